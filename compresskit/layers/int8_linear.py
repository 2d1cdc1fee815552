"""A linear layer computed in integers: int8 weights, activations rounded to uint8.

    before  y = W x + b
    after   s = (max x − min x) / 255,  z = −min x / s,  q = round(x / s) + z        one s and z for the whole tensor
            y = s · scales · Σ (q − z) · codes + b                                   the sum is exact, in int32

The range from min x to max x is that of the input as it comes (dynamic), or one that calibration fixed (static): then
what lies outside is cut off. A smoothed layer rounds `x · smooth` and holds the codes of W / smooth: one factor for
each input, so that channels with large activations do not take the whole range (SmoothQuant, arXiv:2211.10438).

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

import torch
from torch import Tensor, nn

from compresskit.layers import grid
from compresskit.layers.operators import dynamic_matmul, emitting, static_matmul
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
        smooth: whether inputs are multiplied by a factor each before they are rounded.
        static: whether the range of inputs is fixed (`set_input_range`), instead of each call's own.
    """

    codes: Tensor  # (in, out) int8 in −127…127, as the operator reads them
    scales: Tensor  # (out,) float32
    smooth: Tensor | None  # (in,) float32
    input_scale: Tensor | None  # scalar float32; None where dynamic
    input_zero: Tensor | None  # scalar uint8; None where dynamic

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        smooth: bool = False,
        static: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("codes", torch.zeros(in_features, out_features, dtype=torch.int8, device=device))
        self.register_buffer("scales", torch.zeros(out_features, dtype=torch.float32, device=device))
        factors = torch.ones(in_features, dtype=torch.float32, device=device) if smooth else None
        self.register_buffer("smooth", factors)
        self.register_buffer("input_scale", torch.ones((), dtype=torch.float32, device=device) if static else None)
        self.register_buffer("input_zero", torch.zeros((), dtype=torch.uint8, device=device) if static else None)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device)) if bias else None

    def set_codes(self, values: grid.Codes) -> None:
        """Take over an (out, in) weight, divided by `smooth` where there is one, in 8 bits with one scale a row.

        Raises:
            RuntimeError: shapes that do not agree.
            ValueError: codes with zero points.
        """
        grid.refuse_other_symmetry(values, with_zeros=False)
        self.codes.copy_((values.codes.to(torch.int16) - 128).to(torch.int8).T)
        self.scales.copy_(values.scales.squeeze(1))

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
        weight = self.codes.T.float() * self.scales[:, None]
        return weight if self.smooth is None else weight * self.smooth

    def forward(self, x: Tensor) -> Tensor:
        """The integer product, rounded once to the type of `x`, shape (…, out_features)."""
        scaled = x if self.smooth is None else x * self.smooth
        if self.input_scale is None or self.input_zero is None:
            if emitting():
                return dynamic_matmul(scaled, self.codes, self.scales, self.bias)
            quantized, scale, zero = quantize_dynamic(scaled.float())
        else:
            if emitting():
                return static_matmul(scaled, self.input_scale, self.input_zero, self.codes, self.scales, self.bias)
            scale, zero = self.input_scale.float(), self.input_zero.float()
            quantized = quantize_static(scaled.float(), scale, zero)
        y = multiply_exactly(quantized.sub_(zero), self.codes.float()).mul_(scale * self.scales)
        return (y if self.bias is None else y.add_(self.bias)).to(x.dtype)

    def extra_repr(self) -> str:
        """The shape, as nn.Linear prints it."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        form = f"smooth={self.smooth is not None}, static={self.input_scale is not None}"
        return f"{shape}, bias={self.bias is not None}, {form}"
