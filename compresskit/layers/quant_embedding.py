"""An embedding table held as integers.

    before  y = W[i]                                 W (num, dim) float32               32 bits a value
    after   y = (codes[i] − zeros[i]) · scales[i]    codes in 4 or 8 bits, packed       4 or 8 bits and 4 bytes a group

Where the table multiplies what it looks up by one number (Gemma), so does this one.

Small models are mostly embeddings (52 % of all-MiniLM-L6-v2), so a small file needs this. Only the rows that are
looked up are dequantised. In ONNX it is `com.microsoft::GatherBlockQuantized` with these very tensors.
"""

import torch
from torch import Tensor, nn

from compresskit.layers import grid
from compresskit.layers.operators import check_group_size, emitting, gather_block_quantized
from compresskit.layers.stand_in import TypedLayer


class QuantEmbedding(TypedLayer):
    """A lookup table of integers.

    Args:
        num_embeddings: rows.
        embedding_dim: columns; even where bits is 4.
        bits: 4 or 8; the operator has no 3.
        group_size: columns that share a scale: 0 (the row), 16, 32, 64, 128 or 256, dividing `embedding_dim`.
        symmetric: whether the middle code stands for zero, and no zero points are stored; None: for 8 bits.
        padding_idx: kept for those who ask; lookups of it are like any other.
        multiplier: of what is looked up; no part of the table that a tied head reads.

    Raises:
        ValueError: bits, group size or an odd width that do not fit.
    """

    codes: Tensor  # (num, dim · bits / 8) uint8
    scales: Tensor  # (num, groups) float32
    zeros: Tensor | None  # (num, ⌈groups · bits / 8⌉) uint8, packed; None where symmetric

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        bits: int,
        group_size: int,
        symmetric: bool | None = None,
        padding_idx: int | None = None,
        multiplier: float = 1.0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_group_size(embedding_dim, group_size)
        if bits not in (4, 8):
            raise ValueError(f"tables have 4 or 8 bits, not {bits}")
        if bits == 4 and embedding_dim % 2:
            raise ValueError(f"4-bit tables need an even width, not {embedding_dim}")
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.bits, self.group_size, self.multiplier = bits, group_size, multiplier
        self.groups = grid.count_groups(embedding_dim, group_size)
        width = grid.packed_columns(embedding_dim, bits)
        self.register_buffer("codes", torch.zeros(num_embeddings, width, dtype=torch.uint8, device=device))
        self.register_buffer("scales", torch.zeros(num_embeddings, self.groups, dtype=torch.float32, device=device))
        with_zeros, width = grid.has_zeros(bits, symmetric), grid.packed_columns(self.groups, bits)
        zeros = torch.zeros(num_embeddings, width, dtype=torch.uint8, device=device) if with_zeros else None
        self.register_buffer("zeros", zeros)

    def set_codes(self, values: grid.Codes) -> None:
        """Take over a quantised (num, dim) table of the same bits and groups.

        Raises:
            RuntimeError: shapes that do not agree.
            ValueError: codes of the other symmetry.
        """
        grid.refuse_other_symmetry(values, with_zeros=self.zeros is not None)
        self.codes.copy_(grid.pack(values.codes, bits=self.bits))
        self.scales.copy_(values.scales)
        if self.zeros is not None and values.zeros is not None:
            self.zeros.copy_(grid.pack(values.zeros, bits=self.bits))

    def _decode(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        codes = grid.unpack(codes, self.embedding_dim, bits=self.bits)
        zeros = None if zeros is None else grid.unpack(zeros, self.groups, bits=self.bits)
        return grid.decode(codes, scales, zeros, bits=self.bits)

    def dequantize(self) -> Tensor:
        """The whole table, (num, dim) float32, before the multiplier."""
        return self._decode(self.codes, self.scales, self.zeros)

    def forward(self, indices: Tensor) -> Tensor:
        """The rows `indices` times the multiplier, shape (*indices, dim), in the model's float type."""
        rows = self._look_up(indices)
        rows = rows if self.multiplier == 1 else rows * self.multiplier
        return rows if emitting() else rows.to(self.dtype)

    def _look_up(self, indices: Tensor) -> Tensor:
        if emitting():
            return gather_block_quantized(
                self.codes, indices, self.scales, self.zeros, bits=self.bits, columns=self.embedding_dim
            )
        zeros = None if self.zeros is None else self.zeros[indices]
        return self._decode(self.codes[indices], self.scales[indices], zeros)

    def extra_repr(self) -> str:
        """Shape and grid."""
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}, group_size={self.group_size}"


class SameTable(nn.Module):
    """Looks up in a table that stands elsewhere in the model, and holds nothing itself.

    Args:
        table: where it stands.
    """

    def __init__(self, table: QuantEmbedding) -> None:
        super().__init__()
        # A tuple hides the table from nn.Module: its integers must not appear a second time among the buffers.
        self._table = (table,)
        self.num_embeddings, self.embedding_dim = table.num_embeddings, table.embedding_dim
        self.padding_idx = table.padding_idx

    def forward(self, indices: Tensor) -> Tensor:
        """What the table gives."""
        return self._table[0](indices)
