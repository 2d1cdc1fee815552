"""Loss and gradient of a slab of logits, in place and tile by tile: the part that every chunked op shares.

A slab holds the raw output products of a few tokens, vocabulary first: (V, C). Rows of it are contiguous tiles that
stay in a core's cache, and the products around it run in the orientation that is fastest on a CPU. Three passes:

    statistics   ln Σ exp of each token, by a running maximum                    (student and teacher)
    reduction    D = Σ f and Σ r, only where the gradient needs Σ r or no gradient is wanted
    gradient     student slab ← ∂loss/∂product

All numbers are float32 (float64 for float64 slabs), whatever the slab's dtype. Nothing here divides by a count.

A slab of 16 bits holds what the library's product rounded, as the model's own logits are. To take each token's centre
out before that rounding, the product would have to know it: by an epilogue that library products do not offer, or by
a copy of the head with one column more. Neither is here; where the rounding matters (a student near its teacher),
float32 hidden states give float32 slabs.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compresskit.kernels.divergence import Divergence, summand_and_slope, working_dtype
from compresskit.kernels.exponential import exp, exp_

# V vocabulary, C tokens of the slab, K entries of a top-k teacher
#: Elements of a tile: a handful of float32 temporaries of this size fit a second-level cache.
TILE_ELEMENTS = 1 << 16
#: Temporaries of a tile that are alive together, at most.
_TILE_BUFFERS = 12


def tile_elements(memory_bytes: int, dtype: torch.dtype) -> int:
    """How large a tile may be so that its temporaries take at most `memory_bytes`."""
    return max(1, min(TILE_ELEMENTS, memory_bytes // tile_bytes(1, dtype)))


def tile_bytes(elements: int, dtype: torch.dtype) -> int:
    """Bytes of the temporaries of a tile of `elements` elements, at most."""
    return elements * _TILE_BUFFERS * working_dtype(dtype).itemsize


@dataclass(frozen=True)
class Readout:
    """From an output product x to logits: z = cap · tanh(scale · (x + bias) / cap), without the tanh where cap is None.

    Attributes:
        bias: (V,), or None.
        scale: a factor on the logits (Granite divides by 8, Cohere multiplies).
        softcap: cap > 0 (Gemma), or None. Under a cap a bias of −∞ gives the logit −cap: no absent column.
    """

    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, product: Tensor, bias: Tensor | None) -> Tensor:
        """z of `product`, to which `bias` broadcasts; `product` itself where there is nothing to do."""
        if bias is not None:
            product = product + bias
        if self.scale != 1:
            product = product * self.scale
        return product if self.softcap is None else self.softcap * (product / self.softcap).tanh()

    def tile(self, slab: Tensor, part: slice, dtype: torch.dtype) -> Tensor:
        """z of some rows of a slab, in `dtype`."""
        bias = None if self.bias is None else self.bias[part, None].to(dtype)
        return self.logits(slab[part].to(dtype), bias)

    def picked(self, slab: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
        """z of `index` (K, C), K entries of each token."""
        bias = None if self.bias is None else self.bias[index].to(dtype)
        return self.logits(slab.gather(0, index).to(dtype), bias)

    def backward_(self, grad: Tensor, logits: Tensor) -> Tensor:
        """∂loss/∂x from ∂loss/∂z, in place."""
        if self.scale != 1:
            grad *= self.scale
        if self.softcap is not None:
            grad *= 1 - (logits / self.softcap).square()
        return grad


@dataclass(frozen=True)
class TokenTerms:
    """What each token of a slab counts: all (C,), in the working dtype.

    Attributes:
        weight: w of the divergence.
        labels: int64 class of the cross-entropy, or None.
        label_weight: c of the cross-entropy; None exactly where `labels` is.
    """

    weight: Tensor
    labels: Tensor | None = None
    label_weight: Tensor | None = None


@dataclass(frozen=True)
class Statistics:
    """What turns a token's logits into ln softmax, all (C,).

    The largest logit and the log of the sum stay apart: their sum would round at the size of the logits, and near the
    teacher ln p − ln q is far smaller.

    Attributes:
        temperature: τ.
        peak: max z.
        log_total: ln Σ exp((z − peak)/τ).
        log_total_one: ln Σ exp(z − peak), where it was asked for.
        entropy: of softmax(z/τ), where it was asked for.
    """

    temperature: float
    peak: Tensor
    log_total: Tensor
    log_total_one: Tensor | None = None
    entropy: Tensor | None = None

    def log_softmax(self, logits: Tensor) -> Tensor:
        """ln softmax(z/τ) of some logits (…, C)."""
        shifted = logits - self.peak
        if self.temperature != 1:
            shifted /= self.temperature
        return shifted.sub_(self.log_total)

    def log_softmax_one(self, logits: Tensor) -> Tensor:
        """ln softmax(z) of some logits (…, C)."""
        assert self.log_total_one is not None
        return (logits - self.peak).sub_(self.log_total_one)


def tiles(slab: Tensor, elements: int) -> Iterator[slice]:
    """Slices over the vocabulary of a slab, of about `elements` elements each."""
    rows = max(1, elements // max(1, slab.shape[1]))
    for start in range(0, slab.shape[0], rows):
        yield slice(start, min(start + rows, slab.shape[0]))


def slab_statistics(
    slab: Tensor, readout: Readout, temperature: float, *, tile: int, at_one: bool = False, entropy: bool = False
) -> Statistics:
    """The statistics of a slab in one pass over it; −∞ logits count as absent."""
    dtype = working_dtype(slab.dtype)
    peak = slab.new_full((slab.shape[1],), torch.finfo(dtype).min, dtype=dtype)
    total, total_one, moment = (torch.zeros_like(peak) for _ in range(3))
    for part in tiles(slab, tile):
        logits = readout.tile(slab, part, dtype)
        higher = torch.maximum(peak, logits.amax(0))
        drop = (peak - higher) / temperature
        shifted = logits - higher
        if at_one:
            total_one = total_one * (peak - higher).exp() + exp(shifted).sum(0)
        if temperature != 1:
            shifted /= temperature
        if entropy:
            weights = exp(shifted)
            gained = (weights * shifted.clamp_min_(torch.finfo(dtype).min / 4)).sum(0)  # 0 · −∞ is no number
            moment = drop.exp() * torch.where(total > 0, moment + drop * total, 0) + gained
            total = total * drop.exp() + weights.sum(0)
        else:
            total = total * drop.exp() + exp_(shifted).sum(0)
        peak = higher
    return Statistics(
        temperature,
        peak,
        total.log(),
        total_one.log() if at_one else None,
        total.log() - moment / total if entropy else None,
    )


def drop_idle_(teacher: Tensor, tokens: TokenTerms) -> None:
    """Make the teacher's columns (V, C) of tokens that are there for their label alone 0: not a number · 0 is none."""
    if tokens.labels is not None:
        teacher.index_fill_(1, (tokens.weight == 0).nonzero().flatten(), 0)


