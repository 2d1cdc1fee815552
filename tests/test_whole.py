import errno
import os
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
