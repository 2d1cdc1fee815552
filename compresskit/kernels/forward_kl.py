"""Forward KL of two slabs that may both be overwritten: fewer passes than `slab_loss_`, for one divergence.

    exponentials   b, a ← 2^(b − m_b), 2^(a − m_a)    m: the maxima of a tile; sums of both, and of the new b times
                                                      (b − m_b) − (a − m_a), which no offset between the two rounds
    gradient       a ← w (q − p) = (w s_a) a − (w s_b) b    s = 2^(m − max m) / Σ, of each tile and token

With a, b the logits of student and teacher in base 2, D / ln 2 = Σ p (b − a) + log₂ Σ 2^a − log₂ Σ 2^b. The sums over
tiles run in float64 with the maxima put back, since the three terms cancel near the teacher. Labels of weight c, at
temperature 1, add c to the first factor and take c from the label's own row. Thirteen passes over tiles that stay in a
core's cache, where `slab_loss_`, which keeps the logits and rounds its gradient once, needs about thirty; in base 2,
because exponentials are the slowest of them (`compresskit.kernels.exponential`).

Slabs of float32 and float64 hold the exponentials between the two steps. Slabs of 16 bits would round them, so there
both steps read the logits into float32 tiles and make them; the gradient alone is rounded, once.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from compresskit.kernels.divergence import Divergence, working_dtype
from compresskit.kernels.exponential import LOG2_E
from compresskit.kernels.slab import Readout, TokenTerms, drop_idle_, tiles, weighted

# V vocabulary, C tokens of the slab, N tiles


def serves(
    dtypes: Sequence[torch.dtype], divergence: Divergence, readouts: tuple[Readout, Readout], *, labels: bool
) -> bool:
    """Whether `forward_kl_` computes this loss: forward KL of two slabs of one dtype, biases finite."""
    return (
        divergence.kind == "forward_kl"
        and divergence.weight_rule == "none"
        and (not labels or divergence.temperature == 1)
        and len(set(dtypes)) == 1
        and all(one.softcap is None for one in readouts)
        and all(one.bias is None or bool(one.bias.isfinite().all()) for one in readouts)
    )


def stretch(readout: Readout, temperature: float, dtype: torch.dtype) -> float:
    """What hidden states of `dtype` are to be multiplied with before the product.

    In full precision that makes the products logits over τ in base 2; 16 bits it would round a second time.
    """
    return _to_base_2(readout, temperature) if dtype == working_dtype(dtype) else 1.0


def _to_base_2(readout: Readout, temperature: float) -> float:
    """From a product, without its bias, to its logit over τ in base 2."""
    return readout.scale / temperature * LOG2_E


class _Tiles:
    """The logits in base 2 of student and teacher, tile by tile: the slabs' own rows, or float32 copies of them."""

    def __init__(self, slabs: tuple[Tensor, Tensor], readouts: tuple[Readout, Readout], temperature: float, tile: int):
        self.slabs, self.parts = slabs, list(tiles(slabs[0], tile))
        self.factors = [_to_base_2(one, temperature) for one in readouts]
        self.dtype = working_dtype(slabs[0].dtype)
        self.in_place = slabs[0].dtype == self.dtype
        self.biases = [
            None if one.bias is None else one.bias[:, None].to(self.dtype) * factor
            for one, factor in zip(readouts, self.factors, strict=True)
        ]
        rows = len(slabs[0][self.parts[0]]) if self.parts else 0
        self.memory = slabs[0].new_empty(1 if self.in_place else 3, rows, slabs[0].shape[1], dtype=self.dtype)

    def spare(self, part: slice) -> Tensor:
        """Room for one tile more."""
        return self.memory[0, : part.stop - part.start]

    def logits(self, part: slice) -> list[Tensor]:
        """Of student and teacher, (R, C) each; in place this can be asked for once."""
        found = []
        for i, (slab, factor, bias) in enumerate(zip(self.slabs, self.factors, self.biases, strict=True)):
            one = slab[part]
            if not self.in_place:
                one = self.memory[1 + i, : len(one)].copy_(one).mul_(factor)
            found.append(one if bias is None else one.add_(bias[part]))
        return found

    def exponentials(self, part: slice, peaks: Tensor) -> list[Tensor]:
        """2^(logits − peaks) (R, C) each, which `logits` gave and were then raised to in place; peaks (2, C)."""
        if self.in_place:
            return [slab[part] for slab in self.slabs]
        return [one.sub_(peak).exp2_() for one, peak in zip(self.logits(part), peaks, strict=True)]

    def picked(self, row: Tensor) -> Tensor:
        """The logits of one entry (1, C) of each token, before they are raised: (2, C) float64."""
        found = [slab.gather(0, row)[0].double() for slab in self.slabs]
        if not self.in_place:
            found = [one * factor for one, factor in zip(found, self.factors, strict=True)]
        biases = [0 if bias is None else bias[row[0], 0] for bias in self.biases]
        return torch.stack([one + bias for one, bias in zip(found, biases, strict=True)])


