"""Linear layers in the formats of bitsandbytes, computed as its own layers compute them.

    nf4, fp4   y = (T[codes] · absmax) x + b          16 values T, an absmax for every 64 weights of a row
               absmax = map[code] · nested + offset   double quantisation: 8 bits each and a scale for every 256
    int8       y = s_x s_w Σ q(x) codes + b           one scale per output, one per token; columns of x that hold an
                                                      outlier anywhere in the batch are multiplied in float32

Sources: QLoRA (arXiv:2305.14314), LLM.int8 (arXiv:2208.07339). The codes are bitsandbytes' and the arithmetic is plain
torch, bit for bit what bitsandbytes does in float32 on a CPU, so that a student answers without that package.
In ONNX 4 bits are `com.microsoft::MatMulBnb4` with these codes; int8 becomes an 8-bit `QuantLinear` (`onnx_form`),
which rounds no activation, but at the export's accuracy level 4.

Not for speed on a CPU: 4 bits are decoded at every call, int8 rounds and searches its input for outliers at every call.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compresskit.layers.grid import Codes
from compresskit.layers.int8_linear import multiply_exactly
from compresskit.layers.operators import emitting, matmul_bnb4
from compresskit.layers.quant_linear import QuantLinear
from compresskit.layers.stand_in import LinearStandIn

#: Weights that share an absmax, and absmaxes that share a nested scale: what bitsandbytes uses unless told otherwise.
BLOCK, NESTED_BLOCK = 64, 256
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
# bitsandbytes' own constants, in its own digits: 1 / 127² and 1 / 127.
_PRODUCT_SCALE, _WEIGHT_SCALE = 6.200124e-05, 7.874015718698502e-3


def code_table(form: str) -> Tensor:
    """The 16 values that codes of `nf4` or `fp4` stand for, float32."""
    if form == "nf4":
        return torch.tensor(_NF4)
    return torch.tensor([*_FP4, *(-value for value in _FP4)]) / max(_FP4)


class Bnb4Linear(LinearStandIn):
    """y = (T[codes] · absmax) x + bias.

    Args:
        in_features: width of x, shape (…, in_features); a multiple of 64.
        out_features: width of y, shape (…, out_features).
        form: nf4 or fp4.
        double_quant: whether the absmaxes are 8-bit codes themselves.
        bias: whether a float bias is added.

    Raises:
        ValueError: columns that blocks of 64 do not divide.
    """

    codes: Tensor  # (out · in / 2,) uint8, row after row, the first of two weights in the high half
    absmax: Tensor  # (out · in / 64,) float32, or uint8 where quantised
    nested_absmax: Tensor | None  # (⌈out · in / 64 / 256⌉,) float32
    nested_map: Tensor | None  # (256,) float32: what 8-bit absmaxes stand for
    offset: Tensor | None  # () float32

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        form: str,
        double_quant: bool = False,
        bias: bool,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if in_features % BLOCK:
            raise ValueError(f"blocks of {BLOCK} do not divide {in_features} columns")
        self.in_features, self.out_features = in_features, out_features
        self.form, self.double_quant = form, double_quant
        blocks = out_features * in_features // BLOCK
        nested = {"nested_absmax": (-(-blocks // NESTED_BLOCK),), "nested_map": (256,), "offset": ()}
        self.register_buffer("codes", torch.zeros(blocks * BLOCK // 2, dtype=torch.uint8, device=device))
        dtype = torch.uint8 if double_quant else torch.float32
        self.register_buffer("absmax", torch.zeros(blocks, dtype=dtype, device=device))
        for name, shape in nested.items():
            held = torch.zeros(shape, dtype=torch.float32, device=device) if double_quant else None
            self.register_buffer(name, held)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device)) if bias else None

    def scales(self) -> Tensor:
        """The absmax of every block, (out · in / 64,) float32."""
        if self.nested_absmax is None or self.nested_map is None or self.offset is None:
            return self.absmax
        nested = self.nested_absmax.repeat_interleave(NESTED_BLOCK)[: len(self.absmax)]
        return self.nested_map[self.absmax.long()] * nested + self.offset

    def dequantize(self) -> Tensor:
        """The weight that the codes stand for, (out, in) float32."""
        halves = torch.stack([self.codes >> 4, self.codes & 15], 1).view(-1, BLOCK)
        values = code_table(self.form).to(self.codes.device)[halves.long()]
        return (values * self.scales()[:, None]).view(self.out_features, self.in_features)

    def onnx_form(self) -> nn.Module:
        """The layer whose tensors the operator reads: with double quantisation one of float absmaxes, else itself."""
        if not self.double_quant:
            return self
        plain = Bnb4Linear(self.in_features, self.out_features, form=self.form, bias=False, device=self.codes.device)
        plain.codes.copy_(self.codes)
        plain.absmax.copy_(self.scales())
        plain.bias = self.bias
        return plain.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Decode in float32 and multiply in the type of `x`, shape (…, out_features)."""
        if emitting():
            y = matmul_bnb4(x, self.codes, self.scales(), form=self.form, block=BLOCK, out_features=self.out_features)
            return y if self.bias is None else y + self.bias
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.dequantize().to(x.dtype), bias)

    def extra_repr(self) -> str:
        """Shape and format."""
        form = f"{self.form}, double_quant={self.double_quant}"
        return f"in_features={self.in_features}, out_features={self.out_features}, {form}, bias={self.bias is not None}"


