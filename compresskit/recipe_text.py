"""YAML as recipes use it: plain values, the line of each, and `--set` on top.

YAML 1.2 words (`on`, `yes` and `1:30` are text, `3e-4` is a number); a key said twice, tags and aliases are mistakes.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import yaml
from yaml.composer import ComposerError

from compresskit.errors import CompressKitError

Path = tuple[str | int, ...]
_MAX_DIGITS = 40
#: One part of a place that an error names: `passes[1] (quantize)`, `keep.ffn`, `losses[0]`.
_NAMED = re.compile(r"([a-z_]\w*(?:\[\d+\])?(?:\.[a-z_]\w*(?:\[\d+\])?)*)(?: \(\w+\))?")


class _Loader(yaml.SafeLoader):
    """Composes nodes with the resolvers of YAML 1.2's core schema; PyYAML's own are those of 1.1."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # pyright: ignore[reportIncompatibleVariableOverride]

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise ComposerError(None, None, f"'*{event.anchor}' is an alias", event.start_mark)
        return super().compose_node(parent, index)


def _boolean(text: str) -> bool:
    return text.lower() == "true"


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:  # Python itself refuses thousands of decimal digits, and prints no hexadecimal ones
        raise ValueError(f"a whole number of more than {_MAX_DIGITS} digits")
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


def _null(text: str) -> None:
    del text


def _float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


_SCALARS: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    "tag:yaml.org,2002:null": (r"^(~|null|Null|NULL|)$", "~nN\0", _null),
    "tag:yaml.org,2002:bool": (r"^(true|True|TRUE|false|False|FALSE)$", "tTfF", _boolean),
    "tag:yaml.org,2002:int": (r"^([-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", "-+0123456789", _integer),
    "tag:yaml.org,2002:float": (
        r"^([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$",
        "-+.0123456789",
        _float,
    ),
}
_TEXT = "tag:yaml.org,2002:str"
for _tag, (_pattern, _first, _) in _SCALARS.items():
    _letters = ["" if letter == "\0" else letter for letter in _first]
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), _letters)


def write_path(path: Path) -> str:
    """`("passes", 1, "keep")` as `passes[1].keep`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


@dataclass
class RecipeText:
    """Values, where each was said, and the mistakes of the text itself.

    Attributes:
        name: the file, as the user named it.
        value: the whole document.
        origins: path -> `file:line`, or the `--set` that said it.
    """

    name: str
    value: Any = None
    origins: dict[Path, str] = field(default_factory=dict)
    mistakes: list[CompressKitError] = field(default_factory=list)

    def where(self, path: Path) -> str:
        """The place to print for `path`: the nearest thing that was said, then the path."""
        known = next((path[:end] for end in range(len(path), 0, -1) if path[:end] in self.origins), ())
        origin = self.origins.get(known, f"{self.name}:1")
        if origin.startswith("--set") and known == path:
            return origin
        return f"{origin}: {write_path(path)}" if path else origin

    def line_of(self, place: str) -> str | None:
        """Where the nearest thing was said that `place` names, as errors that a model shows write it.

        `passes[1] (distill): losses[0] (hidden): hidden.layers` is found by what of it are keys and entries here. None
        where it does not begin with a key of the recipe: a file, a module.
        """
        path: Path = ()
        for named in place.split(": "):
            found = _NAMED.fullmatch(named)
            if found is None:
                break
            for part in re.split(r"\W+", found[1].rstrip("]")):
                below = (*path, int(part) if part.isdigit() else part)
                if below in self.origins:
                    path = below
                elif not path:
                    return None
        return self.origins[path] if path else None


def parse_yaml(text: str, name: str) -> RecipeText:
    """The document and all mistakes of its form; nothing is raised for the user's text."""
    result = RecipeText(name)
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        result.mistakes.append(_syntax_error(error, name))
        return result
    if node is not None:
        result.value = _value(node, (), result)
    return result


