import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from tool_modules import loaded_tool

from compresskit.export import EXPORTERS
from compresskit.passes import PASSES
from compresskit.recipe import load_recipe

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    with loaded_tool("recipe_schema") as module:
        return module.recipe_schema()


@pytest.fixture(scope="module")
def validator(schema: dict[str, Any]) -> jsonschema.Draft202012Validator:
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_shipped_recipe_parses_and_fits_the_schema(path: Path, validator: Any) -> None:
    load_recipe(path)
    validator.validate(yaml.safe_load(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "recipe",
    [
        {"model": "m", "passes": [{"kind": "low_rank", "keep": 0.8, "targets": "*attention*"}]},
        {"model": "m", "passes": [{"kind": "prune_width", "keep": 0.75}]},
        {"model": "m", "passes": [{"kind": "prune_width", "keep": {"ffn": 0.75, "heads": 0.5}}]},
        {"model": "m", "data": {"source": "text", "path": "a.txt"}, "passes": [{"kind": "low_rank", "keep": 0.8}]},
    ],
)
def test_a_right_recipe_fits(recipe: dict[str, Any], validator: Any) -> None:
    validator.validate(recipe)


@pytest.mark.parametrize(
    "recipe",
    [
        {"passes": []},
        {"model": "m", "sed": 1},
        {"model": "m", "task": "sing"},
        {"model": "m", "data": {"sorce": "text"}},
        {"model": "m", "passes": [{"kind": "low_rnk"}]},
        {"model": "m", "passes": [{"keep": 0.5}]},
        {"model": "m", "passes": [{"kind": "low_rank", "keep": 0.5, "tagets": "x"}]},
        {"model": "m", "passes": [{"kind": "low_rank", "keep": 2}]},
    ],
)
def test_a_wrong_recipe_does_not_fit(recipe: dict[str, Any], validator: Any) -> None:
    assert not validator.is_valid(recipe)


def test_the_script_prints_the_schema_when_it_is_called_as_the_readme_says(schema: dict[str, Any]) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    printed = subprocess.run(["tools/recipe_schema.py"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)
    assert json.loads(printed.stdout) == schema


def test_every_registered_kind_is_a_branch_with_a_description(schema: dict[str, Any]) -> None:
    for base, registry in (("Pass", PASSES), ("Exporter", EXPORTERS)):
        names = [branch["$ref"].rpartition("/")[2] for branch in schema["$defs"][base].get("oneOf", ())]
        kinds = {schema["$defs"][name]["properties"]["kind"]["const"] for name in names}
        assert kinds == set(registry)
        assert all(schema["$defs"][name]["description"] for name in names)
