"""Files and folders that appear whole or not at all: written beside their place, flushed to the disk, renamed into it;
and lists of files that tell later whether they are still what was written.

What a killed process leaves behind has a name that starts with `SCRATCH`; `clear_scratch` takes it away.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SCRATCH = ".tmp-"
_OLD = f"{SCRATCH}old-"


def write_whole(path: Path, content: bytes) -> None:
    """Put `content` at `path` so that a reader sees all of it or what was there before.

    Raises:
        OSError: a disk that is full or refuses; nothing is left of the attempt.
    """
    scratch = path.with_name(f"{SCRATCH}{path.name}.{os.getpid()}")
    try:
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


@contextmanager
def whole_folder(target: Path, *, replace: bool = True) -> Iterator[Path]:
    """An empty folder beside `target` that takes its place when the block ends well, and vanishes when it does not.

    Args:
        target: need not exist.
        replace: what to do with a folder that is there at the end: replace it, or keep it (another process was first).

    Raises:
        OSError: a disk that is full or refuses; what was at `target` stays.
    """
    scratch = target.with_name(f"{SCRATCH}{target.name}.{os.getpid()}")
    old = target.with_name(f"{_OLD}{target.name}")
    for left_over in _left_over(target):
        shutil.rmtree(left_over, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        if target.is_dir() and not replace:
            return
        _flush_tree(scratch)
        if target.is_dir():
            target.rename(old)
        scratch.replace(target)
        _flush_folder(target.parent)
    finally:
        if old.is_dir() and not target.exists():
            old.rename(target)
        for left_over in (scratch, old):
            shutil.rmtree(left_over, ignore_errors=True)


def _left_over(target: Path) -> list[Path]:
    """Scratch folders for `target` whose process is gone."""
    found = target.parent.glob(f"{SCRATCH}{target.name}.*")
    return [path for path in found if not _is_alive(path.name.rpartition(".")[2])]


def _is_alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:  # somebody else's
        return True
    return int(process) != os.getpid()


def clear_scratch(folder: Path) -> None:
    """Remove what killed processes left half-written in `folder`, and put back what one had moved aside."""
    for path in folder.glob(f"{_OLD}*"):
        target = folder / path.name.removeprefix(_OLD)
        if not target.exists():
            path.rename(target)
    for path in folder.glob(f"{SCRATCH}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _flush_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            _flush_folder(path)
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def list_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Name (relative, with /) -> size in bytes and sha256, of every file under `folder`."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            sha = hashlib.file_digest(file, "sha256").hexdigest()
        found[path.relative_to(folder).as_posix()] = {"size_bytes": path.stat().st_size, "sha256": sha}
    return found


def difference(folder: Path, listed: Mapping[str, dict[str, Any]], *, besides: str) -> str | None:
    """The first file that is not as `listed` (the file `besides` apart), and how it differs; None where all are."""
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {besides}
    for name, facts in listed.items():
        if name not in present:
            return f"{name} is missing"
        size = (folder / name).stat().st_size
        if size != facts["size_bytes"]:
            return f"{name} has {size} bytes instead of {facts['size_bytes']}"
        with (folder / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
                return f"the contents of {name} are not what was written (sha256 differs)"
    extra = sorted(present - set(listed))
    return f"{extra[0]} was not written by the run" if extra else None
