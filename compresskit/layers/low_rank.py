"""A linear layer as two thin ones.

    before  y = W x + b            W (out, in)                          out · in weights
    after   y = B (A x) + b'       A (rank, in), B (out, rank)          rank · (in + out) weights

Linears that read the same input (query, key and value; gate and up) may share one A: the first of them owns it, the
others keep an unregistered reference, so that the weight exists, is saved and is exported once. Pivoted, A holds an
identity (`PivotedLinear`): rank · (in + out − rank) weights, fewer than the dense layer's at every rank below full.
"""

import torch
from torch import Tensor, nn

from compresskit.layers.pivoted_linear import PivotedLinear
from compresskit.layers.stand_in import LinearStandIn


class LowRankLinear(LinearStandIn):
    """y = expand(reduce(x)): a linear map of rank `rank`.

    Args:
        in_features: width of x; the last dimension of the input, shape (…, in_features).
        out_features: width of y, shape (…, out_features).
        rank: width between the factors.
        bias: whether `expand` adds a bias.
        pivot: whether `reduce` is a PivotedLinear.
        shares: the layer whose `reduce` this one uses; None where it owns its own.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool,
        pivot: bool = False,
        shares: "LowRankLinear | None" = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        # A tuple hides the owner from nn.Module: its factor must not appear a second time among the parameters.
        self._owner = (shares,) if shares is not None else ()
        self.reduce: nn.Module | None = None
        if shares is None and pivot:
            self.reduce = PivotedLinear(in_features, rank, device=device, dtype=dtype)
        elif shares is None:
            self.reduce = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.expand = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @property
    def factor_in(self) -> nn.Module:
        """The module that computes A x, whoever owns it (a linear, a pivoted or a quantised one)."""
        owner = self._owner[0] if self._owner else self
        assert owner.reduce is not None
        return owner.reduce

    def forward(self, x: Tensor) -> Tensor:
        """B (A x) + b, shape (…, out_features)."""
        return self.expand(self.factor_in(x))

    def extra_repr(self) -> str:
        """The shape, as nn.Linear prints it."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
