"""Bits by trials under one budget."""

import re

import pytest
import torch
from families import answer, tiny, tiny_student
from pydantic import ValidationError

from compresskit.errors import CompressKitError
from compresskit.evaluate import state_dict_bytes
from compresskit.layers.int8_linear import Int8Linear
from compresskit.layers.quant_linear import QuantLinear
from compresskit.passes import quantize_bits
from compresskit.passes.quantize import Quantize
from compresskit.student import Student
from compresskit.surgery.edits import replay

AUTO = {"bits": "auto", "group_size": 16, "embeddings": None}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESSKIT_CACHE", str(tmp_path))


def _done(**options: object) -> tuple[Student, dict]:
    student = tiny_student("llama")
    notes = Quantize.model_validate(AUTO | options).apply(student, generator=torch.Generator())
    return student, notes


def _bits(student: Student) -> dict[str, int]:
    return {name: m.bits for name, m in student.model.named_modules() if isinstance(m, QuantLinear)}


def _mean_bits(student: Student) -> float:
    layers = [m for m in student.model.modules() if isinstance(m, QuantLinear)]
    weights = [layer.in_features * layer.out_features for layer in layers]
    return sum(w * layer.bits for w, layer in zip(weights, layers, strict=True)) / sum(weights)


def test_the_mean_is_kept_and_the_table_says_why():
    student, notes = _done(mean_bits=6.0)
    assert 5 < _mean_bits(student) <= 6
    assert set(_bits(student).values()) == {4, 8}
    table = notes["bits"]
    assert len(table) == 8  # four input sites in each of two blocks
    assert all(0 < row["kl at 8 bits"] < row["kl at 4 bits"] for row in table.values())
    for names, row in table.items():
        assert {_bits(student)[name] for name in names.split(" + ")} == {row["chosen"]}


def test_integer_products_of_both_widths_share_a_budget_of_bytes():
    """8 bits have one scale a row, 4 bits groups; what each takes is what its layers hold."""
    options = {"act": "int8", "embeddings": None}
    sizes = {}
    for bits, size in ((4, 16), (8, "channel")):
        student = tiny_student("llama")
        Quantize(bits=bits, group_size=size, **options).apply(student, generator=torch.Generator())
        sizes[bits] = state_dict_bytes(student.model)
    budget = (sizes[4] + sizes[8]) // 2
    student, notes = _done(budget_bytes=budget, method="gptq", **options)
    layers = {name: m for name, m in student.model.named_modules() if isinstance(m, Int8Linear)}
    assert {(m.bits, m.groups == 1) for m in layers.values()} == {(4, False), (8, True)}
    assert 0.9 * budget < state_dict_bytes(student.model) <= budget
    assert all(
        layers[name].bits == row["chosen"] for names, row in notes["bits"].items() for name in names.split(" + ")
    )
    assert all(0 < row["kl at 8 bits"] < row["kl at 4 bits"] for row in notes["bits"].values())


def test_columns_that_no_group_divides_are_told_before_any_trial(monkeypatch):
    monkeypatch.setattr(quantize_bits, "_try", lambda *_: pytest.fail("a trial"))
    with pytest.raises(CompressKitError, match="group size 64 does not divide the columns"):
        _done(mean_bits=6.0, act="int8", group_size=64)


def test_more_bits_lose_less():
    lost = []
    for mean in (4.0, 6.0, 8.0):
        student, _ = _done(mean_bits=mean)
        lost.append(float((answer(student.model) - answer(student.original)).norm()))
    assert lost == sorted(lost, reverse=True)


def test_the_whole_student_fits_into_a_budget_of_bytes():
    sizes = {}
    for bits in (4, 8):
        student = tiny_student("llama")
        Quantize(bits=bits, group_size=16, embeddings=None).apply(student, generator=torch.Generator())
        sizes[bits] = state_dict_bytes(student.model)
    budget = (sizes[4] + sizes[8]) // 2
    student, _ = _done(budget_bytes=budget)
    assert 0.9 * budget < state_dict_bytes(student.model) <= budget


def test_a_budget_of_bytes_copies_no_tensor_of_the_student(monkeypatch):
    model = tiny("llama")
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    float_tensors = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    copies = []
    copy_parameter, copy_tensor = torch.nn.Parameter.__deepcopy__, torch.Tensor.__deepcopy__
    for kind, plain in ((torch.nn.Parameter, copy_parameter), (torch.Tensor, copy_tensor)):
        monkeypatch.setattr(
            kind, "__deepcopy__", lambda one, memo, plain=plain: (copies.append(id(one)), plain(one, memo))[1]
        )
    assert Quantize.model_validate(AUTO | {"budget_bytes": 60_000}).plan(model)
    assert not float_tensors & set(copies)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before


def test_an_override_is_no_part_of_the_choice():
    student, notes = _done(mean_bits=4.0, overrides={"*v_proj": {"bits": 8}})
    bits = _bits(student)
    assert {width for name, width in bits.items() if name.endswith("v_proj")} == {8}
    assert {width for name, width in bits.items() if not name.endswith("v_proj")} == {4}
    assert not any("v_proj" in names for names in notes["bits"])


def test_a_budget_that_has_nothing_to_decide_is_refused():
    said = {"mean_bits": 6.0, "overrides": {"*": {"bits": 4}}}
    with pytest.raises(CompressKitError, match="bits: auto has nothing to choose"):
        Quantize.model_validate(AUTO | said).plan(tiny("llama"))


def test_a_width_that_is_said_twice_is_one():
    assert Quantize.model_validate(AUTO | {"mean_bits": 6.0, "widths": [8, 4, 8]}).widths == (8, 4)


def test_another_budget_needs_no_other_trial(monkeypatch):
    _done(mean_bits=6.0)

    def fail(*_: object) -> float:
        raise AssertionError("tried again")

    monkeypatch.setattr(quantize_bits, "_try", fail)
    assert _mean_bits(_done(mean_bits=4.0)[0]) == 4
    with pytest.raises(AssertionError, match="tried again"):
        _done(mean_bits=6.0, group_size=32)


def test_budgets_that_the_smallest_width_exceeds_are_refused_from_shapes_alone():
    with pytest.raises(ValidationError, match=r"mean_bits 3\.5 is below the least of widths; say mean_bits: 4 or more"):
        Quantize.model_validate(AUTO | {"mean_bits": 3.5})
    edits = Quantize.model_validate(AUTO | {"mean_bits": 3.5, "widths": [3, 4]}).plan(tiny("llama"))
    assert {edit.bits for edit in edits} == {3, 4}
    with pytest.raises(CompressKitError, match=r"take [0-9]+ bytes at 4 bits, and all else [0-9]+") as caught:
        Quantize.model_validate(AUTO | {"budget_bytes": 1000}).plan(tiny("llama"))
    found = re.search(r"say budget_bytes: ([0-9]+) or more", caught.value.fix)
    assert found is not None
    assert caught.value.where == "budget_bytes"
    least = int(found[1])
    Quantize.model_validate(AUTO | {"budget_bytes": least}).plan(tiny("llama"))
    with pytest.raises(CompressKitError, match="and all else"):
        Quantize.model_validate(AUTO | {"budget_bytes": least - 1}).plan(tiny("llama"))


def test_the_plan_spends_the_budget_as_the_choice_by_trials_does():
    student, _ = _done(mean_bits=6.0)
    planned = tiny("llama")
    replay(Quantize.model_validate(AUTO | {"mean_bits": 6.0}).plan(planned), planned)
    assert state_dict_bytes(planned) == pytest.approx(state_dict_bytes(student.model), rel=0.02)
