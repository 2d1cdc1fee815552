import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from changed_students import FAST, linears, make_student, quantize_linears, run_readme
from tokenizers import Tokenizer
from transformers import BertConfig, BertForSequenceClassification

from compresskit.errors import CompressKitError, RunFailedError
from compresskit.export import OnnxExport
from compresskit.export.fidelity import judge_embedding
from compresskit.export.folder import MANIFEST_FILE, MODEL_FILE, load_exported_tokenizer, read_exported, write_readme
from compresskit.export.runtime import open_session, session_feed
from compresskit.layers.int8_linear import Int8Linear
from compresskit.sentence import SentenceEmbedding
from compresskit.student import Student

PARTS = ("Transformer", "Pooling", "Normalize")


def _told(poolings: tuple[str, ...], parts: tuple[str, ...] = PARTS) -> SentenceEmbedding:
    listed = [{"path": name, "type": f"sentence_transformers.models.{name}"} for name in parts]
    return SentenceEmbedding(poolings, {"modules.json": json.dumps(listed).encode()})


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Student, Path, dict[str, Any]]:
    """A BERT in integers that pools in two ways and normalises, and its export; read only."""
    student = make_student("feature-extraction")
    quantize_linears(student, [*linears(student), "pooler.dense"], bits=8, group_size=0, act="int8")
    student.sentence = _told(("cls", "mean"))
    folder = tmp_path_factory.mktemp("embedder") / "onnx"
    return student, folder, OnnxExport(**FAST).write(student, folder)  # type: ignore[arg-type]


@pytest.fixture
def copied(embedder: tuple[Student, Path, dict[str, Any]], tmp_path: Path) -> Path:
    for path in embedder[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_pooling_and_normalisation_are_inside_the_graph(embedder: tuple[Student, Path, dict[str, Any]]) -> None:
    _, folder, entry = embedder
    session = open_session(folder / MODEL_FILE, threads=1)
    assert [value.name for value in session.get_outputs()] == ["last_hidden_state", "sentence_embedding"]
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long(), "token_type_ids": torch.zeros_like(ids)}
    hidden, got = (np.asarray(value) for value in session.run(None, session_feed(session, batch)))
    mean = np.stack([hidden[0].mean(0), hidden[1, :2].mean(0)])
    expected = np.concatenate([hidden[:, 0], mean], axis=1)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert got.shape == (2, 64)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert entry["parity"]["embedding_error"] <= 1e-6


def test_the_readme_embeds_without_torch(embedder: tuple[Student, Path, dict[str, Any]]) -> None:
    similarities = np.array([float(word) for word in re.findall(r"-?\d+\.?\d*", run_readme(embedder[1]))])
    np.testing.assert_allclose(similarities.reshape(2, 2).diagonal(), 1, atol=1e-5)


def test_the_readme_of_a_classifier_prints_labels(tmp_path: Path) -> None:
    student = make_student("feature-extraction")
    names = {0: "bad", 1: "good"}
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(student.tokenizer), **shape, id2label=names, pad_token_id=0)
    models = [BertForSequenceClassification(config).eval() for _ in range(2)]
    student = Student(models[0], models[1], student.tokenizer, "text-classification", student.corpus)
    OnnxExport(**FAST).write(student, tmp_path / "onnx")  # type: ignore[arg-type]
    said = run_readme(tmp_path / "onnx")
    assert re.fullmatch(r"\['(bad|good)', '(bad|good)'\]\n", said)


def test_the_manifest_tells_the_graph_its_proof_and_every_file(
    embedder: tuple[Student, Path, dict[str, Any]],
) -> None:
    student, folder, entry = embedder
    manifest = read_exported(folder)
    assert manifest["task"] == "feature-extraction"
    assert manifest["inputs"]["input_ids"] == {"dtype": "int64", "shape": ["batch", "sequence"]}
    assert manifest["outputs"]["last_hidden_state"]["shape"] == ["batch", "sequence", 32]
    assert manifest["outputs"]["sentence_embedding"]["shape"] == ["batch", 64]
    assert manifest["operators"] == entry["operators"]
    assert manifest["opset"][""] == 23
    rounding = [name for name, module in student.model.named_modules() if isinstance(module, Int8Linear)]
    assert "pooler.dense" in rounding, "the file has no use for it"
    assert manifest["integer_layers"] == dict.fromkeys([name for name in rounding if name != "pooler.dense"], 8) != {}
    assert manifest["parity"] == entry["parity"]
    assert {"compresskit", "onnxruntime", "torch"} <= set(manifest["versions"])
    assert set(manifest["files"]) == {path.name for path in folder.iterdir()} - {MANIFEST_FILE}
    sha = hashlib.sha256((folder / MODEL_FILE).read_bytes()).hexdigest()
    assert manifest["files"][MODEL_FILE]["sha256"] == sha


def _flip(folder: Path) -> None:
    content = bytearray((folder / MODEL_FILE).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / MODEL_FILE).write_bytes(content)


DAMAGES = {
    r"the contents of model\.onnx are not what was written \(sha256 differs\)": _flip,
    r"tokenizer\.json has \d+ bytes instead of \d+": lambda folder: (folder / "tokenizer.json").write_text("{}"),
    r"config\.json is missing": lambda folder: (folder / "config.json").unlink(),
    r"no manifest\.json: this is no exported folder": lambda folder: (folder / MANIFEST_FILE).unlink(),
    r"manifest\.json: is not what an export writes": lambda folder: (folder / MANIFEST_FILE).write_text("{}"),
    r"manifest\.json: cannot be read": lambda folder: (folder / MANIFEST_FILE).write_text("{"),
    r"is of format 99; this compresskit reads 1": lambda folder: (folder / MANIFEST_FILE).write_text(
        '{"format": 99, "files": {}}'
    ),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_folder_that_was_changed_is_refused(copied: Path, message: str) -> None:
    DAMAGES[message](copied)
    with pytest.raises(CompressKitError, match=message) as error:
        read_exported(copied)
    assert error.value.fix


def test_a_folder_without_a_fast_tokenizer_says_so(copied: Path) -> None:
    assert isinstance(load_exported_tokenizer(copied), Tokenizer)
    (copied / "tokenizer.json").unlink()
    with pytest.raises(CompressKitError, match=r"no tokenizer\.json"):
        load_exported_tokenizer(copied)
    write_readme(copied, "feature-extraction", "print()")
    assert "```" not in (copied / "README.md").read_text()


def test_a_folder_that_may_not_be_written_is_named_before_anything_is_traced(
    embedder: tuple[Student, Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(RunFailedError, match="cannot be written: Permission denied") as error:
        OnnxExport(**FAST).write(embedder[0], tmp_path / "onnx")  # type: ignore[arg-type]
    assert "--output" in str(error.value)


@pytest.mark.parametrize(
    ("sentence", "told"),
    [
        (SentenceEmbedding(), False),
        (_told(("mean",), ("Transformer", "Pooling")), True),
        (_told(("mean",), ("Transformer", "Pooling", "Dense")), False),
    ],
)
def test_only_folders_that_tell_all_of_it_are_pooled_in_the_graph(sentence: SentenceEmbedding, told: bool) -> None:
    assert sentence.is_told == told


def test_a_wrong_embedding_is_fatal() -> None:
    judge_embedding(1e-4, bound=1e-3, where="onnx")
    with pytest.raises(RunFailedError, match="otherwise than 1_Pooling says"):
        judge_embedding(float("nan"), bound=1e-3, where="onnx")
