"""torch's kernels for packed weights: where they are used, and that they multiply what decoding gives."""

import copy
import io

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from compresskit.layers import packed_product, quant_linear
from compresskit.layers.grid import quantize_weight
from compresskit.layers.operators import emit_operators
from compresskit.layers.packed_product import MOST_ROWS, PackedWeight, takes
from compresskit.layers.quant_embedding import QuantEmbedding
from compresskit.layers.quant_linear import QuantLinear

pytestmark = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in packed_product._VECTOR_CODE,
    reason="no vector code on this processor",
)
#: bits, group size, symmetric
FITTING = [(4, size, symmetric) for size in packed_product.GROUP_SIZES for symmetric in (True, False)] + [(8, 0, True)]


def _layer(bits: int, group_size: int, symmetric: bool, columns: int = 256, *, seed: int = 0) -> QuantLinear:
    draw = torch.Generator().manual_seed(seed)
    layer = QuantLinear(columns, 48, bits=bits, group_size=group_size, symmetric=symmetric, bias=True).eval()
    weight = torch.randn(48, columns, generator=draw) + 0.5
    layer.set_codes(quantize_weight(weight, bits=bits, group_size=group_size, symmetric=symmetric, clip_points=1))
    assert layer.bias is not None
    layer.bias.data.normal_(generator=draw)
    return layer.requires_grad_(False)


def _x(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def _apart(y: Tensor, truth: Tensor) -> float:
    return float((y.double() - truth).norm() / truth.norm())


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[PackedWeight]:
    """Every packed form that is made."""
    made: list[PackedWeight] = []

    class Counted(PackedWeight):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(quant_linear, "PackedWeight", Counted)
    return made


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), FITTING)
@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 5), (2, 32)])
def test_a_packed_product_is_as_near_to_the_exact_one_as_a_decoded_one(
    packings: list[PackedWeight], bits: int, group_size: int, symmetric: bool, shape: tuple[int, ...]
) -> None:
    layer, x = _layer(bits, group_size, symmetric), _x(*shape, 256)
    y = layer(x)
    assert len(packings) == 1
    assert (y.dtype, y.shape) == (torch.bfloat16, (*shape, 48))
    assert layer.bias is not None
    truth = x.double() @ layer.dequantize().double().T + layer.bias.double()
    decoded = F.linear(x, layer.dequantize().bfloat16(), layer.bias.bfloat16())
    assert _apart(y, truth) <= 2 * _apart(decoded, truth) + 1e-3
    assert _apart(y, truth) < 6e-3


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), FITTING)
def test_the_kernels_read_these_very_integers(bits: int, group_size: int, symmetric: bool) -> None:
    """With float32 inputs and grid, which are not used for their speed, nothing but float32 rounding is left."""
    layer = _layer(bits, group_size, symmetric)
    packed = PackedWeight(layer.values(), bits=bits, group_size=group_size)
    scales = layer.tensors()[1]
    zeros = layer.values().zeros
    shift = torch.zeros_like(scales) if zeros is None else (8 - zeros.float()) * scales
    packed._grid = scales[:, 0] if bits == 8 else torch.stack([scales, shift], -1).transpose(0, 1).contiguous()
    x = _x(7, 256).float()
    assert _apart(packed.multiply(x), x.double() @ layer.dequantize().double().T) <= 1e-5


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "columns"),
    [
        (4, 16, False, 256),
        (4, 0, False, 256),
        (4, 64, False, 240),
        (8, 32, True, 256),
        (8, 0, False, 256),
        (3, 64, False, 256),
        (8, 0, True, 250),
    ],
)
def test_other_grids_are_decoded(
    packings: list[PackedWeight], bits: int, group_size: int, symmetric: bool, columns: int
) -> None:
    layer, x = _layer(bits, group_size, symmetric, columns), _x(3, columns)
    assert layer.bias is not None
    assert torch.equal(layer(x), F.linear(x, layer.dequantize().bfloat16(), layer.bias.bfloat16()))
    assert packings == []


def test_floats_gradients_training_many_tokens_and_traces_are_left_to_decoding(packings: list[PackedWeight]) -> None:
    layer = _layer(4, 64, symmetric=False)
    layer(_x(2, 256).float())
    layer(_x(MOST_ROWS + 1, 256))
    layer(_x(0, 256))
    assert layer(_x(2, 256).requires_grad_()).requires_grad
    layer.train()(_x(2, 256))
    program = torch.export.export(layer.eval(), (_x(2, 256),))
    assert not any("int4pack" in str(node.target) for node in program.graph.nodes)
    with emit_operators():
        traced = torch.export.export(layer, (_x(2, 256).float(),))
    assert not any("int4pack" in str(node.target) for node in traced.graph.nodes)
    assert packings == []
    with torch.no_grad():
        assert takes(_x(MOST_ROWS, 256).requires_grad_())
        layer(_x(MOST_ROWS, 256))
    assert len(packings) == 1


def test_the_packed_form_follows_the_integers_and_is_stored_nowhere(packings: list[PackedWeight]) -> None:
    layer, x = _layer(4, 64, symmetric=False), _x(2, 256)
    names = set(layer.state_dict())
    first = layer(x)
    assert torch.equal(layer(x), first)
    assert len(packings) == 1
    assert set(layer.state_dict()) == names
    twin = copy.deepcopy(layer)
    assert twin._kept is None
    other = _layer(4, 64, symmetric=False, seed=5)
    twin.set_codes(other.values())
    assert not torch.equal(twin(x), first)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))
    scales = layer.scales
    assert scales is not None
    scales.mul_(2)
    assert layer.bias is not None
    torch.testing.assert_close(layer(x) - layer.bias, 2 * (other(x) - layer.bias), rtol=2e-2, atol=0.2)
    before = len(packings)
    layer.to("meta")
    assert layer(x.to("meta")).is_meta
    assert len(packings) == before
    buffer = io.BytesIO()
    torch.save(other, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), other(x))


def test_a_tied_head_packs_the_integers_of_its_table(packings: list[PackedWeight]) -> None:
    table = QuantEmbedding(48, 64, bits=4, group_size=32)
    weights = [torch.randn(48, 64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    head, x = QuantLinear.tied_to(table, bias=False).eval(), _x(3, 64)
    for weight in weights:
        table.set_codes(quantize_weight(weight, bits=4, group_size=32, clip_points=1))
        assert _apart(head(x), x.double() @ table.dequantize().double().T) < 6e-3
    assert len(packings) == 2
