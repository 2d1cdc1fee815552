"""An integer layer with a thin float path beside it that repairs most of what rounding lost.

    before  y = Q x + b                 Q integers (out, in)
    after   y = Q x + b + B (A x)       A (rank, in), B (out, rank) float32

In ONNX the path is two products and an addition.
"""

from torch import Tensor, nn

from compresskit.layers.quant_linear import QuantLinear
from compresskit.layers.stand_in import LinearStandIn


class CorrectedLinear(LinearStandIn):
    """y = base(x) + expand(reduce(x)).

    Args:
        base: the integer layer; its bias is this layer's.
        rank: width of the path.
    """

    def __init__(self, base: QuantLinear, rank: int) -> None:
        super().__init__()
        device = base.tensors()[0].device
        self.in_features, self.out_features, self.rank = base.in_features, base.out_features, rank
        self.base = base
        self.reduce = nn.Linear(base.in_features, rank, bias=False, device=device)
        self.expand = nn.Linear(rank, base.out_features, bias=False, device=device)
        for factor in (self.reduce, self.expand):
            nn.init.zeros_(factor.weight)

    @property
    def bias(self) -> nn.Parameter | None:
        """The integer layer's."""
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both paths, shape (…, out_features)."""
        return self.base(x) + self.expand(self.reduce(x))

    def extra_repr(self) -> str:
        """The shape."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
