"""What a class of options says about itself: its keys, what each may hold, and the comment that stands above each.

The messages about a wrong recipe, `compresskit passes NAME` and the editors' JSON Schema all read from here.
"""

import inspect
import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from compresskit.config import Registry

Branch = Registry[Any] | type[BaseModel]
_FIELD = re.compile(r"^    (\w+)\s*:")


def registry_in(metadata: Iterable[Any]) -> Registry[Any] | None:
    """The registry whose `parse` stands among an annotation's validators."""
    for item in metadata:
        if isinstance(item, BeforeValidator) and inspect.ismethod(item.func):
            owner = item.func.__self__
            if isinstance(owner, Registry):
                return owner
    return None


def branches(annotation: Any, metadata: Iterable[Any] = ()) -> Iterator[Branch]:
    """Everything with keys that a value of this type may be: registries and classes of options, at any depth."""
    registry = registry_in(metadata)
    if registry is not None:
        yield registry
    elif get_origin(annotation) is Annotated:
        inner, *notes = get_args(annotation)
        yield from branches(inner, notes)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    else:
        for part in get_args(annotation):
            yield from branches(part)


def classes_at(root: type[BaseModel], path: Iterable[str | int], value: Any) -> list[type[BaseModel]]:
    """The classes of options that may stand at `path` inside `value`, which is read as `root`."""
    here: list[Branch] = [root]
    keyed = False  # whether a key comes next that is the user's own
    for part in path:
        if isinstance(part, str) and not keyed:
            fields = [cls.model_fields[part] for cls in _classes(here, value) if part in cls.model_fields]
            here = [branch for field in fields for branch in branches(field.annotation, field.metadata)]
            keyed = any(get_origin(field.annotation) is dict for field in fields)
        elif isinstance(part, str):
            keyed = False
        value = _inside(value, part)
    return _classes(here, value)


def example_at(root: type[BaseModel], path: tuple[str | int, ...], value: Any) -> Any:
    """What the field at `path` gives as an example of its values (`Field(examples=…)`), or None.

    Of a value under a key of the user's own, what the mapping's example holds.
    """
    for cls in classes_at(root, path[:-1], value):
        if path[-1] in cls.model_fields:
            return next(iter(cls.model_fields[str(path[-1])].examples or ()), None)
    above = example_at(root, path[:-1], value) if len(path) > 1 and isinstance(path[-1], str) else None
    return next(iter(above.values())) if isinstance(above, dict) else None


def _classes(found: list[Branch], value: Any) -> list[type[BaseModel]]:
    kind = str(value.get("kind")) if isinstance(value, dict) else ""
    chosen = [branch[kind] for branch in found if isinstance(branch, Registry) and kind in branch]
    return chosen + [cls for cls in found if isinstance(cls, type)]


def _inside(value: Any, part: str | int) -> Any:
    if isinstance(value, dict):
        return value.get(part)
    if isinstance(value, list | tuple) and isinstance(part, int) and part < len(value):
        return value[part]
    return None


def notes(cls: type[BaseModel]) -> dict[str, str]:
    """What each field means: its `Field(description=…)`, else the `#:` comment above it in the source."""
    found: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if issubclass(owner, BaseModel) and owner is not BaseModel:
            found |= _comments(inspect.getsource(owner))
    described = {name: field.description for name, field in cls.model_fields.items() if field.description}
    return {name: text for name, text in (found | described).items() if name in cls.model_fields}


def _comments(source: str) -> dict[str, str]:
    found: dict[str, str] = {}
    pending: list[str] = []
    for line in source.splitlines():
        comment = line.strip()
        match = _FIELD.match(line)
        if comment.startswith("#:"):
            pending.append(comment.removeprefix("#:").strip())
        else:
            if match and pending:
                found[match[1]] = " ".join(pending)
            pending = []
    return found


def describe_type(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """The type of a field in a reader's words: `number`, `'each' | 'ends'`, `list of loss`."""
    registry = registry_in(metadata)
    origin, parts = get_origin(annotation), get_args(annotation)
    if registry is not None:
        return registry.noun
    if origin is Annotated:
        return describe_type(parts[0], parts[1:])
    if origin is Literal:
        return " | ".join(repr(part) for part in parts)
    if origin in (tuple, list, frozenset, set):
        return f"list of {describe_type(parts[0])}"
    if origin is Union or type(annotation).__name__ == "UnionType":
        return " | ".join(describe_type(part) for part in parts if part is not type(None))
    plain = {int: "whole number", float: "number", bool: "true | false", str: "text", dict: "mapping"}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "{" + ", ".join(annotation.model_fields) + "}"
    return plain.get(origin or annotation, str(annotation))


def describe_default(field: FieldInfo) -> str:
    """The default of a field as YAML would say it; `required` where there is none."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_defaults=True) or "all defaults"
    words = {None: "-", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)
