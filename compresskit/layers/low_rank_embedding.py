"""An embedding table as a thin table and a projection.

    before  y = W[i]               W (num, dim)                            num · dim weights
    after   y = R[i] P             R (num, rank), P (rank, dim)            rank · (num + dim) weights

An output head tied to the table is a `LowRankLinear` whose factors are the same parameters, W = R P read the other way
round: logits = R (P h). The table is never expanded. In ONNX a lookup is Gather and MatMul.
"""

import torch
from torch import Tensor, nn


class LowRankEmbedding(nn.Module):
    """A lookup table of rank `rank`.

    Args:
        num_embeddings: rows.
        embedding_dim: width of a looked-up row.
        rank: width of the stored rows.
        padding_idx: the row that gets no gradient, as in nn.Embedding.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        *,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.rank = num_embeddings, embedding_dim, rank
        self.padding_idx = padding_idx
        rows = torch.zeros(num_embeddings, rank, device=device, dtype=dtype)
        self.rows = nn.Embedding(num_embeddings, rank, padding_idx, _weight=rows)
        self.project = nn.Parameter(torch.zeros(rank, embedding_dim, device=device, dtype=dtype))

    def forward(self, indices: Tensor) -> Tensor:
        """The rows `indices`, shape (*indices, dim)."""
        return self.rows(indices) @ self.project

    def extra_repr(self) -> str:
        """The shape, as nn.Embedding prints it."""
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}"
