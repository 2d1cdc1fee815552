"""A recipe: which model, which text, which passes in which order, what to write.

file.yaml ──load_recipe──► Recipe          all mistakes at once, with file:line
file.yaml ──reading──────► Recipe          the same; mistakes of planning and running get their line too
Recipe    ──dump_recipe──► YAML            parses back to an equal Recipe
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationError,
    model_validator,
)
from pydantic_core import to_jsonable_python

from compresskit.config import Config, did_you_mean
from compresskit.data import DataSource
from compresskit.errors import CompressKitError, ManyErrors
from compresskit.export import EXPORTERS, Exporter
from compresskit.models import TASKS
from compresskit.passes import PASSES, Pass
from compresskit.recipe_mistakes import explain
from compresskit.recipe_text import RecipeText, override, parse_yaml, write_path

AnyPass = Annotated[SerializeAsAny[Pass], BeforeValidator(PASSES.parse)]
AnyExporter = Annotated[SerializeAsAny[Exporter], BeforeValidator(EXPORTERS.parse)]


def _is_task(task: str) -> str:
    if task not in TASKS:
        near = did_you_mean(task, TASKS)
        raise ValueError(f"unknown task {task!r}; {f'did you mean {near!r}?' if near else 'use ' + ', '.join(TASKS)}")
    return task


Task = Annotated[str, AfterValidator(_is_task), Field(json_schema_extra={"enum": list(TASKS)})]


class Recipe(Config):
    """What to make of a model, in order."""

    #: a folder, a hub id, package:NAME/SUBFOLDER (carried by an installed Python package), or a folder with a GGUF file
    model: str
    #: the file inside the model's folder that holds the weights, where they are not safetensors
    gguf_file: str | None = None
    #: what the model does; without it, what its config.json says
    task: Task | None = None
    #: the text for calibration, training and evaluation
    data: DataSource = DataSource()
    #: pass i draws all its randomness from (seed, i)
    seed: Annotated[int, Field(strict=True, ge=0)] = 0
    #: when to measure the student against the original: after each pass, at both ends, or never
    evaluate: Literal["each", "ends", "never"] = "each"
    #: what to do to the model, in this order
    passes: tuple[AnyPass, ...] = ()
    #: what to write besides the checkpoint
    export: tuple[AnyExporter, ...] = ()

    @model_validator(mode="after")
    def _can_be_done(self) -> "Recipe":
        mistakes = order_mistakes([type(one) for one in self.passes]) + work_mistakes(self.passes, self.export)
        if mistakes:
            raise ManyErrors([CompressKitError(what, where=where, fix=fix) for where, what, fix in mistakes])
        return self


_Mistake = tuple[str, str, str]  # where, what, fix


def order_mistakes(passes: Sequence[type[Pass] | None]) -> list[_Mistake]:
    """Each pass that refuses what an earlier one makes of the model; None stands for a pass that is not known."""
    found: list[_Mistake] = []
    for index, cls in enumerate(passes):
        if cls is None:
            continue
        kind = cls.model_fields["kind"].default
        for before, earlier in enumerate(passes[:index]):
            met = sorted(cls.refuses & earlier.adds) if earlier is not None else []
            if met:
                what = f"{kind} cannot run after passes[{before}] made the model {' and '.join(met)}"
                circular = earlier is not None and earlier.refuses & cls.adds
                fix = "leave one of the two out" if circular else f"move {kind} before passes[{before}]"
                found.append((f"passes[{index}]", what, fix))
                break
    return found


def work_mistakes(passes: Sequence[object], export: Sequence[Exporter]) -> list[_Mistake]:
    """A recipe that neither changes nor writes anything, or writes two things into one folder."""
    if not passes and not export:
        return [("passes", "no pass and no export: nothing to do", "add a pass; `compresskit passes` lists them")]
    kinds = [one.kind for one in export]
    twice = [index for index, kind in enumerate(kinds) if kind in kinds[:index]]
    return [(f"export[{index}]", f"{kinds[index]} is written twice", "keep one of the two") for index in twice]


def load_recipe(path: str | Path, *, settings: Iterable[str] = ()) -> Recipe:
    """The recipe in a YAML file, with `--set` values on top.

    Raises:
        CompressKitError: no such file. ManyErrors: all mistakes of the text.
    """
    return _checked(_read(path, settings))


@contextmanager
def reading(recipe: Recipe | str | Path, *, settings: Sequence[str] = ()) -> Iterator[Recipe]:
    """The recipe in a YAML file; mistakes raised inside the block are told with the line of what they name.

    A Recipe is itself, and its mistakes have no line.

    Raises:
        as `load_recipe`. CompressKitError: settings on top of a Recipe.
    """
    if isinstance(recipe, Recipe):
        if settings:
            raise CompressKitError("settings change a YAML, and this is a Recipe", fix="change the Recipe, or its YAML")
        yield recipe
        return
    text = _read(recipe, settings)
    checked = _checked(text)
    try:
        yield checked
    except CompressKitError as error:
        for mistake in error.each:
            line = text.line_of(mistake.where or "")
            if line is not None:
                mistake.at(line)
        if isinstance(error, ManyErrors):
            raise ManyErrors(sorted(error.errors, key=_line)) from None
        raise


def _read(path: str | Path, settings: Iterable[str]) -> RecipeText:
    try:
        written = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(Path(path), error) from error
    text = parse_yaml(written, str(path))
    if text.value is None and not text.mistakes:
        text.mistakes.append(CompressKitError("the recipe is empty", where=str(path), fix="start with 'model: …'"))
    elif text.value is not None:
        for setting in settings:
            override(text, setting)
    return text


def parse_recipe(value: Any, *, name: str = "recipe") -> Recipe:
    """The recipe that a mapping says (passes may be instances).

    Raises:
        ManyErrors: all mistakes.
    """
    return _checked(RecipeText(name, value, {(): name}))


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, without what is left at its default; `load_recipe` gives an equal one back."""
    return yaml.safe_dump(_plain(recipe), sort_keys=False, allow_unicode=True, width=120)