def weighted(weight: Tensor, value: Tensor | float) -> Tensor:
    """w · D of each token, (C,); 0 where w is, whatever D is there, also where that is no number."""
    return torch.where(weight > 0, weight * value, 0)


def rule_factor(divergence: Divergence, teacher: Statistics, vocabulary: int) -> Tensor | float:
    """What the weight rule multiplies each token's weight with, (C,)."""
    if divergence.weight_rule == "confidence":
        return (-teacher.log_total).exp()
    if divergence.weight_rule == "entropy":
        assert teacher.entropy is not None
        return teacher.entropy / math.log(max(vocabulary, 2))
    return 1.0


@dataclass(frozen=True)
class Outward:
    """From ∂D/∂(z/τ) to ∂loss/∂product: the tokens' weights, the cross-entropy, and the readout.

    Attributes:
        readout: the student's.
        factor: τ w, (C,).
        label_weight: c, (C,), or None.
        student: its statistics, with those at temperature 1 where there are labels.
    """

    readout: Readout
    factor: Tensor
    label_weight: Tensor | None
    student: Statistics

    def grad_(self, slope: Tensor, logits: Tensor) -> Tensor:
        """∂loss/∂product of some elements, without the −c of the labels' own; overwrites `slope`."""
        grad = slope.mul_(self.factor)
        if self.label_weight is not None:
            grad += exp_(self.student.log_softmax_one(logits)).mul_(self.label_weight)
        return self.readout.backward_(grad, logits)

    def label_grad(self, slope: Tensor, logits: Tensor) -> Tensor:
        """∂loss/∂product of the labels' logits, (1, C); overwrites `slope`."""
        assert self.label_weight is not None
        grad = slope.mul_(self.factor)
        grad += self.student.log_softmax_one(logits).expm1_().mul_(self.label_weight)
        return self.readout.backward_(grad, logits)

    def label_loss(self, logits: Tensor) -> Tensor:
        """−Σ c ln softmax(z)_y, a scalar, from the labels' logits (1, C)."""
        assert self.label_weight is not None
        log_q = self.student.log_softmax_one(logits)[0]
        return -torch.where(self.label_weight > 0, self.label_weight * log_q, 0).sum()


