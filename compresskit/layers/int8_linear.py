"""A linear layer computed in integers: int8 or 4-bit weights, activations rounded to uint8.

    before  y = W x + b
    after   s = (max x − min x) / 255,  z = −min x / s,  q = round(x / s) + z        one s and z for the whole tensor
            y = s · scales · Σ (q − z) · codes + b                                   the sum is exact, in int32

The range from min x to max x is that of the input as it comes (dynamic), or one that calibration fixed (static): then
what lies outside is cut off. A smoothed layer rounds `x · smooth` and holds the codes of W / smooth: one factor for
each input, so that channels with large activations do not take the whole range (SmoothQuant, arXiv:2211.10438).

Codes of 4 bits are held in groups of columns and widened to 8 for the product: (code − zero) · factor, where a group's
factor is a whole number and the row's scale its step (QServe's progressive groups, arXiv:2405.04532). They take half
the bytes and lose a little more than other 4 bits do, since a row has fifteen scales at most: a group of far larger
weights costs the others of its row their precision. ONNX Runtime widens them once, when it loads the file.

This is ONNX's `DynamicQuantizeLinear` or `QuantizeLinear` followed by ONNX Runtime's integer product, which makes an
encoder about three times as fast as float on a CPU with dot-product instructions. The forward pass here computes the
same integers, so what is evaluated in torch is what the file computes.

On x86 without VNNI or AMX (before about 2019) ONNX Runtime adds pairs of products in 16 bits, where codes near 127 can
overflow. There the session needs `session.x64quantprecision` = 1; the parity check of an export made there says so.

Not for layers whose input has a few huge entries even when smoothed: they stretch the one scale that the whole tensor
shares. There weight-only (`QuantLinear`) is the safe choice. A dynamic scale depends on everything in the batch,
padding included, so a text's result depends a little on what it is batched with, in torch and in ONNX Runtime alike; a
static one does not, and wants calibration text like the texts to come.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compresskit.layers import grid
from compresskit.layers.operators import dynamic_matmul, emitting, static_matmul, widened_codes
from compresskit.layers.stand_in import LinearStandIn

# Any sum of this many products of 8-bit numbers stays below 2^24, where float32 counts every integer.
_EXACT_COLUMNS = (1 << 24) // (255 * 127)


def quantize_dynamic(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`x` as uint8 steps held in float32, its scale and its zero point: ONNX DynamicQuantizeLinear, bit for bit.

    Args:
        x: float32, any shape.

    Returns:
        q (shape of x, whole numbers 0…255), scale and zero (scalars). All zeros give scale 1.

    Source: https://onnx.ai/onnx/operators/onnx__DynamicQuantizeLinear.html; rounding is to even.
    """
    scale, zero = input_grid(*torch.aminmax(x))
    return quantize_static(x, scale, zero), scale, zero


