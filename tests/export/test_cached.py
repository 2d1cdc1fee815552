import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
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
from families import DECODERS, OTHERS, random_model
from pydantic import ValidationError
from tiny_tokenizer import make_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from compresskit.errors import CompressKitError, RunFailedError
from compresskit.export import OnnxExport
from compresskit.export.cached import cache_shapes
from compresskit.export.folder import MODEL_FILE
from compresskit.export.greedy import check_greedy, judge_greedy
from compresskit.export.runtime import open_session
from compresskit.export.steps import Steps, greedy_tokens
from compresskit.student import Student
from compresskit.surgery.cuts import PruneHeads

NEW = 5


def _cut_student() -> Student:
    """Two blocks: the first with half its heads, a shared factor, integers everywhere, the head tied to a table."""
    student = make_student("text-generation", blocks=2)
    attention = "model.layers.0.self_attn"
    query, key, value, output = (f"{attention}.{name}_proj" for name in "qkvo")
    cut = PruneHeads(
        query=query, key=key, value=value, output=output, module=attention, head_dim=8, keep="0-1", keep_kv="0"
    )
    student.edit(cut)
    factorise(student, [("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj")], rank=16)
    quantize_linears(student, linears(student), bits=8, group_size=16)
    quantize_table(student, "model.embed_tokens", bits=8, head="lm_head")
    return student


def _family_student(family: str) -> Student:
    tokenizer = make_tokenizer()
    config = copy.deepcopy({**DECODERS, **OTHERS}[family])
    config.vocab_size = len(tokenizer)
    models = [random_model(AutoModelForCausalLM, config) for _ in range(2)]
    return Student(models[0], models[1], tokenizer, "text-generation", random_corpus(len(tokenizer)))


@pytest.fixture(scope="module")
def cut_export(tmp_path_factory: pytest.TempPathFactory) -> tuple[Student, Path, dict[str, Any]]:
    student = _cut_student()
    folder = tmp_path_factory.mktemp("cut") / "onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPRESSKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        entry = OnnxExport(**FAST | {"baselines": True}).write(student, folder)  # type: ignore[arg-type]
    return student, folder, entry


def _logits(model: PreTrainedModel, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """What the model says after the last token, reading everything at once."""
    positions = torch.from_numpy(np.maximum(mask.cumsum(1) - 1, 0))
    with torch.no_grad():
        output = model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), position_ids=positions)
    return output.logits[:, -1].numpy()


def _assert_steps_agree(model: PreTrainedModel, path: Path, *, texts: int, prompt: int, steps: list[int]) -> None:
    """Texts padded on the left, read in steps of several sizes, as torch without a cache reads them."""
    session = open_session(path, threads=1, exact=True)
    draw = np.random.default_rng(0)
    ids = draw.integers(5, 90, (texts, prompt))
    mask = np.ones_like(ids)
    mask[0, : prompt // 2] = 0
    reader, new = Steps(session, texts), ids
    for size in [*steps, 0]:
        expected = _logits(model, ids, mask)
        got = reader.read(new, mask)
        assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected)
        new = draw.integers(5, 90, (texts, size))
        ids, mask = np.concatenate([ids, new], 1), np.concatenate([mask, np.ones_like(new)], 1)


def test_one_graph_reads_prompts_and_single_tokens(cut_export: tuple[Student, Path, dict[str, Any]]) -> None:
    student, folder, entry = cut_export
    assert entry["operators"]["com.microsoft::GroupQueryAttention"] == 2
    assert [path.name for path in folder.glob("*.onnx*")] == [MODEL_FILE]
    _assert_steps_agree(student.model, folder / MODEL_FILE, texts=3, prompt=7, steps=[1, 1, 1])
    _assert_steps_agree(student.model, folder / MODEL_FILE, texts=1, prompt=1, steps=[1, 4, 1])


def test_nothing_is_reshaped_around_attention(cut_export: tuple[Student, Path, dict[str, Any]]) -> None:
    nodes = onnx.load(str(cut_export[1] / MODEL_FILE)).graph.node
    made_by = {name: node.op_type for node in nodes for name in node.output}
    attentions = [node for node in nodes if node.op_type == "GroupQueryAttention"]
    read = {made_by[name] for node in attentions for name in node.input[:3]}
    assert read <= {"RotaryEmbedding", "Split"}
    results = {node.output[0] for node in attentions}
    assert {node.op_type for node in nodes if results & set(node.input)} <= {"MatMul", "MatMulNBits", "Gemm"}


def test_joined_products_hold_the_integers_of_their_layers(cut_export: tuple[Student, Path, dict[str, Any]]) -> None:
    student, folder, _ = cut_export
    stored = {one.name: one for one in onnx.load(str(folder / MODEL_FILE)).graph.initializer}
    joined = [name for name in stored if "+" in name and name.endswith(".codes")]
    layers = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    assert "+".join(f"model.layers.0.{layer}.codes" for layer in layers) in joined
    for name in joined:
        held = [student.model.get_submodule(part.removesuffix(".codes")).tensors() for part in name.split("+")]
        for kind, parts in zip(("codes", "scales", "zeros"), zip(*held, strict=True), strict=True):
            if parts[0] is not None:
                array = onnx.numpy_helper.to_array(stored[name.replace(".codes", f".{kind}")])
                assert np.array_equal(array, torch.cat(parts).numpy())


