"""Token sequences in memory, and the batches made of them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Batch = dict[str, Tensor]  # input_ids and attention_mask, (batch, length) int64; masked positions are padding


@dataclass(frozen=True)
class Sequences:
    """Token sequences of one part.

    Attributes:
        rows: token ids, special tokens included; each row has at least one.
        pad_token_id: what fills the shorter rows of a batch, on the right, under a mask of 0.
    """

    rows: list[list[int]]
    pad_token_id: int

    def __len__(self) -> int:
        return len(self.rows)

    def limit(self, count: int) -> "Sequences":
        """The first `count` sequences, or all where there are fewer."""
        return Sequences(self.rows[:count], self.pad_token_id)

    def by_length(self) -> "Sequences":
        """The same sequences, shortest first: batches of them hold little padding."""
        return Sequences(sorted(self.rows, key=len), self.pad_token_id)

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


PARTS = ("calibration", "training", "evaluation")


@dataclass(frozen=True)
class Corpus:
    """Three parts of one text that share no sequence; of packed windows, no document either.

    Attributes:
        fingerprint: sha256 of everything that decides the sequences: options, text, tokenizer, seed.
        origin: the text in words, for the report ("python-docs of CPython 3.12.3").
    """

    calibration: Sequences
    training: Sequences
    evaluation: Sequences
    fingerprint: str
    origin: str = ""

    def amounts(self) -> dict[str, str | int]:
        """For the report: `origin`, and the number of sequences of each part by its name."""
        return {"origin": self.origin, **{part: len(getattr(self, part)) for part in PARTS}}