def _syntax_error(error: yaml.YAMLError, name: str) -> CompressKitError:
    if not isinstance(error, yaml.MarkedYAMLError):  # a character that YAML does not allow
        return CompressKitError(str(error).splitlines()[0], where=name, fix="save the file as UTF-8 text")
    line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
    what = " ".join(part for part in (error.context, error.problem) if part)
    fix = "indent with spaces, write 'key: value', and put values that hold ': ' or start with one of *&!%@` in quotes"
    if "alias" in what:
        fix = "put a value that starts with * in quotes; a value that is wanted twice is written twice"
    return CompressKitError(what, where=f"{name}{line}", fix=fix)


def _value(node: yaml.Node, path: Path, result: RecipeText) -> Any:
    """The plain value of a node; lines and mistakes go to `result`."""
    line = f"{result.name}:{node.start_mark.line + 1}"
    result.origins.setdefault(path, line)
    if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
        return _mapping(node, path, result)
    if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
        return [_value(item, (*path, index), result) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode) and node.tag == _TEXT:
        return node.value
    if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
        pattern, _, read = _SCALARS[node.tag]
        if re.match(pattern, node.value):
            try:
                return read(node.value)
            except ValueError as error:
                fix = "write a smaller number, or put digits that are text in quotes"
                result.mistakes.append(CompressKitError(str(error), where=result.where(path), fix=fix))
                return None
    what = f"{node.tag} is no type that recipes use"
    result.mistakes.append(CompressKitError(what, where=result.where(path), fix="write the value without a '!' tag"))
    return None


def _mapping(node: yaml.MappingNode, path: Path, result: RecipeText) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = f"{result.name}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            result.mistakes.append(CompressKitError("a key must be a word", where=line, fix="write 'key: value'"))
            continue
        key, place = key_node.value, (*path, key_node.value)
        if key in values:
            what, where = f"said twice, first at {result.origins[place]}", f"{line}: {write_path(place)}"
            result.mistakes.append(CompressKitError(what, where=where, fix="keep one of the two"))
            continue
        result.origins[place] = line
        values[key] = _value(value_node, place, result)
    return values


def override(text: RecipeText, setting: str) -> None:
    """Apply one `--set dotted.key=value` to `text`, in place; a key that leads nowhere becomes one of its mistakes."""
    origin = f"--set {setting}"
    dotted, equals, written = setting.partition("=")
    if not equals or not dotted:
        text.mistakes.append(CompressKitError("no 'key=value'", where=origin, fix="--set passes.0.keep=0.8"))
        return
    parsed = parse_yaml(written, origin)
    if parsed.mistakes:
        what = parsed.mistakes[0].what
        text.mistakes.append(CompressKitError(what, where=origin, fix="quote the value: --set 'key=\"value\"'"))
        return
    path = tuple(int(part) if re.fullmatch(r"[0-9]{1,9}", part) else part for part in dotted.split("."))
    try:
        _put(text.value, path, parsed.value)
    except CompressKitError as error:
        text.mistakes.append(error.at(origin))
        return
    for old in [known for known in text.origins if known[: len(path)] == path]:
        del text.origins[old]
    for end in range(1, len(path)):
        text.origins.setdefault(path[:end], origin)
    text.origins[path] = origin


def _put(value: Any, path: Path, new: Any) -> None:
    """Set `path` inside `value`; mappings that are not said yet are made, list entries are not."""
    here = value
    for depth, part in enumerate(path):
        key = _key_in(here, path[:depth], part)
        if depth == len(path) - 1:
            here[key] = new
        elif isinstance(here, dict):
            here = here.setdefault(key, {})
        else:
            here = here[key]


def _key_in(here: Any, path: Path, part: str | int) -> Any:
    """`part` as the list or mapping `here`, which stands at `path`, is indexed.

    Raises:
        CompressKitError: a list that has no such entry, or a plain value.
    """
    place = write_path(path) or "the recipe"
    if isinstance(here, dict):
        return str(part)
    if not isinstance(here, list):
        fix = f"give it whole: --set '{'.'.join(map(str, path))}={{{part}: …}}'"
        raise CompressKitError(f"{place} is {here!r} and has no {part!r}", fix=fix)
    if not isinstance(part, int) or part >= len(here):
        fix = f"use a position from 0 to {len(here) - 1}" if here else "write the entry in the recipe"
        raise CompressKitError(f"{place} has {len(here)} entries and no {part!r}", fix=fix)
    return part
