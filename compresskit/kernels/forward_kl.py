"""Forward KL of two float slabs that may both be overwritten: fewer passes than `slab_loss_`, for one divergence.

    exponentials   b, a ← 2^(b − m_b), 2^(a − m_a)    m: the maxima of a tile; sums of both and of 2^b (b − a)
    gradient       a ← w (q − p) = (w s_a) a − (w s_b) b    s = 2^(m − max m) / Σ, of each tile and token

With a, b the logits of student and teacher in base 2 (products of hidden states times `stretch`), D / ln 2 =
Σ p (b − a) + log₂ Σ 2^a − log₂ Σ 2^b. The sums over tiles run in float64, since the three terms cancel near the
teacher. Labels of weight c, at temperature 1, add c to the first factor and take c from the label's own row. Thirteen
passes over tiles that stay in a core's cache, where `slab_loss_`, which keeps the logits and rounds its gradient once,
needs about thirty; in base 2, because exponentials are the slowest of them (`compresskit.kernels.exponential`).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from compresskit.kernels.divergence import Divergence
from compresskit.kernels.exponential import LOG2_E
from compresskit.kernels.slab import Readout, TokenTerms, tiles

# V vocabulary, C tokens of the slab, N tiles


def serves(
    dtypes: Sequence[torch.dtype], divergence: Divergence, readouts: tuple[Readout, Readout], *, labels: bool
) -> bool:
    """Whether `forward_kl_` computes this loss: forward KL in one dtype of full precision, biases finite."""
    return (
        divergence.kind == "forward_kl"
        and divergence.weight_rule == "none"
        and (not labels or divergence.temperature == 1)
        and set(dtypes) in ({torch.float32}, {torch.float64})
        and all(one.softcap is None for one in readouts)
        and all(one.bias is None or bool(one.bias.isfinite().all()) for one in readouts)
    )


def stretch(readout: Readout, temperature: float) -> float:
    """What products are to be multiplied with to be logits over τ in base 2."""
    return readout.scale / temperature * LOG2_E


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
        student: (V, C) products times `stretch`, float32 or float64, any strides.
        teacher: (V, C), as the student's.
        tokens: what each of the C tokens counts.
        temperature: τ; 1 where there are labels.
        readouts: the student's and the teacher's, without a cap.
        tile: elements that are worked on at once.
    """
    parts, label_row = list(tiles(student, tile)), None if tokens.labels is None else tokens.labels[None]
    peaks, totals = (student.new_empty(2, len(parts), student.shape[1]) for _ in range(2))
    cross = student.new_empty(len(parts), student.shape[1])
    gap = student.new_empty(len(student[parts[0]]), student.shape[1]) if parts else student
    biases = [
        None if one.bias is None else one.bias[:, None].to(student.dtype) * stretch(one, temperature)
        for one in readouts
    ]
    labelled = None if label_row is None else _picked(student, label_row, biases[0])
    for n, part in enumerate(parts):
        a, b = student[part], teacher[part]
        for logits, bias in zip((a, b), biases, strict=True):
            if bias is not None:
                logits += bias[part]
        difference = torch.sub(b, a, out=gap[: len(a)])
        for logits, peak, total in ((b, peaks[1, n], totals[1, n]), (a, peaks[0, n], totals[0, n])):
            torch.amax(logits, 0, out=peak)
            torch.sum(logits.sub_(peak).exp2_(), 0, out=total)
        torch.sum(difference.mul_(b), 0, out=cross[n])
    tops = peaks.amax(1).double()
    shares = (peaks.double() - tops[:, None]).exp2_()
    sums = (shares * totals).sum(1)
    shares /= sums[:, None]
    log_sums = tops + sums.log2()
    divergence = math.log(2) * ((shares[1] * cross).sum(0) + log_sums[0] - log_sums[1])
    weight, scale = tokens.weight.double(), readouts[0].scale
    counts = torch.stack([weight, weight]) * temperature
    loss = temperature**2 * (weight * divergence).sum()
    if labelled is not None and tokens.label_weight is not None:
        label_weight = tokens.label_weight.double()
        loss += math.log(2) * (label_weight * (log_sums[0] - labelled)).sum()
        counts[0] += label_weight
    factors = (shares * (scale * counts)[:, None]).to(student.dtype)
    for n, part in enumerate(parts):
        student[part].mul_(factors[0, n]).addcmul_(teacher[part], factors[1, n], value=-1)
    if label_row is not None and tokens.label_weight is not None:
        student.scatter_add_(0, label_row, -scale * tokens.label_weight[None].to(student.dtype))
    return loss.to(tokens.weight.dtype)


def _picked(slab: Tensor, row: Tensor, bias: Tensor | None) -> Tensor:
    """The logits in base 2 of one entry of each token, (C,) float64."""
    picked = slab.gather(0, row)[0].double()
    return picked if bias is None else picked + bias[row[0], 0]
