"""GPTQ: integers for a whole matrix at once, each rounding error made good by the columns that are still to come.

    minimise over Q on the grid   E‖(M − Q) x‖² = tr((M − Q) C (M − Q)ᵀ)       C = E[x xᵀ]

Column after column is rounded to nearest, and what that lost is moved onto the columns not yet rounded, by least
squares under C (GPTQ, arXiv:2210.17323). The most used columns are rounded first, while many are left to make good
their errors; scales belong to neighbouring columns all the same, are found before the first rounding and stay, so that
the integers have a form that ONNX can say. Where C is diagonal nothing can be made good: it rounds to nearest.

Then scales and codes take turns (`improve`): the best scales for the codes, by least squares; and the codes of each
column in turn, rounded to what is best beside all others (coordinate descent, as in QuantEase, arXiv:2309.01885). No
turn raises the error under C + λ I beyond float32's rounding of the scales; turns end when one gains little. One turn
takes about three times as long as the first rounding did.

Departures from the paper: M may be the anchored target (then Q also repairs what earlier layers lost); the groups'
ranges come from a clip search weighted by diag(C), in float32; all else is float64, but for the scales, which stay
float32's values; λ is larger than the paper's. Not worth its time at 8 bits.
"""

# O rows (outputs), I columns (inputs), G groups of a row

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from compresskit.layers.grid import Codes, round_codes
from compresskit.layerwise.moments import ridged

#: Of the mean of diag(C), added to the diagonal: how far the moments of few tokens are trusted. With the paper's 0.01
#: the calibration text is fitted too well: SmolLM2-135M in 4 bits, by 4,096 tokens, ended at perplexities 21.5 and, on
#: another domain, 65.3; with 0.3 at 20.9 and 61.7; with 1 at 21.3 in domain. all-MiniLM-L6-v2 likes 0.2 to 0.5.
DAMPING = 0.3
#: Columns whose errors are gathered before they are moved onto all later ones in one product.
_BLOCK = 128
#: Turns of scales and codes, at most.
SWEEPS = 3
#: The share of its error that a turn has to gain for another to follow.
_GAIN = 0.005
#: Numbers of a kind (I or G² a row) of the rows that are worked on together.
_NUMBERS = 1 << 24


@dataclass(frozen=True)
class Compensation:
    """How errors move: one for all layers that read the same input.

    Attributes:
        order: the columns in the order of their rounding, (I,) int64.
        factor: U (I, I) float64, upper triangular, (P (C + λ I) Pᵀ)⁻¹ = Uᵀ U in that order.
        moment: C + λ I (I, I) float64, in the columns' own order; its diagonal is what an error in each column costs.
    """

    order: Tensor
    factor: Tensor
    moment: Tensor


def plan_compensation(moment: Tensor, *, damping: float = DAMPING) -> Compensation:
    """The order of rounding and the factor U for inputs with the moment C (I, I).

    Args:
        moment: symmetric, positive semi-definite; may be singular, with dead columns or all zero.
        damping: λ / mean(diag C), positive.

    Cost: a Cholesky factor, an inverse and another factor of (I, I), in float64.
    """
    H = ridged(moment, damping)
    order = torch.argsort(H.diagonal(), descending=True, stable=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H[order][:, order]))
    return Compensation(order, torch.linalg.cholesky(inverse, upper=True), H)


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