class Bnb8Linear(LinearStandIn):
    """y = s_x s_w Σ q(x) codes + bias, columns with an outlier apart.

    Args:
        in_features: width of x, shape (…, in_features).
        out_features: width of y, shape (…, out_features).
        threshold: |x| from which a column is multiplied in float32; 0 for none.
        bias: whether a float bias is added.
    """

    codes: Tensor  # (out, in) int8
    scales: Tensor  # (out,) float32: the largest |w| of each row, which stands for code 127

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        threshold: float,
        bias: bool,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.threshold = in_features, out_features, threshold
        self.register_buffer("codes", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("scales", torch.zeros(out_features, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device)) if bias else None

    def dequantize(self) -> Tensor:
        """The weight that the codes stand for, (out, in) float32."""
        return self.codes * self.scales[:, None] * _WEIGHT_SCALE

    def onnx_form(self) -> nn.Module:
        """The same codes in a layer that multiplies the input as it is: what ONNX Runtime has an operator for."""
        new = QuantLinear(
            self.in_features, self.out_features, bits=8, group_size=0, bias=False, device=self.codes.device
        )
        new.set_codes(Codes((self.codes.to(torch.int16) + 128).to(torch.uint8), self.scales[:, None] / 127, None))
        new.bias = self.bias
        return new.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """The integer product, and the outliers' columns in float32, shape (…, out_features), in the type of `x`."""
        rows = x.reshape(-1, self.in_features).float()
        steps, row_scales, outliers = round_rows(rows, self.threshold)
        product = multiply_exactly(steps, self.codes.T.float())
        scales = self.scales.float()
        y = product * (row_scales[:, None] * scales) * _PRODUCT_SCALE
        if self.bias is not None:
            y += self.bias
        if len(outliers):
            weight = self.codes[:, outliers].contiguous() * scales[:, None] * _WEIGHT_SCALE
            y = y.addmm(rows[:, outliers].contiguous(), weight.T)
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def extra_repr(self) -> str:
        """Shape and threshold."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, threshold={self.threshold}, bias={self.bias is not None}"


def round_rows(rows: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Each row in steps of 1/127 of its largest element, as bitsandbytes rounds activations.

    Args:
        rows: (N, I) float32; rounded from float16.
        threshold: elements from this size on do not count, and their whole column becomes zero; 0 for none.

    Returns:
        Steps (N, I), whole numbers in −127…127 held in float32; scales (N,) float32; the columns left out, int64.
    """
    half = rows.half()
    columns = torch.empty(0, dtype=torch.int64, device=rows.device)
    if threshold > 0:
        outliers = half.abs() >= threshold
        columns = outliers.any(0).nonzero().view(-1)
        half = half.masked_fill(outliers, 0)
    scales = half.abs().amax(1).float()
    steps = torch.round(half * (127.0 / scales[:, None])).nan_to_num(0.0)  # a row of zeros
    steps[:, columns] = 0
    return steps, scales, columns
