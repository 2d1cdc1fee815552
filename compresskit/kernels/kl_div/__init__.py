"""Forward Kullback–Leibler divergence between two sets of logits, with one weight per token.

    kl_div(z_s, z_t, token_weight=w, temperature=τ)
      == τ² · (w · F.kl_div(log_softmax(z_s/τ), log_softmax(z_t/τ), log_target=True, reduction="none").sum(-1)).sum()

    with p = softmax(z_t/τ), q = softmax(z_s/τ):     ∂loss/∂z_s[t] = τ · w[t] · (q[t] − p[t])

The factor τ² keeps the gradient's size independent of the temperature (arXiv:1503.02531). Three implementations of this
one definition: `reference` (plain torch, saves several (T, V) tensors), `chunked` (any device, the gradient is computed
in the forward pass, working memory under a budget) and `triton` (CUDA, one program per row, two reads of the logits).
"""

from typing import Literal, get_args

from torch import Tensor

from compresskit.kernels.kl_div.chunked import chunked_kl_div
from compresskit.kernels.kl_div.reference import reference_kl_div
from compresskit.kernels.kl_div.support import why_not_triton

Impl = Literal["auto", "triton", "chunked", "reference"]

__all__ = ["Impl", "kl_div", "why_not_triton"]


def kl_div(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    token_weight: Tensor,
    temperature: float = 1.0,
    impl: Impl = "auto",
    memory_mb: int = 64,
) -> Tensor:
    """τ² Σ_t w_t KL(teacher_t ‖ student_t), a scalar; the gradient goes to the student alone.

    Args:
        student_logits: (T, V_s), any float dtype.
        teacher_logits: (T, V_t), must not require grad. Where V_s and V_t differ (padded vocabularies of one tokenizer)
            both are cut to the shorter.
        token_weight: (T,), already normalised by the caller: nothing here divides by a count. A token of weight 0 is
            not read, so it may hold anything, NaN included.
        temperature: τ > 0.
        impl: `auto` takes Triton where it can run, else `chunked`.
        memory_mb: working memory of `chunked` in MiB, the returned gradient (T, V_s) not counted.

    Returns:
        A scalar in float32, or in float64 where the student's logits are. All weights 0 give 0 with a zero gradient.
        A column that both give −∞ adds nothing; one that the student alone gives −∞ makes the divergence infinite,
        as it is.

    Raises:
        ValueError: shapes that do not agree, τ ≤ 0, a teacher that requires grad, an unknown `impl`, or `impl="triton"`
            where Triton cannot run (the message says why).

    Cost: `chunked` reads the logits a few times and keeps the gradient (T, V_s) until backward.
    """
    _check(student_logits, teacher_logits, token_weight, temperature, impl)
    reason = why_not_triton(student_logits, teacher_logits) if impl in ("auto", "triton") else None
    if impl == "triton" and reason:
        raise ValueError(f"impl='triton' cannot run here: {reason}")
    if impl == "reference":
        return reference_kl_div(student_logits, teacher_logits, token_weight, temperature)
    if impl == "chunked" or reason:
        return chunked_kl_div(student_logits, teacher_logits, token_weight, temperature, memory_mb)
    from compresskit.kernels.kl_div.triton import triton_kl_div

    return triton_kl_div(student_logits, teacher_logits, token_weight, temperature)


def _check(student: Tensor, teacher: Tensor, weight: Tensor, temperature: float, impl: str) -> None:
    if impl not in get_args(Impl):
        raise ValueError(f"impl {impl!r} is none of {', '.join(get_args(Impl))}")
    if student.ndim != 2 or teacher.ndim != 2 or student.shape[0] != teacher.shape[0]:
        raise ValueError(f"logits must be (T, V) with equal T, got {tuple(student.shape)} and {tuple(teacher.shape)}")
    if weight.shape != student.shape[:1]:
        raise ValueError(f"token_weight must be ({student.shape[0]},), got {tuple(weight.shape)}")
    if weight.requires_grad:
        raise ValueError("token_weight requires grad; the weights are constants here, so detach them")
    if teacher.requires_grad:
        raise ValueError("the teacher's logits require grad; run the teacher under torch.no_grad() or detach them")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
