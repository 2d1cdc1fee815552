import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from compresskit.export import fusion


def _model(nodes: list[ir.Node], inputs: list[ir.Value], constants: dict[str, np.ndarray]) -> ir.Model:
    values = []
    for node in nodes:
        for value in node.inputs:
            if value is not None and value.name in constants and value not in values:
                value.const_value = ir.tensor(constants[value.name], name=value.name)
                values.append(value)
    output = nodes[-1].outputs[0]
    output.name, output.dtype = "y", ir.DataType.FLOAT
    graph = ir.Graph(inputs, [output], nodes=nodes, initializers=values, opset_imports={"": 20, "com.microsoft": 1})
    return ir.Model(graph, ir_version=10)


def _value(name: str, shape: tuple[int, ...], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def _run(model: ir.Model, **feed: np.ndarray) -> np.ndarray:
    data = ir.to_proto(model).SerializeToString()
    return np.asarray(ort.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, feed)[0])


def _operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("skip", [False, True])
def test_residual_sums_before_norms_compute_the_same(skip: bool) -> None:
    x, z, gamma, beta = _value("x", (2, 3, 8)), _value("z", (2, 3, 8)), _value("gamma", (8,)), _value("beta", (8,))
    draw = np.random.default_rng(0)
    constants = {name: draw.normal(size=8).astype(np.float32) for name in ("gamma", "beta")}
    if skip:
        attributes = {"epsilon": 1e-5}
        nodes = [ir.node("SkipLayerNormalization", [x, z, gamma, beta], attributes, domain="com.microsoft")]
    else:
        add = ir.node("Add", [x, z])
        nodes = [add, ir.node("LayerNormalization", [add.outputs[0], gamma, beta], {"axis": -1, "epsilon": 1e-5})]
    model = _model(nodes, [x, z], constants)
    feed = {name: draw.normal(size=(2, 3, 8)).astype(np.float32) for name in ("x", "z")}
    before = _run(model, **feed)
    fusion.prefer_sums(model)
    assert _operators(model) == ["Sum", "LayerNormalization"]
    np.testing.assert_allclose(_run(model, **feed), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("shape", "operator"), [((4000, 2), "Transpose"), ((1, 2, 4000), "Reshape")])
def test_a_copy_of_a_table_becomes_a_view_of_it(shape: tuple[int, ...], operator: str) -> None:
    table = np.random.default_rng(0).normal(size=(2, 4000)).astype(np.float32)
    copy = table.T.copy() if operator == "Transpose" else table.reshape(shape)
    x = _value("x", (4000,) if operator == "Transpose" else (2, 4000))
    first, second = _value("first", table.shape), _value("second", shape)
    product = ir.node("MatMul" if operator == "Transpose" else "Add", [x, second])
    row = ir.node("Gather", [first, _value("index", (), ir.DataType.INT64)])
    total = ir.node("ReduceSum", [product.outputs[0]], {"keepdims": 0})
    result = ir.node("Add", [total.outputs[0], row.outputs[0]])
    constants = {"first": table, "second": copy, "index": np.array(1)}
    model = _model([product, row, total, result], [x], constants)
    value = np.ones(tuple(x.shape or ()), np.float32)
    before = _run(model, x=value)
    fusion.share_tables(model)
    assert _operators(model)[0] == operator
    assert "second" not in model.graph.initializers
    assert np.array_equal(_run(model, x=value), before)


def test_different_tables_of_one_size_stay_apart() -> None:
    draw = np.random.default_rng(0)
    constants = {name: draw.normal(size=(2, 4000)).astype(np.float32) for name in ("first", "second")}
    x, first, second = (_value(name, (2, 4000)) for name in ("x", "first", "second"))
    add = ir.node("Add", [x, first])
    model = _model([add, ir.node("Add", [add.outputs[0], second])], [x], constants)
    fusion.share_tables(model)
    assert _operators(model) == ["Add", "Add"]
    assert set(model.graph.initializers) == {"first", "second"}


def _integers(name: str, rows: int, draw: np.random.Generator, *, bias: bool) -> dict[str, np.ndarray]:
    """4-bit codes of (rows, 32) in groups of 16, with scales and zeros."""
    found = {
        f"{name}.codes": draw.integers(0, 256, (rows, 2, 8), dtype=np.uint8),
        f"{name}.scales": draw.random((rows, 2), dtype=np.float32),
        f"{name}.zeros": draw.integers(0, 256, (rows, 1), dtype=np.uint8),
    }
    return found | ({f"{name}.bias": draw.random(rows, dtype=np.float32)} if bias else {})


