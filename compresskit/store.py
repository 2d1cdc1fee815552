"""The folder of a run: steps that exist whole or not at all, found again by fingerprint.

    DIR/run.json                           which run this is: model, text, seed; and, at the end, that it is finished
    DIR/steps/NN-kind-fingerprint/         record.json, student/, MANIFEST.json (size and sha256 of each file)
    DIR/student/  DIR/onnx/  DIR/report.*  the result

A fingerprint is a sha256 chain: model, task, text and seed first, then each pass's kind, version and options. Changing
one pass changes its own step and those after it, and leaves those before it. What is written goes to a temporary
sibling, is flushed to the disk and then renamed.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from compresskit.errors import CompressKitError, RunFailedError
from compresskit.passes import Pass
from compresskit.whole import SCRATCH, clear_scratch, difference, list_files, whole_folder, write_whole

SCHEMA = 1
MANIFEST = "MANIFEST.json"
RUN_FILE = "run.json"
LOCK_FILE = ".lock"
FAILURE_LOG = "failure.log"
_REPORTS = ("report.json", "report.html")
#: what run.json says of a finished run
_FINISHED = ("fingerprint", "results", "files")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NO_SPACE_WORDS = ("No space left on device", "Disk quota exceeded")


def digest(value: Any) -> str:
    """sha256 of the canonical JSON of `value`."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def chain(start: str, passes: Sequence[Pass], read: Sequence[Sequence[str]] | None = None) -> list[str]:
    """The fingerprint after each pass, over that of its predecessor; `start` itself is not among them.

    Args:
        start: what the first pass builds on.
        passes: in order.
        read: for each pass, the fingerprints of the models and texts that it reads besides the original and its own.
    """
    prints: list[str] = []
    for one, models in zip(passes, read or [()] * len(passes), strict=True):
        start = digest([start, one.kind, one.version, one.deciding_options(), *models])
        prints.append(start)
    return prints


