"""Integer grids for weights: which codes, scales and zero points stand for a float matrix.

    w ≈ (code − zero) · scale          one scale (and zero) for `group_size` neighbouring columns of a row, 0: the row

Each bit width has a usual form, in which it loses least for its bytes, and on request the other one:

- 8 bit is symmetric: codes 1…255 around the zero point 128, which ONNX Runtime's `MatMulNBits` and
  `GatherBlockQuantized` assume where none is given, so no zero points are stored. A zero of its own would win at most
  one bit of range, and 8 bits have it to spare.
- 4 and 3 bit are asymmetric: a zero point of as many bits for each group. With 16 or 8 values, a group whose weights
  lie on one side of zero would waste half of a symmetric grid. Symmetric, they use all codes, around 8 and 4.

Zero itself is always on the grid, so padding and pruned weights stay exactly zero; the last group of a row may be a
short one. Rounding is to nearest; the range of each group may be shrunk by a clip search that minimises the error
weighted by how strongly each column is used (`diag(C)` of the layer's input moment). The search runs in float32, where
errors closer than its rounding count as equal; codes are then chosen in float64 for the float32 scale that is stored,
so they are nearest for that scale.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# O rows (outputs, or tokens of a table), I columns, G groups of a row, S columns of a group
WIDTHS = (3, 4, 8)
CLIP_POINTS = 20
_SMALLEST_SHRINK = 0.5
# Rows are worked on in chunks whose temporaries stay in a core's cache; larger ones made the search 4 times slower.
_CHUNK_ELEMENTS = 1 << 16


@dataclass(frozen=True)
class Codes:
    """A quantised matrix, unpacked.

    Attributes:
        codes: (O, I) uint8, below 2^bits.
        scales: (O, G) float32, positive.
        zeros: (O, G) uint8 zero points, or None where every zero point is 2^(bits − 1).
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None