def _products(*, rows: tuple[int, ...], levels: tuple[int, ...], bias: bool = False) -> tuple[ir.Model, list[str]]:
    """Products of one x with several weights, and their results one after another."""
    draw, x, constants, nodes = np.random.default_rng(0), _value("x", (1, 3, 32)), {}, []
    for index, (count, level) in enumerate(zip(rows, levels, strict=True)):
        own = _integers(str(index), count, draw, bias=bias)
        values: list[ir.Value | None] = [
            ir.Value(name=name, shape=ir.Shape(one.shape), type=ir.TensorType(ir.DataType.from_numpy(one.dtype)))
            for name, one in own.items()
        ]
        values[3:3] = [None] if bias else []
        attributes = {"K": 32, "N": count, "bits": 4, "block_size": 16, "accuracy_level": level}
        nodes.append(ir.node("MatMulNBits", [x, *values], attributes, domain="com.microsoft", name=f"product{index}"))
        constants |= own
    joined = ir.node("Concat", [node.outputs[0] for node in nodes], {"axis": -1})
    return _model([*nodes, joined], [x], constants), list(constants)


@pytest.mark.parametrize("bias", [False, True])
def test_products_of_one_input_become_one(bias: bool) -> None:
    model, names = _products(rows=(6, 2, 3), levels=(0, 0, 0), bias=bias)
    x = np.random.default_rng(1).normal(size=(1, 3, 32)).astype(np.float32)
    before = _run(model, x=x)
    fusion.join_products(model)
    assert _operators(model) == ["MatMulNBits", "Split", "Concat"]
    parts = [part for name in model.graph.initializers if "+" in name for part in name.split("+")]
    assert sorted(parts) == sorted(names)
    assert np.array_equal(_run(model, x=x), before)


def test_products_of_other_forms_stay_apart() -> None:
    model, _ = _products(rows=(6, 2, 3), levels=(0, 4, 0))
    fusion.join_products(model)
    assert sorted(_operators(model)) == ["Concat", "MatMulNBits", "MatMulNBits", "Split"]
    alone, _ = _products(rows=(6, 2), levels=(0, 4))
    before = set(alone.graph.initializers)
    fusion.join_products(alone)
    assert _operators(alone) == ["MatMulNBits", "MatMulNBits", "Concat"]
    assert set(alone.graph.initializers) == before


@pytest.mark.parametrize("reason", ["expanded", "shared", "output", "ordered"])
def test_products_that_cannot_be_joined_stay_as_they_are(reason: str) -> None:
    model, _ = _products(rows=(6, 6), levels=(0, 0))
    graph = model.graph
    first, second = (node for node in graph if node.op_type == "MatMulNBits")
    if reason == "expanded":
        scales = graph.initializers.pop("0.scales")
        narrow = _value("narrow", (6, 1))
        narrow.const_value = ir.tensor(np.full((6, 1), 0.5, np.float32), name="narrow")
        size = _value("size", (2,), ir.DataType.INT64)
        size.const_value = ir.tensor(np.array([6, 2]), name="size")
        for value in (narrow, size):
            graph.register_initializer(value)
        expand = ir.node("Expand", [narrow, size])
        graph.insert_before(first, expand)
        scales.replace_all_uses_with(expand.outputs[0])
    elif reason == "shared":
        graph.initializers["1.codes"].replace_all_uses_with(graph.initializers["0.codes"])
        del graph.initializers["1.codes"]
    elif reason == "output":
        first.outputs[0].name, first.outputs[0].dtype = "first", ir.DataType.FLOAT
        graph.outputs.append(first.outputs[0])
    else:
        for node in (first, second):
            order = _value(f"{node.name}.order", (32,), ir.DataType.INT32)
            order.const_value = ir.tensor(np.repeat(np.arange(2, dtype=np.int32), 16), name=order.name)
            graph.register_initializer(order)
            node.resize_inputs(5)
            node.replace_input_with(4, order)
    before, initializers = _operators(model), set(graph.initializers)
    fusion.join_products(model)
    assert _operators(model) == before
    assert set(graph.initializers) == initializers
    if reason != "ordered":
        assert np.isfinite(_run(model, x=np.ones((1, 3, 32), np.float32))).all()


@pytest.mark.parametrize("operator", ["DynamicQuantizeLinear", "QuantizeLinear"])
def test_one_input_is_rounded_once(operator: str) -> None:
    x, nodes, constants = _value("x", (2, 8)), [], {}
    for index in range(2):
        fixed = []
        if operator == "QuantizeLinear":
            constants |= {f"scale{index}": np.array(0.1, np.float32), f"zero{index}": np.array(7, np.uint8)}
            fixed = [_value(f"scale{index}", ()), _value(f"zero{index}", (), ir.DataType.UINT8)]
        rounding = ir.node(operator, [x, *fixed], num_outputs=1 if fixed else 3)
        nodes += [rounding, ir.node("Cast", [rounding.outputs[0]], {"to": ir.DataType.FLOAT})]
    nodes.append(ir.node("Sub", [nodes[1].outputs[0], nodes[3].outputs[0]]))
    model = _model(nodes, [x], constants)
    fusion.join_integers(model)
    assert _operators(model).count(operator) == 1
    assert not _run(model, x=np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)).any()
