"""Divergences between two sets of logits that are already there, with one weight per token.

    kl_div(z_s, z_t, token_weight=w, temperature=τ)
      == τ² · (w · F.kl_div(log_softmax(z_s/τ), log_softmax(z_t/τ), log_target=True, reduction="none").sum(-1)).sum()

The factor τ² keeps the gradient's size independent of the temperature (arXiv:1503.02531). `divergence_loss` takes any
of `compresskit.kernels.divergence`; `kl_div` and `jsd` are two of them by name. Three implementations of one
definition: `reference` (plain torch, saves several (T, V) tensors), `chunked` (any device, the gradient is made in the
forward pass, working memory under a budget) and `triton` (CUDA). Where the logits come from an output head that still
has to be applied, `compresskit.kernels.linear_kl` never makes them.
"""

from typing import Literal, get_args

from torch import Tensor

from compresskit.kernels import checks
from compresskit.kernels.divergence import FORWARD_KL, Divergence
from compresskit.kernels.kl_div.fused import fused_divergence, least_memory_mb
from compresskit.kernels.reference import reference_loss
from compresskit.kernels.slab import TokenTerms
from compresskit.kernels.support import why_not_triton

Impl = Literal["auto", "triton", "chunked", "reference"]

__all__ = ["Divergence", "Impl", "divergence_loss", "jsd", "kl_div", "why_not_triton"]


def divergence_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    token_weight: Tensor,
    divergence: Divergence = FORWARD_KL,
    impl: Impl = "auto",
    memory_mb: int = 64,
) -> Tensor:
    """τ² Σ_t w_t D(p_t, q_t), a scalar; the gradient goes to the student alone.

    Args:
        student_logits: (T, V_s), any float dtype.
        teacher_logits: (T, V_t), must not require grad. Where V_s and V_t differ (padded vocabularies of one tokenizer)
            both are cut to the shorter.
        token_weight: (T,) ≥ 0, already normalised by the caller: nothing here divides by a count. A token of weight 0
            is not read, so it may hold anything, NaN included.
        divergence: kind, mix, temperature τ > 0 and weight rule.
        impl: `auto` takes Triton where it can run, else `chunked`.
        memory_mb: working memory of `chunked` in MiB, the returned gradient (T, V_s) not counted.

    Returns:
        A scalar in float32, or in float64 where the student's logits are. All weights 0 give 0 with a zero gradient.
        A column that both give −∞ adds nothing; one that the student alone gives −∞ makes forward KL infinite.

    Raises:
        ValueError: shapes that do not agree, a teacher that requires grad, weights that are negative or not finite
            (looked at on a CPU and outside of `torch.compile` only), a budget that does not hold one token, an unknown
            `impl`, or `impl="triton"` where Triton cannot run (the message says why).
        RuntimeError: a second derivative is asked for (`impl="reference"` has one).

    Cost: `chunked` reads the logits a few times and keeps the gradient (T, V_s) until backward, in float32 for logits
        of float16: there a scaled loss (`torch.amp.GradScaler`) then keeps small gradients.
    """
    if student_logits.ndim != 2 or teacher_logits.ndim != 2 or len(student_logits) != len(teacher_logits):
        shapes = f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        raise ValueError(f"logits must be (T, V) with equal T, got {shapes}")
    checks.check_floats(student_logits=student_logits, teacher_logits=teacher_logits, token_weight=token_weight)
    checks.check_constant(teacher_logits=teacher_logits)
    checks.check_vocabulary(min(student_logits.shape[1], teacher_logits.shape[1]))
    checks.check_weights(len(student_logits), token_weight=token_weight)
    reason = why_not_triton(student_logits, teacher_logits) if impl in ("auto", "triton") else None
    checks.check_impl(impl, get_args(Impl), reason)
    if impl == "reference":
        rows, width = token_weight.nonzero().flatten(), min(student_logits.shape[1], teacher_logits.shape[1])
        student, teacher = (logits[rows, :width] for logits in (student_logits, teacher_logits))
        return reference_loss(student, teacher, TokenTerms(token_weight[rows]), divergence)
    checks.check_memory(memory_mb, least_memory_mb(student_logits, teacher_logits))
    chosen = "chunked" if impl == "chunked" or reason else "triton"
    return fused_divergence(student_logits, teacher_logits, token_weight, divergence, chosen, memory_mb)


def kl_div(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    token_weight: Tensor,
    temperature: float = 1.0,
    impl: Impl = "auto",
    memory_mb: int = 64,
) -> Tensor:
    """τ² Σ_t w_t KL(teacher_t ‖ student_t): `divergence_loss` of forward KL."""
    divergence = Divergence("forward_kl", temperature=temperature)
    return divergence_loss(
        student_logits,
        teacher_logits,
        token_weight=token_weight,
        divergence=divergence,
        impl=impl,
        memory_mb=memory_mb,
    )


def jsd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    token_weight: Tensor,
    beta: float = 0.5,
    temperature: float = 1.0,
    impl: Impl = "auto",
    memory_mb: int = 64,
) -> Tensor:
    """τ² Σ_t w_t (β KL(p ‖ m) + (1 − β) KL(q ‖ m)), m = β p + (1 − β) q: `divergence_loss` of the Jensen–Shannon."""
    divergence = Divergence("jsd", mix=beta, temperature=temperature)
    return divergence_loss(
        student_logits,
        teacher_logits,
        token_weight=token_weight,
        divergence=divergence,
        impl=impl,
        memory_mb=memory_mb,
    )