def count_groups(columns: int, group_size: int) -> int:
    """How many groups a row of `columns` has; the last may be short.

    Raises:
        ValueError: a negative group size.
    """
    if group_size < 0:
        raise ValueError(f"group size {group_size} is negative")
    return -(-columns // group_size) if group_size else 1


def has_zeros(bits: int, symmetric: bool | None = None) -> bool:
    """Whether a grid stores zero points; without word on symmetry, whether the usual one of `bits` does.

    Raises:
        ValueError: bits other than 3, 4 and 8.
    """
    if bits not in WIDTHS:
        raise ValueError(f"grids have 3, 4 or 8 bits, not {bits}")
    return not symmetric if symmetric is not None else bits < 8


def refuse_other_symmetry(values: Codes, *, with_zeros: bool) -> None:
    """Make sure that codes have zero points where a layer stores them, and none where it does not.

    Raises:
        ValueError: otherwise: the codes would stand for other weights.
    """
    if (values.zeros is not None) != with_zeros:
        have, stores = ("no zero points", "some") if with_zeros else ("zero points", "none")
        raise ValueError(f"the codes have {have}, and the layer stores {stores}: quantise with its `symmetric`")


def packed_columns(columns: int, bits: int) -> int:
    """Bytes that hold `columns` codes of `bits` bits."""
    return (columns * bits + 7) // 8


def find_scales(
    weight: Tensor,
    *,
    bits: int,
    group_size: int,
    symmetric: bool | None = None,
    column_weight: Tensor | None = None,
    clip_points: int = CLIP_POINTS,
    whole: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Scales and zeros for `weight`, each group's range shrunk where that lowers its weighted squared error.

    Args:
        weight: (O, I), any float dtype; computed in float32; not modified.
        bits: 3, 4 or 8.
        group_size: columns that share a scale; 0 is the whole row.
        symmetric: whether every zero point is the middle code; None: as is usual for `bits`.
        column_weight: (I,), the weight of each column's squared error, not negative; None weighs all alike.
        clip_points: shrink factors tried from 1 down to 0.5, 1 first; 1 is no search. A factor wins only where its
            error is strictly less, so the result is never worse than no clip.
        whole: whether the scales of a row are then moved to whole multiples of one (`whole_factors`), and from there,
            with the zeros, by one where that lowers the error.

    Returns:
        scales (O, G) float32 and zeros (O, G) uint8, or None for the symmetric grid.

    Raises:
        ValueError: shapes or sizes that do not agree.

    Cost: `clip_points` roundings of the matrix, and for `whole` nine more, or three of a symmetric grid.
    """
    rows, columns = weight.shape
    groups = count_groups(columns, group_size)
    if column_weight is not None and column_weight.shape != (columns,):
        raise ValueError(f"column_weight has shape {tuple(column_weight.shape)}, expected ({columns},)")
    with_zeros = has_zeros(bits, symmetric)
    importance = torch.ones(columns) if column_weight is None else _scaled_to_one(column_weight)
    importance = _grouped(importance.to(weight.device)[None], groups, group_size)
    scales = torch.empty(rows, groups, dtype=torch.float32, device=weight.device)
    zeros = torch.empty(rows, groups, dtype=torch.uint8, device=weight.device)
    step = max(1, _CHUNK_ELEMENTS // columns)
    for start in range(0, rows, step):
        chunk = _grouped(weight[start : start + step].detach().float(), groups, group_size)
        part = _search(chunk, importance, bits, with_zeros, clip_points)
        if whole:
            part = _whole_scales(chunk, importance, *part, bits, with_zeros)
        scales[start : start + step], zeros[start : start + step] = part
    return scales, zeros if with_zeros else None


def whole_factors(scales: Tensor, zeros: Tensor | None, *, bits: int) -> tuple[Tensor, Tensor]:
    """Scales as whole multiples of one step a row, so that (code − zero) · factor stays within −127…127.

    A product of integers then takes the weight in 8 bits, with the step as the scale of its row. The group with the
    largest scale keeps it; the others' move by half a step at most. Scales that are such multiples stay.

    Args:
        scales, zeros: (O, G), as `find_scales` gives them; a scale of 0 is that of a group without weights.
        bits: of the codes.

    Returns:
        steps (O, 1) float32 and factors (O, G) uint8 from 1 on.

    Source: progressive group quantisation, QServe (arXiv:2405.04532), section 4.1.
    """
    most = _greatest_factors(torch.full_like(scales, 2 ** (bits - 1)) if zeros is None else zeros.float(), bits)
    steps = (scales / most).amax(1, keepdim=True)
    steps = torch.where(steps == 0, 1.0, steps)
    return steps, (scales / steps).round().clamp(min=1).to(torch.uint8)


def _greatest_factors(zeros: Tensor, bits: int) -> Tensor:
    """The most by which codes around these zeros may be multiplied within −127…127, (O, G) float."""
    return (127 / torch.maximum(zeros, 2**bits - 1 - zeros)).floor()


def _whole_scales(
    weight: Tensor, importance: Tensor, scales: Tensor, zeros: Tensor, bits: int, with_zeros: bool
) -> tuple[Tensor, Tensor]:
    """The scales (O, G) of groups of `weight` (O, G, S) as whole multiples of one a row, and their zeros.

    The group that the step of its row follows from keeps both, so that `whole_factors` finds that step again.
    """
    # Groups of zeros, whose scale says nothing, have no part in the step.
    scales = scales.masked_fill(weight.abs().amax(-1) < torch.finfo(torch.float32).tiny * 2**bits, 0)
    steps, factors = whole_factors(scales, zeros if with_zeros else None, bits=bits)
    start, zero = factors.float(), zeros.float()
    leads = torch.zeros_like(scales, dtype=torch.bool)
    leads.scatter_(1, (scales / _greatest_factors(zero, bits)).argmax(1, keepdim=True), True)
    best = _group_error(weight, importance, start * steps, zero, bits, with_zeros)
    best_factor, best_zero = start, zero
    around = itertools.product((-1, 0, 1), (-1, 0, 1) if with_zeros else (0,))
    for by, shift in (move for move in around if any(move)):
        factor, moved = start + by, (zero + shift).clamp(0, 2**bits - 1)
        error = _group_error(weight, importance, factor * steps, moved, bits, with_zeros)
        better = (error < best) & (factor >= 1) & (factor <= _greatest_factors(moved, bits)) & ~leads
        best = torch.where(better, error, best)
        best_factor, best_zero = torch.where(better, factor, best_factor), torch.where(better, moved, best_zero)
    return best_factor * steps, best_zero.to(torch.uint8)


def _grouped(matrix: Tensor, groups: int, group_size: int) -> Tensor:
    """(…, I) as (…, G, S), a short last group filled up with zeros."""
    size = group_size or -(-matrix.shape[-1] // groups)
    missing = groups * size - matrix.shape[-1]
    return (F.pad(matrix, (0, missing)) if missing else matrix).unflatten(-1, (groups, size))


def _scaled_to_one(column_weight: Tensor) -> Tensor:
    """Column weights in float32 with a greatest one of 1, so that none of a tiny moment underflows."""
    greatest = column_weight.max().clamp_min(torch.finfo(torch.float64).tiny)
    return (column_weight.double() / greatest).float()


def _search(weight: Tensor, importance: Tensor, bits: int, with_zeros: bool, clip_points: int) -> tuple[Tensor, Tensor]:
    """The best (scales, zeros) of each group of `weight` (O, G, S) among the shrunk ranges."""
    low, high = weight.amin(-1).clamp(max=0), weight.amax(-1).clamp(min=0)
    best_scale, best_zero = _range_grid(low, high, bits, with_zeros)
    best = _group_error(weight, importance, best_scale, best_zero, bits, with_zeros)
    for shrink in torch.linspace(1.0, _SMALLEST_SHRINK, max(clip_points, 1)).tolist()[1:]:
        scale, zero = _range_grid(low * shrink, high * shrink, bits, with_zeros)
        error = _group_error(weight, importance, scale, zero, bits, with_zeros)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero.to(torch.uint8)


def _range_grid(low: Tensor, high: Tensor, bits: int, with_zeros: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero of groups that reach from `low` ≤ 0 to `high` ≥ 0, float32."""
    top = 2**bits - 1
    scale = (high - low) / top if with_zeros else torch.maximum(high, -low) / (top // 2)
    # A group of zeros, or one below float32's normal range, gets scale 1 and the codes of zero.
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)
    zero = (-low / scale).round().clamp(0, top) if with_zeros else torch.full_like(scale, 2 ** (bits - 1))
    return scale, zero


def _group_error(
    weight: Tensor, importance: Tensor, scale: Tensor, zero: Tensor, bits: int, with_zeros: bool
) -> Tensor:
    scale, zero = scale[..., None], zero[..., None]
    codes = round_codes(weight / scale, zero, bits=bits, symmetric=not with_zeros)
    return (codes.sub_(zero).mul_(scale).sub_(weight).square_() * importance).sum(-1)


def round_codes(steps: Tensor, zero: Tensor, *, bits: int, symmetric: bool) -> Tensor:
    """Nearest codes, ties to even, for weights given in steps of their scale; in the dtype of `steps`."""
    # Integer kernels take 8-bit weights from −127 on: symmetric ones leave code 0 out.
    lowest = 1 if symmetric and bits == 8 else 0
    return (steps.round() + zero).clamp(lowest, 2**bits - 1)


def encode(weight: Tensor, scales: Tensor, zeros: Tensor | None, *, bits: int, group_size: int = 0) -> Tensor:
    """The nearest codes (O, I) uint8 of `weight` on a given grid.

    Args:
        scales, zeros: (O, G); no zeros is the symmetric grid.
        group_size: columns of a group; 0: `scales` split the columns evenly.
    """
    rows, columns = weight.shape
    groups = scales.shape[1]
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    step = max(1, _CHUNK_ELEMENTS // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        steps = _grouped(weight[part].detach().double(), groups, group_size) / scales[part].double()[..., None]
        zero = torch.full_like(scales[part], 2 ** (bits - 1)) if zeros is None else zeros[part]
        found = round_codes(steps, zero.double()[..., None], bits=bits, symmetric=zeros is None)
        codes[part] = found.flatten(-2)[:, :columns].to(torch.uint8)
    return codes


def quantize_weight(
    weight: Tensor,
    *,
    bits: int,
    group_size: int,
    symmetric: bool | None = None,
    column_weight: Tensor | None = None,
    clip_points: int = CLIP_POINTS,
    whole: bool = False,
) -> Codes:
    """`weight` rounded to nearest on the grid of `find_scales` (same arguments and errors)."""
    scales, zeros = find_scales(
        weight,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        column_weight=column_weight,
        clip_points=clip_points,
        whole=whole,
    )
    return Codes(encode(weight, scales, zeros, bits=bits, group_size=group_size), scales, zeros)


def decode(codes: Tensor, scales: Tensor, zeros: Tensor | None, *, bits: int, group_size: int = 0) -> Tensor:
    """(code − zero) · scale in float32, shape of `codes` (…, I); `scales` and `zeros` are (…, G), as in `encode`.

    The difference is an exact integer and the product is rounded once, which is also what ONNX Runtime's operators do.
    """
    columns = codes.shape[-1]
    grouped = _grouped(codes, scales.shape[-1], group_size).float()
    zero = 2.0 ** (bits - 1) if zeros is None else zeros.float()[..., None]
    return ((grouped - zero) * scales[..., None]).flatten(-2)[..., :columns]


def pack(codes: Tensor, *, bits: int) -> Tensor:
    """Codes (…, I) as bytes (…, ⌈I·bits/8⌉) uint8, without gaps, the first code in the lowest bits, zero-padded."""
    if bits == 8:
        return codes
    if bits == 4:
        codes = F.pad(codes, (0, codes.shape[-1] % 2))
        return codes[..., 0::2] | (codes[..., 1::2] << 4)
    width = packed_columns(codes.shape[-1], bits)
    octets = F.pad(codes, (0, -codes.shape[-1] % 8)).unflatten(-1, (-1, 8)).to(torch.int32)
    words = (octets << (bits * torch.arange(8, device=codes.device))).sum(-1)
    parts = [(words >> (8 * byte)) & 255 for byte in range(bits)]
    return torch.stack(parts, dim=-1).flatten(-2)[..., :width].to(torch.uint8)


def unpack(packed: Tensor, columns: int, *, bits: int) -> Tensor:
    """The codes (…, columns) that `pack` packed."""
    if bits == 8:
        return packed[..., :columns]
    if bits == 4:
        return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., :columns]
    octets = F.pad(packed, (0, -packed.shape[-1] % bits)).unflatten(-1, (-1, bits)).to(torch.int32)
    words = (octets << (8 * torch.arange(bits, device=packed.device))).sum(-1)
    codes = (words[..., None] >> (bits * torch.arange(8, device=packed.device))) & (2**bits - 1)
    return codes.flatten(-2)[..., :columns].to(torch.uint8)
