"""Options as data: frozen pydantic objects that refuse unknown keys, and registries that find them by `kind`."""

import difflib
from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, field_validator

T = TypeVar("T", bound=BaseModel)
C = TypeVar("C", bound=BaseModel)


class Config(BaseModel):
    """Base of everything a recipe can say. Instances are frozen; unknown keys, NaN and infinity are errors.

    Types are meant as they are said: `true` is no number and `"12"` no integer. Only an integer may stand for a float,
    and a list for a tuple, which YAML does not have.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    @field_validator("*", mode="before")
    @classmethod
    def _list_as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    def _refuse_idle(self, name: str, needs: str) -> None:
        """For validators: refuse a field that was said although nothing reads it without `needs`."""
        if name in self.model_fields_set:
            raise ValueError(f"{name} has no effect without {needs}; leave it out or say {needs}")


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """The known word closest to `word`, or None where nothing is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return close[0] if close else None


class Registry(Generic[T]):
    """Maps `kind` to the class of options that carries it.

    Args:
        noun: what is registered (`pass`, `loss`, `exporter`), used in messages.
    """

    def __init__(self, noun: str) -> None:
        self.noun = noun
        self._classes: dict[str, type[T]] = {}

    def add(self, cls: type[C]) -> type[C]:
        """Register a class under the default of its `kind` field; a taken name is a programming error."""
        kind = cls.model_fields["kind"].default
        if kind in self._classes:
            raise ValueError(f"{self.noun} {kind!r} is already registered by {self._classes[kind].__name__}")
        self._classes[kind] = cls  # pyright: ignore[reportArgumentType] # C is a kind of T, which typing cannot say
        return cls

    def __getitem__(self, kind: str) -> type[T]:
        return self._classes[kind]

    def __contains__(self, kind: object) -> bool:
        return kind in self._classes

    def __iter__(self) -> Iterator[str]:
        return iter(self._classes)

    def parse(self, raw: Any) -> Any:
        """Turn `{"kind": "x", …}` into an instance of x; pass instances through.

        Raises:
            ValueError: no `kind`, or one that is not registered. Pydantic's own ValidationError for the rest;
                raised inside a validator, both keep their place in the recipe.
        """
        if isinstance(raw, BaseModel):
            return raw
        if not isinstance(raw, dict):
            raise ValueError(f"expected a mapping with 'kind', got {type(raw).__name__}")
        kind = raw.get("kind")
        if not isinstance(kind, str) or kind not in self._classes:
            what = f"unknown {self.noun} {kind!r}" if "kind" in raw else f"the {self.noun} has no 'kind'"
            near = did_you_mean(str(kind), self._classes) if "kind" in raw else None
            hint = f"did you mean {near!r}?" if near else f"one of: {', '.join(sorted(self._classes))}"
            raise ValueError(f"{what}; {hint}")
        return self._classes[kind].model_validate(raw)