def improve(
    compensation: Compensation,
    target: Tensor,
    start: Codes,
    *,
    bits: int,
    group_size: int,
    sweeps: int = SWEEPS,
    refit: bool = True,
) -> Codes:
    """Codes and scales for M whose error under C + λ I is no greater than that of `start`; zeros stay.

    Args:
        target: M (O, I), any float dtype.
        start: codes (O, I), scales and zeros (O, G), as `round_with` gives and takes them.
        sweeps: how often all scales and then all codes are set anew, at most.
        refit: whether scales are; without it they stay.

    Cost: a sweep is 3·O·I² multiplications and O solutions of G equations, and for the rows that are worked on together
    (up to `_NUMBERS` / I) I short steps.
    """
    columns, groups = target.shape[1], start.scales.shape[1]
    group = torch.arange(columns, device=target.device) // (group_size or columns)
    codes, scales = start.codes.clone(), start.scales.clone()
    step = max(1, _NUMBERS // max(groups * groups, columns))
    for first in range(0, len(target), step):
        rows = slice(first, first + step)
        work = _Rows(compensation.moment, target[rows], start, rows, group, bits)
        error = work.error()
        for _ in range(sweeps):
            if refit:
                work.refit_scales()
            work.descend()
            before, error = error, work.error()
            if error >= (1 - _GAIN) * before:
                break
        codes[rows], scales[rows] = work.codes().T.to(torch.uint8), work.scales.T.float()
    return Codes(codes, scales, start.zeros)


class _Rows:
    """Rows of a matrix on their way to a smaller error; columns as rows, as in `round_with`.

    Attributes:
        scales: (G, O) float64, of float32 values.
    """

    def __init__(self, moment: Tensor, target: Tensor, start: Codes, rows: slice, group: Tensor, bits: int) -> None:
        self._moment, self._group, self._bits = moment, group, bits
        self._symmetric = start.zeros is None
        self.scales = start.scales[rows].double().T.contiguous()
        zeros = torch.full_like(self.scales, 2 ** (bits - 1)) if start.zeros is None else start.zeros[rows].double().T
        self._zeros = zeros[group]
        self._steps = start.codes[rows].double().T.contiguous().sub_(self._zeros)
        # C (M − Q)ᵀ: half of how fast the error falls with each number of Q.
        self._target = target.detach().double().T
        self._slopes = moment @ (self._target - self._steps * self.scales[group])

    def codes(self) -> Tensor:
        """(I, O) float64."""
        return self._steps + self._zeros

    def error(self) -> float:
        """tr((M − Q) C (M − Q)ᵀ)."""
        return float(((self._target - self._steps * self.scales[self._group]) * self._slopes).sum())

    def refit_scales(self) -> None:
        """The least squares of each row over its scales: A Δs = b for A_gh = D_gᵀ C D_h, b_g = D_gᵀ C (m − q).

        D_g are the row's codes − zeros in group g. Rows of which a scale would more than double or halve keep theirs.
        """
        D, groups = self._steps, len(self.scales)
        A = D.new_empty(D.shape[1], groups, groups)
        ends = [0, *self._group.bincount().cumsum(0).tolist()]  # a group's columns are neighbours
        for index, (start, stop) in enumerate(pairwise(ends)):
            A[:, index] = self._summed(D * (self._moment[:, start:stop] @ D[start:stop])).T
        # A group whose codes all are its zero has no scale to find.
        level = A.diagonal(dim1=1, dim2=2)
        level.add_(1e-6 * level.mean(-1, keepdim=True) + torch.finfo(torch.float32).tiny)
        best = self.scales + torch.linalg.solve(A, self._summed(D * self._slopes).T).T
        near = ((best > self.scales / 2) & (best < self.scales * 2)).all(0)
        best = torch.where(near, best, self.scales).float().double()
        self._slopes.addmm_(self._moment, D * (best - self.scales)[self._group], alpha=-1)
        self.scales = best

    def _summed(self, numbers: Tensor) -> Tensor:
        """(I, O) summed up within groups, (G, O)."""
        return torch.zeros_like(self.scales).index_add_(0, self._group, numbers)

    def descend(self) -> None:
        """Each column in turn is rounded to what is best beside all others."""
        columns, moment, slopes = len(self._steps), self._moment, self._slopes
        scales = self.scales[self._group]
        for start in range(0, columns, _BLOCK):
            stop = min(start + _BLOCK, columns)
            moved = torch.empty_like(slopes[start:stop])
            for column in range(start, stop):
                s, z, old = scales[column], self._zeros[column], self._steps[column]
                best = slopes[column].div(s * float(moment[column, column])).add_(old)
                steps = round_codes(best, z, bits=self._bits, symmetric=self._symmetric).sub_(z)
                change = torch.mul(steps - old, s, out=moved[column - start])
                slopes[start:stop].addr_(moment[start:stop, column], change, alpha=-1)
                self._steps[column] = steps
            slopes[:start].addmm_(moment[:start, start:stop], moved, alpha=-1)
            slopes[stop:].addmm_(moment[stop:, start:stop], moved, alpha=-1)
