"""The bench of widths: shares that leave what was asked, and methods that say what they are."""

import argparse

import pytest
from families import tiny_student
from tool_modules import loaded_tool

from compresskit.errors import CompressKitError
from compresskit.passes.prune_width import PruneWidth
from compresskit.surgery.sites import find_anatomy, find_blocks


@pytest.fixture(scope="module")
def methods():
    with loaded_tool("methods_width") as module:
        yield module


def linear_weights(model):
    return sum(model.get_submodule(name).weight.numel() for name in find_anatomy(model).linears())


def matrix_weights(model):
    return sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)


@pytest.mark.parametrize("parts", [["ffn"], ["ffn", "heads"]])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_what_stays_of_the_block_linears_is_what_was_asked(methods, family, parts):
    student = tiny_student(family)
    before = linear_weights(student.model)
    shares = methods.kept_shares(student, 0.75, parts)
    assert set(shares) == (set(parts) if family == "bert" else {"ffn"}), "of two key/value groups 0.75 keeps both"
    student, _ = methods.compress(student, "flap-ls-uniform", 0.75, 0, argparse.Namespace(parts=parts))
    assert linear_weights(student.model) / before == pytest.approx(0.75, abs=0.05)


def test_whole_blocks_and_neurons_together_leave_what_was_asked(methods):
    options = argparse.Namespace(parts=["ffn"])
    for method, blocks, kept in (("depth", 1, 0.5), ("mix", 1, 0.4)):
        student = tiny_student("bert")
        student, said = methods.compress(student, method, kept, 0, options)
        assert len(find_blocks(student.model)) == blocks
        assert ("score" in said) == (method == "mix")
        assert linear_weights(student.model) / linear_weights(student.original) == pytest.approx(kept, abs=0.05)


def test_neurons_and_ranks_together_leave_what_was_asked(methods):
    student = tiny_student("llama")
    student, said = methods.compress(student, "rank", 0.6, 0, argparse.Namespace(parts=["ffn"]))
    assert said["keep"]["ffn"] < 1
    assert said["low_rank"]["keep"] == pytest.approx(0.75)
    gone = matrix_weights(student.original) - matrix_weights(student.model)
    assert 1 - gone / linear_weights(student.original) == pytest.approx(0.6, abs=0.05)


def test_every_score_repair_and_allocation_is_a_method_with_valid_options(methods):
    others = {"depth", "mix", "rank", "torch-pruning"}
    assert len(methods.METHODS.keys() - others) == 7 * 4 * 2
    for name, said in methods.METHODS.items():
        if name not in others:
            PruneWidth.model_validate({"keep": 0.5, **said})
    assert set(methods.QUICK) <= set(methods.METHODS)


def test_shares_that_cannot_be_kept_are_refused(methods):
    with pytest.raises(CompressKitError, match="cannot be kept by cutting ffn"):
        methods.kept_shares(tiny_student("bert"), 0.1, ["ffn"])


def test_torch_pruning_is_not_given_grouped_queries(methods, monkeypatch):
    options = argparse.Namespace(parts=["ffn"], blocks=0, model="m", task="t")
    monkeypatch.setattr(methods.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(CompressKitError, match="does not end on grouped-query attention"):
        methods.compress(tiny_student("llama"), "torch-pruning", 0.75, 0, options)
    monkeypatch.setattr(methods.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CompressKitError, match="not installed"):
        methods.compress(tiny_student("bert"), "torch-pruning", 0.75, 0, options)
