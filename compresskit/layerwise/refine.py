"""Refinement: a block's factors, trained together for a few steps so that the block gives what the original's does.

    minimise   E ‖ block'(h') − block(h) ‖²        h' the student's stream before the block, h the original's

Layer by layer each factor was the best for its own target; together they can also make up for each other, and for what
the stream has lost before the block. Errors count by the Fisher information of the model's answer in the block's output
where it is known, else relative to each token's stream. A quarter of the sequences is not trained on: the step that is
best on them is kept, the one before the first among them.
Source: block-wise refinement of AA-SVD (arXiv:2604.02119); the metric and the held-out choice are ours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compresskit.layers.low_rank import LowRankLinear
from compresskit.layerwise.walk import BlockBatch

#: Step size of Adam in units of each tensor's root mean square.
_RATE = 3e-3


@dataclass(frozen=True)
class Refined:
    """The held-out loss before and after, in the same unit, and how many rounds over the batches were kept."""

    before: float
    after: float
    rounds: int


def stream_error(output: Tensor, target: Tensor, metric: Tensor | None) -> Tensor:
    """The mean over tokens of eᵀ F e, or of ‖e‖² / ‖t‖² without a metric; output and target (tokens, H), F (H, H)."""
    error = output - target
    if metric is not None:
        return ((error @ metric) * error).sum(-1).mean()
    return (error.square().sum(-1) / target.square().sum(-1).clamp_min(torch.finfo(target.dtype).tiny)).mean()


def refine_block(
    block: nn.Module, batches: Sequence[BlockBatch], *, rounds: int, metric: Tensor | None, generator: torch.Generator
) -> Refined:
    """Train the low-rank layers of a block, in place, on what they and the original's block give.

    Args:
        block: its LowRankLinears are trained, all else stays.
        batches: what the block reads in the student, and what it should give.
        rounds: passes over all batches.
        metric: F (H, H) on the block's output; None for relative errors.
        generator: shuffles the batches.
    """
    metric = None if metric is None else metric.float()
    trained = [p for module in block.modules() if isinstance(module, LowRankLinear) for p in module.parameters()]
    flags = [parameter.requires_grad for parameter in trained]
    best = before = _held_out_error(batches, metric)
    kept, kept_rounds = [parameter.detach().clone() for parameter in trained], 0
    optimizer = torch.optim.Adam(
        [{"params": [p], "lr": _RATE * max(float(p.detach().square().mean().sqrt()), 1e-8)} for p in trained]
    )
    total = rounds * len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / total))
    for parameter in trained:
        parameter.requires_grad_()
    for done in range(1, rounds + 1):
        for index in torch.randperm(len(batches), generator=generator).tolist():
            with torch.enable_grad():
                loss = _error(batches[index], batches[index].fit_rows, metric)
            for parameter, gradient in zip(trained, torch.autograd.grad(loss, trained), strict=True):
                parameter.grad = gradient
            optimizer.step()
            schedule.step()
        now = _held_out_error(batches, metric)
        if now < best:
            best, kept, kept_rounds = now, [parameter.detach().clone() for parameter in trained], done
    for parameter, value, flag in zip(trained, kept, flags, strict=True):
        parameter.requires_grad_(flag).detach().copy_(value)
        parameter.grad = None
    return Refined(before, best, kept_rounds)


def _error(batch: BlockBatch, rows: Tensor, metric: Tensor | None) -> Tensor:
    return stream_error(batch.run().flatten(0, 1)[rows], batch.target.flatten(0, 1)[rows], metric)


@torch.no_grad()
def _held_out_error(batches: Sequence[BlockBatch], metric: Tensor | None) -> float:
    """The mean over all held-out tokens."""
    counts = [len(batch.held_out_rows) for batch in batches]
    errors = [
        float(_error(batch, batch.held_out_rows, metric)) * n for batch, n in zip(batches, counts, strict=True) if n
    ]
    return sum(errors) / max(sum(counts), 1)
