import copy
import hashlib
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from changed_students import (
    FAST,
    factorise,
    linears,
    make_student,
    quantize_linears,
    quantize_table,
    random_corpus,
    run_readme,
)
from families import random_model
from onnx import numpy_helper
from tiny_tokenizer import make_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForTextEncoding,
    AutoTokenizer,
    ModernBertConfig,
    ModernBertModel,
    T5Config,
)

from compresskit.errors import CompressKitError, RunFailedError
from compresskit.export import EXPORTERS, OnnxExport, files, parity
from compresskit.export import onnx as exporter
from compresskit.export.folder import MODEL_FILE, read_exported
from compresskit.export.onnx import complete_batch
from compresskit.export.runtime import open_session, run_session
from compresskit.export.trace import OUTPUTS
from compresskit.layers.grid import unpack
from compresskit.layers.int8_linear import Int8Linear
from compresskit.student import Student
from compresskit.surgery.cuts import PruneHeads

BERT = "encoder.layer.{}.{}"


@pytest.fixture
def bert() -> Student:
    return make_student("feature-extraction")


@pytest.fixture(scope="module")
def integer_export(tmp_path_factory: pytest.TempPathFactory) -> tuple[Student, Path, dict[str, Any]]:
    """A BERT in integers and its export; read only."""
    student = make_student("feature-extraction")
    _change_bert_integers(student)
    folder = tmp_path_factory.mktemp("integers") / "onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPRESSKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        entry = OnnxExport(**FAST | {"baselines": True}).write(student, folder)  # type: ignore[arg-type]
    return student, folder, entry


def _attention(index: int) -> tuple[str, ...]:
    return tuple(BERT.format(index, f"attention.self.{name}") for name in ("query", "key", "value"))


def _change_bert_integers(student: Student) -> None:
    quantize_linears(student, linears(student), bits=8, group_size=0, act="int8")
    for name in ("word", "position", "token_type"):
        quantize_table(student, f"embeddings.{name}_embeddings", bits=8)


def _change_bert_low_rank_integers(student: Student) -> None:
    """Heads pruned, query, key and value sharing a factor, then everything in integers."""
    for index in range(1):
        query, key, value = _attention(index)
        output = BERT.format(index, "attention.output.dense")
        shape = {"module": BERT.format(index, "attention.self"), "head_dim": 8, "keep": "0,2-3", "keep_kv": "0,2-3"}
        student.edit(PruneHeads(query=query, key=key, value=value, output=output, **shape))  # type: ignore[arg-type]
    factorise(student, [_attention(0)], rank=16)
    quantize_linears(student, linears(student), bits=8, group_size=0, act="int8")
    quantize_table(student, "embeddings.word_embeddings", bits=4)


def _change_bert_weights(student: Student) -> None:
    factorise(student, [_attention(0)], rank=16)
    quantize_linears(student, linears(student), bits=4, group_size=16)


BERT_CHANGES = {"low_rank_weights4": _change_bert_weights, "low_rank_integers": _change_bert_low_rank_integers}


def _change_llama_all(student: Student) -> None:
    factorise(student, [("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj")], rank=16)
    quantize_linears(student, linears(student), bits=8, group_size=16)
    quantize_table(student, "model.embed_tokens", bits=8, head="lm_head")


LLAMA_CHANGES: dict[str, Callable[[Student], None]] = {
    "float": lambda student: None,
    "low_rank_weights_and_tied_head": _change_llama_all,
    "integers": lambda student: quantize_linears(student, linears(student), bits=8, group_size=0, act="int8"),
    "static_integers": lambda student: quantize_linears(
        student, linears(student), bits=8, group_size=0, act="int8_static"
    ),
    "integers4": lambda student: quantize_linears(student, linears(student), bits=4, group_size=16, act="int8"),
    "tied4": lambda student: quantize_table(student, "model.embed_tokens", bits=4, head="lm_head"),
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("integers", "static_integers", "integers4", "tied4")]


def _stored(path: Path) -> dict[str, np.ndarray]:
    return {one.name: numpy_helper.to_array(one) for one in onnx.load(str(path)).graph.initializer}


