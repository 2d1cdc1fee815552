"""Token sequences and other model inputs in memory, and the batches made of them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from compresskit.errors import CompressKitError

#: What a model is called with. Text: input_ids and attention_mask, (batch, length) int64; masked positions are padding.
Batch = dict[str, Tensor]


class Examples(Protocol):
    """Inputs of one part: token sequences, or what else a model reads."""

    def __len__(self) -> int: ...

    def limit(self, count: int) -> Self:
        """The first `count` examples, or all where there are fewer."""
        ...

    def by_length(self) -> Self:
        """The same examples, shortest first."""
        ...

    def batches(self, size: int, *, limit: int | None = None) -> Iterator[Batch]:
        """Batches in order; `limit` uses only the first examples."""
        ...


@dataclass(frozen=True)
class Sequences:
    """Token sequences of one part.

    Attributes:
        rows: token ids, special tokens included; each row has at least one.
        pad_token_id: what fills the shorter rows of a batch, on the right, under a mask of 0.
        prompts: of each token whether it belongs to a prompt, shaped as `rows`; None where nothing does.
    """

    rows: list[list[int]]
    pad_token_id: int
    prompts: list[list[bool]] | None = None

    @classmethod
    def of_marked(cls, rows: list[list[int]], pad_token_id: int) -> "Sequences":
        """From rows in which a prompt's token is told by its complement, ~id."""
        told = [[max(token, ~token) for token in row] for row in rows]
        return cls(told, pad_token_id, [[token < 0 for token in row] for row in rows])

    def __len__(self) -> int:
        return len(self.rows)

    def limit(self, count: int) -> "Sequences":
        """The first `count` sequences, or all where there are fewer."""
        return self.take(range(min(count, len(self.rows))))

    def take(self, chosen: Iterable[int]) -> "Sequences":
        """The sequences of these numbers, in this order."""
        order = list(chosen)
        prompts = None if self.prompts is None else [self.prompts[index] for index in order]
        return Sequences([self.rows[index] for index in order], self.pad_token_id, prompts)

    def by_length(self) -> "Sequences":
        """The same sequences, shortest first: batches of them hold little padding."""
        return self.take(sorted(range(len(self.rows)), key=lambda index: len(self.rows[index])))

    def batches(self, size: int, *, limit: int | None = None) -> Iterator[Batch]:
        """Padded batches in order, the last one smaller where `size` does not divide the count.

        Args:
            size: sequences in a batch, ≥ 1.
            limit: use only the first `limit` sequences.
        """
        rows = self.rows if limit is None else self.rows[:limit]
        if size < 1 or not rows:
            raise ValueError(f"batches of {size} from {len(rows)} sequences")
        return (pad(rows[first : first + size], self.pad_token_id) for first in range(0, len(rows), size))


def pad(rows: list[list[int]], pad_token_id: int) -> Batch:
    """One batch, padded on the right to its longest row."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad_token_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def require_tokens(calibration: Examples) -> None:
    """Refuse text that is all empty.

    Raises:
        CompressKitError: no sequence holds a token, or there is no example at all.
    """
    if not (any(calibration.rows) if isinstance(calibration, Sequences) else len(calibration)):
        what = "the calibration sequences hold no token: there is nothing to fit to"
        raise CompressKitError(what, where="data.calibration", fix="use text that is not empty")


PARTS = ("calibration", "training", "evaluation")


@dataclass(frozen=True)
class ModelInputs:
    """Examples that are ready for a model, all of one shape: images as `pixel_values`, say, or audio features.

    Attributes:
        tensors: by the name of the model's argument; the first axis counts examples.
        labels: the right class of each example, (examples,) int64, where they are known.
    """

    tensors: dict[str, Tensor]
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        lengths = {len(tensor) for tensor in (*self.tensors.values(), *([] if self.labels is None else [self.labels]))}
        if len(lengths) != 1:
            raise ValueError(f"inputs of {sorted(lengths)} examples do not belong together")

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def limit(self, count: int) -> "ModelInputs":
        """The first `count` examples, or all where there are fewer."""
        labels = None if self.labels is None else self.labels[:count]
        return ModelInputs({name: tensor[:count] for name, tensor in self.tensors.items()}, labels)

    def by_length(self) -> "ModelInputs":
        """Itself: all examples are equally long."""
        return self

    def batches(self, size: int, *, limit: int | None = None) -> Iterator[Batch]:
        """Batches in order, the last one smaller where `size` does not divide the count; without labels."""
        count = len(self) if limit is None else min(limit, len(self))
        if size < 1 or not count:
            raise ValueError(f"batches of {size} from {count} examples")
        starts = range(0, count, size)
        return ({name: t[first : min(first + size, count)] for name, t in self.tensors.items()} for first in starts)


def token_rows(examples: Examples) -> list[list[int]]:
    """The token sequences of a part of a text.

    Raises:
        TypeError: examples that are no text.
    """
    if not isinstance(examples, Sequences):
        raise TypeError(f"{type(examples).__name__} holds no token sequences")
    return examples.rows


@dataclass(frozen=True)
class Corpus:
    """Three parts of one text, or of other inputs, that share no sequence; of packed windows, no document either.

    Attributes:
        fingerprint: sha256 of everything that decides the sequences: options, text, tokenizer, seed.
        origin: the text in words, for the report ("python-docs of CPython 3.12.3").
    """

    calibration: Examples
    training: Examples
    evaluation: Examples
    fingerprint: str
    origin: str = ""

    def amounts(self) -> dict[str, str | int]:
        """For the report: `origin`, and the number of sequences of each part by its name."""
        return {"origin": self.origin, **{part: len(getattr(self, part)) for part in PARTS}}
