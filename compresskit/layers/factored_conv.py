"""A convolution as a chain of smaller ones.

    before   y = W ∗ x                                W (out, in, kh, kw)
    Tucker   1×1 (in → r₁), kh×kw (r₁ → r₂), 1×1 (r₂ → out)                       Kim and others, arXiv:1511.06530
    CP       1×1 (in → r), kh×1 and 1×kw in each of the r channels, 1×1 (r → out)  Lebedev and others, arXiv:1412.6553

Stride, padding and dilation stay with the factor that holds the kernel's taps along their axis; a first factor without
bias leaves padding with zeros what it was. Works for one and for two axes; in ONNX every factor is a Conv.
"""

from collections.abc import Iterator

from torch import Tensor, nn

Conv = nn.Conv1d | nn.Conv2d


class FactoredConv(nn.Module):
    """What `old` computes, by the convolutions `factors` in a row.

    Args:
        old: the dense layer; its attributes are kept for models that ask for a layer's stride or width.
        factors: as `tucker_chain` and `cp_chain` make them.
    """

    def __init__(self, old: Conv, factors: list[Conv]) -> None:
        super().__init__()
        self.in_channels, self.out_channels = old.in_channels, old.out_channels
        self.kernel_size, self.stride, self.dilation = old.kernel_size, old.stride, old.dilation
        self.padding, self.padding_mode, self.groups = old.padding, old.padding_mode, old.groups
        self.factors = nn.Sequential(*factors)

    @property
    def weight(self) -> Tensor:
        """The first factor's weight: models ask a layer's weight for its dtype and device."""
        first = self.factors[0]
        assert isinstance(first, Conv)
        return first.weight

    @property
    def bias(self) -> Tensor | None:
        """The last factor's bias, (out,)."""
        last = self.factors[-1]
        assert isinstance(last, Conv)
        return last.bias

    def forward(self, x: Tensor) -> Tensor:
        """Shape (batch, out, …) for x (batch, in, …)."""
        return self.factors(x)


def _pointwise(old: Conv, inputs: int, outputs: int, *, bias: bool) -> Conv:
    return type(old)(inputs, outputs, 1, bias=bias, device=old.weight.device, dtype=old.weight.dtype)


def tucker_chain(old: Conv, in_rank: int, out_rank: int, *, bias: bool) -> list[Conv]:
    """The factors of a Tucker decomposition; one of full rank is left out.

    Args:
        old: without groups.
        in_rank: r₁, at most the input channels. out_rank: r₂, at most the output channels.
        bias: whether the last factor has a bias.
    """
    last = out_rank == old.out_channels
    core = type(old)(
        in_rank,
        out_rank,
        old.kernel_size,  # pyright: ignore[reportArgumentType] # as many numbers as its own kind of layer has
        stride=old.stride,  # pyright: ignore[reportArgumentType]
        padding=old.padding,  # pyright: ignore[reportArgumentType]
        dilation=old.dilation,  # pyright: ignore[reportArgumentType]
        padding_mode=old.padding_mode,  # pyright: ignore[reportArgumentType]
        bias=bias and last,
        device=old.weight.device,
        dtype=old.weight.dtype,
    )
    first = [] if in_rank == old.in_channels else [_pointwise(old, old.in_channels, in_rank, bias=False)]
    return [*first, core, *([] if last else [_pointwise(old, out_rank, old.out_channels, bias=bias)])]


def cp_chain(old: Conv, rank: int, *, bias: bool) -> list[Conv]:
    """The factors of a CP decomposition of `rank` components; axes of a single tap need none (`tap_axes`)."""
    taps = [_along(old, axis, rank) for axis in tap_axes(old)]
    first, last = (
        _pointwise(old, old.in_channels, rank, bias=False),
        _pointwise(old, rank, old.out_channels, bias=bias),
    )
    return [first, *taps, last]


def tap_axes(conv: Conv) -> list[int]:
    """The axes along which a convolution does more than look at each place alone."""
    padding = (0,) * len(conv.kernel_size) if isinstance(conv.padding, str) else conv.padding
    shapes = zip(conv.kernel_size, conv.stride, padding, strict=True)
    return [axis for axis, (size, step, margin) in enumerate(shapes) if size > 1 or step > 1 or margin > 0]


def _along(old: Conv, axis: int, channels: int) -> Conv:
    """A convolution of each channel along one axis, with that axis' taps, stride, padding and dilation."""

    def only(values: tuple[int, ...], other: int) -> tuple[int, ...]:
        return tuple(value if own == axis else other for own, value in enumerate(values))

    return type(old)(
        channels,
        channels,
        only(old.kernel_size, 1),  # pyright: ignore[reportArgumentType]
        stride=only(old.stride, 1),  # pyright: ignore[reportArgumentType]
        padding=old.padding if isinstance(old.padding, str) else only(old.padding, 0),  # pyright: ignore[reportArgumentType]
        dilation=only(old.dilation, 1),  # pyright: ignore[reportArgumentType]
        padding_mode=old.padding_mode,  # pyright: ignore[reportArgumentType]
        groups=channels,
        bias=False,
        device=old.weight.device,
        dtype=old.weight.dtype,
    )


def weights_in(factors: list[Conv]) -> int:
    """How many weights the factors hold, biases apart."""
    return sum(factor.weight.numel() for factor in factors)


def factors_of(layer: FactoredConv) -> Iterator[Conv]:
    """The factors, in the order in which they run."""
    for factor in layer.factors:
        assert isinstance(factor, Conv)
        yield factor


def is_plain(module: nn.Module) -> bool:
    """Whether a module is a convolution that a chain can stand for: of its own class, without groups."""
    return isinstance(module, Conv) and type(module) in (nn.Conv1d, nn.Conv2d) and module.groups == 1
