"""Training batches of similar lengths: little padding is computed, and every choice comes from one generator."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compresskit.data.sequences import Batch, Sequences, pad

#: Optimiser steps whose sequences are sorted by length together.
_POOL_STEPS = 16


@dataclass(frozen=True)
class Numbered:
    """A batch, the numbers of its sequences in the training part, and which tokens (B, L) are a prompt's, if any."""

    rows: list[int]
    batch: Batch
    prompt: Tensor | None = None


def collate(sequences: Sequences, rows: Sequence[int], *, max_length: int | None = None) -> Numbered:
    """The sequences `rows`, cut to `max_length` tokens and padded on the right to the longest."""
    batch = pad([sequences.rows[row][:max_length] for row in rows], sequences.pad_token_id)
    if sequences.prompts is None:
        return Numbered(list(rows), batch)
    prompt = torch.zeros(batch["input_ids"].shape, dtype=torch.bool)
    for index, row in enumerate(rows):
        asks = sequences.prompts[row][:max_length]
        prompt[index, : len(asks)] = torch.tensor(asks)
        prompt[index, len(asks) :] = asks[-1]  # after a text that ends in its prompt no answer begins
    return Numbered(list(rows), batch, prompt)


def split_held_out(rows: int, held_out: int, *, generator: torch.Generator) -> tuple[list[int], list[int]]:
    """Numbers of the sequences to train on and of those held out: at most `held_out`, at most a tenth, at least one.

    Raises:
        ValueError: fewer than two sequences.
    """
    if rows < 2:
        raise ValueError(f"{rows} sequences cannot be split")
    shuffled = torch.randperm(rows, generator=generator).tolist()
    count = min(held_out, max(1, rows // 10))
    return sorted(shuffled[count:]), sorted(shuffled[:count])


def by_length(sequences: Sequences, rows: Sequence[int], size: int, *, max_length: int | None) -> list[Numbered]:
    """All of `rows` once, in batches of `size`, shortest first."""
    ordered = sorted(rows, key=lambda row: (len(sequences.rows[row]), row))
    return [collate(sequences, ordered[i : i + size], max_length=max_length) for i in range(0, len(ordered), size)]


def _shuffled(rows: Sequence[int], generator: torch.Generator) -> Iterator[int]:
    while True:
        for i in torch.randperm(len(rows), generator=generator).tolist():
            yield rows[i]


def training_steps(
    sequences: Sequences,
    rows: Sequence[int],
    *,
    batch_size: int,
    accumulate: int,
    max_length: int | None,
    generator: torch.Generator,
) -> Iterator[list[Numbered]]:
    """Endless optimiser steps, each of `accumulate` batches of `batch_size` sequences.

    Sequences come in a new order each time round. A pool of steps is sorted by length and cut into steps, which are
    taken in random order: which sequences share a step depends on batch_size · accumulate alone.
    """
    stream, step_rows = _shuffled(rows, generator), batch_size * accumulate
    while True:
        pool = sorted(
            (next(stream) for _ in range(_POOL_STEPS * step_rows)), key=lambda row: (len(sequences.rows[row]), row)
        )
        for i in torch.randperm(_POOL_STEPS, generator=generator).tolist():
            chosen = pool[i * step_rows : (i + 1) * step_rows]
            yield [
                collate(sequences, chosen[j : j + batch_size], max_length=max_length)
                for j in range(0, step_rows, batch_size)
            ]
