import pytest
import torch

from compresskit.layers.grid import (
    count_groups,
    decode,
    encode,
    find_scales,
    pack,
    quantize_weight,
    unpack,
)

GRIDS = [(3, 16), (4, 16), (4, 0), (8, 16), (8, 0)]


def _weight(rows: int = 12, columns: int = 48) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=draw)
    weight[3] = weight[3].abs() + 2  # a row on one side of zero
    weight[5, 7] = 30  # an outlier
    return weight


def _restored(weight: torch.Tensor, bits: int, group_size: int, **options) -> tuple[torch.Tensor, torch.Tensor]:
    values = quantize_weight(weight, bits=bits, group_size=group_size, **options)
    steps = values.scales.repeat_interleave(weight.shape[1] // values.scales.shape[1], dim=1)
    return decode(values.codes, values.scales, values.zeros, bits=bits), steps


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("columns", [1, 2, 7, 48])
def test_unpacking_gives_back_the_packed_codes(bits: int, columns: int) -> None:
    codes = torch.randint(0, 2**bits, (5, columns), dtype=torch.uint8)
    packed = pack(codes, bits=bits)
    assert packed.shape == (5, (columns * bits + 7) // 8)
    assert torch.equal(unpack(packed, columns, bits=bits), codes)


def test_four_bit_codes_lie_low_half_first() -> None:
    codes = torch.tensor([[1, 2, 3]], dtype=torch.uint8)
    assert pack(codes, bits=4).tolist() == [[0x21, 0x03]]


@pytest.mark.parametrize(("bits", "group_size"), GRIDS)
def test_without_clipping_every_weight_is_within_half_a_step(bits: int, group_size: int) -> None:
    weight = _weight()
    restored, steps = _restored(weight, bits, group_size, clip_points=1)
    assert ((restored - weight).abs() <= steps / 2 * (1 + 1e-4)).all()


@pytest.mark.parametrize(("bits", "group_size"), GRIDS)
def test_zero_weights_stay_exactly_zero(bits: int, group_size: int) -> None:
    weight = _weight()
    weight[:, ::3] = 0
    restored, _ = _restored(weight, bits, group_size)
    assert (restored[:, ::3] == 0).all()


@pytest.mark.parametrize(("bits", "group_size"), GRIDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_clip_search_is_never_worse_in_any_group(bits: int, group_size: int, weighted: bool) -> None:
    weight = _weight()
    importance = torch.linspace(0, 4, 48) ** 2 if weighted else torch.ones(48)
    errors = []
    for points in (1, 20):
        restored, _ = _restored(weight, bits, group_size, clip_points=points, column_weight=importance)
        error = (restored.double() - weight.double()).square() * importance
        errors.append(error.unflatten(1, (count_groups(48, group_size), -1)).sum(-1))
    # The search compares in float32, where errors closer than its rounding count as equal.
    assert (errors[1] <= errors[0] * (1 + 1e-5) + 1e-12).all()
    if bits == 4:
        assert errors[1].sum() < errors[0].sum()


def test_importance_moves_precision_to_the_columns_that_are_used() -> None:
    weight = _weight(columns=16)
    weight[:, 0] = 8  # a large column that hardly counts
    importance = torch.ones(16)
    importance[0] = 1e-6
    plain, _ = _restored(weight, 4, 0)
    aware, _ = _restored(weight, 4, 0, column_weight=importance)
    assert (aware - weight)[:, 1:].square().sum() < (plain - weight)[:, 1:].square().sum()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_of_zeros_or_of_tiny_values_has_a_finite_grid(bits: int) -> None:
    weight = torch.zeros(3, 16)
    weight[1] = 1e-44
    scales, zeros = find_scales(weight, bits=bits, group_size=0)
    assert torch.isfinite(scales).all()
    assert (scales > 0).all()
    restored = decode(encode(weight, scales, zeros, bits=bits), scales, zeros, bits=bits)
    assert (restored == 0).all()


def test_large_matrices_in_chunks_give_the_codes_of_their_rows_alone() -> None:
    weight = torch.randn(3000, 1024, generator=torch.Generator().manual_seed(1))
    whole = quantize_weight(weight, bits=4, group_size=32, clip_points=2)
    alone = quantize_weight(weight[2998:], bits=4, group_size=32, clip_points=2)
    assert torch.equal(whole.codes[2998:], alone.codes)
    assert torch.equal(whole.scales[2998:], alone.scales)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="group size -1 is negative"):
        find_scales(_weight(), bits=4, group_size=-1)
    with pytest.raises(ValueError, match="3, 4 or 8 bits, not 5"):
        find_scales(_weight(), bits=5, group_size=16)
    with pytest.raises(ValueError, match="column_weight has shape"):
        find_scales(_weight(), bits=4, group_size=16, column_weight=torch.ones(5))


def test_three_bit_codes_lie_without_gaps_from_the_lowest_bit_on() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]], dtype=torch.uint8)
    bits = sum(code << (3 * place) for place, code in enumerate(codes[0].tolist()))
    assert pack(codes, bits=3)[0].tolist() == list(bits.to_bytes(3, "little"))


@pytest.mark.parametrize(("bits", "lowest"), [(3, 0), (4, 0), (8, 1)])
def test_symmetric_grids_have_no_zeros_and_use_all_codes_but_the_lowest_of_8_bits(bits: int, lowest: int) -> None:
    weight = torch.tensor([[-8.0, 7.0, 0.1, -9.0]]) / 8
    values = quantize_weight(weight, bits=bits, group_size=0, symmetric=True)
    assert values.zeros is None
    codes = encode(torch.tensor([[-999.0, 999.0]]), torch.ones(1, 1), None, bits=bits)
    assert codes.tolist() == [[lowest, 2**bits - 1]]


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_short_last_group_has_the_grid_that_it_would_have_alone(bits: int) -> None:
    weight = _weight(columns=40)
    whole = quantize_weight(weight, bits=bits, group_size=16)
    rest = quantize_weight(weight[:, 32:], bits=bits, group_size=0)
    assert torch.equal(whole.codes[:, 32:], rest.codes)
    assert torch.equal(whole.scales[:, 2:], rest.scales)
    restored = decode(whole.codes, whole.scales, whole.zeros, bits=bits, group_size=16)
    assert torch.equal(restored[:, 32:], decode(rest.codes, rest.scales, rest.zeros, bits=bits))
