import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def test_the_wheel_ships_the_command_into_optimums_namespace() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert packages["packages"] == ["compresskit", "optimum"]
    files = [path.relative_to(ROOT).as_posix() for path in (ROOT / "optimum").rglob("*.py")]
    # any __init__.py would hide optimum's own
    assert files == ["optimum/commands/register/register_compresskit.py"]


@pytest.fixture
def optimum_cli(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call `optimum-cli` in this process; the exit status."""
    cli = pytest.importorskip("optimum.commands.optimum_cli")

    def call(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["optimum-cli", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0)

    return call


def test_optimum_runs_a_recipe(
    optimum_cli: Any, tiny_bert_folder: Path, tiny_text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = "calibration: 8, training: 8, evaluation: 8, max_length: 16"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tiny_bert_folder}\ndata: {{source: text, path: {tiny_text_file}, {sizes}}}\nevaluate: never\n"
        "passes:\n  - {kind: prune_width, keep: {ffn: 0.5}}\n"
    )
    output = tmp_path / "out"
    assert optimum_cli("compress", recipe, "--output", output, "--set", "passes.0.keep.ffn=0.75", "--fresh") == 0
    assert (output / "student" / "model.safetensors").is_file()
    assert '"ffn": 0.75' in (output / "report.json").read_text()
    assert "prune_width" in capsys.readouterr().out


def test_mistakes_are_told_as_compresskit_tells_them(
    optimum_cli: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert optimum_cli("compress", tmp_path / "none.yaml", "--output", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "none.yaml" in said
    assert "Traceback" not in said
