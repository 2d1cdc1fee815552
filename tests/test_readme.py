"""What the README and the shipped recipes say is true: code runs, recipes parse, files exist."""

import re
from pathlib import Path

import pytest

from compresskit.recipe import load_recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def blocks(language: str) -> list[str]:
    found = re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)
    assert found, f"the README has no {language} block"
    return found


def test_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "out" / "student" / "model.safetensors").is_file()
    assert "spearman" in capsys.readouterr().out


def test_recipes_of_the_readme_parse(tmp_path):
    found = []
    for number, text in enumerate(blocks("yaml")):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text, encoding="utf-8")
        found.append([one.kind for one in load_recipe(path).passes])
    assert found == [["low_rank", "prune_width", "distill", "quantize"], ["prune_depth", "distill"]]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_shipped_recipes_parse_and_open_with_purpose_command_and_result(path):
    recipe = load_recipe(path)
    assert recipe.passes
    header = path.read_text(encoding="utf-8").split("\nmodel:")[0]
    for said in ("compresskit run", "Measured", "cores"):
        assert said in header, f"the header does not say {said!r}"


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md", "docs/measurements.md"])
def test_texts_link_to_what_is_there_and_hold_no_placeholder(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not re.findall(r"(?m)^[A-Z]{4,}$|TODO|FIXME|TBD", text)
    linked = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    assert all((ROOT / name).parent.joinpath(path).exists() for path in linked)


def test_there_are_recipes_and_the_files_that_the_readme_names():
    assert RECIPES
    for name in ("tools/quickstart", "tools/test", "tools/recipe_schema.py", "recipes/quickstart.yaml", ".ci/run"):
        assert (ROOT / name).is_file()
