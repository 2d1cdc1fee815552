"""GPTQ: integers for a whole matrix at once, each rounding error made good by the columns that are still to come.

    minimise over Q on the grid   E‖(M − Q) x‖² = tr((M − Q) C (M − Q)ᵀ)       C = E[x xᵀ]

Column after column is rounded to nearest, and what that lost is moved onto the columns not yet rounded, by least
squares under C (GPTQ, arXiv:2210.17323). The most used columns are rounded first, while many are left to make good
their errors; scales belong to neighbouring columns all the same, are found before the first rounding and stay, so that
the integers have a form that ONNX can say. Where C is diagonal nothing can be made good: it rounds to nearest.

Departures from the paper: M may be the anchored target (then Q also repairs what earlier layers lost); the groups'
ranges come from a clip search weighted by diag(C); everything is float64. Not worth its time at 8 bits.
"""

# O rows (outputs), I columns (inputs), G groups of a row

from dataclasses import dataclass

import torch
from torch import Tensor

from compresskit.layers.grid import round_codes
from compresskit.layerwise.moments import ridged

#: Of the mean of diag(C), added to the diagonal: how far the moments of few tokens are trusted.
DAMPING = 0.01
#: Columns whose errors are gathered before they are moved onto all later ones in one product.
_BLOCK = 128


@dataclass(frozen=True)
class Compensation:
    """How errors move: one for all layers that read the same input.

    Attributes:
        order: the columns in the order of their rounding, (I,) int64.
        factor: U (I, I) float64, upper triangular, (P (C + λ I) Pᵀ)⁻¹ = Uᵀ U in that order.
        importance: diag(C + λ I), (I,) float64, in the columns' own order.
    """

    order: Tensor
    factor: Tensor
    importance: Tensor


def plan_compensation(moment: Tensor, *, damping: float = DAMPING) -> Compensation:
    """The order of rounding and the factor U for inputs with the moment C (I, I).

    Args:
        moment: symmetric, positive semi-definite; may be singular, with dead columns or all zero.
        damping: λ / mean(diag C), positive.

    Cost: a Cholesky factor, an inverse and another factor of (I, I), in float64.
    """
    importance = column_importance(moment, damping=damping)
    order = torch.argsort(importance, descending=True, stable=True)
    H = ridged(moment, damping)[order][:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
    return Compensation(order, torch.linalg.cholesky(inverse, upper=True), importance)


def column_importance(moment: Tensor, *, damping: float = DAMPING) -> Tensor:
    """diag(C + λ I), (I,) float64: what an error in each column costs; never zero, not even for dead columns."""
    power = moment.diagonal().double().clamp_min(0)
    level = float(power.mean())
    return power + damping * level if level > 0 else torch.ones_like(power)


def round_with(
    compensation: Compensation, target: Tensor, scales: Tensor, zeros: Tensor | None, *, bits: int, group_size: int
) -> Tensor:
    """The codes (O, I) uint8 of M on a given grid, scales and zeros (O, G).

    Cost: about O·I² multiplications, and I short steps over O numbers.
    """
    M = target.detach().double()
    order, U = compensation.order, compensation.factor
    columns = M.shape[1]
    group = order // (group_size or columns)
    # Columns as rows, in the order of rounding: every step then reads and writes memory in one piece.
    W = M.T[order].contiguous()
    S = scales.double().T[group].contiguous()
    Z = torch.full_like(S, 2 ** (bits - 1)) if zeros is None else zeros.double().T[group].contiguous()
    found = torch.empty(W.shape, dtype=torch.uint8, device=W.device)
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        errors = torch.empty_like(W[start:stop])
        for column in range(start, stop):
            w, s, z = W[column], S[column], Z[column]
            codes = round_codes(w / s, z, bits=bits, symmetric=zeros is None)
            found[column] = codes.to(torch.uint8)
            error = errors[column - start]
            torch.sub(w, codes.sub_(z).mul_(s), out=error)
            error.div_(U[column, column])
            W[column + 1 : stop].addr_(U[column, column + 1 : stop], error, alpha=-1)
        W[stop:].addmm_(U[start:stop, stop:].T, errors, alpha=-1)
    codes = torch.empty_like(found)
    codes[order] = found
    return codes.T.contiguous()
