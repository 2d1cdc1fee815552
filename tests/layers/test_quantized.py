import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from compresskit.export.trace import quiet_exporters
from compresskit.layers.grid import Codes, decode, encode, quantize_weight, whole_factors
from compresskit.layers.int8_linear import Int8Linear, input_grid, multiply_exactly, quantize_dynamic, quantize_static
from compresskit.layers.quant_embedding import QuantEmbedding
from compresskit.layers.quant_linear import QuantLinear

LINEAR_GRIDS = [(64, 4, 16), (64, 8, 32), (64, 4, 0), (50, 8, 0), (50, 4, 0)]


def _codes(rows: int, columns: int, bits: int, group_size: int, symmetric: bool | None = None) -> Codes:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    return quantize_weight(weight, bits=bits, group_size=group_size, symmetric=symmetric, clip_points=3)


def _linear(columns: int, bits: int, group_size: int) -> QuantLinear:
    layer = QuantLinear(columns, 24, bits=bits, group_size=group_size, bias=True)
    layer.set_codes(_codes(24, columns, bits, group_size))
    with torch.no_grad():
        layer.bias.normal_()  # type: ignore[union-attr]
    return layer


def _table(width: int, bits: int, group_size: int) -> QuantEmbedding:
    table = QuantEmbedding(40, width, bits=bits, group_size=group_size)
    table.set_codes(_codes(40, width, bits, group_size))
    return table


def _int8(columns: int, rows: int, *, static: bool = False, smooth: bool = False) -> Int8Linear:
    layer = Int8Linear(columns, rows, bias=True, static=static, smooth=smooth)
    layer.set_codes(_codes(rows, columns, 8, 0))
    with torch.no_grad():
        layer.bias.normal_()  # type: ignore[union-attr]
    if layer.smooth is not None:
        layer.smooth.copy_(torch.linspace(0.5, 2, columns))
    if static:
        layer.set_input_range(torch.linspace(-1, -2, columns), torch.linspace(2, 3, columns))
    return layer


def _in_onnx_runtime(module: nn.Module, sample: Tensor) -> tuple[Callable[[Tensor], np.ndarray], onnx.ModelProto]:
    free = torch.export.Dim.DYNAMIC
    with quiet_exporters():
        program = torch.onnx.export(module, (sample,), dynamo=True, dynamic_shapes=({0: free, 1: free},))
    assert program is not None
    proto = program.model_proto
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: np.asarray(session.run(None, {name: x.numpy()})[0]), proto


def _narrow(columns: int, rows: int, group_size: int, *, symmetric: bool | None = None, **form: bool) -> Int8Linear:
    """4-bit codes for products of integers."""
    grid: dict[str, Any] = {"bits": 4, "group_size": group_size, "symmetric": symmetric}
    layer = Int8Linear(columns, rows, bias=True, **grid, **form)
    layer.set_codes(quantize_weight(torch.randn(rows, columns), whole=True, **grid))
    with torch.no_grad():
        layer.bias.normal_()  # type: ignore[union-attr]
    return layer


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear4": lambda: _linear(64, 4, 16),
    "linear8": lambda: _linear(64, 8, 0),
    "table4": lambda: _table(64, 4, 32),
    "table8": lambda: _table(64, 8, 0),
    "int8": lambda: _int8(33, 7),
    "int8_static": lambda: _int8(33, 7, static=True),
    "int8_of_4": lambda: _narrow(72, 7, 32),
    "int8_of_4_symmetric": lambda: _narrow(33, 7, 0, symmetric=True),
}
EMPTY: dict[str, Callable[[str], nn.Module]] = {
    "linear4": lambda device: QuantLinear(64, 24, bits=4, group_size=16, bias=True, device=device),
    "linear8": lambda device: QuantLinear(64, 24, bits=8, group_size=0, bias=True, device=device),
    "table4": lambda device: QuantEmbedding(40, 64, bits=4, group_size=32, device=device),
    "table8": lambda device: QuantEmbedding(40, 64, bits=8, group_size=0, device=device),
    "int8": lambda device: Int8Linear(33, 7, bias=True, device=device),
    "int8_static": lambda device: Int8Linear(33, 7, bias=True, static=True, device=device),
    "int8_of_4": lambda device: Int8Linear(72, 7, bias=True, bits=4, group_size=32, device=device),
    "int8_of_4_symmetric": lambda device: Int8Linear(33, 7, bias=True, bits=4, symmetric=True, device=device),
}


