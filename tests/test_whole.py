import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from compresskit.cache import cache_folder, writing_to_cache
from compresskit.errors import RunFailedError
from compresskit.whole import SCRATCH, clear_scratch, whole_folder, write_whole


def full_disk(*_args: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", b"first")
    write_whole(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"second"
    assert names(tmp_path) == ["a"]


def test_a_disk_that_refuses_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "a", b"first")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first"
    assert names(tmp_path) == ["a"]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    for content in ("first", "second"):
        with whole_folder(tmp_path / "f") as scratch:
            (scratch / content).write_text(content)
    assert names(tmp_path / "f") == ["second"]
    assert names(tmp_path) == ["f"]


@pytest.mark.parametrize("fails", ["inside", "while flushing", "while renaming"])
def test_a_folder_that_cannot_be_finished_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    def attempt() -> None:
        with whole_folder(tmp_path / "f") as scratch:
            (scratch / "second").touch()
            if fails == "inside":
                full_disk()
            monkeypatch.setattr(*((os, "fsync") if fails == "while flushing" else (Path, "replace")), full_disk)

    with whole_folder(tmp_path / "f") as scratch:
        (scratch / "first").touch()
    with pytest.raises(OSError, match="No space left"):
        attempt()
    assert names(tmp_path / "f") == ["first"]
    assert names(tmp_path) == ["f"]


def test_of_two_processes_that_make_the_same_folder_each_sees_its_own_files(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from compresskit.whole import whole_folder
with whole_folder(Path(sys.argv[1]), replace=False) as scratch:
    (scratch / "first").write_text(sys.argv[2])
    print("begun", flush=True)
    sys.stdin.readline()
    (scratch / "second").write_text(sys.argv[2])
"""
    command = [sys.executable, "-c", script, str(tmp_path / "f")]
    writers = [
        subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for name in "ab"
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "begun\n"
    for writer in writers:
        writer.communicate("\n", timeout=60)
        assert writer.returncode == 0
    assert [(tmp_path / "f" / name).read_text() for name in ("first", "second")] == ["a", "a"]
    assert names(tmp_path) == ["f"]


def test_scratch_of_a_dead_process_goes_with_the_next_writer(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / f"{SCRATCH}f.{gone.pid}").mkdir()
    with whole_folder(tmp_path / "f"):
        pass
    assert names(tmp_path) == ["f"]


def test_what_a_killed_process_left_is_removed_or_put_back(tmp_path: Path) -> None:
    (tmp_path / f"{SCRATCH}half").mkdir()
    (tmp_path / f"{SCRATCH}run.json.17").touch()
    (tmp_path / f"{SCRATCH}old-kept").mkdir()
    clear_scratch(tmp_path)
    assert names(tmp_path) == ["kept"]


def test_a_cache_that_cannot_be_written_says_where_and_what_to_set() -> None:
    with pytest.raises(RunFailedError) as caught, writing_to_cache(cache_folder() / "texts" / "a.json"):
        full_disk()
    assert str(caught.value) == (
        f"cache: cannot write {cache_folder() / 'texts' / 'a.json'}: No space left on device\n"
        "  fix: make room, or set COMPRESSKIT_CACHE to a folder on another disk"
    )