@torch.no_grad()
def forward_kl_(
    student: Tensor,
    teacher: Tensor,
    tokens: TokenTerms,
    temperature: float,
    readouts: tuple[Readout, Readout],
    *,
    tile: int,
) -> Tensor:
    """Σ τ² w KL(p‖q) + Σ c CE of two slabs, a scalar; the student's becomes ∂loss/∂product, the teacher's is used up.

    Args:
        student: (V, C) products of hidden states times `stretch`, any strides.
        teacher: (V, C), as the student's.
        tokens: what each of the C tokens counts.
        temperature: τ; 1 where there are labels.
        readouts: the student's and the teacher's, without a cap.
        tile: elements that are worked on at once.
    """
    drop_idle_(teacher, tokens)
    work = _Tiles((student, teacher), readouts, temperature, tile)
    shape = len(work.parts), student.shape[1]
    peaks, totals = (student.new_empty(shape[0], 2, shape[1], dtype=work.dtype) for _ in range(2))
    cross = student.new_empty(shape, dtype=work.dtype)
    label_row = None if tokens.labels is None else tokens.labels[None]
    labelled = None if label_row is None else work.picked(label_row)
    for n, part in enumerate(work.parts):
        a, b = work.logits(part)
        for logits, peak in zip((a, b), peaks[n], strict=True):
            torch.amax(logits, 0, out=peak)
            logits.sub_(peak)
        difference = torch.sub(b, a, out=work.spare(part))
        for logits, total in zip((a, b), totals[n], strict=True):
            torch.sum(logits.exp2_(), 0, out=total)
        torch.sum(difference.mul_(b), 0, out=cross[n])
    tops = peaks.amax(0).double()
    below = peaks.double() - tops
    shares = below.exp2()
    sums = (shares * totals).sum(0)
    shares /= sums
    log_sums = sums.log2()
    gaps = cross + totals[:, 1] * (below[:, 1] - below[:, 0])
    divergence = math.log(2) * ((shares[:, 1] * gaps).sum(0) + log_sums[0] - log_sums[1])
    weight, scale = tokens.weight.double(), readouts[0].scale
    counts = temperature * torch.stack([weight, weight])
    loss = temperature**2 * weighted(weight, divergence).sum()
    label_grad = None
    if labelled is not None and tokens.label_weight is not None:
        label_weight = tokens.label_weight.double()
        log_q, log_p = math.log(2) * (labelled - tops - log_sums)
        loss -= (label_weight * log_q).sum()
        label_grad = scale * (counts[0] * (log_q.exp() - log_p.exp()) + label_weight * log_q.expm1())
        counts[0] += label_weight
    factors = (shares * (scale * counts)).to(work.dtype)
    for n, part in enumerate(work.parts):
        a, b = work.exponentials(part, peaks[n])
        a.mul_(factors[n, 0]).addcmul_(b, factors[n, 1], value=-1)
        if not work.in_place:
            student[part] = a
    if label_row is not None and label_grad is not None:
        student.scatter_(0, label_row, label_grad[None].to(student.dtype))
    return loss.to(tokens.weight.dtype)
