"""Divergence from a cached top-k teacher: the k tokens it names and one bucket for everything else.

Over those k + 1 buckets every divergence is at most what it is over the vocabulary (data processing), and it is no
longer biased as one over the k alone is. The student's probability of the bucket is a sum over its own logits, never
1 − Σ, so it does not cancel. The teacher's is: where rounding alone is left of it, it counts as what is nearest to the
student's (`with_tail`), the least that the divergence may be. With g_j = r_j − q_j Σ r over buckets, a logit among
the k gets g_j, any other the bucket's g times its share of the bucket's probability.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compresskit.kernels.divergence import Divergence, summand_and_slope, working_dtype
from compresskit.kernels.exponential import exp_
from compresskit.kernels.slab import (
    Outward,
    Readout,
    Statistics,
    TokenTerms,
    rule_factor,
    slab_statistics,
    tiles,
    weighted,
)

# V vocabulary, C tokens of the slab, K entries of the cache


@dataclass(frozen=True)
class TopK:
    """What a cache keeps of a teacher's distribution at the temperature of the loss.

    Attributes:
        log_probs: (T, K) ln p of K entries; their probabilities sum to at most 1, the rest is the tail.
        indices: (T, K) int64, the entries' places in the vocabulary, each at most once in a token.
    """

    log_probs: Tensor
    indices: Tensor

    @classmethod
    def of(cls, logits: Tensor, k: int, *, temperature: float = 1.0) -> "TopK":
        """The k most probable entries of softmax(logits/τ), from (T, V)."""
        if not 1 <= k <= logits.shape[-1]:
            raise ValueError(f"k must lie between 1 and the vocabulary's {logits.shape[-1]}, got {k}")
        if not logits.is_floating_point():
            raise ValueError(f"logits must be floating point, got {logits.dtype}")
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature must be above 0 and finite, got {temperature}")
        log_probs, indices = (logits.to(working_dtype(logits.dtype)) / temperature).log_softmax(-1).topk(k)
        return cls(log_probs, indices)


#: Roundings of 1 below which 1 − Σ p says nothing of the tail but that it is no larger.
_TAIL_ROUNDINGS = 4


def with_tail(log_probs: Tensor, log_q_tail: Tensor) -> Tensor:
    """ln p of the K entries and the tail, (…, K + 1), for a student whose ln q of the tail is `log_q_tail`, (…, 1).

    Where rounding alone is left of the tail, p there is q, or as much of q as rounding hides: of all that the tail may
    be, what diverges least, so that no divergence is above the vocabulary's and none is infinite by the cache alone. A
    student without a tail is not compared there.
    """
    tail = 1 - log_probs.exp().sum(-1, keepdim=True)
    hidden = _TAIL_ROUNDINGS * torch.finfo(tail.dtype).eps
    nearest = log_q_tail.detach().clamp_max(math.log(hidden))
    known = (tail > hidden) & (log_q_tail > float("-inf"))
    return torch.cat([log_probs, torch.where(known, tail.clamp_min(hidden).log(), nearest)], -1)


@torch.no_grad()
def bucket_loss_(
    student: Tensor,
    teacher: TopK,
    tokens: TokenTerms,
    divergence: Divergence,
    readout: Readout,
    *,
    wants_grad: bool,
    tile: int,
) -> Tensor:
    """As `slab_loss_`, for the cached rows of the slab's C tokens; the slab is overwritten in any case."""
    dtype, tau, indices = working_dtype(student.dtype), divergence.temperature, teacher.indices.T
    for part in tiles(student, tile):
        student[part] = readout.tile(student, part, dtype)
    logits = student.gather(0, indices)
    label_logits = None if tokens.labels is None else student.gather(0, tokens.labels[None]).to(dtype)
    student.scatter_(0, indices, float("-inf"))
    rest = slab_statistics(student, Readout(), tau, tile=tile, at_one=tokens.labels is not None)
    student.scatter_(0, indices, logits)
    logits = logits.to(dtype)
    log_q = _bucketed(rest, logits)
    counts = tokens.weight > 0
    log_p = with_tail(teacher.log_probs.to(dtype), log_q[-1, :, None]).T
    f, slope, q = summand_and_slope(divergence, torch.where(counts, log_p, log_q), log_q)
    g = slope - q * slope.sum(0)
    weight = tokens.weight * rule_factor(divergence, _bucket_statistics(log_p, tau), len(student))
    weight = torch.where(counts, weight, 0)
    outward = Outward(readout, tau * weight, tokens.label_weight, _whole(rest, logits))
    loss = tau**2 * weighted(weight, f.sum(0)).sum()
    if label_logits is not None:
        loss = loss + outward.label_loss(label_logits)
    if not wants_grad:
        return loss
    # A logit's share of the bucket; all of an empty one are −∞, or among the entries and written below.
    share = replace(rest, log_total=torch.where(rest.log_total > float("-inf"), rest.log_total, float("inf")))
    for part in tiles(student, tile):
        logits_here = student[part].to(dtype)
        student[part] = outward.grad_(exp_(share.log_softmax(logits_here)).mul_(g[-1]), logits_here)
    student.scatter_(0, indices, outward.grad_(g[:-1].clone(), logits).to(student.dtype))
    if label_logits is not None and tokens.labels is not None:
        named = indices == tokens.labels
        own = torch.where(named, g[:-1], 0).sum(0)
        others = torch.where(named.any(0), 0, share.log_softmax(label_logits)[0].exp() * g[-1])
        label_grad = outward.label_grad((own + others)[None], label_logits)
        student.scatter_(0, tokens.labels[None], label_grad.to(student.dtype))
    return loss


def _bucketed(rest: Statistics, logits: Tensor) -> Tensor:
    """ln q of the entries, whose logits are (K, C), and of the tail, (K + 1, C).

    The largest logit is taken out of all of them first, since their sums would round at its size.
    """
    peak = torch.maximum(rest.peak, logits.amax(0))
    tail = (rest.peak - peak) / rest.temperature + rest.log_total
    log_q = torch.cat([(logits - peak) / rest.temperature, tail[None]])
    return log_q.sub_(log_q.logsumexp(0))


def _whole(rest: Statistics, logits: Tensor) -> Statistics:
    """The statistics at temperature 1 of all logits, from those of the tail and the entries' own (K, C)."""
    if rest.log_total_one is None:
        return rest
    peak = torch.maximum(rest.peak, logits.amax(0))
    total = torch.logaddexp((rest.peak - peak) + rest.log_total_one, (logits - peak).logsumexp(0))
    return Statistics(rest.temperature, peak, rest.log_total, total)


def _bucket_statistics(log_p: Tensor, tau: float) -> Statistics:
    """The teacher's, from ln p of the entries and the tail, (K + 1, C)."""
    entropy = torch.special.entr(log_p.exp()).sum(0)
    peak = log_p[:-1].amax(0)
    return Statistics(tau, tau * peak, -peak, entropy=entropy)
