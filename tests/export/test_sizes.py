"""Files that take so many texts of so many tokens: on request, proven, run, timed and scored like any other."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from changed_students import FAST, factorise, linears, make_student, quantize_linears, quantize_table, run_readme
from families import tiny_student
from transformers import BertConfig, BertForSequenceClassification

import compresskit
from compresskit.data import Batch
from compresskit.errors import CompressKitError, ManyErrors
from compresskit.export import OnnxExport
from compresskit.export.folder import MODEL_FILE, read_exported
from compresskit.export.generate import generate
from compresskit.export.onnx import complete_batch
from compresskit.export.runtime import headline, open_session, run_session, session_feeds, session_sizes
from compresskit.export.sizes import FREE, Sizes
from compresskit.forecast import foretell
from compresskit.models import find_model
from compresskit.recipe import parse_recipe
from compresskit.sentence import SentenceEmbedding
from compresskit.student import Student


def _batch(rows: int, length: int) -> Batch:
    ids = torch.randint(5, 90, (rows, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[-1, (length + 1) // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _options(**sizes: Any) -> OnnxExport:
    return OnnxExport(**FAST | sizes)  # type: ignore[arg-type]


def _value_shapes(path: Path) -> dict[str, list[int | str]]:
    graph = onnx.load(str(path)).graph
    values = [*graph.input, *graph.output, *graph.value_info]
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, 8), (3, 5), (4, 8), (7, 11)])
def test_any_batch_is_cut_padded_and_filled_up_and_comes_back_as_it_was(rows: int, length: int) -> None:
    sizes, inputs = Sizes(batch=3, length=8), _batch(rows, length)
    parts = sizes.fit(inputs)
    assert len(parts) == -(-rows // 3)
    assert all(part["input_ids"].shape == part["attention_mask"].shape == (3, 8) for part in parts)
    assert all(part["attention_mask"].any(1).all() for part in parts)  # no text is nothing but padding
    kept = min(length, 8)
    states = [part["input_ids"][:, :, None].numpy() for part in parts]
    np.testing.assert_array_equal(sizes.join(states, inputs)[:, :, 0], inputs["input_ids"][:, :kept])
    vectors = [part["input_ids"][:, :1].numpy() for part in parts]
    assert sizes.join(vectors, inputs).shape == (rows, 1)
    assert sum(int(part["attention_mask"][:, kept:].sum()) for part in parts) == 0


def test_free_sizes_change_nothing() -> None:
    inputs = _batch(2, 5)
    assert FREE.fit(inputs) == [inputs]
    assert FREE.cut(inputs) is inputs


def _float(student: Student) -> None:
    factorise(student, [tuple(f"encoder.layer.0.attention.self.{name}" for name in ("query", "key", "value"))], rank=8)


def _integers(student: Student) -> None:
    quantize_linears(student, linears(student), bits=8, group_size=0, act="int8")
    for name in ("word", "position", "token_type"):
        quantize_table(student, f"embeddings.{name}_embeddings", bits=8)


@pytest.mark.parametrize("change", [_float, _integers])
@pytest.mark.parametrize(("batch", "length"), [(1, 16), (3, None), (None, 16)])
def test_an_encoder_of_fixed_sizes_answers_ragged_text_as_the_student_does(
    tmp_path: Path, change: Any, batch: int | None, length: int | None
) -> None:
    student = make_student("feature-extraction")
    change(student)
    entry = _options(batch=batch, length=length).write(student, tmp_path / "onnx")
    assert entry["parity"]["relative_error"] <= 1e-5
    session = open_session(tmp_path / "onnx" / MODEL_FILE, threads=1)
    assert session_sizes(session) == Sizes(batch, length)
    shapes = _value_shapes(tmp_path / "onnx" / MODEL_FILE)
    named = [batch or "batch", length or "sequence"]
    assert shapes["input_ids"] == shapes["attention_mask"] == named
    if batch and length:
        unknown = {name: shape for name, shape in shapes.items() if any(isinstance(dim, str) for dim in shape)}
        assert unknown == {}
        assert entry["latency_ms"].keys() == {"p50", "p95", "1x16"}
        assert read_exported(tmp_path / "onnx")["outputs"]["last_hidden_state"]["shape"] == [1, 16, 32]
        assert set(entry["parity"]["shapes"]) == {"1x16"}
        assert "Shape" not in entry["operators"]
    for rows, tokens in ((1, 1), (5, 9), (4, 16)):
        inputs = complete_batch(student, _batch(rows, tokens))
        with torch.no_grad():
            expected = student.model(**inputs).last_hidden_state.numpy()
        got = run_session(session, inputs)
        assert got.shape == expected.shape
        kept = inputs["attention_mask"].numpy().astype(bool)
        apart = np.linalg.norm((got - expected)[kept]) / np.linalg.norm(expected[kept])
        # Scales of integer activations are those of the whole batch, padding and all.
        assert apart <= (0.1 if change is _integers else 1e-5)


def test_longer_texts_are_cut(tmp_path: Path) -> None:
    student = make_student("feature-extraction")
    _options(batch=2, length=6).write(student, tmp_path / "onnx")
    session = open_session(tmp_path / "onnx" / MODEL_FILE, threads=1)
    inputs = complete_batch(student, _batch(3, 20))
    with torch.no_grad():
        expected = student.model(**{name: value[:, :6] for name, value in inputs.items()}).last_hidden_state.numpy()
    np.testing.assert_allclose(run_session(session, inputs)[:2], expected[:2], atol=1e-5)
    assert len(session_feeds(session, inputs)) == 2


def test_the_readme_of_fixed_sizes_embeds_without_torch(tmp_path: Path) -> None:
    student = make_student("feature-extraction")
    student.sentence = SentenceEmbedding(("mean",), {"modules.json": b'[{"path": "1_Pooling", "type": "Pooling"}]'})
    said = []
    for sizes in ({"batch": 3, "length": 32}, {"batch": 1}, {}):
        _options(**sizes, pooling=bool(sizes.get("length"))).write(student, tmp_path / "onnx")
        numbers = np.array([float(word) for word in re.findall(r"-?\d+\.?\d*", run_readme(tmp_path / "onnx"))])
        said.append(numbers.reshape(2, 2))
    similar = [one / np.sqrt(np.outer(one.diagonal(), one.diagonal())) for one in said]
    np.testing.assert_allclose(similar[1:], [similar[0]] * 2, atol=1e-4)


def test_a_classifier_of_fixed_sizes_keeps_its_labels_apart_from_tokens(tmp_path: Path) -> None:
    """Four labels and four tokens: logits of texts are no states of tokens."""
    student = make_student("feature-extraction")
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(student.tokenizer), **shape, num_labels=4, pad_token_id=0)
    models = [BertForSequenceClassification(config).eval() for _ in range(2)]
    student = Student(models[0], models[1], student.tokenizer, "text-classification", student.corpus)
    _options(batch=2, length=4).write(student, tmp_path / "onnx")
    session = open_session(tmp_path / "onnx" / MODEL_FILE, threads=1)
    assert run_session(session, complete_batch(student, _batch(3, 2))).shape == (3, 4)
    assert re.fullmatch(r"\['LABEL_\d', 'LABEL_\d'\]\n", run_readme(tmp_path / "onnx"))


def test_images_have_a_batch_and_no_length(tmp_path: Path) -> None:
    student = tiny_student("vit")
    entry = _options(batch=3).write(student, tmp_path / "onnx")
    assert entry["latency_ms"].keys() == {"p50", "p95", "3x3x16x16"}
    session = open_session(tmp_path / "onnx" / MODEL_FILE, threads=1)
    images = next(student.corpus.evaluation.batches(5))
    with torch.no_grad():
        expected = student.model(**images).logits.numpy()
    np.testing.assert_allclose(run_session(session, images), expected, atol=1e-5)
    with pytest.raises(CompressKitError, match="reads no text") as error:
        _options(length=8).write(student, tmp_path / "refused")
    assert error.value.fix == "leave length out"


@pytest.mark.parametrize("batch", [1, 3])
def test_a_decoder_with_its_cache_takes_a_fixed_batch(tmp_path: Path, batch: int) -> None:
    student = make_student("text-generation")
    entry = _options(batch=batch).write(student, tmp_path / "onnx")
    assert entry["parity"]["greedy"]["equal"] == entry["parity"]["greedy"]["tokens"]
    assert {f"{batch}x16", f"{batch}x1+63"} <= entry["latency_ms"].keys()
    shapes = _value_shapes(tmp_path / "onnx" / MODEL_FILE)
    assert shapes["input_ids"] == [batch, "sequence"]
    assert shapes["past_key_values.0.key"] == [batch, 2, "past", 8]
    assert shapes["present.0.value"] == [batch, 2, "total", 8]
    assert run_readme(tmp_path / "onnx").strip()
    if batch == 1:
        assert "".join(generate(tmp_path / "onnx", "the", max_new_tokens=3, threads=1)).strip()
        return
    with pytest.raises(CompressKitError, match="takes 3 texts at a time; generate writes one"):
        generate(tmp_path / "onnx", "the", max_new_tokens=3, threads=1)


def test_a_decoder_without_its_cache_takes_a_fixed_length(tmp_path: Path) -> None:
    student = make_student("text-generation")
    _options(batch=2, length=12, cache=False).write(student, tmp_path / "onnx")
    session = open_session(tmp_path / "onnx" / MODEL_FILE, threads=1)
    inputs = _batch(3, 7)
    with torch.no_grad():
        expected = student.model(**inputs).logits.numpy()
    kept = inputs["attention_mask"].numpy().astype(bool)
    np.testing.assert_allclose(run_session(session, inputs)[kept], expected[kept], atol=1e-4)
    assert run_readme(tmp_path / "onnx").strip()


REFUSED = {
    "text-generation, past": ({"length": 8}, "text-generation", "keeps its past", "cache: false"),
    "positions": ({"length": 65}, "feature-extraction", "65 is more than the model's 64 positions", "length: 64 or"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_length_that_the_model_cannot_take_is_refused_before_a_weight_is_read(
    case: str, tiny_bert_folder: Path, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    options, task, what, fix = REFUSED[case]
    folder = tiny_bert_folder if task == "feature-extraction" else tiny_llama_folder
    recipe = parse_recipe({"model": str(folder), "task": task, "export": [{"kind": "onnx", **options}]})
    with pytest.raises(ManyErrors, match=what) as error:
        foretell(recipe, find_model(folder), task)
    (one,) = error.value.errors
    assert one.where == "export[0] (onnx): length"
    assert fix in str(one.fix)
    with pytest.raises(CompressKitError, match=what):
        _options(**options).write(make_student(task), tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["batch", "length"])
def test_sizes_below_one_are_mistakes_of_the_recipe(option: str) -> None:
    with pytest.raises(CompressKitError, match=rf"export\[0\]\.{option}.*1"):
        parse_recipe({"model": "any", "export": [{"kind": "onnx", option: 0}]})


def test_the_headline_is_the_largest_shape_of_the_fewest_texts() -> None:
    assert headline(["1x16", "1x64", "8x64", "1x1+256"]) == "1x64"
    assert headline(["4x16", "4x64", "4x1+64"]) == "4x64"
    assert headline(["1x3x32x32", "8x3x32x32"]) == "1x3x32x32"


def test_a_run_exports_and_scores_a_file_of_fixed_sizes(
    tiny_bert_folder: Path, tiny_data: dict[str, object], tmp_path: Path
) -> None:
    """Held-out texts have up to 32 tokens, and the file takes 12."""
    export = OnnxExport(rounds=3, threads=1, texts=8, batch=2, length=12, accuracy_level=0)
    report = compresskit.compress(
        tiny_bert_folder,
        passes=[compresskit.Quantize(bits=8, group_size=16)],
        data=tiny_data,
        output=tmp_path / "out",
        export=[export],
    )
    (entry,) = report["export"]
    assert entry["speed"].keys() == entry["baseline"]["latency_ms"].keys() - {"p50", "p95"} == {"2x12"}
    assert entry["fidelity"]["spearman"] > 0.9
    figures = compresskit.measure(tmp_path / "out" / "onnx")["onnx"]
    assert figures["spearman"] > 0.9
    assert figures["mean_cosine"] > 0.99
