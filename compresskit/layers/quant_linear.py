"""A linear layer whose weight is held as integers, and multiplied as float.

    before  y = W x + b                          W (out, in) float32                32 bits a weight
    after   y = ((codes − zeros) · scales) x + b codes in 3, 4 or 8 bits, packed    as many bits and 4 bytes a group

It saves bytes and memory traffic; the products stay float, so a fast encoder wants `Int8Linear` instead (8 bit
weights alone gave 1.2 times the speed of float on a 64-token input). In ONNX it is `com.microsoft::MatMulNBits`
with these very tensors; it has no 3 bits, so these integers take up 4 there (`widened`). A row with one scale (group
size 0) is written as blocks that repeat that scale, because the operator has no larger block than 256. Columns that no
group divides are padded with codes that no input reaches.

In torch the weight is decoded at every call; a few tokens in bfloat16 go through torch's packed kernels instead, where
they take the grid (`packed_product`). In float32 those are no faster.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compresskit.layers import grid
from compresskit.layers.operators import check_group_size, emitting, matmul_nbits, row_block
from compresskit.layers.packed_product import PackedWeight, fingerprint, fits, takes
from compresskit.layers.quant_embedding import QuantEmbedding
from compresskit.layers.stand_in import LinearStandIn


class QuantLinear(LinearStandIn):
    """y = dequantised(codes) x + bias.

    Args:
        in_features: width of x, shape (…, in_features).
        out_features: width of y, shape (…, out_features).
        bits: 3, 4 or 8.
        group_size: columns that share a scale: 0 (the row), 16, 32, 64, 128 or 256; the last group may be short.
        symmetric: whether the middle code stands for zero, and no zero points are stored; None: for 8 bits.
        bias: whether a float bias is added.
        table: the embedding whose integers are this weight (see `tied_to`); None where the layer owns its own.

    Raises:
        ValueError: bits or a group size that no operator has.
    """

    codes: Tensor | None  # (out, blocks, block · bits / 8) uint8, as MatMulNBits reads them
    scales: Tensor | None  # (out, groups) float32
    zeros: Tensor | None  # (out, ⌈groups · bits / 8⌉) uint8, packed; None where symmetric

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int,
        group_size: int,
        symmetric: bool | None = None,
        bias: bool,
        table: QuantEmbedding | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_group_size(in_features, group_size, pad=True)
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size, self.symmetric = bits, group_size, not grid.has_zeros(bits, symmetric)
        self.groups = grid.count_groups(in_features, group_size)
        self.block_size = group_size or row_block(in_features)
        self.blocks = -(-in_features // self.block_size)
        # A tuple hides the table from nn.Module: its integers must not appear a second time among the buffers.
        self._table = (table,) if table is not None else ()
        owns = table is None
        blob = self.block_size * bits // 8
        shapes = {
            "codes": ((out_features, self.blocks, blob), torch.uint8, owns),
            "scales": ((out_features, self.groups), torch.float32, owns),
            "zeros": (
                (out_features, grid.packed_columns(self.groups, bits)),
                torch.uint8,
                owns and not self.symmetric,
            ),
        }
        for name, (shape, dtype, stored) in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device) if stored else None)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device)) if bias else None
        self._kept: tuple[tuple[tuple[int, int], ...], PackedWeight] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the packed form, which a copy makes of its own integers."""
        return self.__dict__ | {"_kept": None}

    def _packed(self) -> PackedWeight | None:
        """What a kernel reads, made when the integers have changed or moved since; None where no kernel takes them."""
        shape = (self.out_features, self.in_features)
        if not fits(shape, bits=self.bits, group_size=self.group_size, symmetric=self.symmetric):
            return None
        now = fingerprint(self.tensors())
        if now is None:
            return None
        if self._kept is None or self._kept[0] != now:
            self._kept = (now, PackedWeight(self.values(), bits=self.bits, group_size=self.group_size))
        return self._kept[1]

    @classmethod
    def tied_to(cls, table: QuantEmbedding, *, bias: bool) -> "QuantLinear":
        """An output head, (…, dim) to (…, num), whose weight is the table's integers, stored once.

        Raises:
            ValueError: a table whose width is no multiple of 16, which the operator could only read as a copy.
        """
        if table.embedding_dim % 16:
            raise ValueError(f"a tied head needs a table width that is a multiple of 16, not {table.embedding_dim}")
        return cls(
            table.embedding_dim,
            table.num_embeddings,
            bits=table.bits,
            group_size=table.group_size,
            symmetric=table.zeros is None,
            bias=bias,
            table=table,
            device=table.codes.device,
        )

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Packed codes (out, blocks, bytes), scales and packed zeros, whoever owns them."""
        if self._table:
            table = self._table[0]
            return table.codes.view(self.out_features, self.blocks, -1), table.scales, table.zeros
        assert self.codes is not None
        assert self.scales is not None
        return self.codes, self.scales, self.zeros

    def set_codes(self, values: grid.Codes) -> None:
        """Take over a quantised (out, in) weight of the same bits and groups (a tied head writes to its table).

        Raises:
            RuntimeError: shapes that do not agree.
            ValueError: codes of the other symmetry.
        """
        codes, scales, zeros = self.tensors()
        grid.refuse_other_symmetry(values, with_zeros=zeros is not None)
        padding = self.blocks * self.block_size - self.in_features
        packed = grid.pack(F.pad(values.codes, (0, padding)), bits=self.bits)
        codes.copy_(packed.view(self.out_features, self.blocks, -1))
        scales.copy_(values.scales)
        if zeros is not None and values.zeros is not None:
            zeros.copy_(grid.pack(values.zeros, bits=self.bits))

    def values(self) -> grid.Codes:
        """The integers and their grid, unpacked: what `set_codes` took over."""
        return self._rows(0, self.out_features)

    def _rows(self, start: int, stop: int) -> grid.Codes:
        codes, scales, zeros = self.tensors()
        codes = grid.unpack(codes[start:stop].flatten(1), self.in_features, bits=self.bits)
        zeros = None if zeros is None else grid.unpack(zeros[start:stop], self.groups, bits=self.bits)
        return grid.Codes(codes, scales[start:stop], zeros)

    def widened(self) -> "QuantLinear":
        """A layer of 4-bit integers that stand for the same weight, for operators without 3 bits.

        Codes and zero points stay what they are; around a symmetric grid's middle both move up by 4.
        """
        wide = QuantLinear(
            self.in_features,
            self.out_features,
            bits=4,
            group_size=self.group_size,
            symmetric=self.symmetric,
            bias=False,
            device=self.tensors()[0].device,
        )
        values = self.values()
        shift = 8 - 2 ** (self.bits - 1) if self.symmetric else 0
        wide.set_codes(grid.Codes(values.codes + shift, values.scales, values.zeros))
        wide.bias = self.bias
        return wide

    def onnx_form(self) -> "QuantLinear":
        """The layer whose tensors the operator reads: of 3 bits the widened one, else itself."""
        return self.widened() if self.bits == 3 else self

    def dequantize(self) -> Tensor:
        """The weight that the codes stand for, (out, in) float32."""
        return self.dequantize_rows(0, self.out_features)

    def dequantize_rows(self, start: int, stop: int) -> Tensor:
        """The weight of the outputs from `start` to `stop`, (stop − start, in) float32."""
        rows = self._rows(start, stop)
        return grid.decode(rows.codes, rows.scales, rows.zeros, bits=self.bits, group_size=self.group_size)

    def forward(self, x: Tensor) -> Tensor:
        """Dequantise in float32 and multiply in the type of `x`, shape (…, out_features)."""
        if emitting():
            codes, scales, zeros = self.tensors()
            return matmul_nbits(x, codes, scales, zeros, self.bias, bits=self.bits, in_features=self.in_features)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        packed = self._packed() if takes(x) and not self.training else None
        if packed is not None:
            y = packed.multiply(x)
            return y if bias is None else y + bias
        return F.linear(x, self.dequantize().to(x.dtype), bias)

    def extra_repr(self) -> str:
        """Shape and grid."""
        form = ", symmetric" if self.symmetric and self.bits < 8 else ""
        text = f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}{form}"
        return f"{text}, group_size={self.group_size}, bias={self.bias is not None}{', tied' if self._table else ''}"
