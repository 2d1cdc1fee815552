"""torch's CPU kernels for packed 4 and 8 bit weights, which decode in registers what `QuantLinear` decodes in memory.

    4 bits in groups of 32 to 256         aten::_weight_int4pack_mm_for_cpu     (code − 8) · scale + (8 − zero) · scale
    8 bits, symmetric, a scale a row      aten::_weight_int8pack_mm             (code − 128) · scale

Only for bfloat16: torch 2.13 has vector code for no other type on x86. Sums are kept in float32, and what the kernels
round to bfloat16 (scales and shifted zeros, where decoding rounds each weight) leaves them as near to the exact product
as decoding: 0.24 % from it, against 0.23 %. In float32 they are exact to 7e-7, and a loop: of 64 tokens 10 to 25 times
as slow as decoding, of one token at most a little faster. The packed form takes the memory of the codes once more.

Measured on one core with AVX-512, 576 × 1536 and 1536 × 576, decoding's time over the kernel's: 4 bits 17 for one token
and 1.9 to 2.6 for 64, 8 bits 8 to 10 and 1.1 to 1.4.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from compresskit.layers import grid

GROUP_SIZES = (32, 64, 128, 256)
#: Tokens above which decoding once for all of them wins.
MOST_ROWS = 64
_VECTOR_CODE = ("AVX2", "AVX512")
# What the kernels ask of both sides of a weight.
_STEP = 16


def fits(weight: tuple[int, int], *, bits: int, group_size: int, symmetric: bool) -> bool:
    """Whether a kernel takes an (out, in) weight on such a grid."""
    if any(side % _STEP for side in weight):
        return False
    if bits == 8:
        return group_size == 0 and symmetric
    return bits == 4 and group_size in GROUP_SIZES and weight[1] % group_size == 0


def takes(x: Tensor) -> bool:
    """Whether a kernel is the faster way to multiply `x` (…, in): a few tokens in bfloat16, and no gradient."""
    return (
        x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and not (torch.is_grad_enabled() and x.requires_grad)
        and 0 < x.numel() <= MOST_ROWS * x.shape[-1]
        and not torch.compiler.is_compiling()
        and torch.backends.cpu.get_cpu_capability() in _VECTOR_CODE
    )


def fingerprint(tensors: Sequence[Tensor | None]) -> tuple[tuple[int, int], ...] | None:
    """What changes when any of these moves or is written to; None where torch does not count that (inference mode)."""
    held = [tensor for tensor in tensors if tensor is not None]
    if any(tensor.is_inference() or tensor.device.type != "cpu" for tensor in held):
        return None
    return tuple((tensor.data_ptr(), tensor._version) for tensor in held)


class PackedWeight:
    """The integers of a weight as a kernel reads them.

    Args:
        values: of a weight that `fits`.
        bits: 4 or 8.
        group_size: of 4 bits.
    """

    def __init__(self, values: grid.Codes, *, bits: int, group_size: int) -> None:
        self._group_size = group_size if bits == 4 else 0
        scales = values.scales.float()
        if bits == 8:
            self._codes = (values.codes.to(torch.int16) - 128).to(torch.int8).contiguous()
            self._grid = scales[:, 0].contiguous().bfloat16()
            return
        self._codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values.codes.to(torch.int32), 1)
        shift = torch.zeros_like(scales) if values.zeros is None else (8.0 - values.zeros.float()) * scales
        self._grid = torch.stack([scales, shift], dim=-1).transpose(0, 1).contiguous().bfloat16()

    def multiply(self, x: Tensor) -> Tensor:
        """The product for x (…, in) in bfloat16, (…, out)."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        if self._group_size:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self._codes, self._group_size, self._grid)
        else:
            y = torch.ops.aten._weight_int8pack_mm(rows, self._codes, self._grid)
        return y.view(*x.shape[:-1], y.shape[-1])
