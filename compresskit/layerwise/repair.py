"""What becomes of the columns that stay, and of the bias, when columns of a layer are cut.

    none             W' = W[:, K]                              b' = b
    bias             W' = W[:, K]                              b' = ν − W' μ_K    (for t = W x + b: b + W[:, cut] μ_cut)
    least_squares    W' = least squares on the target t        b' = ν − W' μ_K

The mean goes into a bias only where the layer has one; least squares then goes through the origin. Each can do what the
one above it does, so their errors on the calibration moments fall from line to line. Sources: the mean bias is FLAP's
(arXiv:2312.11983), least squares MoDeGPT's (arXiv:2408.09632); its pull towards W is `layerwise.objective`'s.
"""

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from compresskit.layerwise.moments import SiteMoments
from compresskit.layerwise.objective import fit_weight, folded_bias, restrict

Repair = Literal["none", "bias", "least_squares"]


@dataclass(frozen=True)
class Repaired:
    """A cut layer.

    Attributes:
        weight: W' (O, K) float64.
        bias: b' (O,) float64; None where the layer has none, or keeps its own.
        shrinkage: λ of least squares in units of mean(diag C); None where nothing is fitted, or W itself is best.
    """

    weight: Tensor
    bias: Tensor | None
    shrinkage: float | None = None


def repair_columns(
    weight: Tensor, bias: Tensor | None, moments: SiteMoments, columns: Tensor, repair: Repair
) -> Repaired:
    """The layer of the inputs `columns` alone.

    Args:
        weight: W (O, I), today's.
        bias: b (O,), today's; None where the layer has none, and then it gets none.
        moments: of the layer's inputs and of what it should give, bias included.
        columns: kept inputs (K,).
    """
    centred = bias is not None
    if repair == "least_squares":
        fitted, mean, shrinkage = fit_weight(weight, moments.fit, moments.held_out, centred=centred, columns=columns)
        found = None if math.isinf(shrinkage) else shrinkage
        return Repaired(fitted, folded_bias(fitted, mean) if centred else None, found)
    kept = weight.double()[:, columns]
    if repair == "none" or not centred:
        return Repaired(kept, None)
    return Repaired(kept, folded_bias(kept, restrict(moments.all.mean(centred=True), columns)))


def relative_error(weight: Tensor, bias: Tensor | None, moments: SiteMoments, columns: Tensor) -> float:
    """√(E‖t − W' x − b'‖² / E‖t − ν‖²) of a layer (O, K) that sees the inputs `columns`; 0 for a constant target.

    Args:
        bias: b' (O,); None for none.
    """
    means = moments.all.mean(centred=True)
    if means.target_power <= 0:
        return 0.0
    part = restrict(means, columns)
    missed = folded_bias(weight, part)
    if bias is not None:
        missed = missed - bias.double()
    error = part.error(weight) + float(missed @ missed)
    return math.sqrt(max(error, 0.0) / means.target_power)
