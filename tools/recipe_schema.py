#!/usr/bin/env python3
"""Print the JSON Schema (draft 2020-12) of recipes, for editors: completion, descriptions, and errors while typing.

    .venv/bin/python tools/recipe_schema.py > recipe.schema.json
    # first line of a recipe:  # yaml-language-server: $schema=recipe.schema.json

Built from the registries: each pass, loss and exporter is one branch, chosen by its `kind`.
"""

import json
import sys
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from compresskit.config import Registry
from compresskit.options import branches, notes
from compresskit.recipe import Recipe

DRAFT = "https://json-schema.org/draft/2020-12/schema"
_REFERENCE = "#/$defs/{model}"


def recipe_schema() -> dict[str, Any]:
    """The schema; `$defs` holds one entry per class of options, and one per registry that lists its kinds."""
    registries: dict[str, Registry[Any]] = {}
    classes: dict[str, type[BaseModel]] = {}
    _collect(Recipe, classes, registries)
    pairs = [(cls, "validation") for cls in classes.values()]
    _, schema = models_json_schema(pairs, ref_template=_REFERENCE)  # pyright: ignore[reportArgumentType]
    definitions: dict[str, Any] = schema["$defs"]
    for name, cls in classes.items():
        _describe(definitions[name], cls)
    for base, registry in registries.items():
        kinds = [{"$ref": _REFERENCE.format(model=registry[kind].__name__)} for kind in registry]
        for kind in registry:
            _require_kind(definitions[registry[kind].__name__])
        definitions[base] = {"description": f"one {registry.noun}", "oneOf": kinds} if kinds else {"not": {}}
    return {
        "$schema": DRAFT,
        "title": "compresskit recipe",
        "$ref": _REFERENCE.format(model="Recipe"),
        "$defs": definitions,
    }


def _collect(cls: type[BaseModel], classes: dict[str, type[BaseModel]], registries: dict[str, Registry[Any]]) -> None:
    """Every class of options that `cls` can hold, and the registries by the name of their base class."""
    if cls.__name__ in classes:
        return
    classes[cls.__name__] = cls
    for field in cls.model_fields.values():
        for branch in branches(field.annotation, field.metadata):
            if isinstance(branch, Registry):
                registries[_base_name(field.annotation)] = branch
            for inner in [branch[kind] for kind in branch] if isinstance(branch, Registry) else [branch]:
                _collect(inner, classes, registries)


def _base_name(annotation: Any) -> str:
    """The class that stands for a registry in an annotation, such as Pass in `tuple[AnyPass, ...]`."""
    bare = next(found for found in _bare_classes(annotation) if found is not BaseModel)
    return bare.__name__


def _bare_classes(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    parts = getattr(annotation, "__args__", ()) or ()
    return [found for part in parts for found in _bare_classes(part)]


def _describe(definition: dict[str, Any], cls: type[BaseModel]) -> None:
    for name, text in notes(cls).items():
        definition["properties"][name]["description"] = text


def _require_kind(definition: dict[str, Any]) -> None:
    definition["required"] = sorted({"kind", *definition.get("required", [])})


if __name__ == "__main__":
    json.dump(recipe_schema(), sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")
