"""Which tokens stay: those that a text uses, the most frequent first, with all that they need."""

from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor

from compresskit.errors import CompressKitError


def count_tokens(rows: Iterable[Iterable[int]], vocabulary: int) -> Tensor:
    """How often each id occurs, (vocabulary,) int64."""
    counts = torch.zeros(vocabulary, dtype=torch.int64)
    for row in rows:
        counts += torch.bincount(torch.tensor(list(row), dtype=torch.int64), minlength=vocabulary)
    return counts


def choose_tokens(
    counts: Tensor,
    *,
    known: Collection[int],
    required: Collection[int],
    needs: Callable[[int], Collection[int]],
    limit: int,
    min_count: int = 1,
    round_to: int = 8,
) -> list[int]:
    """The ids to keep, ascending: what is required, then what is used, the most frequent first, each with its needs.

    Args:
        counts: how often each id occurs, (vocabulary,).
        known: ids that stand for a token.
        required: ids that stay whatever the counts say, some of `known`.
        needs: the ids without which an id cannot stay, itself among them.
        limit: the most ids that stay.
        min_count: ids that occur less often are not used.
        round_to: the number of ids is a multiple of it, as far as `known` and `limit` allow: unused ids are added, the
            first ones (the commonest, in most vocabularies) first.

    Raises:
        CompressKitError: nothing but required ids is used, or these alone are more than `limit`.
    """
    kept = {need for index in required for need in needs(index)}
    used = [index for index in known if counts[index] >= min_count and index not in kept]
    if not any(counts[index] >= min_count for index in known):
        what = "the text uses no token" + (f" {min_count} times or more" if min_count > 1 else "")
        raise CompressKitError(what, where="corpus", fix="give more text" + (", or lower min_count" * (min_count > 1)))
    if len(kept) > limit:
        what = f"{limit} tokens are fewer than the {len(kept)} that the tokenizer cannot do without"
        least = -(-(len(kept) + round_to) * 1000 // len(counts)) / 1000
        fix = f"use keep: {least} or more" if least < 1 else "use keep: 1, or a smaller round_to"
        raise CompressKitError(what, where="keep", fix=fix)
    _fill(kept, sorted(used, key=lambda index: (-int(counts[index]), index)), needs, limit)
    full = min(limit, len(known), -(-len(kept) // round_to) * round_to)
    _fill(kept, sorted(set(known) - kept, key=lambda index: (-int(counts[index]), index)), needs, full)
    return sorted(kept)


def _fill(kept: set[int], candidates: list[int], needs: Callable[[int], Collection[int]], limit: int) -> None:
    """Add candidates in order, each with its needs where there is room for all of them; again while any fits."""
    grown = True
    while grown and len(kept) < limit:
        grown = False
        for index in candidates:
            if len(kept) == limit:
                return
            new = set() if index in kept else set(needs(index)) - kept
            if new and len(kept) + len(new) <= limit:
                kept |= new
                grown = True