def _assert_integers_are_the_students(student: Student, path: Path) -> None:
    """Every integer buffer that the output depends on lies in the file once, bit for bit, possibly beside others."""
    stored = [array for array in _stored(path).values() if array.dtype in (np.uint8, np.int8)]
    assert stored
    buffers = {name: value for name, value in student.model.state_dict().items() if "pooler" not in name}
    checked = 0
    for name, value in buffers.items():
        if value.dtype not in (torch.uint8, torch.int8):
            continue
        wanted = value.numpy()
        found = sum(_count_inside(array, wanted) for array in stored)
        # Zero points of inputs are single numbers, which layers may share.
        assert found == 1 or (found and not wanted.shape), f"{name} {wanted.shape} is in the file {found} times"
        checked += 1
    assert checked


def _count_inside(array: np.ndarray, wanted: np.ndarray) -> int:
    """How often `wanted` is `array`, one of three equal column blocks of it, or some of its rows one after another."""
    if array.dtype != wanted.dtype:
        return 0
    if wanted.ndim and array.shape[1:] == wanted.shape[1:] and len(array) > len(wanted):
        starts = range(len(array) - len(wanted) + 1)
        return sum(np.array_equal(array[start : start + len(wanted)], wanted) for start in starts)
    parts = [array] if array.size != 3 * wanted.size else np.split(array, 3, axis=-1)
    return sum(part.size == wanted.size and np.array_equal(part.reshape(wanted.shape), wanted) for part in parts)


