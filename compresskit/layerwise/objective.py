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

from compresskit.layerwise.moments import MeanMoments, Moments, ridged

#: λ in units of the mean of C's diagonal.
SHRINKAGES = (1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, math.inf)


def shrunk_weight(weight: Tensor, moments: MeanMoments, shrinkage: float) -> Tensor:
    """M(λ) = (T + λ W)(C + λ I)⁻¹, (O, I) float64, for λ = shrinkage · mean(diag C) > 0; `inf` returns W.

    Args:
        weight: W (O, I), what the answer is pulled towards.
        moments: C (I, I), which may be singular, and T (O, I).
    """
    W = weight.double()
    scale = float(moments.C.diagonal().mean())
    if math.isinf(shrinkage) or scale <= 0:
        return W
    # W + (T − W C)(C + λ I)⁻¹: the same, and exactly W where the layer already gives its target.
    gap = moments.T - W @ moments.C
    return W + torch.cholesky_solve(gap.T, torch.linalg.cholesky(ridged(moments.C, shrinkage))).T


def choose_shrinkage(
    weight: Tensor, fit: MeanMoments, held_out: MeanMoments, *, grid: Sequence[float] = SHRINKAGES
) -> float:
    """The λ of `grid` (in units of mean diag C) whose answer on `fit` has the least error on `held_out`.

    Args:
        weight: W (O, I).
        fit, held_out: moments of disjoint sequences, both centred or both not.

    Cost: one float64 `eigh` of (I, I) and four products of (O, I) by (I, I), whatever the length of the grid: with
    C = Q diag(s) Qᵀ on `fit`, M(λ) − W = G diag(f) Qᵀ for f = 1 / (s + λ), so the error on `held_out` is the
    quadratic fᵀ (QᵀC'Q ∘ GᵀG) f + 2 pᵀ f + const.
    """
    W = weight.double()
    scale = float(fit.C.diagonal().mean())
    if scale <= 0:
        return math.inf
    spectrum, Q = torch.linalg.eigh(fit.C)
    G = (fit.T - W @ fit.C) @ Q
    linear = (((W @ held_out.C - held_out.T) @ Q) * G).sum(0)
    quadratic = Q.T @ (held_out.C @ Q)
    del Q  # the widest layer's are the largest matrices of a walk
    quadratic *= G.T @ G

    def error(shrinkage: float) -> float:
        f = 1 / (spectrum.clamp_min(0) + shrinkage * scale)  # zeros for an infinite shrinkage
        return float(f @ quadratic @ f + 2 * linear @ f)

    return min(grid, key=error)


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
    W = weight.double() if columns is None else weight.double()[:, columns]

    def mean(part: Moments) -> MeanMoments:
        whole = part.mean(centred=centred)
        return whole if columns is None else restrict(whole, columns)

    shrinkage = choose_shrinkage(W, mean(fit), mean(held_out))
    both = mean(fit + held_out)
    return shrunk_weight(W, both, shrinkage), both, shrinkage


def folded_bias(weight: Tensor, moments: MeanMoments) -> Tensor:
    """b' = ν − W' μ, (O,) float64: the bias that makes the layer exact in the mean."""
    return moments.nu - weight.double() @ moments.mu