@pytest.mark.parametrize("name", LAYERS)
def test_state_dict_round_trip_is_exact(name: str) -> None:
    layer, empty = LAYERS[name](), EMPTY[name]("cpu")
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty.dequantize(), layer.dequantize())  # type: ignore[operator]
    assert all(torch.equal(value, empty.state_dict()[key]) for key, value in layer.state_dict().items())
    assert layer.dequantize().abs().sum() > 0  # type: ignore[operator]


@pytest.mark.parametrize("name", LAYERS)
def test_meta_layers_have_the_shapes_and_types_of_real_ones(name: str) -> None:
    real, meta = LAYERS[name]().state_dict(), EMPTY[name]("meta").state_dict()
    assert all(value.is_meta for value in meta.values())
    assert {k: (v.shape, v.dtype) for k, v in real.items()} == {k: (v.shape, v.dtype) for k, v in meta.items()}


@pytest.mark.parametrize(("columns", "bits", "group_size"), LINEAR_GRIDS)
def test_dequantised_weight_is_that_of_the_codes(columns: int, bits: int, group_size: int) -> None:
    values = _codes(24, columns, bits, group_size)
    zero = (
        128.0 if values.zeros is None else values.zeros.double().repeat_interleave(columns // values.zeros.shape[1], 1)
    )
    scale = values.scales.double().repeat_interleave(columns // values.scales.shape[1], 1)
    truth = (values.codes.double() - zero) * scale
    assert torch.equal(_linear(columns, bits, group_size).dequantize(), truth.float())


@pytest.mark.parametrize(("columns", "bits", "group_size"), LINEAR_GRIDS)
def test_matmul_nbits_computes_what_the_layer_computes(columns: int, bits: int, group_size: int) -> None:
    layer = _linear(columns, bits, group_size)
    run, proto = _in_onnx_runtime(layer, torch.randn(2, 3, columns))
    assert "MatMulNBits" in {node.op_type for node in proto.graph.node}
    for shape in ((1, 1), (3, 17), (8, 5)):
        x = torch.randn(*shape, columns)
        expected = layer(x).detach().numpy()
        assert np.linalg.norm(run(x) - expected) <= 1e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("width", "bits", "group_size"), [(64, 4, 16), (64, 8, 32), (64, 4, 0), (36, 8, 0), (36, 4, 0)]
)
def test_gather_block_quantized_gives_exactly_the_rows_of_the_table(width: int, bits: int, group_size: int) -> None:
    table = _table(width, bits, group_size)
    run, proto = _in_onnx_runtime(table, torch.zeros(2, 3, dtype=torch.int64))
    assert [node.op_type for node in proto.graph.node] == ["GatherBlockQuantized"]
    for shape in ((1, 1), (4, 9)):
        ids = torch.randint(0, 40, shape)
        assert np.array_equal(run(ids), table(ids).numpy())
        assert torch.equal(table(ids), table.dequantize()[ids])


@pytest.mark.parametrize(("static", "smooth"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(("columns", "rows"), [(33, 7), (1600, 12)])
def test_integer_product_equals_onnx_runtime_but_for_float_rounding(
    columns: int, rows: int, static: bool, smooth: bool
) -> None:
    layer = _int8(columns, rows, static=static, smooth=smooth)
    run, proto = _in_onnx_runtime(layer, torch.randn(2, 3, columns))
    rounding = "QuantizeLinear" if static else "DynamicQuantizeLinear"
    assert {node.op_type for node in proto.graph.node} - {"Mul"} == {rounding, "MatMulIntegerToFloat"}
    for shape, shift in (((1, 1), 0.0), ((3, 17), 5.0), ((8, 5), -0.3), ((2, 2), 0.0)):
        x = torch.randn(*shape, columns) + shift
        # The integers agree; ONNX Runtime may fuse the product with the scale and the bias, on some processors.
        np.testing.assert_allclose(run(x), layer(x).detach().numpy(), rtol=1e-6, atol=1e-6)


def test_activations_are_rounded_as_dynamic_quantize_linear_rounds_them() -> None:
    node = onnx.helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"])
    floats, bytes_ = onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8
    outputs = [onnx.helper.make_tensor_value_info(n, t, None) for n, t in (("q", bytes_), ("s", floats), ("z", bytes_))]
    graph = onnx.helper.make_graph([node], "g", [onnx.helper.make_tensor_value_info("x", floats, [None])], outputs)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    ties = torch.arange(-3, 252.5, 0.5)  # with scale 1, every second value lies in the middle
    for x in (torch.randn(1000), torch.randn(1000) + 9, torch.randn(1000) - 9, torch.zeros(4), torch.ones(3), ties):
        expected = session.run(None, {"x": x.numpy()})
        for got, truth in zip(quantize_dynamic(x), expected, strict=True):
            assert np.array_equal(got.numpy(), np.asarray(truth).astype(np.float32))


def test_a_fixed_range_is_rounded_as_quantize_linear_rounds_it() -> None:
    floats, bytes_ = onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8
    inputs = [onnx.helper.make_tensor_value_info(n, t, s) for n, t, s in (("x", floats, [None]), ("s", floats, []))]
    inputs.append(onnx.helper.make_tensor_value_info("z", bytes_, []))
    node = onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])
    graph = onnx.helper.make_graph([node], "g", inputs, [onnx.helper.make_tensor_value_info("q", bytes_, None)])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = torch.cat([torch.randn(1000) * 3, torch.arange(-300, 300, 0.5), torch.tensor([1e30, -1e30])])
    for low, high in ((-3.0, 252.0), (-1.0, 1.5), (0.5, 2.0), (-2.0, -1.0), (0.0, 0.0)):
        scale, zero = input_grid(torch.tensor(low), torch.tensor(high))
        feed = {"x": x.numpy(), "s": scale.numpy(), "z": zero.to(torch.uint8).numpy()}
        assert np.array_equal(quantize_static(x, scale, zero).numpy(), np.asarray(session.run(None, feed)[0]))


def test_a_fixed_range_holds_what_calibration_showed_and_no_answer_depends_on_its_neighbours() -> None:
    low, high = -torch.rand(33), torch.rand(33)
    for smooth in (False, True):
        layer = _int8(33, 7, static=True, smooth=smooth)
        layer.set_input_range(low, high)
        factors = 1.0 if layer.smooth is None else layer.smooth
        assert layer.input_scale is not None
        assert layer.input_zero is not None
        shown = torch.stack([low, high]) * factors
        reach = (torch.tensor([0.0, 255.0]) - layer.input_zero) * layer.input_scale
        assert float(reach[0]) == pytest.approx(float(shown.min()), abs=float(layer.input_scale))
        assert float(reach[1]) == pytest.approx(float(shown.max()), abs=float(layer.input_scale))
        x = torch.randn(2, 5, 33)
        x[1] *= 10
        assert torch.equal(layer(x)[:1], layer(x[:1]))
        dynamic = _int8(33, 7, smooth=smooth)
        assert not torch.equal(dynamic(x)[:1], dynamic(x[:1]))


@pytest.mark.parametrize("symmetric", [None, True])
@pytest.mark.parametrize(("columns", "group_size"), [(64, 16), (72, 32), (48, 64), (33, 0)])
def test_codes_of_4_bits_widen_to_the_weight_that_they_stand_for(
    columns: int, group_size: int, symmetric: bool | None
) -> None:
    grid: dict[str, Any] = {"bits": 4, "group_size": group_size}
    weight = torch.randn(24, columns) * torch.rand(24, 1)
    weight[3] = 0
    weight[5, :16] = 0
    values = quantize_weight(weight, symmetric=symmetric, whole=True, **grid)
    layer = Int8Linear(columns, 24, bias=False, symmetric=symmetric, **grid)
    layer.set_codes(values)
    assert layer.integers().dtype == torch.int8
    assert layer.integers().to(torch.int16).abs().max() <= 127
    expected = decode(values.codes, values.scales, values.zeros, **grid)
    torch.testing.assert_close(layer.dequantize(), expected, rtol=1e-6, atol=0)
    assert torch.equal(layer.dequantize()[3], weight[3])
    assert torch.equal(layer.dequantize()[5, :16], weight[5, :16])
    free = quantize_weight(weight, symmetric=symmetric, **grid)
    lost, least = ((decode(v.codes, v.scales, v.zeros, **grid) - weight).norm() for v in (values, free))
    assert lost <= 1.06 * least
    assert layer.codes.numel() == 24 * layer.groups * -(-layer.group_size // 2)
    x = torch.randn(3, columns)
    rounded, scale, zero = quantize_dynamic(x)
    exact = (rounded - zero).double() @ layer.integers().double() * (scale * layer.scales)
    torch.testing.assert_close(layer(x).double(), exact, rtol=1e-5, atol=1e-6)


def test_whole_factors_keep_the_largest_scale_and_stay_when_found_again() -> None:
    scales, zeros = torch.rand(9, 6) + 0.01, torch.randint(0, 16, (9, 6), dtype=torch.uint8)
    steps, factors = whole_factors(scales, zeros, bits=4)
    reach = torch.maximum(zeros.float(), 15 - zeros.float())
    assert (factors * reach <= 127).all()
    assert (factors >= 1).all()
    moved = steps * factors
    assert ((moved - scales).abs() <= 0.5001 * steps).logical_or(factors == 1).all()
    largest = (scales / (127 / reach).floor()).argmax(1, keepdim=True)
    torch.testing.assert_close(moved.gather(1, largest), scales.gather(1, largest))
    again, same = whole_factors(moved, zeros, bits=4)
    assert torch.equal(same, factors)
    torch.testing.assert_close(again, steps)


@pytest.mark.parametrize("symmetric", [None, True])
def test_whole_scales_are_chosen_by_the_error_of_used_columns(symmetric: bool | None) -> None:
    chance = torch.Generator().manual_seed(0)
    weight, used = torch.randn(32, 96, generator=chance), torch.rand(96, generator=chance).square()
    grid: dict[str, Any] = {"bits": 4, "group_size": 16}
    free = quantize_weight(weight, symmetric=symmetric, column_weight=used, **grid)
    steps, factors = whole_factors(free.scales, free.zeros, bits=4)
    moved = Codes(encode(weight, steps * factors, free.zeros, **grid), steps * factors, free.zeros)
    chosen = quantize_weight(weight, symmetric=symmetric, column_weight=used, whole=True, **grid)

    def lost(values: Codes) -> Tensor:
        away = decode(values.codes, values.scales, values.zeros, **grid) - weight
        return (away.square() * used).unflatten(1, (-1, 16)).sum(-1)

    assert (lost(chosen) <= lost(moved) * (1 + 1e-5)).all()
    assert lost(chosen).sum() < 0.99 * lost(moved).sum()
    again, same = whole_factors(chosen.scales, chosen.zeros, bits=4)
    torch.testing.assert_close(again * same, chosen.scales, rtol=1e-6, atol=0)


def test_integer_sums_are_exact_at_their_largest() -> None:
    left, right = torch.full((3, 4000), 255.0), torch.full((4000, 5), 127.0)
    right[::7] = -126.0
    assert torch.equal(multiply_exactly(left, right), (left.long() @ right.long()).float())


def test_a_tied_head_uses_the_integers_of_its_table_without_storing_them() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = _table(64, 4, 32)
            self.head = QuantLinear.tied_to(self.table, bias=False)

    model = Tied()
    assert set(model.state_dict()) == {"table.codes", "table.scales", "table.zeros"}
    assert torch.equal(model.head.dequantize(), model.table.dequantize())
    other = copy.deepcopy(model)
    other.table.codes.zero_()
    assert torch.equal(other.head.dequantize(), other.table.dequantize())
    assert not torch.equal(other.head.dequantize(), model.head.dequantize())


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric"), [(4, 32, None), (4, 64, True), (8, 32, None), (8, 64, False), (4, 128, None)]
)
def test_a_file_is_as_large_as_its_codes_scales_and_zeros(bits: int, group_size: int, symmetric: bool | None) -> None:
    rows, columns = 2048, 256
    layer = QuantLinear(columns, rows, bits=bits, group_size=group_size, symmetric=symmetric, bias=False)
    layer.set_codes(_codes(rows, columns, bits, group_size, symmetric))
    _, proto = _in_onnx_runtime(layer, torch.randn(2, 3, columns))
    groups = rows * columns // group_size
    expected = rows * columns * bits / 8 + groups * (4 + (0 if layer.symmetric else bits / 8))
    assert abs(len(proto.SerializeToString()) / expected - 1) < 0.02


def test_a_checkpoint_of_3_bits_holds_3_bits_a_weight() -> None:
    layer = _linear(64, 3, 16)
    assert layer.codes is not None
    assert layer.codes.numel() == 24 * 64 * 3 // 8
    wide = layer.widened()
    assert (wide.bits, wide.zeros is None) == (4, layer.zeros is None)
    assert torch.equal(wide.dequantize(), layer.dequantize())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_short_last_groups_and_other_symmetries_keep_their_integers(bits: int, symmetric: bool) -> None:
    values = _codes(24, 40, bits, 16, symmetric)
    layer = QuantLinear(40, 24, bits=bits, group_size=16, symmetric=symmetric, bias=False)
    layer.set_codes(values)
    kept = layer.values()
    assert torch.equal(kept.codes, values.codes)
    assert torch.equal(kept.scales, values.scales)
    assert (kept.zeros is None) == symmetric == (values.zeros is None)
    wide = layer.widened() if bits == 3 else layer
    assert torch.equal(wide.dequantize(), layer.dequantize())
    run, _ = _in_onnx_runtime(wide, torch.randn(2, 3, 40))
    x = torch.randn(3, 7, 40)
    expected = layer(x).detach().numpy()
    assert np.linalg.norm(run(x) - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_of_the_other_symmetry_are_refused(symmetric: bool) -> None:
    layers: list[tuple[int, QuantLinear | QuantEmbedding | Int8Linear]] = [
        (4, QuantLinear(32, 8, bits=4, group_size=16, symmetric=symmetric, bias=False)),
        (8, QuantLinear(32, 8, bits=8, group_size=16, symmetric=symmetric, bias=False)),
        (4, QuantEmbedding(8, 32, bits=4, group_size=16, symmetric=symmetric)),
        (8, QuantEmbedding(8, 32, bits=8, group_size=16, symmetric=symmetric)),
    ]
    if symmetric:
        layers.append((8, Int8Linear(32, 8, bias=False)))
    for bits, layer in layers:
        size = 0 if isinstance(layer, Int8Linear) else 16
        layer.set_codes(_codes(8, 32, bits, size, symmetric))
        before = layer.dequantize()
        with pytest.raises(ValueError, match="quantise with its `symmetric`"):
            layer.set_codes(_codes(8, 32, bits, size, not symmetric))
        assert torch.equal(layer.dequantize(), before)


def test_integer_products_refuse_other_forms_and_scales_that_would_be_rounded_again() -> None:
    for form in ({"bits": 3}, {"bits": 8, "group_size": 16}, {"bits": 8, "symmetric": False}):
        with pytest.raises(ValueError, match="integer products have 4 bits, or 8 with one scale a row"):
            Int8Linear(64, 4, bias=False, **form)  # type: ignore[arg-type]
    layer = Int8Linear(64, 4, bias=False, bits=4, group_size=16)
    with pytest.raises(ValueError, match="no whole multiples of one"):
        layer.set_codes(quantize_weight(torch.randn(4, 64), bits=4, group_size=16))


def test_layers_refuse_what_their_operators_cannot_read() -> None:
    with pytest.raises(ValueError, match="group size 48"):
        QuantLinear(96, 8, bits=4, group_size=48, bias=False)
    with pytest.raises(ValueError, match="group size 32 does not fit 80 columns"):
        QuantEmbedding(8, 80, bits=8, group_size=32)
    with pytest.raises(ValueError, match="even width"):
        QuantEmbedding(8, 7, bits=4, group_size=0)
    with pytest.raises(ValueError, match="multiple of 16"):
        QuantLinear.tied_to(QuantEmbedding(8, 20, bits=8, group_size=0), bias=False)


def test_printed_layers_name_their_grid() -> None:
    assert "bits=4, group_size=16, bias=True" in repr(_linear(64, 4, 16))
    assert "40, 64, bits=8, group_size=0" in repr(_table(64, 8, 0))
