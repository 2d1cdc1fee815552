"""Pydantic's complaints about a recipe, as a user can act on them: place, fact, fix.

A validator of ours says its fix after the last semicolon: `ValueError("100 is not a multiple of 16; use 32 or 64")`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from compresskit.config import did_you_mean
from compresskit.errors import CompressKitError
from compresskit.options import classes_at, example_at, notes
from compresskit.recipe_text import Path

_NOUNS = {
    "int": ("a whole number", "12"),
    "float": ("a number", "0.5"),
    "bool": ("true or false", "true"),
    "string": ("text", "some-text"),
    "tuple": ("a list", "[…]"),
    "list": ("a list", "[…]"),
    "frozen_set": ("a list", "[…]"),
    "model": ("a mapping", "{key: value}"),
    "dict": ("a mapping", "{key: value}"),
    "finite": ("a finite number", "0.5"),
    "none": ("nothing", "null"),
}
_BOUNDS = {
    "greater_than": ("not above", "gt", "above"),
    "greater_than_equal": ("below", "ge", "of at least"),
    "less_than": ("not below", "lt", "below"),
    "less_than_equal": ("above", "le", "of at most"),
}


@dataclass(frozen=True)
class _Complaint:
    path: Path
    gives_way: bool  # to a complaint from deeper inside the same value
    noun: str | None
    what: str
    fix: str | None


def explain(
    error: ValidationError, root: type[BaseModel], value: Any, where: Callable[[Path], str]
) -> list[CompressKitError]:
    """One CompressKitError per place of `value`, in the order of the text.

    Args:
        error: from validating `value` as `root`.
        root: the class that was validated.
        value: the plain data.
        where: the text to print for a path.
    """
    complaints = [_translate(dict(detail), root, value) for detail in error.errors(include_url=False)]
    by_path: dict[Path, list[_Complaint]] = {}
    for one in complaints:
        deeper = any(len(o.path) > len(one.path) and o.path[: len(one.path)] == one.path for o in complaints)
        if not (one.gives_way and deeper):
            by_path.setdefault(one.path, []).append(one)
    return [_join(group, value, where(path)) for path, group in by_path.items()]


def _join(group: list[_Complaint], value: Any, where: str) -> CompressKitError:
    """The branches of a union at one place, as one mistake."""
    first = group[0]
    nouns = list(dict.fromkeys(one.noun for one in group if one.noun))
    if len(nouns) == len(group) > 1:
        given = repr(_at(value, first.path))
        return CompressKitError(f"expected {' or '.join(nouns)}, got {given}", where=where, fix=first.fix)
    whats = list(dict.fromkeys(one.what for one in group))
    fixes = list(dict.fromkeys(one.fix for one in group if one.fix))
    return CompressKitError("; or ".join(whats), where=where, fix=" or ".join(fixes) or None)


def _translate(detail: dict[str, Any], root: type[BaseModel], value: Any) -> _Complaint:
    kind, context = detail["type"], detail.get("ctx") or {}
    path, in_branch = _real_path(detail["loc"], value, missing=kind == "missing")
    # As it was written: pydantic's "input" may be what a validator made of it.
    given = _at(value, path) if _reachable(value, path) else detail["input"]
    noun: str | None = None
    if kind == "extra_forbidden":
        what, fix = "unknown key", _known_keys(root, path, value)
    elif kind == "missing":
        what, fix = "missing", f"add '{path[-1]}: …'{_note(root, path, value)}"
    elif kind in _BOUNDS:
        relation, bound, words = _BOUNDS[kind]
        what, fix = f"{given!r} is {relation} {context[bound]}", f"use a value {words} {context[bound]}"
    elif kind in ("literal_error", "enum"):
        what, fix = f"{given!r} is not one of {context['expected']}", _choice(given, context["expected"])
    elif kind in ("value_error", "assertion_error"):
        what, _, fix = str(context["error"]).rpartition("; ")
        what, fix = (what, fix) if what else (fix, None)
    elif kind == "too_short":
        least = context["min_length"]
        what, fix = f"has {context['actual_length']} entries", f"give {least} or more"
    elif _noun(kind) is not None:
        noun, example = _noun(kind) or ("", "")
        what, fix = (
            f"expected {noun}, got {_show(given)}",
            f"write {noun}, such as {_entry(root, path, value, example)}",
        )
    else:
        what, fix = detail["msg"][:1].lower() + detail["msg"][1:], None
    # A list of which one entry is wrong is also said to be too short.
    return _Complaint(path, in_branch or kind == "too_short", noun, what, fix or _fallback(root, path, value))


def _noun(kind: str) -> tuple[str, str] | None:
    if kind in ("int_from_float", "finite_number"):
        return _NOUNS["finite" if kind == "finite_number" else "int"]
    stem = kind.removesuffix("_type").removesuffix("_parsing").removesuffix("_attributes").removesuffix("_required")
    return _NOUNS.get(stem)


def _entry(root: type[BaseModel], path: Path, value: Any, usual: str) -> str:
    """`key: value` as YAML, by the example of the field at `path`, or else with the `usual` value of its type."""
    if not path:
        return f"key: {usual}"
    if isinstance(path[-1], int):
        return f"- {usual}"
    example = example_at(root, path, value)
    if example is None:
        return f"{path[-1]}: {usual}"
    return yaml.safe_dump({path[-1]: example}, default_flow_style=True, width=120).strip()[1:-1]


def _show(given: Any) -> str:
    text = "nothing" if given is None else repr(given)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _choice(given: Any, expected: str) -> str:
    written = [word.strip() for word in expected.replace(" or ", ", ").split(",")]
    if isinstance(given, str) and given in written:
        return f"write {given} without quotes"
    words = [word.strip("'\"") for word in written]
    near = did_you_mean(str(given), words)
    return f"did you mean {written[words.index(near)]}?" if near else f"use {expected}"


def _real_path(loc: Path, value: Any, *, missing: bool) -> tuple[Path, bool]:
    """`loc` without the names of union branches, and whether it ended in one."""
    path: list[str | int] = []
    in_branch = False
    for depth, part in enumerate(loc):
        last = depth == len(loc) - 1
        inside = _reachable(value, (part,))
        in_branch = not inside and not (last and missing)
        if inside:
            value = value[part]
        if not in_branch:
            path.append(part)
    return tuple(path), in_branch


def _at(value: Any, path: Path) -> Any:
    """What stands at `path`, which exists."""
    for part in path:
        value = value[part]
    return value


def _known_keys(root: type[BaseModel], path: Path, value: Any) -> str:
    known = {name for cls in classes_at(root, path[:-1], value) for name in cls.model_fields}
    near = did_you_mean(str(path[-1]), known)
    return f"did you mean {near!r}?" if near else f"the keys here are: {', '.join(sorted(known)) or 'none'}"


def _note(root: type[BaseModel], path: Path, value: Any) -> str:
    for cls in classes_at(root, path[:-1], value):
        text = notes(cls).get(str(path[-1]))
        if text:
            return f" ({text})"
    return ""


def _fallback(root: type[BaseModel], path: Path, value: Any) -> str:
    kinds = [entry.get("kind") for entry in (_inner(value, path[:end]) for end in range(len(path) + 1)) if entry]
    kind = next((str(word) for word in kinds if word), None)
    listing = f"`compresskit passes {kind}` lists its options" if kind and path[0] == "passes" else None
    return listing or f"see the description of {root.__name__.lower()}s in README.md"


def _inner(value: Any, path: Path) -> Any:
    found = _at(value, path) if _reachable(value, path) else None
    return found if isinstance(found, Mapping) else None


def _reachable(value: Any, path: Path) -> bool:
    try:
        _at(value, path)
    except (KeyError, IndexError, TypeError):
        return False
    return True
