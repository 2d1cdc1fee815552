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

    def batches(
        self, size: int, *, limit: int | None = None, generator: torch.Generator | None = None, start: int = 0
    ) -> Iterator[Batch]:
        """Padded batches: one walk in order, or with a generator an endless shuffled one.

        The walk in order ends with a smaller batch where `size` does not divide the count. The shuffled one visits
        every sequence at most once an epoch and drops an epoch's incomplete last batch, so that all batches have
        equal weight.

        Args:
            size: sequences in a batch, ≥ 1. A part that is smaller is one batch.
            limit: use only the first `limit` sequences.
            generator: source of the order. One number is drawn from it, now and not at the first batch: the same
                state of the generator gives the same batches, whatever else is drawn from it later.
            start: batches to pass over without building them; state and `start` together resume a walk exactly.
        """
        rows = self.rows if limit is None else self.rows[:limit]
        if size < 1 or not rows:
            raise ValueError(f"batches of {size} from {len(rows)} sequences")
        if generator is None:
            return self._in_order(rows, size, start)
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        return self._shuffled(rows, size, start, seed)

    def _in_order(self, rows: list[list[int]], size: int, start: int) -> Iterator[Batch]:
        for first in range(start * size, len(rows), size):
            yield pad(rows[first : first + size], self.pad_token_id)

    def _shuffled(self, rows: list[list[int]], size: int, start: int, seed: int) -> Iterator[Batch]:
        size = min(size, len(rows))
        epoch, position = divmod(start, len(rows) // size)
        while True:
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed + epoch)).tolist()
            for batch in range(position, len(rows) // size):
                yield pad([rows[index] for index in order[batch * size : (batch + 1) * size]], self.pad_token_id)
            epoch, position = epoch + 1, 0


def pad(rows: list[list[int]], pad_token_id: int) -> Batch:
    """One batch, padded on the right to its longest row."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad_token_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


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
