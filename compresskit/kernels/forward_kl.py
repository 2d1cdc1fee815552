"""Forward KL of two float slabs that may both be overwritten: fewer passes than `slab_loss_`, for one divergence.

    exponentials   b, a ← exp(b − m_b), exp(a − m_a)    m: the maxima of a tile; sums of both and of exp(b) (b − a)
    gradient       a ← w (q − p) = (w s_a) a − (w s_b) b    s = exp(m − max m) / Σ, of each tile and token

With a, b the logits of student and teacher, D = Σ p (b − a) + ln Σ exp a − ln Σ exp b. The sums over tiles run in
float64, since the three terms cancel near the teacher. Labels of weight c, at temperature 1, add c to the first factor
and take c from the label's own row. Thirteen passes over tiles that stay in a core's cache, where
`slab_loss_`, which keeps the logits and rounds its gradient once, needs about thirty.
"""

import torch
from torch import Tensor

from compresskit.kernels.divergence import Divergence
from compresskit.kernels.slab import Readout, TokenTerms, tiles

# V vocabulary, C tokens of the slab, N tiles


def serves(
    student: Tensor, teacher: Tensor, tokens: TokenTerms, divergence: Divergence, readouts: tuple[Readout, Readout]
) -> bool:
    """Whether `forward_kl_` computes this loss: forward KL in one dtype of full precision, all logits finite."""
    return (
        divergence.kind == "forward_kl"
        and divergence.weight_rule == "none"
        and (tokens.labels is None or divergence.temperature == 1)
        and student.dtype == teacher.dtype
        and student.dtype in (torch.float32, torch.float64)
        and all(one.softcap is None for one in readouts)
        and all(one.bias is None or bool(one.bias.isfinite().all()) for one in readouts)
    )


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
        student: (V, C) products, float32 or float64, any strides.
        teacher: (V, C), as the student's.
        tokens: what each of the C tokens counts.
        temperature: τ; 1 where there are labels.
        readouts: the student's and the teacher's, without a cap.
        tile: elements that are worked on at once.
    """
    parts, label_row = list(tiles(student, tile)), None if tokens.labels is None else tokens.labels[None]
    labelled = None if label_row is None else readouts[0].picked(student, label_row, torch.float64)[0]
    peaks, totals = (student.new_empty(2, len(parts), student.shape[1]) for _ in range(2))
    cross = student.new_empty(len(parts), student.shape[1])
    gap = student.new_empty(len(student[parts[0]]), student.shape[1]) if parts else student
    for n, part in enumerate(parts):
        a, b = (
            _scale_(slab[part], part, one, temperature) for slab, one in zip((student, teacher), readouts, strict=True)
        )
        difference = torch.sub(b, a, out=gap[: len(a)])
        for logits, peak, total in ((b, peaks[1, n], totals[1, n]), (a, peaks[0, n], totals[0, n])):
            torch.amax(logits, 0, out=peak)
            torch.sum(logits.sub_(peak).exp_(), 0, out=total)
        torch.sum(difference.mul_(b), 0, out=cross[n])
    tops = peaks.amax(1).double()
    shares = (peaks.double() - tops[:, None]).exp_()
    sums = (shares * totals).sum(1)
    shares /= sums[:, None]
    divergence = (shares[1] * cross).sum(0) + (tops[0] - tops[1]) + sums[0].log() - sums[1].log()
    weight, scale = tokens.weight.double(), readouts[0].scale
    counts = torch.stack([weight, weight]) * temperature
    loss = temperature**2 * (weight * divergence).sum()
    if labelled is not None and tokens.label_weight is not None:
        label_weight = tokens.label_weight.double()
        loss += (label_weight * (tops[0] + sums[0].log() - labelled)).sum()
        counts[0] += label_weight
    factors = (shares * (scale * counts)[:, None]).to(student.dtype)
    for n, part in enumerate(parts):
        student[part].mul_(factors[0, n]).addcmul_(teacher[part], factors[1, n], value=-1)
    if label_row is not None and tokens.label_weight is not None:
        student.scatter_add_(0, label_row, -scale * tokens.label_weight[None].to(student.dtype))
    return loss.to(tokens.weight.dtype)


def _scale_(product: Tensor, part: slice, readout: Readout, temperature: float) -> Tensor:
    """z/τ of some rows, in place."""
    if readout.bias is not None:
        product += readout.bias[part, None]
    if readout.scale != temperature:
        product *= readout.scale / temperature
    return product
