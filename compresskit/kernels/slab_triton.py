"""`slab_loss_` as fused Triton kernels between library products: each logit is read two or three times, never copied.

    statistics   running max and Σ exp of student and teacher, for reverse KL Σ e (s_q − s_p), for entropy Σ e ln e
    slopes       Σ r, only for the divergences whose gradient needs it and that no running sum gives
    gradient     student slab ← ∂loss/∂product in place, and D

A program takes a block of tokens and one part of the vocabulary, so that a slab of few tokens still fills a GPU; the
parts' sums are joined by a few operations on (parts, C). Numbers are float32 in registers. Bytes moved per logit in
bfloat16: 4 in the products that write both slabs, 4 a read of both, 2 to write the gradient, 4 in the products that
read it: 18 for forward and reverse KL, 22 for the rest.
"""

# Pyright does not know the types inside kernels.
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportArgumentType=false

from dataclasses import dataclass
from typing import Any, get_args

import torch
import triton
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from compresskit.kernels.divergence import FAR, Divergence, Kind
from compresskit.kernels.slab import Readout, Statistics, TokenTerms, rule_factor, weighted

# V vocabulary, C tokens of the slab, P parts of the vocabulary
BLOCK_V, BLOCK_C, NUM_WARPS = 32, 64, 8
#: Programs that a launch has, about, where the vocabulary is long enough to be parted; a part's sums cost as much as
#: a few dozen of its logits.
_PROGRAMS, _SHORTEST_PART = 512, 1024
_FORWARD, _REVERSE, _JSD, _SKEW_FORWARD, _SKEW_REVERSE, _TOTAL_VARIATION = range(6)
_FARTHEST = tl.constexpr(FAR)
_FORWARD_KL, _REVERSE_KL = tl.constexpr(_FORWARD), tl.constexpr(_REVERSE)
_JENSEN_SHANNON, _SKEW_P, _SKEW_Q = tl.constexpr(_JSD), tl.constexpr(_SKEW_FORWARD), tl.constexpr(_SKEW_REVERSE)
# A kernel knows a kind by its place in `Kind`.
_ORDER = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation")
assert get_args(Kind) == _ORDER, get_args(Kind)


@triton.jit
def _logits(slab, bias, v, c, inside, stride_v, stride_c, scale, softcap, HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr):
    """A tile of logits in float32; −∞ outside."""
    at = slab + v.to(tl.int64) * stride_v + c.to(tl.int64) * stride_c
    x = tl.load(at, mask=inside, other=float("-inf")).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + v, mask=inside, other=0.0).to(tl.float32)
    x *= scale
    if CAPPED:
        x = tl.where(inside, softcap * (1 - 2 / (tl.exp(2 * x / softcap) + 1)), float("-inf"))
    return x


@triton.jit
def _add_tile(x, peak, total, moment, inverse_tau, MOMENT: tl.constexpr):
    """A running max, Σ e and Σ e·s over axis 0, with s = (x − max)/τ and e = exp(s)."""
    higher = tl.maximum(peak, tl.max(x, 0))
    drop = (peak - higher) * inverse_tau
    shifted = (x - higher[None, :]) * inverse_tau
    e = tl.exp(shifted)
    if MOMENT:
        moment = tl.exp(drop) * tl.where(total > 0, moment + drop * total, 0.0)  # drop may be −∞, and 0 · −∞ is none
        moment += tl.sum(tl.where(e > 0, e * shifted, 0.0), 0)
    return higher, total * tl.exp(drop) + tl.sum(e, 0), moment