def input_grid(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and the zero point (a whole number 0…255) with which uint8 reaches from `low` to `high` and to 0.

    Args:
        low, high: float32 scalars.
    """
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = (high - low) / 255.0
    scale = torch.where(high == low, torch.ones_like(scale), scale)
    return scale, (-low / scale).clamp(0.0, 255.0).round()


def quantize_static(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """`x` as uint8 steps held in float32, values out of reach cut off: ONNX QuantizeLinear, bit for bit.

    Args:
        x: float32, any shape.
        scale, zero: float32 scalars.

    Source: https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html; rounding is to even.
    """
    return (x / scale).round_().add_(zero).clamp_(0.0, 255.0)


def multiply_exactly(left: Tensor, right: Tensor) -> Tensor:
    """left · right summed as integers, as float32, for whole numbers |left| ≤ 255 (…, I) and |right| ≤ 127 (I, O).

    Float32 products of column chunks small enough that no partial sum is rounded, in any order and on any device
    (the factors also fit into TF32 and bfloat16); only the few chunk sums are added in int32, and their total is
    rounded to float32 once, as ONNX Runtime does.
    """
    if right.shape[0] <= _EXACT_COLUMNS:
        return left @ right
    total = torch.zeros(*left.shape[:-1], right.shape[1], dtype=torch.int32, device=left.device)
    for start in range(0, right.shape[0], _EXACT_COLUMNS):
        part = slice(start, start + _EXACT_COLUMNS)
        total += (left[..., part] @ right[part]).to(torch.int32)
    return total.float()


class Int8Linear(LinearStandIn):
    """y = scale · scales · (q − zero) codes + bias, with q the input rounded to uint8.

    Args:
        in_features: width of x, shape (…, in_features).
        out_features: width of y, shape (…, out_features).
        bias: whether a float bias is added.
        bits: 8 or 4, of a code.
        group_size: of 4 bits: columns that share a factor and a zero; 0 is the row. The last group may be short.
        symmetric: of 4 bits: whether the middle code stands for zero, and no zero points are stored; None: no.
        smooth: whether inputs are multiplied by a factor each before they are rounded.
        static: whether the range of inputs is fixed (`set_input_range`), instead of each call's own.

    Raises:
        ValueError: bits other than 4 and 8, or 8 bits in groups or with zero points.
    """

    # of 8 bits: (in, out) int8 in −127…127, as the operator reads them; of 4: (out, groups, ⌈group / 2⌉) uint8, packed
    codes: Tensor
    scales: Tensor  # (out,) float32
    factors: Tensor | None  # of 4 bits: (out, ⌈groups / 2⌉) uint8, packed, 1…15
    zeros: Tensor | None  # of 4 bits: likewise, 0…15
    smooth: Tensor | None  # (in,) float32
    input_scale: Tensor | None  # scalar float32; None where dynamic
    input_zero: Tensor | None  # scalar uint8; None where dynamic

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        bits: Literal[4, 8] = 8,
        group_size: int = 0,
        symmetric: bool | None = None,
        smooth: bool = False,
        static: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if bits not in (4, 8) or (bits == 8 and (group_size or symmetric is False)):
            form = f"{bits} bits, group size {group_size}, symmetric {symmetric}"
            raise ValueError(f"integer products have 4 bits, or 8 with one scale a row and no zero points, not {form}")
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        self.groups, self.group_size = grid.count_groups(in_features, group_size), group_size or in_features
        held = {"codes": torch.zeros(in_features, out_features, dtype=torch.int8, device=device)}
        if bits == 4:
            per_row = grid.packed_columns(self.groups, 4)
            shapes = {"codes": (self.groups, grid.packed_columns(self.group_size, 4)), "factors": (per_row,)}
            if grid.has_zeros(4, symmetric):
                shapes["zeros"] = (per_row,)
            held = {
                name: torch.zeros(out_features, *shape, dtype=torch.uint8, device=device)
                for name, shape in shapes.items()
            }
        held["scales"] = torch.zeros(out_features, dtype=torch.float32, device=device)
        for name in ("codes", "scales", "factors", "zeros"):
            if name in held:
                self.register_buffer(name, held[name])
            else:  # and no buffer of None: torch.export 2.13 counts those among the inputs of what it traces
                setattr(self, name, None)
        peaks = torch.ones(in_features, dtype=torch.float32, device=device) if smooth else None
        self.register_buffer("smooth", peaks)
        self.register_buffer("input_scale", torch.ones((), dtype=torch.float32, device=device) if static else None)
        self.register_buffer("input_zero", torch.zeros((), dtype=torch.uint8, device=device) if static else None)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device)) if bias else None

    def set_codes(self, values: grid.Codes) -> None:
        """Take over an (out, in) weight, divided by `smooth` where there is one.

        Args:
            values: of 8 bits with one scale a row; of 4 bits with scales that are whole multiples (`find_scales`).

        Raises:
            RuntimeError: shapes that do not agree.
            ValueError: codes with zero points where the layer stores none, or the other way round; scales of 4 bits
                that are no whole multiples of one.
        """
        grid.refuse_other_symmetry(values, with_zeros=self.zeros is not None)
        if self.factors is None:
            self.codes.copy_((values.codes.to(torch.int16) - 128).to(torch.int8).T)
            self.scales.copy_(values.scales.squeeze(1))
            return
        steps, factors = grid.whole_factors(values.scales, values.zeros, bits=4)
        if not torch.allclose(steps * factors, values.scales, rtol=1e-5, atol=0):
            raise ValueError("the scales of a row are no whole multiples of one: quantise with `whole`")
        codes = F.pad(values.codes, (0, self.groups * self.group_size - self.in_features))
        self.codes.copy_(grid.pack(codes.unflatten(1, (self.groups, self.group_size)), bits=4))
        self.scales.copy_(steps.squeeze(1))
        self.factors.copy_(grid.pack(factors, bits=4))
        if self.zeros is not None and values.zeros is not None:
            self.zeros.copy_(grid.pack(values.zeros, bits=4))

    def integers(self) -> Tensor:
        """The int8 matrix that the product reads, (in, out) in −127…127."""
        if self.factors is None:
            return self.codes
        codes = grid.unpack(self.codes, self.group_size, bits=4).to(torch.int8)
        factors = grid.unpack(self.factors, self.groups, bits=4).to(torch.int8)
        zeros = 8 if self.zeros is None else grid.unpack(self.zeros, self.groups, bits=4).to(torch.int8)[..., None]
        return codes.sub_(zeros).mul_(factors[..., None]).flatten(1)[:, : self.in_features].T

    def set_input_range(self, low: Tensor, high: Tensor) -> None:
        """Fix the range of a static layer's input, from the least and the greatest value of each, (in,) or scalars.

        They are those before factors, which must have been set.
        """
        assert self.input_scale is not None
        assert self.input_zero is not None
        factors = torch.ones((), device=self.codes.device) if self.smooth is None else self.smooth
        scale, zero = input_grid((low.float() * factors).min(), (high.float() * factors).max())
        self.input_scale.copy_(scale)
        self.input_zero.copy_(zero)

    def dequantize(self) -> Tensor:
        """The weight that codes and factors stand for, (out, in) float32."""
        weight = self.integers().T.float() * self.scales[:, None]
        return weight if self.smooth is None else weight * self.smooth

    def forward(self, x: Tensor) -> Tensor:
        """The integer product, rounded once to the type of `x`, shape (…, out_features)."""
        scaled = x if self.smooth is None else x * self.smooth
        if self.input_scale is None or self.input_zero is None:
            if emitting():
                return dynamic_matmul(scaled, self._emitted_integers(), self.scales, self.bias)
            quantized, scale, zero = quantize_dynamic(scaled.float())
        else:
            if emitting():
                codes = self._emitted_integers()
                return static_matmul(scaled, self.input_scale, self.input_zero, codes, self.scales, self.bias)
            scale, zero = self.input_scale.float(), self.input_zero.float()
            quantized = quantize_static(scaled.float(), scale, zero)
        y = multiply_exactly(quantized.sub_(zero), self.integers().float()).mul_(scale * self.scales)
        return (y if self.bias is None else y.add_(self.bias)).to(x.dtype)

    def _emitted_integers(self) -> Tensor:
        """`integers`, as the file makes them."""
        if self.factors is None:
            return self.codes
        size = {"columns": self.in_features, "group_size": self.group_size}
        return widened_codes(self.codes, self.factors, self.zeros, **size)

    def extra_repr(self) -> str:
        """The shape, as nn.Linear prints it."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        form = f"bits={self.bits}, smooth={self.smooth is not None}, static={self.input_scale is not None}"
        return f"{shape}, bias={self.bias is not None}, {form}"