@dataclass(frozen=True)
class Step:
    """A finished step on the disk."""

    folder: Path

    @property
    def student(self) -> Path:
        """The checkpoint."""
        return self.folder / "student"

    def read(self, name: str) -> Any:
        """The JSON file `name`."""
        return json.loads((self.folder / name).read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that `path` holds all of it or what it held before."""
    write_whole(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def refuse_foreign(folder: Path) -> None:
    """Refuse a path that is a file, or a folder with something in it that is no run of ours.

    Raises:
        CompressKitError: with the way out.
    """
    if folder.exists() and not folder.is_dir():
        raise CompressKitError(f"{folder} is a file", where="--output", fix="name a folder")
    if not folder.is_dir() or (folder / RUN_FILE).is_file():
        return
    others = sorted(p.name for p in folder.iterdir() if p.name != LOCK_FILE and not p.name.startswith(SCRATCH))
    if others:
        raise CompressKitError(
            f"{folder} holds {others[0]!r} and no {RUN_FILE}: it is not the output of a run",
            where="--output",
            fix="name a new or empty folder (--fresh deletes only what compresskit wrote)",
        )


class Store:
    """The output folder of one run. Open it with `opened`, which holds the lock."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.steps = folder, folder / "steps"

    def claim(self, identity: dict[str, Any]) -> None:
        """Make this the folder of the run that `identity` describes, or go on with that run.

        Args:
            identity: what the user said (`model`, `task`, …) and the `fingerprint` of it all.

        Raises:
            CompressKitError: the folder holds another run, or a run.json that cannot be read.
        """
        path = self.folder / RUN_FILE
        if not path.is_file():
            write_json(path, {"schema_version": SCHEMA, **identity})
            return
        known = self.read_run()
        if known.get("fingerprint") == identity["fingerprint"]:
            return
        differing = [key for key in identity if key != "fingerprint" and known.get(key) != identity[key]]
        said = [key for key in differing if key != "source"]  # a digest tells a reader nothing
        told = ", ".join(f"{key} {known.get(key)!r} there, {identity[key]!r} here" for key in said)
        raise CompressKitError(
            f"{self.folder} holds another run ({told or 'its model or text has changed since'})",
            where="--output",
            fix="name another folder, or add --fresh to delete that run",
        )

    def read_run(self) -> dict[str, Any]:
        """What run.json says."""
        path = self.folder / RUN_FILE
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:  # not JSON, or not text
            what = f"cannot be read ({error})"
            raise CompressKitError(what, where=str(path), fix="add --fresh to delete that run") from error
        fix = "name another folder, or add --fresh to delete that run"
        if not isinstance(known, dict) or known.get("schema_version") != SCHEMA:
            what = f"is not of schema {SCHEMA}, which this compresskit reads"
            raise CompressKitError(what, where=str(path), fix=fix)
        finished = known.get("finished")
        if "finished" in known and not (isinstance(finished, dict) and finished.keys() >= set(_FINISHED)):
            what = f"'finished' must hold {', '.join(_FINISHED)}, and is {finished!r}"
            raise CompressKitError(what, where=str(path), fix=fix)
        return known

    def wipe(self, exports: Sequence[str]) -> None:
        """Delete what runs write (`exports` are the exporters' folders) and nothing else."""
        for name in ("steps", "student", *exports):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for name in (*_REPORTS, FAILURE_LOG, RUN_FILE):
            (self.folder / name).unlink(missing_ok=True)

    def withdraw(self, exports: Sequence[str]) -> None:
        """Take back the former result, but for student/, which `replace` replaces: a kill leaves no mixture of two.

        The mark that it is finished goes first, so that the next run makes all of it again.
        """
        write_json(self.folder / RUN_FILE, {k: v for k, v in self.read_run().items() if k != "finished"})
        for name in _REPORTS:
            (self.folder / name).unlink(missing_ok=True)
        for name in exports:
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def clean(self) -> None:
        """Remove what killed runs left half-written, and put back what one had moved aside."""
        for folder in (self.folder, self.steps):
            clear_scratch(folder)

    def find(self, index: int, kind: str, fingerprint: str) -> Step | None:
        """The step, after every file of it was compared with its manifest; None where it is not there.

        Raises:
            CompressKitError: the folder was cut off or altered.
        """
        folder = self._path(index, kind, fingerprint)
        if not folder.is_dir():
            return None
        try:
            listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            wrong = (
                difference(folder, listed["files"], besides=MANIFEST)
                if listed["fingerprint"] == fingerprint
                else "another step's files"
            )
        except FileNotFoundError as error:
            wrong = f"{Path(str(error.filename)).name} is missing"
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            wrong = f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"
        if wrong:
            fix = f"delete {folder} (earlier steps stay usable), or run with --fresh"
            raise CompressKitError(f"was altered or cut off: {wrong}", where=str(folder), fix=fix)
        return Step(folder)

    def save(self, index: int, kind: str, fingerprint: str, write: Callable[[Path], None]) -> Step:
        """Keep a step: `write` fills an empty folder, which then appears under its name whole.

        Raises:
            RunFailedError: no disk space; what was there before stays.
        """
        target = self._path(index, kind, fingerprint)

        def complete(folder: Path) -> None:
            write(folder)
            write_json(folder / MANIFEST, {"fingerprint": fingerprint, "files": list_files(folder)})

        self.replace(target, complete)
        return Step(target)

    def replace(self, target: Path, write: Callable[[Path], None]) -> None:
        """Put what `write` makes in an empty folder at `target`, in the place of what was there.

        Raises:
            RunFailedError: no disk space; what was there before stays.
        """
        with self.explaining_full_disk(), whole_folder(target) as scratch:
            write(scratch)

    @contextmanager
    def explaining_full_disk(self) -> Iterator[None]:
        """Turn a full disk into a RunFailedError that says what is kept, and give back the half-written bytes."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            full = isinstance(error, OSError) and error.errno in _NO_SPACE
            if not full and not any(words in str(error) for words in _NO_SPACE_WORDS):
                raise
            self.clean()
            raise RunFailedError(
                f"no space left on the disk of {self.folder}; {self.kept()}",
                fix="free some space and give the same command again",
            ) from error

    def need(self, bytes_to_come: int) -> None:
        """Refuse to start where the disk cannot hold what will be written.

        Raises:
            RunFailedError: too little space.
        """
        free = shutil.disk_usage(self.folder).free
        if free < bytes_to_come:
            raise RunFailedError(
                f"the run will write about {bytes_to_come / 1e6:,.0f} MB, {self.folder} has {free / 1e6:,.0f} MB free; "
                f"{self.kept()}",
                fix="free some space, or name an --output on another disk",
            )

    def kept(self) -> str:
        """Which steps are safe, in words."""
        names = sorted(path.name for path in self.steps.glob("[0-9]*")) if self.steps.is_dir() else []
        return f"saved in {self.steps}: {', '.join(names)}" if names else "no step is saved yet"

    def finish(self, fingerprint: str, results: Sequence[str]) -> None:
        """Note in run.json that the result with this fingerprint is complete, with the manifest of its files."""
        values = (fingerprint, list(results), self._results(results))
        write_json(self.folder / RUN_FILE, self.read_run() | {"finished": dict(zip(_FINISHED, values, strict=True))})

    def is_finished(self, fingerprint: str) -> bool:
        """Whether exactly this result is here, with every file as it was written."""
        return self._claims_finished(fingerprint) and self.altered(fingerprint) is None

    def holds_other_result(self, fingerprint: str) -> bool:
        """Whether a finished result of other passes or exports is here."""
        return bool(self.read_run().get("finished")) and not self._claims_finished(fingerprint)

    def altered(self, fingerprint: str) -> str | None:
        """The first file of this finished result that is missing or not as it was written; None where there is none."""
        if not self._claims_finished(fingerprint):
            return None
        finished = self.read_run()["finished"]
        missing = [name for name in finished["results"] if not (self.folder / name).exists()]
        if missing:
            return missing[0]
        present, written = self._results(finished["results"]), finished["files"]
        return next((name for name in sorted(present | written) if present.get(name) != written.get(name)), None)

    def _claims_finished(self, fingerprint: str) -> bool:
        finished = self.read_run().get("finished")
        return bool(finished) and finished.get("fingerprint") == fingerprint

    def _results(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for name in names:
            path = self.folder / name
            inside = list_files(path) if path.is_dir() else {}
            found |= {f"{name}/{inner}": facts for inner, facts in inside.items()}
            if path.is_file():
                with path.open("rb") as file:
                    sha = hashlib.file_digest(file, "sha256").hexdigest()
                found[name] = {"size_bytes": path.stat().st_size, "sha256": sha}
        return found

    def _path(self, index: int, kind: str, fingerprint: str) -> Path:
        return self.steps / f"{index:02d}-{kind}-{fingerprint[:12]}"


@contextmanager
def opened(folder: Path) -> Iterator[Store]:
    """The store of `folder` while this process alone writes to it; left-overs of killed runs are gone.

    The lock belongs to the process, so that of a dead one is free.

    Raises:
        CompressKitError: another process is writing there, or the folder cannot be made.
    """
    refuse_foreign(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK_FILE).open("a+", encoding="utf-8")
    except OSError as error:
        raise CompressKitError(
            f"cannot write to {folder}: {error.strerror}", where="--output", fix="name another folder"
        ) from error
    with lock:
        _lock(lock, folder)
        store = Store(folder)
        store.clean()
        yield store


def _lock(lock: IO[str], folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        what = f"another run (process {holder}) is writing to {folder}"
        raise CompressKitError(what, where="--output", fix="wait for it, or name another folder") from error
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