class _DensePair:
    """A student's and a teacher's slab, with the statistics that turn their logits into ln q and ln p."""

    def __init__(
        self,
        student: Tensor,
        teacher: Tensor,
        divergence: Divergence,
        readouts: tuple[Readout, Readout],
        *,
        at_one: bool,
        tile: int,
    ) -> None:
        self.student, self.teacher, self.divergence, self.readouts = student, teacher, divergence, readouts
        self.dtype, tau = working_dtype(student.dtype), divergence.temperature
        self.parts = list(tiles(student, tile))
        self.ours = slab_statistics(student, readouts[0], tau, tile=tile, at_one=at_one)
        entropy = divergence.weight_rule == "entropy"
        self.theirs = slab_statistics(teacher, readouts[1], tau, tile=tile, entropy=entropy)

    def terms(self, part: slice | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The student's logits, f, r and q of some rows, or of picked entries (K, C) of each token."""
        if isinstance(part, slice):
            logits = self.readouts[0].tile(self.student, part, self.dtype)
            teacher = self.readouts[1].tile(self.teacher, part, self.dtype)
        else:
            logits = self.readouts[0].picked(self.student, part, self.dtype)
            teacher = self.readouts[1].picked(self.teacher, part, self.dtype)
        log_q = self.ours.log_softmax(logits)
        return logits, *summand_and_slope(self.divergence, self.theirs.log_softmax(teacher), log_q)

    def sums(self) -> tuple[Tensor, Tensor]:
        """D = Σ f and Σ r of each token, (C,)."""
        value, slope_sum = torch.zeros_like(self.ours.peak), torch.zeros_like(self.ours.peak)
        for part in self.parts:
            _, f, slope, _ = self.terms(part)
            value += f.sum(0)
            slope_sum += slope.sum(0)
        return value, slope_sum


@torch.no_grad()
def slab_loss_(
    student: Tensor,
    teacher: Tensor,
    tokens: TokenTerms,
    divergence: Divergence,
    readouts: tuple[Readout, Readout],
    *,
    wants_grad: bool,
    tile: int = TILE_ELEMENTS,
) -> Tensor:
    """Σ τ² w D + Σ c CE of a slab, a scalar; with `wants_grad` the student's slab becomes ∂loss/∂product.

    Args:
        student: (V, C), float, any strides; overwritten with the gradient, or left as it is.
        teacher: (V, C), only read; beside labels, a token of weight 0 is overwritten, whatever it holds.
        tokens: what each of the C tokens counts.
        divergence: what is measured.
        readouts: the student's and the teacher's.
        wants_grad: whether the gradient is written.
        tile: elements that are worked on at once; see `tile_elements`.
    """
    drop_idle_(teacher, tokens)
    pair = _DensePair(student, teacher, divergence, readouts, at_one=tokens.labels is not None, tile=tile)
    weight = tokens.weight * rule_factor(divergence, pair.theirs, len(teacher))
    outward = Outward(readouts[0], divergence.temperature * weight, tokens.label_weight, pair.ours)
    label_row = None if tokens.labels is None else tokens.labels[None]
    loss = torch.zeros_like(weight).sum()
    known = divergence.slope_sum
    if known is None or not wants_grad:
        value, slope_sum = pair.sums()
    else:
        value, slope_sum = torch.zeros_like(weight), torch.full_like(weight, known)
    label_grad = None
    if label_row is not None:
        logits, _, slope, q = pair.terms(label_row)
        loss = outward.label_loss(logits)
        label_grad = outward.label_grad(slope - q * slope_sum, logits)
    if wants_grad:
        gained = torch.zeros_like(weight)
        for part in pair.parts:
            logits, f, slope, q = pair.terms(part)
            gained += f.sum(0)
            student[part] = outward.grad_(torch.addcmul(slope, q, slope_sum, value=-1, out=q), logits)
        value = gained
    if wants_grad and label_row is not None and label_grad is not None:
        student.scatter_(0, label_row, label_grad.to(student.dtype))
    return loss + divergence.temperature**2 * weighted(weight, value).sum()