@triton.jit
def statistics_kernel(
    student, teacher, student_bias, teacher_bias, out,
    vocabulary, tokens, span, parts, s_stride_v, s_stride_c, t_stride_v, t_stride_c,
    inverse_tau, s_scale, s_softcap, t_scale, t_softcap,
    S_BIAS: tl.constexpr, S_CAPPED: tl.constexpr, T_BIAS: tl.constexpr, T_CAPPED: tl.constexpr,
    AT_ONE: tl.constexpr, REVERSE: tl.constexpr, ENTROPY: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out (7, P, C): max and Σ of student and of teacher, the student's Σ at τ = 1, Σ e_q (s_q − s_p), Σ e_p s_p.

    e and s are those of `_add_tile`: a difference of logits themselves would round at the size of an offset.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(1)
    # A finite least value: −∞ − −∞ is no number, and what is far above float32's range of exponents is 0 anyway.
    lowest = -3.0e38
    s_peak, t_peak = tl.full((BLOCK_C,), lowest, tl.float32), tl.full((BLOCK_C,), lowest, tl.float32)
    s_total, t_total = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    one_total, gap, moment = s_total, s_total, s_total
    for start in range(part * span, min(part * span + span, vocabulary), BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)[:, None]
        inside = (v < vocabulary) & (c < tokens)[None, :]
        a = _logits(
            student, student_bias, v, c[None, :], inside, s_stride_v, s_stride_c, s_scale, s_softcap, S_BIAS, S_CAPPED
        )
        b = _logits(
            teacher, teacher_bias, v, c[None, :], inside, t_stride_v, t_stride_c, t_scale, t_softcap, T_BIAS, T_CAPPED
        )
        if AT_ONE:
            _, one_total, _ = _add_tile(a, s_peak, one_total, gap, 1.0, False)
        if REVERSE:
            s_higher, t_higher = tl.maximum(s_peak, tl.max(a, 0)), tl.maximum(t_peak, tl.max(b, 0))
            s, t = (a - s_higher[None, :]) * inverse_tau, (b - t_higher[None, :]) * inverse_tau
            s_drop, t_drop = (s_peak - s_higher) * inverse_tau, (t_peak - t_higher) * inverse_tau
            e = tl.exp(s)
            gap = tl.exp(s_drop) * tl.where(s_total > 0, gap + s_total * (s_drop - t_drop), 0.0)
            gap += tl.sum(tl.where(e > 0, e * (s - t), 0.0), 0)
        s_peak, s_total, _ = _add_tile(a, s_peak, s_total, gap, inverse_tau, False)
        t_peak, t_total, moment = _add_tile(b, t_peak, t_total, moment, inverse_tau, ENTROPY)
    at = out + part * tokens + c
    plane = parts * tokens
    tl.store(at, s_peak, mask=c < tokens)
    tl.store(at + plane, s_total, mask=c < tokens)
    tl.store(at + 2 * plane, t_peak, mask=c < tokens)
    tl.store(at + 3 * plane, t_total, mask=c < tokens)
    tl.store(at + 4 * plane, one_total, mask=c < tokens)
    tl.store(at + 5 * plane, gap, mask=c < tokens)
    tl.store(at + 6 * plane, moment, mask=c < tokens)


@triton.jit
def _expm1(x):
    """eˣ − 1; the series where the difference would cancel."""
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6)))))
    return tl.where(tl.abs(x) < 0.25, series, tl.exp(x) - 1)


@triton.jit
def _log1p(x):
    """ln(1 + x) of x ≥ 0; near 0 the series of 2 artanh(x / (2 + x))."""
    s = x / (2 + x)
    series = 2 * s * (1 + s * s * (1.0 / 3 + s * s * (1.0 / 5 + s * s * (1.0 / 7))))
    return tl.where(x < 0.25, series, tl.log(1 + x))


@triton.jit
def _over_mixture(lx, ly, share):
    apart = tl.minimum(tl.maximum(ly - lx, -_FARTHEST), _FARTHEST)
    log_m = _log1p(tl.where(apart > 0, 1 - share, share) * _expm1(tl.abs(apart)))
    over_y = tl.maximum(apart, 0.0) - log_m
    return over_y - apart, over_y


@triton.jit
def _value_and_slope(lp, lq, mix, tie, KIND: tl.constexpr):
    """f, r and q of `compresskit.kernels.divergence.summand_and_slope`; `tie` is a share of q."""
    if KIND >= _JENSEN_SHANNON:
        lp, lq = tl.maximum(lp, -1.0e37), tl.maximum(lq, -1.0e37)
    p, q = tl.exp(lp), tl.exp(lq)
    if KIND == _FORWARD_KL:
        value, slope = p * tl.where(p > 0, lp - lq, 0.0) + (q - p), -p
    elif KIND == _REVERSE_KL:
        slope = q * tl.where(q > 0, lq - lp, 0.0)
        value = slope + (p - q)
    elif KIND == _JENSEN_SHANNON:
        over_p, over_q = _over_mixture(lp, lq, mix)
        slope = (1 - mix) * q * over_q
        value = mix * p * over_p + slope
    elif KIND == _SKEW_P:
        over, _ = _over_mixture(lp, lq, mix)
        value, slope = p * over + (1 - mix) * (q - p), (mix - 1) * q * tl.exp(over)
    elif KIND == _SKEW_Q:
        over, _ = _over_mixture(lq, lp, mix)
        value, slope = q * over + (1 - mix) * (p - q), q * (over - mix * _expm1(over))
    else:
        value = 0.5 * tl.abs(p - q)
        differ = tl.abs(q - p) > tie * q
        slope = 0.5 * q * tl.where(differ, tl.where(q > p, 1.0, -1.0), 0.0)
    return value, slope, q


