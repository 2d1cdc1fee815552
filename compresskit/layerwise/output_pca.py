"""Output PCA: the best low-rank factors of every rank from one eigendecomposition.

    minimise over B, A   E (M x − B A x)ᵀ F (M x − B A x)     with C = E[x xᵀ]

With F = L Lᵀ the answer is U, the eigenvectors of Lᵀ M C Mᵀ L with the largest eigenvalues: B = L⁻ᵀ U and A = Uᵀ Lᵀ M.
The sum of the eigenvalues that are cut is the error, exactly. No inverse of C is taken: a singular moment is no problem
(Swift-SVD, arXiv:2604.01609; for F = I the map equals SVD-LLM's, arXiv:2403.07378, without its Cholesky inverse).
F says which errors of the output count; `layerwise.sensitivity` measures it.
"""

# I in, O out, r min(I, O), k rank

import math
from dataclasses import dataclass

import torch
from torch import Tensor

#: A basis that misses less than this share of a matrix spans it.
_SPANNED = 1e-9


@dataclass(frozen=True)
class OutputMetric:
    """A quadratic form on outputs, eᵀ F e with F = Q G Qᵀ + g (I − Q Qᵀ), known in the range of a tall weight.

    Attributes:
        basis: Q (O, r) with orthonormal columns; None is the identity.
        matrix: G (r, r) float64, symmetric, positive definite.
        rest: g > 0, what a direction outside the range counts.
    """

    basis: Tensor | None
    matrix: Tensor
    rest: float

    def within(self, columns: Tensor | None) -> Tensor:
        """Kᵀ F K for orthonormal columns K (O, s), or F itself where they are None: (s, s) float64."""
        if self.basis is None:
            return self.matrix if columns is None else columns.T @ self.matrix @ columns
        if columns is self.basis:
            return self.matrix
        overlap = self.basis.T if columns is None else self.basis.T @ columns
        inside = overlap.T @ (self.matrix @ overlap) - self.rest * (overlap.T @ overlap)
        inside.diagonal().add_(self.rest)
        return inside

    def times(self, vectors: Tensor) -> Tensor:
        """F V for vectors V (O, n), float64."""
        if self.basis is None:
            return self.matrix @ vectors
        inside = self.basis.T @ vectors
        return self.basis @ (self.matrix @ inside - self.rest * inside) + self.rest * vectors


@dataclass(frozen=True)
class OutputPCA:
    """The best factors of every rank.

    Attributes:
        left: (O, r) and right: (r, I), float64; the first k columns and rows are B and A.
        tail: (r + 1,) float64; entry k is the error of rank k, entry 0 the power of M x.
    """

    left: Tensor
    right: Tensor
    tail: Tensor

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """B (O, rank) and A (rank, I).

        Raises:
            ValueError: rank out of 1…r.
        """
        if not 1 <= rank <= len(self.right):
            raise ValueError(f"rank {rank} is not in 1…{len(self.right)}")
        return self.left[:, :rank], self.right[:rank]


def solve_output_pca(target: Tensor, *, moment: Tensor, metric: OutputMetric | None = None) -> OutputPCA:
    """The factors B, A of every rank that minimise E‖M x − B A x‖² (in the metric F where one is given).

    Args:
        target: M, shape (O, I), any float dtype; computed in float64; not modified.
        moment: C = E[x xᵀ], shape (I, I), symmetric, positive semi-definite.
        metric: F; None counts all errors alike, and B then has orthonormal columns.

    Raises:
        ValueError: shapes that do not agree.

    Cost: one float64 `eigh` of (r, r), two with a metric; a QR of M where O is the larger.
    """
    outputs, inputs = target.shape
    if moment.shape != (inputs, inputs):
        raise ValueError(f"moment is {tuple(moment.shape)}, the target has {inputs} inputs")
    M, C = target.double(), moment.double()
    # M = K R with orthonormal K: only errors within the range of M can be made smaller.
    K, R = _range_of(M, metric) if outputs > inputs else (None, M)
    L = None if metric is None else torch.linalg.cholesky(metric.within(K))
    S = R if L is None else L.T @ R
    eigenvalues, vectors = torch.linalg.eigh(S @ C @ S.T)
    eigenvalues, U = eigenvalues.flip(0).clamp_min(0), vectors.flip(1)
    left = U if L is None else torch.linalg.solve_triangular(L.T, U, upper=True)
    tail = torch.cat([eigenvalues.flip(0).cumsum(0).flip(0), eigenvalues.new_zeros(1)])
    return OutputPCA(left if K is None else K @ left, U.T @ S, tail)


def _range_of(M: Tensor, metric: OutputMetric | None) -> tuple[Tensor, Tensor]:
    """K, R with M = K R and orthonormal K (O, I): the metric's basis where that spans M, as of an anchored target."""
    if metric is not None and metric.basis is not None and metric.basis.shape == M.shape:
        K = metric.basis
        R = K.T @ M
        if (M - K @ R).norm() <= _SPANNED * M.norm():
            return K, R
    return torch.linalg.qr(M)


def squared_error(target: Tensor, answer: Tensor, moment: Tensor) -> float:
    """E‖M x − N x‖² of two maps (O, I) over inputs with the moment C (I, I)."""
    gap = target.double() - answer.double()
    return float(((gap @ moment.double()) * gap).sum())


def relative_error(target: Tensor, answer: Tensor, moment: Tensor | None) -> float:
    """‖(M − N) x‖ / ‖M x‖ over inputs with the moment C (I, I), or ‖M − N‖ / ‖M‖ where nothing is known of them."""
    if moment is None:
        lost, power = float((target - answer).double().square().sum()), float(target.double().square().sum())
    else:
        lost = squared_error(target, answer, moment)
        power = squared_error(target, torch.zeros_like(target), moment)
    return math.sqrt(max(lost, 0.0) / power) if power > 0 else 0.0