def _assert_all_shapes_agree(student: Student, path: Path, output: str) -> None:
    session = open_session(path, threads=1)
    for batch, length in ((1, 1), (1, 9), (5, 2), (4, 23)):
        ids = torch.randint(5, 100, (batch, length), generator=torch.Generator().manual_seed(length))
        mask = torch.ones_like(ids)
        mask[-1, (length + 1) // 2 :] = 0
        inputs = complete_batch(student, {"input_ids": ids, "attention_mask": mask})
        with torch.no_grad():
            expected = student.model(**inputs)[output].numpy()
        assert run_session(session, inputs).shape == expected.shape
        kept = mask.numpy().astype(bool)
        apart = np.linalg.norm((run_session(session, inputs) - expected)[kept]) / np.linalg.norm(expected[kept])
        # Rounded activations: flips may cascade, see compresskit.export.parity.
        assert apart <= (0.05 if any(isinstance(m, Int8Linear) for m in student.model.modules()) else 1e-4)


@pytest.mark.parametrize("change", BERT_CHANGES)
def test_a_changed_encoder_runs_in_onnx_runtime_as_in_torch(bert: Student, tmp_path: Path, change: str) -> None:
    BERT_CHANGES[change](bert)
    entry = OnnxExport(**FAST).write(bert, tmp_path / "onnx")  # type: ignore[arg-type]
    assert entry["parity"]["relative_error"] <= 1e-5
    _assert_all_shapes_agree(bert, tmp_path / "onnx" / MODEL_FILE, "last_hidden_state")
    _assert_integers_are_the_students(bert, tmp_path / "onnx" / MODEL_FILE)
    operators = entry["operators"]
    if change == "low_rank_integers":
        assert operators["Attention"] == 1
        # one rounding each: the shared factor's input, its output, the attention's output, both halves of the FFN
        assert operators["DynamicQuantizeLinear"] == 5
        assert operators["com.microsoft::MatMulIntegerToFloat"] == 7
    else:
        # the factor that query, key and value share is one product of the seven
        assert operators["com.microsoft::MatMulNBits"] == 7


def test_an_encoder_in_integers_is_one_fused_operator_per_attention(
    integer_export: tuple[Student, Path, dict[str, Any]],
) -> None:
    student, folder, entry = integer_export
    assert entry["operators"]["Attention"] == 1
    assert entry["operators"]["DynamicQuantizeLinear"] == 4
    assert entry["operators"]["com.microsoft::MatMulIntegerToFloat"] == 6
    assert not {"com.microsoft::MultiHeadAttention", "Reshape", "Add"} & set(entry["operators"])
    assert entry["parity"]["segments"] == 5
    assert max(entry["parity"]["levels"].values()) <= 1e-5
    assert entry["parity"]["relative_error"] <= 1e-5
    _assert_all_shapes_agree(student, folder / MODEL_FILE, "last_hidden_state")
    _assert_integers_are_the_students(student, folder / MODEL_FILE)


def _assert_narrow_integers_are_the_students(student: Student, path: Path, *, zeros: bool = True) -> None:
    """What 4-bit integer products read lies in the file in ONNX's 4-bit type, bit for bit."""
    initializers = onnx.load(str(path)).graph.initializer
    stored = [numpy_helper.to_array(one) for one in initializers if one.data_type == onnx.TensorProto.UINT4]
    layers = {n: m for n, m in student.model.named_modules() if isinstance(m, Int8Linear) and "pooler" not in n}
    assert layers
    for name, layer in layers.items():
        parts = {"codes": layer.codes, "factors": layer.factors} | ({"zeros": layer.zeros} if zeros else {})
        assert zeros or layer.zeros is None
        for part, packed in parts.items():
            assert packed is not None
            count = layer.group_size if part == "codes" else layer.groups
            numbers = unpack(packed, count, bits=4).numpy().reshape(-1)
            assert any(np.array_equal(numbers, one.astype(np.uint8).reshape(-1)) for one in stored), f"{name}.{part}"


@pytest.mark.parametrize("act", ["int8", "int8_static"])
@pytest.mark.parametrize("symmetric", [None, True])
def test_an_encoder_of_4_bit_weights_multiplies_8_bit_integers(
    bert: Student, tmp_path: Path, act: str, symmetric: bool | None
) -> None:
    """The file holds the student's 4-bit numbers; once loaded they are the constants of any integer product."""
    quantize_linears(bert, linears(bert), bits=4, group_size=16, act=act, symmetric=symmetric)
    path = tmp_path / "onnx" / MODEL_FILE
    entry = OnnxExport(**FAST).write(bert, path.parent)  # type: ignore[arg-type]
    assert entry["operators"]["com.microsoft::MatMulIntegerToFloat"] == 6
    assert entry["operators"]["Attention"] == 1
    assert entry["parity"]["relative_error"] <= 1e-5
    assert max(entry["parity"]["levels"].values()) <= 1e-5
    assert "compresskit" not in {one.domain for one in onnx.load(str(path)).opset_import}
    _assert_all_shapes_agree(bert, path, "last_hidden_state")
    _assert_narrow_integers_are_the_students(bert, path, zeros=not symmetric)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    loaded = onnx.load(str(tmp_path / "loaded.onnx")).graph
    assert not [
        one for one in loaded.initializer if one.data_type == onnx.TensorProto.UINT4 and "pooler" not in one.name
    ]
    int8 = [one for one in loaded.initializer if one.data_type == onnx.TensorProto.INT8]
    assert len(int8) == 6


@pytest.mark.parametrize("form", [{"bits": 4, "group_size": 16}, {"bits": 8, "group_size": 0}])
@pytest.mark.parametrize("task", ["feature-extraction", "text-generation"])
@pytest.mark.parametrize("fuse", [True, False])
def test_layers_of_equal_integers_share_them_and_stay_apart(
    form: dict[str, int], task: str, fuse: bool, tmp_path: Path
) -> None:
    """Two blocks alike, as in models grown by copying; one layer more has the same codes and scales of its own."""
    student = make_student(task, blocks=2)
    twins = linears(student)
    for name in twins:
        if ".1." in name:
            student.model.get_submodule(name).load_state_dict(
                student.model.get_submodule(name.replace(".1.", ".0.")).state_dict()
            )
    quantize_linears(student, twins, **form, act="int8")
    last = student.model.get_submodule(next(name for name in reversed(twins) if ".1." in name))
    last.scales.mul_(1.5)  # type: ignore[operator, union-attr]
    entry = OnnxExport(**FAST | {"fuse": fuse}).write(student, tmp_path / "onnx")  # type: ignore[arg-type]
    assert entry["parity"]["relative_error"] <= 1e-5
    _assert_all_shapes_agree(student, tmp_path / "onnx" / MODEL_FILE, OUTPUTS[task])
    graph = ir.load(tmp_path / "onnx" / MODEL_FILE).graph
    assert len({value.name for node in graph for value in node.outputs}) == sum(len(node.outputs) for node in graph)


def test_4_bit_integer_products_refuse_an_operator_set_without_4_bits(bert: Student) -> None:
    quantize_linears(bert, linears(bert), bits=4, group_size=16, act="int8")
    with pytest.raises(CompressKitError, match="need opset 21 or later, not 20") as error:
        OnnxExport(opset=20).check(bert.model, bert.task)
    assert error.value.where == "opset"
    OnnxExport(opset=21).check(bert.model, bert.task)


def test_an_encoder_of_static_ranges_rounds_each_input_once_and_answers_alike_in_any_batch(
    bert: Student, tmp_path: Path
) -> None:
    quantize_linears(bert, linears(bert), bits=8, group_size=0, act="int8_static")
    ranges = iter(range(3, 99))
    for name, layer in bert.model.named_modules():
        if isinstance(layer, Int8Linear) and not name.endswith(("key", "value")):  # these read what query reads
            reach = torch.tensor(float(next(ranges)))
            layer.set_input_range(-reach, 1.5 * reach)
            for other in ("key", "value"):
                if name.endswith("query"):
                    same = bert.model.get_submodule(name.replace("query", other))
                    same.set_input_range(-reach, 1.5 * reach)  # type: ignore[operator]
    entry = OnnxExport(**FAST).write(bert, tmp_path / "onnx")  # type: ignore[arg-type]
    assert entry["operators"]["QuantizeLinear"] == 4
    assert entry["operators"]["com.microsoft::MatMulIntegerToFloat"] == 6
    assert "DynamicQuantizeLinear" not in entry["operators"]
    assert entry["parity"]["segments"] == 5
    assert entry["parity"]["relative_error"] <= 1e-5
    assert max(entry["parity"]["levels"].values()) <= 1e-5
    path = tmp_path / "onnx" / MODEL_FILE
    _assert_integers_are_the_students(bert, path)
    stored = _stored(path)
    for name, layer in bert.model.named_modules():
        if isinstance(layer, Int8Linear):
            scales = [array for array in stored.values() if array.dtype == np.float32 and array.ndim == 0]
            assert any(np.array_equal(scale, layer.input_scale.numpy()) for scale in scales), name  # type: ignore[union-attr]
    session = open_session(path, threads=1)
    ids = torch.randint(5, 100, (4, 9), generator=torch.Generator().manual_seed(0))
    together = run_session(session, complete_batch(bert, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}))
    for row, expected in zip(ids[:, None], together, strict=True):
        alone = run_session(session, complete_batch(bert, {"input_ids": row, "attention_mask": torch.ones_like(row)}))
        np.testing.assert_allclose(alone[0], expected, rtol=1e-4, atol=1e-4)


