"""The bench of distillation: methods that parse and say what they are, and the share of a gap that was closed."""

import math

import pytest
from tool_modules import loaded_tool
from transformers import AutoModel, AutoModelForCausalLM

from compresskit.data import Sequences
from compresskit.distill.losses import LOSSES


@pytest.fixture(scope="module")
def methods():
    with loaded_tool("methods_distill") as module:
        yield module


@pytest.mark.parametrize("task", ["text-generation", "feature-extraction"])
def test_every_method_suits_the_models_that_it_is_for_and_uses_all_its_steps(
    task, methods, tiny_llama_folder, tiny_bert_folder
):
    decoder = task == "text-generation"
    folder, auto = (tiny_llama_folder, AutoModelForCausalLM) if decoder else (tiny_bert_folder, AutoModel)
    model, kinds = auto.from_pretrained(folder), set()
    for name, method in methods.methods_of(task).items():
        passes = method.distills(10, {"batch_size": 4})
        assert sum(one.steps for one in passes) == (0 if name == "none" else 10)
        for one in passes:
            assert one.plan(model) == []
            assert one.batch_size == 4
            kinds |= {loss.kind for loss in one.losses or ()}
    (staged,) = methods.methods_of(task)["blocks-first"].distills(10, {})
    assert staged.block_steps == 3
    assert kinds == set(LOSSES) - (set() if decoder else {"kl"})
    assert set(methods.QUICK) & set(methods.methods_of(task)) > {"none", "default"}


def test_the_gap_is_one_at_the_original_and_nothing_before(methods):
    assert methods.gap_closed(80.0, 80.0, 20.0) == 0
    assert methods.gap_closed(80.0, 20.0, 20.0) == pytest.approx(1)
    assert methods.gap_closed(80.0, 40.0, 20.0) == pytest.approx(math.log(2) / math.log(4))
    assert methods.gap_closed(20.0, 19.0, 20.0) == 0, "there was no gap"


def test_half_of_the_windows_are_continued_by_the_original_from_their_first_tokens(methods, tiny_llama_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder).eval()
    training = Sequences([[5 + (i + j) % 60 for j in range(24)] for i in range(6)] + [[7] * 8], 0)
    found = [methods.sampled_text(model, training, seed=seed) for seed in (0, 0, 1)]
    assert found[0].rows == found[1].rows != found[2].rows
    assert found[0].rows[1::2] == training.rows[1::2]
    assert found[0].rows[6] == [7] * 8, "too short to be continued"
    for i in (0, 2, 4):
        assert len(found[0].rows[i]) == 24
        assert found[0].rows[i][:16] == training.rows[i][:16]
        assert found[0].rows[i] != training.rows[i]
