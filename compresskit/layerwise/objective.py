"""The layer-wise problem that every weight pass solves under its own constraint.

    minimise over W', b'   E‖ t − W' x' − b' ‖²      subject to   W' ∈ constraint of the pass

The unconstrained answer, pulled towards today's weight W, is M(λ) = (T + λ W)(C + λ I)⁻¹; each pass constrains M. λ is
chosen per layer by the closed-form error on held-out moments, so that noise of few calibration tokens is not fitted;
λ = ∞ gives W itself. Sources: AA-SVD (arXiv:2604.02119) for the anchored target, MoDeGPT (arXiv:2408.09632) for the
least-squares refit of kept columns; the pull towards W and its choice on held-out moments are ours.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from compresskit.layerwise.moments import MeanMoments, Moments

#: λ in units of the mean of C's diagonal.
SHRINKAGES = (1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, math.inf)


class RidgeSolver:
    """(T + λ W)(C + λ I)⁻¹ for any λ from one eigendecomposition of C.

    Args:
        weight: W (O, I), what the answer is pulled towards.
        moments: C (I, I) and T (O, I); C may be singular.

    Cost: one float64 `eigh` of (I, I); then two products per λ.
    """

    def __init__(self, weight: Tensor, moments: MeanMoments) -> None:
        self._W = weight.double()
        spectrum, self._Q = torch.linalg.eigh(moments.C)
        self._spectrum = spectrum.clamp_min(0)
        self._scale = float(moments.C.diagonal().mean())
        # In eigenvector coordinates the answer is W + (T − W C) Q diag(1 / (s + λ)) Qᵀ.
        self._gap = (moments.T - self._W @ moments.C) @ self._Q

    def solve(self, shrinkage: float) -> Tensor:
        """M (O, I) in float64 for λ = shrinkage · mean(diag C); `inf` returns W."""
        if math.isinf(shrinkage) or self._scale <= 0:
            return self._W
        return self._W + (self._gap / (self._spectrum + shrinkage * self._scale)) @ self._Q.T


def choose_shrinkage(
    weight: Tensor, fit: MeanMoments, held_out: MeanMoments, *, grid: Sequence[float] = SHRINKAGES
) -> float:
    """The λ of `grid` (in units of mean diag C) whose answer on `fit` has the least error on `held_out`.

    Args:
        weight: W (O, I).
        fit, held_out: moments of disjoint sequences, both centred or both not.
    """
    solver = RidgeSolver(weight, fit)
    errors = [held_out.error(solver.solve(shrinkage)) for shrinkage in grid]
    return grid[min(range(len(grid)), key=errors.__getitem__)]


def restrict(moments: MeanMoments, columns: Tensor) -> MeanMoments:
    """The moments of a layer that sees only the inputs `columns`."""
    return MeanMoments(
        C=moments.C[columns][:, columns],
        T=moments.T[:, columns],
        mu=moments.mu[columns],
        nu=moments.nu,
        target_power=moments.target_power,
    )


def fit_weight(
    weight: Tensor, fit: Moments, held_out: Moments, *, centred: bool, columns: Tensor | None = None
) -> tuple[Tensor, MeanMoments, float]:
    """The best weight for the target, its moments over all tokens, and the chosen shrinkage.

    Args:
        weight: W (O, I), today's weight.
        fit, held_out: moments of disjoint sequences.
        centred: whether a bias absorbs the means; else the map goes through the origin.
        columns: kept inputs (K,); the answer then has shape (O, K).

    Returns:
        M (O, I or K) in float64; the moments of fit and held-out tokens together, restricted likewise; λ / mean diag C.
    """
    parts = [part.mean(centred=centred) for part in (fit, held_out, fit + held_out)]
    W = weight.double()
    if columns is not None:
        parts = [restrict(part, columns) for part in parts]
        W = W[:, columns]
    shrinkage = choose_shrinkage(W, parts[0], parts[1])
    if math.isinf(shrinkage):
        return W, parts[2], shrinkage
    return RidgeSolver(W, parts[2]).solve(shrinkage), parts[2], shrinkage


def folded_bias(weight: Tensor, moments: MeanMoments) -> Tensor:
    """b' = ν − W' μ, (O,) float64: the bias that makes the layer exact in the mean."""
    return moments.nu - weight.double() @ moments.mu