def _plain(value: Any) -> Any:
    """Plain data that YAML can say; a `kind` is always written, because it is what finds the class."""
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        said = {name: getattr(value, name) for name in fields}
        return {
            name: _plain(given)
            for name, given in said.items()
            if name == "kind" or given != fields[name].get_default(call_default_factory=True, validated_data=said)
        }
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list | set | frozenset):
        return [_plain(inner) for inner in value]
    return to_jsonable_python(value)


def _unreadable(path: Path, error: OSError | UnicodeDecodeError) -> CompressKitError:
    if isinstance(error, UnicodeDecodeError):
        return CompressKitError("is not UTF-8 text", where=str(path), fix="save it as UTF-8")
    if isinstance(error, FileNotFoundError):
        folder = path.parent
        near = did_you_mean(path.name, (p.name for p in folder.iterdir())) if folder.is_dir() else None
        fix = f"did you mean {str(folder / near)!r}?" if near else "give the path of a recipe (*.yaml)"
        return CompressKitError(f"no recipe {str(path)!r}", fix=fix)
    return CompressKitError(f"cannot read {str(path)!r}: {error.strerror}", fix="give the path of a readable file")


def _checked(text: RecipeText) -> Recipe:
    mistakes, value = list(text.mistakes), text.value
    if value is None and mistakes:
        raise ManyErrors(mistakes)
    if not isinstance(value, dict):
        what = f"a recipe is a mapping, not {type(value).__name__}"
        raise ManyErrors([CompressKitError(what, where=text.where(()), fix="start with 'model: …'")])
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(value)
    except ValidationError as error:
        mistakes += explain(error, Recipe, value, text.where)
        mistakes += _placed(order_mistakes(_pass_classes(value.get("passes"))), text)
    except ManyErrors as error:
        mistakes += _placed([(str(one.where), one.what, str(one.fix)) for one in error.errors], text)
    if mistakes or recipe is None:
        raise ManyErrors(sorted(mistakes, key=_line))
    return recipe


def _line(mistake: CompressKitError) -> tuple[bool, int]:
    """The order of the text; what `--set` said comes last."""
    found = re.search(r":(\d+)(:|$)", mistake.where or "")
    return (mistake.where or "").startswith("--set"), int(found[1]) if found else 0


def _pass_classes(entries: Any) -> list[type[Pass] | None]:
    if not isinstance(entries, list | tuple):
        return []
    kinds = [one.get("kind") if isinstance(one, dict) else getattr(one, "kind", None) for one in entries]
    known = {kind: PASSES[kind] for kind in PASSES}
    return [known.get(str(kind)) for kind in kinds]


def _placed(mistakes: Iterable[_Mistake], text: RecipeText) -> list[CompressKitError]:
    """Mistakes of the whole (`passes[1]`) with the line where their entry stands."""
    lines = {write_path(path): text.where(path) for path in text.origins}
    whole = text.where(())
    return [CompressKitError(what, where=lines.get(at, f"{whole}: {at}"), fix=fix) for at, what, fix in mistakes]
