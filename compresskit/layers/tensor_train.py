"""An embedding table as a tensor train: a chain of small cores, one for each digit of the row's number.

    before  y = W[i]                                   W (num, dim)
    after   y[j₁ … jₘ] = G₁[i₁, j₁] G₂[i₂, j₂] … Gₘ[iₘ, jₘ]

i₁ … iₘ are the digits of i (num ≤ v₁ ⋯ vₘ), j₁ … jₘ those of the column (dim = d₁ ⋯ dₘ), and each G_k[i_k, j_k] is a
matrix of r_{k−1} by r_k with r₀ = rₘ = 1. In ONNX a lookup is m Gathers and m − 1 MatMuls.

A lookup multiplies r · d₂ · r values a token and a tied head num · r · dₘ, which is more than the dense head's
num · dim from r = dim / dₘ on: for strong compression of tables, not for speed.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compresskit.layers.operators import emitting
from compresskit.layers.stand_in import LinearStandIn

# Gathered cores are large: this many tokens are looked up at a time.
_TOKENS_AT_A_TIME = 256


def empty_cores(
    rows: Sequence[int],
    columns: Sequence[int],
    ranks: Sequence[int],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.ParameterList:
    """Zero cores of shapes (v_k, r_{k−1}, d_k, r_k), with the m − 1 inner `ranks`."""
    ends = [1, *ranks, 1]
    shapes = zip(rows, ends, columns, ends[1:], strict=False)
    return nn.ParameterList(nn.Parameter(torch.zeros(shape, device=device, dtype=dtype)) for shape in shapes)


class TensorTrainEmbedding(nn.Module):
    """A lookup table held as cores.

    Args:
        num_embeddings: rows; at most the product of `rows`.
        embedding_dim: columns; the product of `columns`.
        rows: v_k, two or more. columns: d_k, as many.
        ranks: the inner ranks, one fewer.
        padding_idx: kept for those who ask; lookups of it are like any other.

    Raises:
        ValueError: shapes that do not multiply to the table's.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        rows: Sequence[int],
        columns: Sequence[int],
        ranks: Sequence[int],
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if math.prod(rows) < num_embeddings or math.prod(columns) != embedding_dim:
            raise ValueError(f"{tuple(rows)} by {tuple(columns)} do not cover {num_embeddings} by {embedding_dim}")
        if not len(rows) == len(columns) == len(ranks) + 1 >= 2:
            raise ValueError(f"{len(rows)} row digits, {len(columns)} column digits and {len(ranks)} ranks: no chain")
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.rows, self.columns, self.ranks = tuple(rows), tuple(columns), tuple(ranks)
        self.cores = empty_cores(rows, columns, ranks, device=device, dtype=dtype)

    def forward(self, indices: Tensor) -> Tensor:
        """The rows `indices`, shape (*indices, dim)."""
        flat = indices.reshape(-1)
        parts = [flat] if emitting() else flat.split(_TOKENS_AT_A_TIME)
        return torch.cat([self._look_up(part) for part in parts]).reshape(*indices.shape, self.embedding_dim)

    def _look_up(self, indices: Tensor) -> Tensor:
        """(N, dim) for N row numbers."""
        digits = [indices // math.prod(self.rows[k + 1 :]) % count for k, count in enumerate(self.rows)]
        found = F.embedding(digits[0], self.cores[0].flatten(1)).view(-1, self.columns[0], self.cores[0].shape[3])
        for k in range(1, len(digits)):
            _, left, width, right = self.cores[k].shape
            # (N, columns so far, left) times (N, left, d_k · right)
            found = found @ F.embedding(digits[k], self.cores[k].flatten(1)).view(-1, left, width * right)
            found = found.reshape(-1, math.prod(self.columns[: k + 1]), right)
        return found.flatten(1)

    def extra_repr(self) -> str:
        """Shape, digits and ranks."""
        digits = f"rows={self.rows}, columns={self.columns}, ranks={self.ranks}"
        return f"{self.num_embeddings}, {self.embedding_dim}, {digits}"


class TensorTrainHead(LinearStandIn):
    """y = W x + b with W (out, in) as a tensor train, contracted core by core; W is never expanded.

    Args:
        table: whose shape it has. Its cores are new: whoever ties the head puts the table's there.
        bias: whether a bias is added.
    """

    def __init__(self, table: TensorTrainEmbedding, *, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = table.embedding_dim, table.num_embeddings
        self.rows, self.columns = table.rows, table.columns
        first = table.cores[0]
        self.cores = empty_cores(table.rows, table.columns, table.ranks, device=first.device, dtype=first.dtype)
        shape = torch.zeros(self.out_features, device=first.device, dtype=first.dtype)
        self.bias = nn.Parameter(shape) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Shape (…, out) for x (…, in)."""
        states = x.reshape(-1, 1, 1, self.in_features)
        first, *others = self.cores
        # One value of the first digit at a time: all of them together would hold v₁ times as much.
        parts = [self._contract(states, [first[i : i + 1], *others]) for i in range(self.rows[0])]
        y = torch.cat(parts, dim=1)[:, : self.out_features]
        y = y if self.bias is None else y + self.bias
        return y.reshape(*x.shape[:-1], self.out_features)

    @staticmethod
    def _contract(states: Tensor, cores: Sequence[Tensor]) -> Tensor:
        """(N, rows) from the inputs (N, 1, 1, d₁ ⋯ dₘ): core by core a column digit goes and a row digit comes."""
        for core in cores:
            number, left, width, right = core.shape
            before, after = states.shape[1], states.shape[3] // width  # rows so far, columns to come
            states = states.reshape(-1, before, left, width, after).permute(0, 1, 4, 2, 3)
            # Two matrices: how products of more axes are grouped depends on whether gradients are wanted.
            product = states.reshape(-1, left * width) @ core.permute(1, 2, 0, 3).reshape(left * width, -1)
            states = product.view(-1, before, after, number, right).permute(0, 1, 3, 4, 2)
            states = states.reshape(-1, before * number, right, after)
        return states.flatten(1)

    def extra_repr(self) -> str:
        """Shape and digits."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rows={self.rows}"
