"""A wide matrix of k rows with k of its columns made an identity: k · (in − k) weights instead of k · in.

    y = P x            P (k, in), some k columns of which are independent, in the order π: P Π = [I  R]
    y = x[π₁…ₖ] + R x[πₖ₊₁…]                                   R (k, in − k)

Any A (k, in) of rank k is such a P times an invertible (k, k) matrix, so the first of two low-rank factors loses
nothing by it: what is left over goes into the second.
Source: pivoting factorisation (PIFA, arXiv:2501.19090), which picks rows of the second factor instead; columns of the
first leave the outputs, which later passes may cut, plain.
"""

import torch
from scipy.linalg import qr
from torch import Tensor, nn

#: Pivots whose part beyond the earlier ones is below this share of the first's add nothing but rounding errors.
_NEGLIGIBLE = 1e-12


def pivot_columns(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """π, R and G with A Π = G [I  R]: the same map as a pivoted matrix and what it takes to be A again.

    Args:
        matrix: A (k, in) with k < in; computed in float64; may have less than full rank.

    Returns:
        π (in,) int64; R (k, in − k) and G (k, k), the pivot columns of A, float64.

    Cost: one QR with column pivoting, which picks columns that lie far apart, so that R stays small.
    """
    A = matrix.double()
    k = len(A)
    triangle, order = qr(A.numpy(), mode="r", pivoting=True)  # pyright: ignore[reportAssignmentType]
    pi, T = torch.from_numpy(order).long(), torch.from_numpy(triangle)
    size = T.diagonal().abs()
    rank = int((size > _NEGLIGIBLE * size[0]).sum())
    R = A.new_zeros(k, A.shape[1] - k)
    R[:rank] = torch.linalg.solve_triangular(T[:rank, :rank], T[:rank, k:], upper=True)
    return pi, R, A[:, pi[:k]]


def _columns(x: Tensor, index: Tensor) -> Tensor:
    """x[..., index]: one Gather in a traced graph; in torch indexing takes at most half of that operator's time."""
    return x.index_select(-1, index) if torch.compiler.is_exporting() else x[..., index]


class PivotedLinear(nn.Module):
    """y = x[pivots] + rest(x[others]).

    Args:
        in_features: width of x, shape (…, in_features).
        out_features: k, width of y, shape (…, k); k < in_features.
    """

    order: Tensor  # (in,) int32: the k pivots, then the other inputs

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0 < out_features < in_features:
            raise ValueError(f"{out_features} pivots of {in_features} inputs")
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("order", torch.arange(in_features, dtype=torch.int32, device=device))
        self.rest = nn.Linear(in_features - out_features, out_features, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """P x, shape (…, k)."""
        pivots, others = self.order.split([self.out_features, self.in_features - self.out_features])
        return _columns(x, pivots) + self.rest(_columns(x, others))

    @torch.no_grad()
    def set_columns(self, order: Tensor, rest: Tensor) -> None:
        """Write π (in,) and R (k, in − k)."""
        self.order.copy_(order)
        self.rest.weight.copy_(rest)  # type: ignore[operator]

    def weight_from(self, rest: Tensor) -> Tensor:
        """P (k, in) for R (k, in − k) in the order that this layer has."""
        identity = torch.eye(self.out_features, dtype=rest.dtype, device=rest.device)
        return torch.cat([identity, rest], dim=1)[:, self.order.argsort()]

    def extra_repr(self) -> str:
        """The shape, as nn.Linear prints it."""
        return f"in_features={self.in_features}, out_features={self.out_features}"