@triton.jit
def terms_kernel(
    student, teacher, student_bias, teacher_bias, token, labels, out,
    vocabulary, tokens, span, parts, s_stride_v, s_stride_c, t_stride_v, t_stride_c,
    inverse_tau, s_scale, s_softcap, t_scale, t_softcap, mix, tie,
    S_BIAS: tl.constexpr, S_CAPPED: tl.constexpr, T_BIAS: tl.constexpr, T_CAPPED: tl.constexpr,
    AT_ONE: tl.constexpr, KIND: tl.constexpr, WRITES: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out (3, P, C): Σ f, Σ r and −ln softmax(z)_y; with WRITES the student's slab becomes ∂loss/∂product.

    token (8, C): peak and log total of the student, of the teacher, log total at τ = 1, Σ r, τ w and c.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    here, part = c < tokens, tl.program_id(1)
    s_peak = tl.load(token + c, mask=here, other=0.0)[None, :]
    s_log = tl.load(token + tokens + c, mask=here, other=0.0)[None, :]
    t_peak = tl.load(token + 2 * tokens + c, mask=here, other=0.0)[None, :]
    t_log = tl.load(token + 3 * tokens + c, mask=here, other=0.0)[None, :]
    slope_sum = tl.load(token + 5 * tokens + c, mask=here, other=0.0)[None, :]
    factor = tl.load(token + 6 * tokens + c, mask=here, other=0.0)[None, :]
    if AT_ONE:
        one_log = tl.load(token + 4 * tokens + c, mask=here, other=0.0)[None, :]
        label_weight = tl.load(token + 7 * tokens + c, mask=here, other=0.0)[None, :]
        label = tl.load(labels + c, mask=here, other=-1)[None, :]
    values = tl.zeros((BLOCK_C,), tl.float32)
    slopes, label_loss = values, values
    for start in range(part * span, min(part * span + span, vocabulary), BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)[:, None]
        inside = (v < vocabulary) & here[None, :]
        a = _logits(
            student, student_bias, v, c[None, :], inside, s_stride_v, s_stride_c, s_scale, s_softcap, S_BIAS, S_CAPPED
        )
        b = _logits(
            teacher, teacher_bias, v, c[None, :], inside, t_stride_v, t_stride_c, t_scale, t_softcap, T_BIAS, T_CAPPED
        )
        lp = (b - t_peak) * inverse_tau - t_log
        lq = (a - s_peak) * inverse_tau - s_log
        value, slope, q = _value_and_slope(lp, lq, mix, tie, KIND)
        values += tl.sum(value, 0)
        if not WRITES:
            slopes += tl.sum(slope, 0)
        grad = tl.where(factor > 0, factor * (slope - q * slope_sum), 0.0)  # a token that is there for its label alone
        if AT_ONE:
            log_q_one = a - s_peak - one_log
            named = v == label
            label_loss -= tl.sum(tl.where(named & inside, log_q_one, 0.0), 0)
            grad += label_weight * (tl.exp(log_q_one) - tl.where(named, 1.0, 0.0))
        if WRITES:
            grad *= s_scale
            if S_CAPPED:
                grad *= 1 - (a / s_softcap) * (a / s_softcap)
            at = student + v.to(tl.int64) * s_stride_v + c[None, :].to(tl.int64) * s_stride_c
            tl.store(at, grad.to(student.dtype.element_ty), mask=inside)
    at = out + part * tokens + c
    tl.store(at, values, mask=here)
    tl.store(at + parts * tokens, slopes, mask=here)
    tl.store(at + 2 * parts * tokens, label_loss, mask=here)


@dataclass(frozen=True)
class _Launch:
    """What both kernels are started with: the slabs, how they are parted, and their readouts."""

    student: Tensor
    teacher: Tensor
    divergence: Divergence
    readouts: tuple[Readout, Readout]
    at_one: bool

    def parts(self) -> tuple[int, int]:
        """How many parts the vocabulary has, and the length of one."""
        vocabulary, tokens = self.student.shape
        wanted = max(1, _PROGRAMS // triton.cdiv(tokens, BLOCK_C))
        span = triton.cdiv(max(_SHORTEST_PART, triton.cdiv(vocabulary, wanted)), BLOCK_V) * BLOCK_V
        return triton.cdiv(vocabulary, span), span

    def run(self, kernel: Any, planes: int, *leading: Tensor, numbers: tuple[float, ...] = (), **flags: Any) -> Tensor:
        """Start `kernel`; its output, (planes, P, C)."""
        (vocabulary, tokens), (parts, span) = self.student.shape, self.parts()
        out = torch.empty(planes, parts, tokens, dtype=torch.float32, device=self.student.device)
        ours, theirs = self.readouts
        kernel[(triton.cdiv(tokens, BLOCK_C), parts)](
            self.student, self.teacher,
            self.student if ours.bias is None else ours.bias, self.teacher if theirs.bias is None else theirs.bias,
            *leading, out,
            vocabulary, tokens, span, parts, *self.student.stride(), *self.teacher.stride(),
            1 / self.divergence.temperature, ours.scale, ours.softcap or 1.0, theirs.scale, theirs.softcap or 1.0,
            *numbers,
            S_BIAS=ours.bias is not None, S_CAPPED=ours.softcap is not None,
            T_BIAS=theirs.bias is not None, T_CAPPED=theirs.softcap is not None,
            AT_ONE=self.at_one, BLOCK_V=BLOCK_V, BLOCK_C=BLOCK_C, num_warps=NUM_WARPS, **flags,
        )  # fmt: skip
        return out

    def statistics(self) -> tuple[Statistics, Statistics, Tensor]:
        """The student's, the teacher's, and reverse KL's Σ r (meaningless for other divergences), (C,)."""
        kind, rule, tau = self.divergence.kind, self.divergence.weight_rule, self.divergence.temperature
        flags = {"REVERSE": kind == "reverse_kl", "ENTROPY": rule == "entropy"}
        s_peaks, s_totals, t_peaks, t_totals, ones, gaps, moments = self.run(statistics_kernel, 7, **flags)
        s_peak, t_peak = s_peaks.amax(0), t_peaks.amax(0)
        s_below, t_below = (s_peaks - s_peak) / tau, (t_peaks - t_peak) / tau
        s_kept, t_kept = s_below.exp(), t_below.exp()
        s_total, t_total = (s_totals * s_kept).sum(0), (t_totals * t_kept).sum(0)
        log_one = (ones * (s_peaks - s_peak).exp()).sum(0).log() if self.at_one else None
        # A part without a logit has the least peak and a total of 0, and 0 · −∞ is no number.
        moment = (t_kept * torch.where(t_totals > 0, moments + t_below * t_totals, 0)).sum(0)
        gap = (s_kept * torch.where(s_totals > 0, gaps + (s_below - t_below) * s_totals, 0)).sum(0)
        entropy = t_total.log() - moment / t_total
        ours, theirs = (
            Statistics(tau, s_peak, s_total.log(), log_one),
            Statistics(tau, t_peak, t_total.log(), entropy=entropy),
        )
        return ours, theirs, gap / s_total + (theirs.log_total - ours.log_total)


@torch.no_grad()
def triton_slab_loss_(
    student: Tensor,
    teacher: Tensor,
    tokens: TokenTerms,
    divergence: Divergence,
    readouts: tuple[Readout, Readout],
    *,
    wants_grad: bool,
    tile: int = 0,
) -> Tensor:
    """As `slab_loss_`, on a CUDA device or under TRITON_INTERPRET=1; `tile` is not read."""
    if not len(tokens.weight):
        return tokens.weight.sum()
    launch = _Launch(student, teacher, divergence, readouts, tokens.labels is not None)
    ours, theirs, reverse_sum = launch.statistics()
    weight, known = weighted(tokens.weight, rule_factor(divergence, theirs, len(teacher))), divergence.slope_sum
    numbers = (divergence.mix, divergence.tie * torch.finfo(torch.float32).eps)
    label_weight = torch.zeros_like(weight) if tokens.label_weight is None else tokens.label_weight
    labels = weight if tokens.labels is None else tokens.labels

    def terms(slope_sum: Tensor, writes: bool) -> Tensor:
        one = torch.zeros_like(weight) if ours.log_total_one is None else ours.log_total_one
        rows = (ours.peak, ours.log_total, theirs.peak, theirs.log_total, one, slope_sum)
        token = torch.stack([*rows, divergence.temperature * weight, label_weight])
        kind = get_args(Kind).index(divergence.kind)
        return launch.run(terms_kernel, 3, token, labels, numbers=numbers, KIND=kind, WRITES=writes).sum(1)

    slope_sum = reverse_sum if divergence.kind == "reverse_kl" else torch.full_like(weight, known or 0.0)
    if wants_grad and known is None and divergence.kind != "reverse_kl":
        _, slope_sum, _ = terms(slope_sum, False)
    value, _, label_loss = terms(slope_sum, wants_grad)
    loss = divergence.temperature**2 * weighted(weight, value).sum()
    return loss if tokens.labels is None else loss + (label_weight * label_loss).sum()
