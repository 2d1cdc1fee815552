"""The definition of the loss in plain torch; truth for every other implementation (run it in float64)."""

import math

import torch
from torch import Tensor

from compresskit.kernels.buckets import TopK, with_tail
from compresskit.kernels.divergence import Divergence, summand_and_slope, working_dtype
from compresskit.kernels.slab import TokenTerms, weighted


def reference_loss(student: Tensor, teacher: Tensor | TopK, tokens: TokenTerms, divergence: Divergence) -> Tensor:
    """Σ_t τ² w_t D(p_t, q_t) + Σ_t c_t CE_t, a scalar, with autograd's own gradient.

    Args:
        student: logits (T, V).
        teacher: logits (T, V), or a cache of them.
        tokens: what each token counts.
        divergence: what is measured.

    Cost: about six tensors of (T, V).
    """
    dtype, tau = working_dtype(student.dtype), divergence.temperature
    log_q = (student.to(dtype) / tau).log_softmax(-1)
    counts = tokens.weight > 0
    if isinstance(teacher, TopK):
        log_q = _bucketed(log_q, teacher.indices)
        log_p = with_tail(teacher.log_probs.to(dtype), log_q[:, -1:])
    else:
        log_p = (teacher.to(dtype) / tau).log_softmax(-1)
    # A teacher that does not count is not read: not a number times 0 is none.
    log_p = torch.where(counts[:, None], log_p, log_q.detach())
    value, _, _ = summand_and_slope(divergence, log_p, log_q)
    weight = tokens.weight.to(dtype) * _rule(divergence, log_p, teacher, student.shape[-1])
    loss = tau**2 * weighted(weight, value.sum(-1)).sum()
    if tokens.labels is None or tokens.label_weight is None:
        return loss
    per_token = torch.nn.functional.cross_entropy(student.to(dtype), tokens.labels, reduction="none")
    return loss + torch.where(tokens.label_weight != 0, tokens.label_weight.to(dtype) * per_token, 0).sum()


def _bucketed(log_q: Tensor, indices: Tensor) -> Tensor:
    """ln q of the cached entries and of all others together, (T, K + 1)."""
    kept = log_q.gather(-1, indices)
    if indices.shape[-1] == log_q.shape[-1]:
        return torch.cat([kept, torch.full_like(kept[:, :1], float("-inf"))], -1)
    others = log_q.scatter(-1, indices, float("-inf"))
    absent = others.amax(-1, keepdim=True) == float("-inf")  # the derivative of ln Σ of these is no number
    others = torch.where(absent, 0, others).logsumexp(-1, keepdim=True)
    return torch.cat([kept, torch.where(absent, float("-inf"), others)], -1)


def _rule(divergence: Divergence, log_p: Tensor, teacher: Tensor | TopK, vocabulary: int) -> Tensor | float:
    entries = log_p[:, :-1] if isinstance(teacher, TopK) else log_p
    if divergence.weight_rule == "confidence":
        return entries.amax(-1).exp()
    if divergence.weight_rule == "entropy":
        return torch.special.entr(log_p.exp()).sum(-1) / math.log(max(vocabulary, 2))
    return 1.0