def test_an_encoder_of_windows_and_rotary_positions_runs_in_integers(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    shape = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    config = ModernBertConfig(**shape, **special, intermediate_size=64, local_attention=6, global_attn_every_n_layers=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = [ModernBertModel(config).eval()]
    models.append(copy.deepcopy(models[0]))
    student = Student(models[0], models[1], tokenizer, "feature-extraction", random_corpus(len(tokenizer)))
    quantize_linears(student, linears(student), bits=8, group_size=0, act="int8")
    entry = OnnxExport(**FAST).write(student, tmp_path / "onnx")  # type: ignore[arg-type]
    assert entry["operators"]["com.microsoft::MatMulIntegerToFloat"] == 8
    assert entry["parity"]["relative_error"] <= 1e-5
    _assert_all_shapes_agree(student, tmp_path / "onnx" / MODEL_FILE, "last_hidden_state")
    _assert_integers_are_the_students(student, tmp_path / "onnx" / MODEL_FILE)


def test_a_position_bias_is_part_of_the_attention_that_integers_go_through(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    shape = {"vocab_size": len(tokenizer), "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    model = random_model(AutoModelForTextEncoding, T5Config(**shape, pad_token_id=0))
    student = Student(model, copy.deepcopy(model), tokenizer, "feature-extraction", random_corpus(len(tokenizer)))
    quantize_linears(student, linears(student), bits=8, group_size=0, act="int8")
    entry = OnnxExport(**FAST).write(student, tmp_path / "onnx")  # type: ignore[arg-type]
    assert entry["operators"]["Attention"] == 2
    assert entry["parity"]["relative_error"] <= 1e-5
    _assert_all_shapes_agree(student, tmp_path / "onnx" / MODEL_FILE, "last_hidden_state")


@pytest.mark.parametrize("change", ["float", "low_rank_weights_and_tied_head", *SLOW])
def test_a_changed_decoder_runs_in_onnx_runtime_as_in_torch(tmp_path: Path, change: str) -> None:
    llama = make_student("text-generation")
    LLAMA_CHANGES[change](llama)
    entry = OnnxExport(**FAST).write(llama, tmp_path / "onnx")  # type: ignore[arg-type]
    assert entry["parity"]["relative_error"] <= 1e-5
    roundings = {"integers": "DynamicQuantizeLinear", "static_integers": "QuantizeLinear"}.get(change)
    if roundings:  # what queries, keys and values read, gates and ups, and the two writers
        assert entry["operators"][roundings] == 4 * llama.model.config.num_hidden_layers
    _assert_all_shapes_agree(llama, tmp_path / "onnx" / MODEL_FILE, "logits")
    if change == "integers4":
        _assert_narrow_integers_are_the_students(llama, tmp_path / "onnx" / MODEL_FILE)
    elif change != "float":
        _assert_integers_are_the_students(llama, tmp_path / "onnx" / MODEL_FILE)
    sizes = [llama.model.config.vocab_size * width for width in (32, 16)]  # 4-bit codes lie two in a byte
    tables = [name for name, array in _stored(tmp_path / "onnx" / MODEL_FILE).items() if array.size in sizes]
    assert len(tables) == 1


@pytest.mark.slow
def test_the_unfused_graph_computes_the_same(bert: Student, tmp_path: Path) -> None:
    _change_bert_integers(bert)
    entry = OnnxExport(**FAST, fuse=False).write(bert, tmp_path / "onnx")  # type: ignore[arg-type]
    assert "Attention" not in entry["operators"]
    assert entry["parity"]["relative_error"] <= 1e-5


def test_report_entry_and_folder_hold_what_they_promise(
    integer_export: tuple[Student, Path, dict[str, Any]],
) -> None:
    student, folder, entry = integer_export
    json.dumps(entry, allow_nan=False)
    assert sorted(path.name for path in folder.iterdir()) == entry["files"]
    assert [path.name for path in folder.parent.iterdir()] == ["onnx"]
    assert entry["kind"] == "onnx"
    assert entry["size_bytes"] == (folder / MODEL_FILE).stat().st_size
    for one in (entry, entry["baseline"], entry["stock_int8"]):
        assert 0 < one["latency_ms"]["p50"] <= one["latency_ms"]["p95"]
        assert {"1x16", "1x64", "8x64"} <= set(one["latency_ms"])
    assert entry["size_bytes"] < entry["baseline"]["size_bytes"]
    assert entry["fidelity"]["spearman"] > 0.9
    assert 0 < entry["stock_int8"]["fidelity"]["mean_cosine"] <= 1
    assert AutoConfig.from_pretrained(folder).hidden_size == 32
    assert len(AutoTokenizer.from_pretrained(folder)) == len(student.tokenizer)
    model = onnx.load(str(folder / MODEL_FILE))
    assert [value.name for value in model.graph.output] == ["last_hidden_state"]
    axes = [[dim.dim_param for dim in value.type.tensor_type.shape.dim] for value in model.graph.input]
    assert axes == [["batch", "sequence"]] * len(axes)
    assert str(Path(__file__).parents[2]).encode() not in (folder / MODEL_FILE).read_bytes()


def test_exporting_changes_nothing_in_the_student(integer_export: tuple[Student, Path, dict[str, Any]]) -> None:
    fresh = make_student("feature-extraction")
    _change_bert_integers(fresh)
    exported = integer_export[0]
    assert exported.model.config._attn_implementation == fresh.model.config._attn_implementation
    assert not exported.model.training
    expected = fresh.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in exported.model.state_dict().items())


@pytest.mark.slow
def test_the_original_is_exported_once_for_many_students(
    bert: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPRESSKIT_CACHE", str(tmp_path / "cache"))
    options = OnnxExport(**FAST | {"baselines": True})  # type: ignore[arg-type]
    options.write(bert, tmp_path / "onnx")
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.onnx")}
    assert sorted(path.name for path in made) == ["float.onnx", "int8.onnx"]
    _change_bert_integers(bert)
    options.write(bert, tmp_path / "onnx")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.onnx")} == made


def _nudge_one_code(graph: ir.Model) -> ir.Model:
    value = next(v for v in graph.graph.initializers.values() if str(v.name).endswith("output.dense.codes"))
    assert value.const_value is not None
    codes = value.const_value.numpy().copy()
    codes.flat[0] = codes.flat[0] ^ 32
    value.const_value = ir.tensor(codes, name=value.name)
    return graph


@pytest.fixture
def traced(integer_export: tuple[Student, Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Student:
    """The integer student, whose graph need not be traced again."""
    student, folder, _ = integer_export
    monkeypatch.setattr(exporter, "trace", lambda *_, **__: ir.load(folder / MODEL_FILE))
    return student


def test_one_wrong_integer_is_fatal_and_leaves_no_file(
    traced: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = exporter.trace
    monkeypatch.setattr(exporter, "trace", lambda *_, **__: _nudge_one_code(whole()))  # type: ignore[call-arg]
    with pytest.raises(RunFailedError, match=r"differs from the student by .* at .*; the bound is 0.001") as error:
        OnnxExport(**FAST).write(traced, tmp_path / "onnx")  # type: ignore[arg-type]
    assert error.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_export_leaves_the_earlier_one_whole(
    traced: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = OnnxExport(**FAST)  # type: ignore[arg-type]
    options.write(traced, tmp_path / "onnx")
    before = (tmp_path / "onnx" / MODEL_FILE).read_bytes()

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(parity, "check_parity", stop)
    for name in ("onnx", "first"):
        with pytest.raises(KeyboardInterrupt):
            options.write(traced, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]
    assert (tmp_path / "onnx" / MODEL_FILE).read_bytes() == before


def test_what_a_killed_export_left_behind_is_no_obstacle(traced: Student, tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / f".tmp-onnx.{gone.pid}").mkdir()
    (tmp_path / f".tmp-onnx.{gone.pid}" / MODEL_FILE).write_bytes(b"half")
    OnnxExport(**FAST).write(traced, tmp_path / "onnx")  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]
    open_session(tmp_path / "onnx" / MODEL_FILE, threads=1)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"relative_error": 2e-3, "texts": 1}, "by 0.002"),
        ({"relative_error": float("nan"), "texts": 1}, "by nan"),
        (
            {"relative_error": 1e-6, "texts": 1, "end_to_end": {"relative_error": 0.3, "rounding_noise": 0.1}},
            "0.3 end to end, more than 2 times",
        ),
    ],
)
def test_parity_past_its_bound_is_an_error(found: dict[str, Any], message: str) -> None:
    with pytest.raises(RunFailedError, match=message):
        parity.judge_parity(found, bound=1e-3, where="onnx")


def test_weight_only_products_ship_fast_once_the_file_is_proven(bert: Student, tmp_path: Path) -> None:
    quantize_linears(bert, linears(bert), bits=8, group_size=16)
    entry = OnnxExport(**FAST | {"accuracy_level": 4}).write(bert, tmp_path / "onnx")  # type: ignore[arg-type]
    nodes = [node for node in ir.load(tmp_path / "onnx" / MODEL_FILE).graph if node.op_type == "MatMulNBits"]
    assert len(nodes) == 6
    assert {node.attributes.get_int("accuracy_level") for node in nodes} == {4}
    assert entry["parity"]["relative_error"] <= 1e-5
    assert entry["parity"]["relative_error"] < entry["parity"]["shipped"]["relative_error"] <= parity.ROUNDED_BOUND
    _assert_integers_are_the_students(bert, tmp_path / "onnx" / MODEL_FILE)


def test_a_shipped_file_far_from_the_student_is_an_error() -> None:
    with pytest.raises(RunFailedError, match=r"moves the student by 0\.3") as error:
        parity.judge_shipped({"relative_error": 0.3}, bound=0.25, where="onnx")
    assert "accuracy_level: 0" in str(error.value)


@pytest.mark.parametrize("target", ["ort", "standard"])
def test_the_file_answers_alike_at_every_optimisation_level(bert: Student, tmp_path: Path, target: str) -> None:
    quantize_linears(bert, linears(bert), bits=4, group_size=16)
    entry = OnnxExport(**FAST | {"accuracy_level": 4, "target": target}).write(bert, tmp_path / "onnx")  # type: ignore[arg-type]
    exact, shipped = entry["parity"]["levels"], entry["parity"]["shipped"]["levels"]
    assert list(exact) == list(shipped) == ["disabled", "basic", "extended", "layout", "all"]
    assert max(exact.values()) <= 1e-5
    assert max(shipped.values()) <= parity.ROUNDED_BOUND
    # What ONNX Runtime makes MatMulNBits of rounds its input; undone, it does not.
    assert (shipped["disabled"] > 1e-4) == (target == "standard")


def test_a_level_with_another_answer_and_one_that_cannot_load_are_errors(
    integer_export: tuple[Student, Path, dict[str, Any]], tmp_path: Path
) -> None:
    student, folder, _ = integer_export
    batch = complete_batch(student, {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3).long()})

    def other(path: Path, *, level: str) -> Any:
        return open_session(tmp_path / "other.onnx" if level == "basic" else path, threads=1, level=level)

    ir.save(_nudge_one_code(ir.load(folder / MODEL_FILE)), tmp_path / "other.onnx")
    found = parity.check_levels(other, folder / MODEL_FILE, batch)
    with pytest.raises(RunFailedError, match="at optimisation level 'basic' ONNX Runtime gives another answer"):
        parity.judge_levels(found, bound=1e-5, where="onnx")
    graph = ir.load(folder / MODEL_FILE)
    next(node for node in graph.graph if node.op_type == "Attention").op_type = "NoSuchOperator"
    ir.save(graph, tmp_path / "other.onnx")
    with pytest.raises(RunFailedError, match=r"cannot run the file at optimisation level 'basic'.*NoSuchOperator"):
        parity.check_levels(other, folder / MODEL_FILE, batch)


def test_values_that_are_not_finite_are_an_infinite_difference() -> None:
    difference = parity.Difference()
    difference.add(np.array([1.0, np.nan]), np.array([1.0, 1.0]))
    assert difference.relative == float("inf")


def test_exporter_is_registered_under_its_kind() -> None:
    assert EXPORTERS["onnx"] is OnnxExport
    assert isinstance(EXPORTERS.parse({"kind": "onnx", "opset": 20}), OnnxExport)


def test_sessions_keep_the_threads_they_were_given(integer_export: tuple[Student, Path, dict[str, Any]]) -> None:
    session = open_session(integer_export[1] / MODEL_FILE, threads=1)
    assert session.get_session_options().intra_op_num_threads == 1


def test_weights_past_the_limit_lie_beside_the_graph(
    bert: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit of protobuf, lowered: the same bytes in another place, in every graph that is written on the way."""
    quantize_linears(bert, linears(bert), bits=8, group_size=16)
    options = OnnxExport(**FAST | {"accuracy_level": 4})  # type: ignore[arg-type]
    options.write(bert, tmp_path / "one")
    monkeypatch.setattr(files, "_SINGLE_FILE_BYTES", 20_000)
    entry = options.write(bert, tmp_path / "two")
    graph, data = tmp_path / "two" / MODEL_FILE, tmp_path / "two" / f"{MODEL_FILE}.data"
    assert {MODEL_FILE, data.name} <= set(entry["files"])
    assert entry["size_bytes"] == graph.stat().st_size + data.stat().st_size
    assert graph.stat().st_size < 20_000 < data.stat().st_size
    manifest = read_exported(tmp_path / "two")
    assert manifest["files"][data.name]["sha256"] == hashlib.sha256(data.read_bytes()).hexdigest()
    one, two = _stored(tmp_path / "one" / MODEL_FILE), _stored(graph)
    assert one.keys() == two.keys()
    assert all(one[name].tobytes() == two[name].tobytes() for name in one)
    assert run_readme(tmp_path / "two") == run_readme(tmp_path / "one")
    assert files.model_bytes(graph) == entry["size_bytes"]


def test_a_rounding_student_is_proven_with_its_weights_beside_the_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its probe, the file with more outputs, is of two files then, and leaves none."""
    student = make_student("feature-extraction")
    _change_bert_integers(student)
    monkeypatch.setattr(files, "_SINGLE_FILE_BYTES", 10_000)
    entry = OnnxExport(**FAST).write(student, tmp_path / "onnx")  # type: ignore[arg-type]
    assert entry["parity"]["relative_error"] <= 1e-5
    assert f"{MODEL_FILE}.data" in entry["files"]
    assert not [name for name in entry["files"] if "probe" in name]


def test_writing_weights_beside_the_graph_holds_no_second_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_SINGLE_FILE_BYTES", 1_000_000)
    arrays = [np.full((1024, 1024), index, np.float32) for index in range(8)]
    values = [ir.Value(name=f"w{i}", const_value=ir.tensor(array, name=f"w{i}")) for i, array in enumerate(arrays)]
    graph = ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 23}, name="weights")
    tracemalloc.start()
    try:
        files.save_graph(ir.Model(graph, ir_version=10), tmp_path / MODEL_FILE)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1.5 * arrays[0].nbytes
    assert (tmp_path / f"{MODEL_FILE}.data").stat().st_size >= sum(array.nbytes for array in arrays)
    assert np.array_equal(ir.load(tmp_path / MODEL_FILE).graph.initializers["w7"].const_value.numpy(), arrays[7])  # type: ignore[union-attr]
