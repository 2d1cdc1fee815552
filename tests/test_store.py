import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from compresskit.errors import CompressKitError, RunFailedError
from compresskit.passes import LowRank, PruneWidth
from compresskit.store import LOCK_FILE, MANIFEST, RUN_FILE, Store, chain, opened, refuse_foreign
from tests.small_passes import Halve, Shake

IDENTITY = {"model": "m", "seed": 0, "fingerprint": "f0"}


def write_step(folder: Path) -> None:
    (folder / "student").mkdir()
    (folder / "student" / "model.safetensors").write_bytes(b"0123456789")
    (folder / "record.json").write_text("{}")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    with opened(tmp_path / "out") as store:
        store.claim(IDENTITY)
    return store


def test_a_saved_step_is_found_by_its_fingerprint_alone(store: Store) -> None:
    step = store.save(1, "shake", "a" * 64, write_step)
    assert step.folder.name == "01-shake-aaaaaaaaaaaa"
    assert store.find(1, "shake", "a" * 64) == step
    assert store.find(1, "shake", "b" * 64) is None
    assert store.find(2, "shake", "a" * 64) is None
    listed = json.loads((step.folder / MANIFEST).read_text())["files"]
    assert listed["student/model.safetensors"] == {
        "size_bytes": 10,
        "sha256": "84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882",
    }


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda folder: (folder / "student/model.safetensors").write_bytes(b"01234"), "has 5 bytes instead of 10"),
        (lambda folder: (folder / "student/model.safetensors").write_bytes(b"0123456780"), "sha256 differs"),
        (lambda folder: (folder / "record.json").unlink(), "record.json is missing"),
        (lambda folder: (folder / MANIFEST).unlink(), f"{MANIFEST} is missing"),
        (lambda folder: (folder / MANIFEST).write_text('{"files": {'), f"{MANIFEST} cannot be read"),
        (lambda folder: (folder / MANIFEST).write_text("[]"), f"{MANIFEST} cannot be read"),
        (lambda folder: (folder / MANIFEST).write_bytes(b"\xff"), f"{MANIFEST} cannot be read"),
        (
            lambda folder: (folder / "student/extra.bin").write_bytes(b""),
            "student/extra.bin was not written by the run",
        ),
    ],
)
def test_a_cut_off_or_altered_step_is_one_clear_error(store: Store, harm: object, said: str) -> None:
    store.save(0, "original", "e" * 64, write_step)
    step = store.save(1, "shake", "a" * 64, write_step)
    harm(step.folder)  # type: ignore[operator]
    with pytest.raises(CompressKitError) as caught:
        store.find(1, "shake", "a" * 64)
    assert said in str(caught.value)
    assert f"fix: delete {step.folder} (earlier steps stay usable), or run with --fresh" in str(caught.value)
    assert caught.value.exit_code == 2
    assert store.find(0, "original", "e" * 64) is not None
    shutil.rmtree(step.folder)
    assert store.find(1, "shake", "a" * 64) is None


def test_a_step_that_fails_while_it_is_written_does_not_exist(store: Store) -> None:
    def fail(folder: Path) -> None:
        write_step(folder)
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        store.save(1, "shake", "a" * 64, fail)
    assert store.find(1, "shake", "a" * 64) is None
    with opened(store.folder):
        assert not list(store.steps.iterdir())


