"""Output head and divergence in one, forward and backward, without the (tokens × vocabulary) logits.

    linear_kl(x_s, Head(W_s), x_t, Head(W_t), token_weight=w)
      == (w · F.kl_div(log_softmax(x_s @ W_s.T), log_softmax(x_t @ W_t.T), log_target=True, reduction="none").sum(-1))
         .sum()

The gradients of hidden states, weight and bias are made during the forward pass, chunk by chunk, while a chunk's logits
are at hand: `reference` is the definition in plain torch, `chunked` runs on any device within a budget of memory, and
`triton` replaces what lies between the products by fused kernels. Divergences: `compresskit.kernels.divergence`.
On a CPU the memory of the logits is kept for the next call, until `release_memory`.

Not for heads over few classes: where (T, V) is small, `compresskit.kernels.kl_div` of the logits does less.
"""

from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from compresskit.kernels import support
from compresskit.kernels.buckets import TopK
from compresskit.kernels.checks import check_impl, check_memory
from compresskit.kernels.divergence import FORWARD_KL, Divergence
from compresskit.kernels.linear_kl.chunked import least_memory_mb
from compresskit.kernels.linear_kl.head import Head, TiledWeight, same_weight
from compresskit.kernels.linear_kl.op import fused_linear_kl
from compresskit.kernels.linear_kl.problem import (
    Problem,
    Projected,
    autocast_dtype,
    checked_problem,
    choose_teacher,
)
from compresskit.kernels.linear_kl.products import release_memory
from compresskit.kernels.linear_kl.reference import reference_linear_kl

Impl = Literal["auto", "triton", "chunked", "reference"]

__all__ = ["Divergence", "Head", "Impl", "TiledWeight", "TopK", "linear_kl", "release_memory", "why_not_triton"]


def why_not_triton(student_hidden: Tensor, teacher: Tensor | TopK) -> str | None:
    """The reason why Triton cannot serve, None where it can; the teacher is given by hidden states, logits or cache."""
    if isinstance(teacher, TopK):
        return "a cached top-k teacher is served by chunked, on any device"
    return support.why_not_triton(student_hidden, teacher)


def linear_kl(
    student_hidden: Tensor,
    student_head: Head | Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_head: Head | Tensor | None = None,
    *,
    token_weight: Tensor,
    teacher_logits: Tensor | None = None,
    teacher_topk: TopK | None = None,
    divergence: Divergence = FORWARD_KL,
    labels: Tensor | None = None,
    label_weight: Tensor | None = None,
    impl: Impl = "auto",
    memory_mb: int = 1024,
) -> Tensor:
    """τ² Σ_t w_t D(p_t, q_t) + Σ_t c_t CE_t, a scalar; gradients go to the student's hidden states and head.

    Args:
        student_hidden: (T, H_s), float.
        student_head: a `Head`, or its weight (V_s, H_s) of the same dtype. Without requires_grad it is frozen, and the
            product for its gradient is not made.
        teacher_hidden: (T, H_t); with `teacher_head` one of three ways to give the teacher.
        teacher_head: a `Head`, or its weight (V_t, H_t). The student's own weight, detached, costs one product.
        token_weight: w (T,) ≥ 0, already normalised by the caller: nothing here divides by a count. A token that counts
            for nothing is not read, so it may hold anything, NaN included, and costs no product over the vocabulary.
        teacher_logits: (T, V_t), already capped and scaled.
        teacher_topk: the cached entries at the temperature of `divergence`, compared over them and one bucket for the
            rest: at most the divergence over the vocabulary.
        divergence: kind, mix, temperature τ and weight rule.
        labels: (T,) int64 classes of the cross-entropy at temperature 1; any number where c is 0.
        label_weight: c (T,) ≥ 0, as `token_weight`.
        impl: `auto` takes Triton where it can run, else `chunked`.
        memory_mb: working memory in MiB beside the gradients; it decides how many tokens a chunk has. On a CPU it is
            kept for the next call (`release_memory`). A 16-bit head whose gradient takes several chunks is summed in
            float32: 4 V H bytes more.

    Returns:
        A scalar in float32, or float64 where the hidden states are. All weights 0 give 0 with zero gradients. A column
        that both give −∞ adds nothing; one that the student alone gives −∞ makes forward KL infinite, as it is.
        Where V_s and V_t differ (padded vocabularies of one tokenizer) both are cut to the shorter.

    Raises:
        ValueError: shapes, dtypes or devices that do not agree, a teacher that requires grad, values out of range, a
            budget that does not hold one token, or `impl="triton"` where Triton cannot run (the message says why).
            Values (weights, labels, a cache's entries) are looked at on a CPU and outside of `torch.compile` only.
        RuntimeError: a second derivative is asked for (`impl="reference"` has one).

    Cost: 2 T V (3 H_s + H_t) floating point operations, H_s less for a frozen head; the gradients are kept until
        backward, in float32 for heads and hidden states of float16: there a scaled loss (`torch.amp.GradScaler`) then
        keeps small gradients. Under autocast the products run in its dtype.
    """
    ours, theirs = _as_head(student_head), None if teacher_head is None else _as_head(teacher_head)
    teacher = choose_teacher(teacher_hidden, theirs, teacher_logits, teacher_topk)
    problem = checked_problem(student_hidden, ours, teacher, token_weight, labels, label_weight, divergence)
    problem = _ready(problem)
    given = problem.teacher.hidden if isinstance(problem.teacher, Projected) else problem.teacher
    reason = why_not_triton(problem.hidden, given) if impl in ("auto", "triton") else None
    check_impl(impl, get_args(Impl), reason)
    if impl == "reference":
        return reference_linear_kl(problem)
    check_memory(memory_mb, least_memory_mb(problem))
    return fused_linear_kl(problem, "chunked" if impl == "chunked" or reason else "triton", memory_mb)


def _as_head(head: Head | Tensor) -> Head:
    return head if isinstance(head, Head) else Head(head)


def _ready(problem: Problem) -> Problem:
    """Hidden states past a low-rank head's thin factor, and all that meets in a product in autocast's dtype, if any."""
    hidden, ours, teacher = problem.hidden, problem.head, problem.teacher
    if ours.reduce is not None:  # its gradient is a product with all rows, so those that are not read must be numbers
        hidden = torch.where(problem.counts()[:, None], hidden, 0)
    hidden, head = _cast(ours.reduced(hidden), ours, None)
    if isinstance(teacher, Projected):
        theirs = teacher.head
        shared = not torch.compiler.is_compiling() and same_weight(ours.weight, theirs.weight)
        states, theirs = _cast(theirs.reduced(teacher.hidden), theirs, head.weight if shared else None)
        teacher = Projected(states, theirs)
    return replace(problem, hidden=hidden, head=head, teacher=teacher)


def _cast(hidden: Tensor, head: Head, same: Tensor | TiledWeight | None) -> tuple[Tensor, Head]:
    """Both in autocast's dtype, if any; `same` is the weight of the head where another has cast it before."""
    dtype = autocast_dtype(hidden)
    if dtype is None:
        return hidden, head
    weight = head.weight
    if isinstance(weight, Tensor):
        weight = same.detach() if isinstance(same, Tensor) else weight.to(dtype)
    return hidden.to(dtype), replace(head, weight=weight)
