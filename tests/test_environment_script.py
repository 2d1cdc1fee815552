"""tools/environment, with a stand-in for the interpreter that it installs with."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of what the script reads, and a `.venv/bin/python` that only notes its arguments."""
    (tmp_path / "tools").mkdir()
    for name in ("tools/environment", "tools/constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@" >>calls\n')
    python.chmod(0o755)
    return tmp_path


def install(project: Path, **said: str) -> list[str]:
    """What was asked of pip, a line for each call."""
    environment = {key: value for key, value in os.environ.items() if key != "COMPRESSKIT_TORCH_INDEX"}
    environment |= {"PYTHON": sys.executable, **said}
    (project / "calls").write_text("")
    subprocess.run(["tools/environment", "dev"], cwd=project, env=environment, check=True, stdout=subprocess.PIPE)
    return (project / "calls").read_text().splitlines()


def test_torch_comes_from_its_own_index_only_where_one_is_named(project: Path) -> None:
    torch, rest = install(project, COMPRESSKIT_TORCH_INDEX="https://index.invalid/cpu")
    assert "--no-deps --index-url https://index.invalid/cpu torch==" in torch
    assert "--editable .[dev]" in rest
    assert "index.invalid" not in rest
    (project / ".venv" / "installed").unlink()
    assert install(project) == [rest]


def test_a_second_call_installs_nothing(project: Path) -> None:
    assert len(install(project)) == 1
    assert install(project) == []