def test_names_and_shapes_are_those_that_runtimes_look_for(cut_export: tuple[Student, Path, dict[str, Any]]) -> None:
    graph = onnx.load(str(cut_export[1] / MODEL_FILE)).graph
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*graph.input, *graph.output]
    }
    vocabulary = len(cut_export[0].tokenizer)
    assert list(shapes)[:3] == ["input_ids", "attention_mask", "position_ids"]
    assert shapes.pop("logits") == ["batch", "sequence", vocabulary]
    assert shapes.pop("attention_mask") == ["batch", "total"]
    assert shapes.pop("input_ids") == shapes.pop("position_ids") == ["batch", "sequence"]
    # the first layer lost one of its two heads of keys
    assert shapes == {
        f"{side}.{layer}.{part}": ["batch", layer + 1, length, 8]
        for side, length in (("past_key_values", "past"), ("present", "total"))
        for layer in (0, 1)
        for part in ("key", "value")
    }


def test_the_file_picks_the_tokens_that_generate_picks(cut_export: tuple[Student, Path, dict[str, Any]]) -> None:
    student, folder, entry = cut_export
    found = entry["parity"]["greedy"]
    # 64 positions, the longer prompt takes 12
    assert found["tokens"] == found["equal"] == 2 * (64 - 12)
    assert found["relative_error"] <= 1e-5
    prompt = [5, 6, 7]
    said = student.model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=-1)  # type: ignore[operator]
    tokens = greedy_tokens(open_session(folder / MODEL_FILE, threads=1), prompt)
    assert [next(tokens) for _ in range(NEW)] == said[0, 3:].tolist()


def test_the_readme_generates_without_torch(cut_export: tuple[Student, Path, dict[str, Any]]) -> None:
    student, folder, _ = cut_export
    prompt = student.tokenizer("A small model")["input_ids"]
    tokens = greedy_tokens(open_session(folder / MODEL_FILE, threads=1), prompt)
    expected = student.tokenizer.decode([*prompt, *(next(tokens) for _ in range(20))], skip_special_tokens=True)
    assert run_readme(folder).strip() == expected


def test_latency_is_told_for_prompts_and_for_tokens_after_them(
    cut_export: tuple[Student, Path, dict[str, Any]],
) -> None:
    entry = cut_export[2]
    latency = entry["latency_ms"]
    for one in (entry, entry["baseline"], entry["stock_int8"]):
        assert set(one["latency_ms"]) == {"p50", "p95", "1x16", "1x64", "8x64", "1x1+63"}
    assert entry["speed"]["1x1+63"] > 0
    assert entry["size_bytes"] < entry["stock_int8"]["size_bytes"] < entry["baseline"]["size_bytes"]
    assert latency["p50"] == latency["1x64"]["p50"]
    assert 0 < latency["1x1+63"]["p50"] <= latency["1x1+63"]["p95"]


def test_a_standard_file_keeps_its_past_with_the_operators_of_onnx(tmp_path: Path) -> None:
    student = make_student("text-generation")
    quantize_linears(student, linears(student), bits=8, group_size=16)
    entry = OnnxExport(**FAST, target="standard").write(student, tmp_path / "onnx")  # type: ignore[arg-type]
    assert entry["operators"]["Attention"] == 1
    assert not any("::" in name for name in entry["operators"])
    assert entry["parity"]["greedy"]["equal"] == entry["parity"]["greedy"]["tokens"]
    _assert_steps_agree(student.model, tmp_path / "onnx" / MODEL_FILE, texts=3, prompt=6, steps=[1, 3, 2])


@pytest.mark.parametrize("family", ["gemma3", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_other_decoders_give_the_last_logits_alone_where_asked(tmp_path: Path, family: str) -> None:
    """Gemma's windows, norms and scaled table; GPT-2's table of positions and transposed weights."""
    student = _family_student(family)
    OnnxExport(**FAST, logits="last").write(student, tmp_path / "onnx")  # type: ignore[arg-type]
    path = tmp_path / "onnx" / MODEL_FILE
    session = open_session(path, threads=1)
    assert session.get_outputs()[0].shape == ["batch", 1, len(student.tokenizer)]
    _assert_steps_agree(student.model, path, texts=2, prompt=9, steps=[1, 1])


def test_another_token_is_fatal_and_a_tie_is_not() -> None:
    found = {"tokens": 128, "equal": 127, "regret": 5e-4, "relative_error": 1e-6}
    judge_greedy(found, bound=1e-3, where="onnx")
    with pytest.raises(RunFailedError, match=r"picks 127 of 128 tokens as the student does; .* the bound is 0.0001"):
        judge_greedy(found, bound=1e-4, where="onnx")
    with pytest.raises(RunFailedError, match="max_relative_error"):
        judge_greedy(found | {"relative_error": float("nan")}, bound=1e-3, where="onnx")


def test_a_file_of_another_student_picks_other_tokens(cut_export: tuple[Student, Path, dict[str, Any]]) -> None:
    student, folder, _ = cut_export
    session = open_session(folder / MODEL_FILE, threads=1)
    found = check_greedy(session, student.original, [[5, 6], [7]])
    assert found["equal"] < found["tokens"]
    assert found["regret"] > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "standard", "opset": 21}, "opset 23, which brought Attention"),
        ({"logits": "last", "cache": False}, "logits: last goes with cache: true"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        OnnxExport(**options)


def test_a_model_that_keeps_something_else_is_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_student("text-generation").model
    plain = type(model).forward

    def forgetful(self: PreTrainedModel, **inputs: Any) -> Any:
        return plain(self, **inputs | {"use_cache": False})

    monkeypatch.setattr(type(model), "forward", forgetful)
    with pytest.raises(CompressKitError, match="does not keep keys and values") as error:
        cache_shapes(model)
    assert "cache: false" in str(error.value)
