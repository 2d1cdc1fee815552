"""The low-rank path beside integer layers: what it repairs, what it costs, and where it is refused."""

import pytest
import torch
from changed_students import FAST, quantised_student
from families import answer, tiny, tiny_student

from compresskit.errors import CompressKitError
from compresskit.export import OnnxExport
from compresskit.layers.corrected_linear import CorrectedLinear
from compresskit.passes.low_rank import LowRank
from compresskit.passes.low_rank_correction import LowRankCorrection
from compresskit.passes.prune_depth import PruneDepth
from compresskit.passes.quantize import Quantize
from compresskit.student import Student


def _quantised(family: str, **options: object) -> Student:
    student = tiny_student(family)
    Quantize.model_validate({"bits": 3, "group_size": 32, "embeddings": None, **options}).apply(
        student, generator=torch.Generator()
    )
    return student


def _lost(student: Student) -> float:
    """Distance from the original on the calibration text."""
    ours, truth = (answer(model, student.corpus.calibration) for model in (student.model, student.original))
    return float((ours - truth).norm() / truth.norm())


@pytest.mark.parametrize("family", ["bert", "llama", "gemma3"])
def test_each_rank_repairs_more_of_what_rounding_lost(family):
    lost = [_lost(_quantised(family))]
    for rank in (4, 16):
        student = _quantised(family)
        notes = LowRankCorrection(rank=rank).apply(student, generator=torch.Generator())
        assert len(notes["layers"]) >= 12
        assert notes["uncorrected"] == []
        assert all(note["relative_error"] < note["error_before"] for note in notes["layers"].values())
        lost.append(_lost(student))
    assert lost == sorted(lost, reverse=True)
    assert lost[2] < 0.7 * lost[0]


def test_the_path_beside_a_layer_of_full_rank_gives_its_whole_target_back():
    student = _quantised("llama", targets="*layers.0.self_attn.q_proj", anchor=0)
    notes = LowRankCorrection(rank=32).apply(student, generator=torch.Generator())
    (note,) = notes["layers"].values()
    assert note["relative_error"] < 1e-6 < note["error_before"]
    layer = student.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, CorrectedLinear)


def test_all_that_is_planned_is_made_where_writers_are_normalised():
    student = _quantised("gemma3")
    planned = LowRankCorrection(rank=4).plan(student.model)
    LowRankCorrection(rank=4).apply(student, generator=torch.Generator())
    assert [edit for edit in student.edits if edit.kind == "add_correction"] == planned


@pytest.mark.parametrize("writer", ["self_attn.o_proj", "mlp.down_proj"])
def test_a_writer_that_is_normalised_before_the_stream_gets_its_original_weight_back(writer):
    """Its target cannot be read from the stream."""
    student = _quantised("gemma3")
    notes = LowRankCorrection(rank=32, targets=f"*{writer}").apply(student, generator=torch.Generator())
    assert len(notes["layers"]) == 2
    for name, note in notes["layers"].items():
        layer = student.model.get_submodule(name)
        assert isinstance(layer, CorrectedLinear)
        got = layer.base.dequantize() + layer.expand.weight @ layer.reduce.weight
        torch.testing.assert_close(got, student.original.get_submodule(name).weight, atol=1e-4, rtol=1e-4)
        assert note["relative_error"] < 1e-5 < note["error_before"]


def test_after_dropped_blocks_that_weight_is_the_one_of_the_block_it_was():
    student = tiny_student("gemma3")
    PruneDepth(blocks=[1]).apply(student, generator=torch.Generator())
    Quantize(bits=3, group_size=32, embeddings=None, anchor=0).apply(student, generator=torch.Generator())
    LowRankCorrection(rank=32, targets="*down_proj").apply(student, generator=torch.Generator())
    layer = student.model.get_submodule("model.layers.0.mlp.down_proj")
    got = layer.base.dequantize() + layer.expand.weight @ layer.reduce.weight
    torch.testing.assert_close(got, student.original.model.layers[1].mlp.down_proj.weight, atol=1e-4, rtol=1e-4)


def test_a_writers_factor_has_no_counterpart_there_and_is_listed():
    student = tiny_student("gemma3")
    LowRank(rank=16, targets="*down_proj", pivot=False).apply(student, generator=torch.Generator())
    Quantize(bits=4, group_size=16).apply(student, generator=torch.Generator())
    step = LowRankCorrection(rank=2, targets="*down_proj*")
    assert step.plans_at_most
    assert len(step.plan(student.model)) == 2
    notes = step.apply(student, generator=torch.Generator())
    assert notes == {"layers": {}, "uncorrected": [f"model.layers.{i}.mlp.down_proj.expand" for i in range(2)]}


def test_a_path_costs_the_bytes_of_its_factors():
    student = _quantised("llama")

    def held() -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in student.model.state_dict().values())

    before = held()
    LowRankCorrection(rank=3, targets="*gate_proj").apply(student, generator=torch.Generator())
    assert held() - before == 2 * 4 * 3 * (32 + 64)


def test_biases_stay_exact_in_the_mean():
    student = _quantised("bert", targets="*layer.0.attention.self.query")
    LowRankCorrection(rank=2).apply(student, generator=torch.Generator())
    name = "encoder.layer.0.attention.self.query"
    with torch.no_grad():
        rows = [torch.tensor([row]) for row in student.corpus.calibration.rows]
        x = torch.cat([student.model.embeddings(input_ids=row)[0] for row in rows])
        now, was = (m.get_submodule(name)(x).mean(0) for m in (student.model, student.original))
    torch.testing.assert_close(now, was, atol=1e-4, rtol=1e-4)


def test_first_factors_have_no_counterpart_and_stay():
    student = tiny_student("bert")
    LowRank(rank=16, targets="*intermediate*", pivot=False).apply(student, generator=torch.Generator())
    Quantize(bits=4, group_size=16).apply(student, generator=torch.Generator())
    notes = LowRankCorrection(rank=2, targets="*intermediate*").apply(student, generator=torch.Generator())
    assert set(notes["layers"]) == {f"encoder.layer.{i}.intermediate.dense.expand" for i in range(2)}


def test_it_needs_integers_a_rank_that_fits_and_no_path_yet():
    with pytest.raises(CompressKitError, match="there is nothing to correct"):
        LowRankCorrection().plan(tiny("bert"))
    student = _quantised("bert")
    with pytest.raises(CompressKitError, match="rank 40 is more than 12 layers have") as caught:
        LowRankCorrection(rank=40).plan(student.model)
    assert "use rank: 32 or less" in str(caught.value)
    LowRankCorrection(rank=2).apply(student, generator=torch.Generator())
    with pytest.raises(CompressKitError, match="corrected already"):
        LowRankCorrection(rank=2).plan(student.model)


def test_a_corrected_student_is_exported_as_two_more_products_a_layer(tmp_path):
    student = quantised_student("bert", bits=4, group_size=16, targets="*layer.0.attention.self.query")
    LowRankCorrection(rank=2).apply(student, generator=torch.Generator())
    entry = OnnxExport(**FAST).write(student, tmp_path / "onnx")
    assert entry["parity"]["relative_error"] <= 1e-5
    assert entry["operators"]["com.microsoft::MatMulNBits"] == 1
