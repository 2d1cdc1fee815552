"""What each token counts before it is normalised over the optimiser step, by what the teacher says there.

    even      1
    tsld      exp(CE / 10),  CE the teacher's cross-entropy with the next token: more where it is surprised
    entropy   H(p) / ln V:   more where it is unsure

Source of tsld: token-scaled logit distillation (arXiv:2308.06744), whose softmax over tokens is this, normalised; 10 is
its temperature. A model that compresses well already agrees where the teacher is certain. The last token of a sequence,
which no token follows, counts as a certain one.
"""

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from compresskit.data import Batch
from compresskit.distill.outputs import Projection
from compresskit.kernels.divergence import working_dtype

TokenRule = Literal["even", "tsld", "entropy"]
_TSLD_TEMPERATURE = 10.0
_LOGITS_AT_A_TIME = 2**24  # floats: 64 MiB


@torch.no_grad()
def count_tokens(rule: TokenRule, predictions: Tensor | Projection, batch: Batch) -> Tensor:
    """What each token counts, (B, L) ≥ 0, not normalised; what stands at padding means nothing.

    Args:
        rule: see above; `tsld` and `entropy` read `predictions`, over tokens.
        predictions: the teacher's.
        batch: its ids are the labels.
    """
    ids = batch["input_ids"]
    if rule == "even":
        return torch.ones(ids.shape, device=ids.device)
    following = torch.nn.functional.pad(ids[:, 1:], (0, 1)).flatten()
    counts = torch.cat([_count(rule, logits, following[part]) for part, logits in _chunks(predictions)])
    counts = counts.view(ids.shape)
    if rule == "tsld":
        follows = torch.nn.functional.pad(batch["attention_mask"][:, 1:], (0, 1)) > 0
        counts = counts.masked_fill(~follows, 1.0)
    return counts


def answers_alone(prompt: Tensor, *, next_tokens: bool) -> Tensor:
    """1 where a token counts and 0 where it is the prompt's, (B, L), from which tokens are.

    Args:
        prompt: (B, L) bool.
        next_tokens: whether what is said at a token is the next one: then that one must not be the prompt's. So the
            last token of a prompt counts, at which the answer begins.
    """
    if next_tokens:
        prompt = torch.cat([prompt[:, 1:], prompt[:, -1:]], 1)
    return (~prompt).float()


def _count(rule: TokenRule, logits: Tensor, following: Tensor) -> Tensor:
    log_p = logits.to(working_dtype(logits.dtype)).log_softmax(-1)
    if rule == "tsld":
        return (-log_p.gather(-1, following[:, None])[:, 0] / _TSLD_TEMPERATURE).exp()
    return torch.special.entr(log_p.exp()).sum(-1) / math.log(max(log_p.shape[-1], 2))


def _chunks(predictions: Tensor | Projection) -> Iterator[tuple[slice, Tensor]]:
    """The logits of a few tokens at a time, and which tokens."""
    if isinstance(predictions, Tensor):
        flat = predictions.flatten(0, -2)
        yield slice(0, len(flat)), flat
        return
    hidden, head = predictions.hidden.flatten(0, 1), predictions.head
    size = max(1, _LOGITS_AT_A_TIME // head.weight.shape[0])
    for first in range(0, len(hidden), size):
        part = slice(first, first + size)
        yield part, head.logits_of_reduced(head.reduced(hidden[part]))