def test_what_killed_runs_left_is_removed_or_put_back(store: Store) -> None:
    (store.steps / ".tmp-01-shake-aaaaaaaaaaaa").mkdir(parents=True)
    (store.folder / ".tmp-run.json.17").write_text("{")
    (store.steps / ".tmp-old-02-shake-bbbbbbbbbbbb").mkdir()
    with opened(store.folder):
        assert [path.name for path in store.steps.iterdir()] == ["02-shake-bbbbbbbbbbbb"]
        assert sorted(path.name for path in store.folder.iterdir()) == [LOCK_FILE, RUN_FILE, "steps"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_says_what_is_kept_and_gives_the_bytes_back(store: Store, error: Exception) -> None:
    store.save(1, "shake", "a" * 64, write_step)

    def fill(folder: Path) -> None:
        write_step(folder)
        raise error

    with pytest.raises(RunFailedError) as caught:
        store.save(2, "shake", "b" * 64, fill)
    assert caught.value.exit_code == 1
    assert f"saved in {store.steps}: 01-shake-aaaaaaaaaaaa" in str(caught.value)
    assert "fix: free some space" in str(caught.value)
    assert [path.name for path in store.steps.iterdir()] == ["01-shake-aaaaaaaaaaaa"]


def test_other_operating_system_errors_are_not_called_a_full_disk(store: Store) -> None:
    with pytest.raises(PermissionError), store.explaining_full_disk():
        raise PermissionError(errno.EACCES, "denied")


def test_too_little_space_is_refused_before_work(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(store.folder)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    store.need(999_999)
    with pytest.raises(RunFailedError, match=r"will write about 2 MB, .* has 1 MB free; no step is saved yet"):
        store.need(2_000_000)


def test_another_runs_folder_is_refused_with_what_differs(store: Store) -> None:
    store.claim(IDENTITY)
    with pytest.raises(CompressKitError, match=r"holds another run \(seed 0 there, 1 here\)[\s\S]*--fresh"):
        store.claim({**IDENTITY, "seed": 1, "fingerprint": "f1"})
    with pytest.raises(CompressKitError, match="its model or text has changed since"):
        store.claim({**IDENTITY, "fingerprint": "f2"})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"\xff{}", "cannot be read"),
        (b"{", "cannot be read"),
        (b"[]", "is not of schema 1"),
        (b'{"schema_version": 1, "finished": true}', "'finished' must hold fingerprint, results, files, and is True"),
        (b'{"schema_version": 1, "finished": {"fingerprint": "f"}}', "'finished' must hold"),
    ],
)
def test_a_damaged_run_file_is_one_message(store: Store, text: bytes, said: str) -> None:
    (store.folder / RUN_FILE).write_bytes(text)
    for ask in (lambda: store.claim(IDENTITY), lambda: store.is_finished("f")):
        with pytest.raises(CompressKitError, match=said) as caught:
            ask()
        assert caught.value.exit_code == 2
        assert "--fresh" in str(caught.value.fix)


def test_a_folder_that_is_no_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(CompressKitError, match=r"holds 'thesis.tex' and no run.json"), opened(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(CompressKitError, match="is a file"):
        refuse_foreign(tmp_path / "thesis.tex")
    refuse_foreign(tmp_path / "new")


def test_wipe_deletes_only_what_runs_write(store: Store) -> None:
    store.save(1, "shake", "a" * 64, write_step)
    (store.folder / "onnx").mkdir()
    (store.folder / "notes.txt").write_text("mine")
    store.wipe(["onnx"])
    assert sorted(path.name for path in store.folder.iterdir()) == [LOCK_FILE, "notes.txt"]


def test_a_withdrawn_result_leaves_the_student_and_no_mark_that_it_is_finished(store: Store) -> None:
    for name in ("student", "onnx", "mine"):
        (store.folder / name).mkdir()
    for name in ("report.json", "report.html"):
        (store.folder / name).write_text("{}")
    store.finish("r1", ["student", "onnx", "report.json", "report.html"])
    store.withdraw(["onnx"])
    assert sorted(path.name for path in store.folder.iterdir()) == [LOCK_FILE, "mine", RUN_FILE, "student"]
    assert store.read_run() == {"schema_version": 1, **IDENTITY}


def test_two_runs_cannot_write_one_folder_and_a_dead_ones_lock_is_free(tmp_path: Path) -> None:
    hold = (
        "import sys, time; from pathlib import Path; from compresskit.store import opened\n"
        f"with opened(Path({str(tmp_path / 'out')!r})):\n    print('held', flush=True); time.sleep(60)\n"
    )
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": root}
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with (
            pytest.raises(CompressKitError, match=f"another run \\(process {process.pid}\\) is writing"),
            opened(tmp_path / "out"),
        ):
            pass
        process.kill()
        process.wait()
    with opened(tmp_path / "out") as store:
        assert store.folder.is_dir()


def test_a_result_is_finished_only_while_every_file_is_as_it_was_written(store: Store) -> None:
    (store.folder / "report.json").write_text("{}")
    (store.folder / "student").mkdir()
    (store.folder / "student" / "config.json").write_text("{}")
    assert not store.is_finished("r1")
    store.finish("r1", ["student", "report.json"])
    assert store.is_finished("r1")
    assert not store.is_finished("r2")
    (store.folder / "student" / "config.json").write_text("[]")
    assert not store.is_finished("r1")


def test_fingerprints_chain_kind_version_and_options(monkeypatch: pytest.MonkeyPatch) -> None:
    base = chain("s", [Shake(), Halve(), Shake()])
    assert len(set(base)) == 3
    changed = chain("s", [Shake(), Halve(), Shake(scale=0.02)])
    assert changed[:2] == base[:2]
    assert changed[2] != base[2]
    assert not set(chain("t", [Shake(), Halve(), Shake()])) & set(base)
    assert chain("s", [LowRank(keep=0.5)]) != chain("s", [PruneWidth.model_validate({"keep": 0.5})])
    monkeypatch.setattr(Halve, "version", 2)
    newer = chain("s", [Shake(), Halve(), Shake()])
    assert newer[0] == base[0]
    assert newer[1] != base[1]
