import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from transformers import PreTrainedModel
from typer.testing import CliRunner

import compresskit
from compresskit import OnnxExport, PruneVocab, Quantize
from compresskit.cli import app
from compresskit.data import Batch
from compresskit.errors import CompressKitError
from compresskit.evaluate import latency
from compresskit.export import scored
from compresskit.export.folder import MANIFEST_FILE, MODEL_FILE, read_exported, write_manifest
from compresskit.export.runtime import session_feeds


@pytest.fixture(scope="module")
def run(tiny_llama_folder: Path, tiny_text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder with fewer tokens, in integers, as checkpoint and as file."""
    output = tmp_path_factory.mktemp("run") / "out"
    sizes = {"calibration": 8, "training": 8, "evaluation": 16, "max_length": 16}
    compresskit.compress(
        tiny_llama_folder,
        passes=[PruneVocab(keep=0.8, round_to=1), Quantize(bits=8, group_size=16)],
        data={"source": "text", "path": str(tiny_text_file), **sizes},
        output=output,
        evaluate="never",
        export=[OnnxExport(baselines=False, rounds=3, threads=1, texts=8, accuracy_level=0)],
    )
    return output


def test_the_file_scores_what_the_student_scores(run: Path) -> None:
    student, file = compresskit.measure(run), compresskit.measure(run / "onnx")
    assert list(file) == ["original", "onnx"]
    assert file["original"]["perplexity"] == student["original"]["perplexity"]
    for name in ("perplexity", "kl_to_original", "top1_flips"):
        assert file["onnx"][name] == pytest.approx(student["student"][name], rel=1e-4)
    assert file["onnx"]["size_bytes"] == (run / "onnx" / MODEL_FILE).stat().st_size
    assert 0 < file["onnx"]["p50_ms"] <= file["onnx"]["p95_ms"]


def test_both_are_timed_on_a_text_of_one_length(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[list[int]] = []

    def first_feed(session: ort.InferenceSession, batch: Batch) -> list[dict[str, np.ndarray]]:
        feeds = session_feeds(session, batch)
        timed.append(list(feeds[0]["input_ids"].shape))
        return feeds

    def lasting(model: PreTrainedModel, inputs: Batch, **options: Any) -> dict[str, float]:
        timed.append(list(inputs["input_ids"].shape))
        return {"p50_ms": 1.0, "p95_ms": 1.0}

    monkeypatch.setattr(scored, "session_feeds", first_feed)
    monkeypatch.setattr(latency, "batch_latency", lasting)
    compresskit.measure(run / "onnx")
    assert len(timed) == 2
    assert timed[0] == timed[1]


@pytest.mark.parametrize(("folder", "column"), [("", "student (torch)"), ("onnx", "onnx (ONNX Runtime)")])
def test_the_command_says_which_runtime_each_column_is_of(run: Path, folder: str, column: str) -> None:
    result = CliRunner().invoke(app, ["eval", str(run / folder)])
    assert result.exit_code == 0
    assert "original (torch)" in result.output
    assert column in result.output


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    """The exported folder without the run that made it."""
    shutil.copytree(run / "onnx", tmp_path / "alone" / "onnx")
    return tmp_path / "alone" / "onnx"


def _measure(folder: Path, run: Path, **options: Any) -> None:
    facts = json.loads((run / "run.json").read_text())
    data = compresskit.DataSource.model_validate(facts["data"])
    compresskit.measure(folder, original=facts["model"], data=data, **options)


def test_a_file_that_was_changed_is_not_scored(run: Path, copied: Path) -> None:
    (copied / "tokenizer.json").unlink()
    with pytest.raises(CompressKitError, match=r"tokenizer\.json is missing"):
        _measure(copied, run)


def test_a_student_with_fewer_tokens_is_scored_beside_its_checkpoint(run: Path, copied: Path) -> None:
    with pytest.raises(CompressKitError, match=r"reads \d+ tokens and its original \d+") as error:
        _measure(copied, run)
    assert "inside its run's output folder" in str(error.value)


def test_another_task_is_refused(run: Path, copied: Path) -> None:
    shutil.copytree(run / "student", copied.parent / "student")
    manifest = read_exported(copied)
    (copied / MANIFEST_FILE).unlink()
    facts = {key: value for key, value in manifest.items() if key not in ("files", "versions", "format")}
    write_manifest(copied, facts | {"task": "text-classification"})
    with pytest.raises(CompressKitError, match="is made for text-classification"):
        _measure(copied, run)
