"""A linear that is not there: it gives zeros, so a branch that ends in it adds nothing to the residual stream."""

from torch import Tensor

from compresskit.layers.stand_in import LinearStandIn


class EmptyLinear(LinearStandIn):
    """y = 0 of shape (…, out_features), whatever x is; no weights. A traced graph holds nothing that x went through."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: Tensor) -> Tensor:
        """Zeros, of `x`'s device and type."""
        return x.new_zeros((*x.shape[:-1], self.out_features))

    def extra_repr(self) -> str:
        """What `print(model)` says of it."""
        return f"in_features={self.in_features}, out_features={self.out_features}"
