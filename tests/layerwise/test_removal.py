"""What goes first: scores against their definitions, and the order when each removal changes the others' scores."""

import copy

import pytest
import torch
from deep_models import BLOCKS, deep
from families import random_sequences, student_of
from torch.nn import functional as F

from compresskit.layerwise.answer import divergence, read_answer
from compresskit.layerwise.removal import Divergences, Unit, choose_removals, influence, without
from compresskit.models import answer_kind
from compresskit.surgery.depth_edits import DropBlocks, EmptyLinears, find_stack
from compresskit.surgery.sites import find_anatomy

TEXT = random_sequences(12, seed=1)


def blocks_of(model):
    stack = find_stack(model)
    return [f"{stack}.{number}" for number in range(BLOCKS)]


def parts_of(model, unit):
    if unit == "layer":
        return [Unit(number, name) for number, name in enumerate(blocks_of(model))]
    anatomy = find_anatomy(model)
    if unit == "attention":
        return [Unit(a.block, a.output, (a.query, a.key, a.value, a.output)) for a in anatomy.attentions]
    return [Unit(f.block, f.output, (*f.inputs, f.output)) for f in anatomy.feed_forwards]


def edited(model, unit):
    """The model with the unit taken out for good."""
    model = copy.deepcopy(model)
    if unit.linears:
        EmptyLinears(targets=unit.linears).apply(model)
    else:
        rest = ",".join(str(number) for number in range(BLOCKS) if number != unit.block)
        DropBlocks(stack=find_stack(model), keep=rest).apply(model)
    return model


@pytest.mark.parametrize("name", ["bert", "llama", "gemma3", "gpt2", "t5"])
def test_influence_is_one_minus_the_mean_cosine_of_what_a_block_reads_and_gives(name):
    model = deep(name)
    reads, gives, real = {}, {}, []
    for number, block in enumerate(blocks_of(model)):

        def keep(_module, args, kwargs, output, number=number):
            read = kwargs.get("hidden_states", args[0] if args else None)
            reads.setdefault(number, []).append(read[real[-1]])
            gives.setdefault(number, []).append((output if isinstance(output, torch.Tensor) else output[0])[real[-1]])

        model.get_submodule(block).register_forward_hook(keep, with_kwargs=True)
    for batch in TEXT.batches(5):
        real.append(batch["attention_mask"].bool())
        with torch.no_grad():
            model(**batch, use_cache=False) if name in ("llama", "gemma3", "gpt2") else model(**batch)
    model = deep(name)
    found = influence(model, blocks_of(model), list(TEXT.batches(5)), parts_of(model, "layer"))
    for unit, score in found.items():
        a, b = torch.cat(reads[unit.block]).double(), torch.cat(gives[unit.block]).double()
        assert score == pytest.approx(float((1 - F.cosine_similarity(a, b, dim=-1)).mean()), abs=1e-6)


@pytest.mark.parametrize("unit", ["attention", "ffn"])
@pytest.mark.parametrize("name", ["bert", "llama", "gemma3"])
def test_influence_of_a_branch_compares_its_block_with_and_without_it(name, unit):
    model = deep(name)
    unit = parts_of(model, unit)[0]
    batch = next(TEXT.batches(12))
    given = []
    for one in (model, edited(model, unit)):
        handle = one.get_submodule(blocks_of(one)[0]).register_forward_hook(lambda _m, _a, out: given.append(out))
        with torch.no_grad():
            one(**batch)
        handle.remove()
    real = batch["attention_mask"].bool()
    with_it, less = (out if isinstance(out, torch.Tensor) else out[0] for out in given)
    expected = float((1 - F.cosine_similarity(with_it[real].double(), less[real].double(), dim=-1)).mean())
    assert influence(model, blocks_of(model), [batch], [unit])[unit] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("unit", ["layer", "attention", "ffn"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_trial_is_the_divergence_of_the_model_with_the_part_taken_out(name, unit):
    model = deep(name)
    batch = next(TEXT.batches(12))
    found = Divergences(model, blocks_of(model), [batch])(parts_of(model, unit))
    with torch.no_grad():
        whole = read_answer(model, batch)
        for unit, score in found.items():
            expected = divergence(whole, read_answer(edited(model, unit), batch), kind=answer_kind(model))
            assert score == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["kl", "influence"])
def test_after_each_removal_the_others_are_scored_without_it_and_nothing_is_left_changed(kind):
    model = deep("llama")
    blocks, batches = blocks_of(model), list(TEXT.batches(6))
    before = {name: vars(module).copy() for name, module in model.named_modules()}

    def score(units):
        return trials(units) if kind == "kl" else influence(model, blocks, batches, units)

    trials = Divergences(model, blocks, batches)
    units = parts_of(model, "layer")
    removals = choose_removals(model, units, 2, score, label="t")
    first, second = removals
    assert {name: vars(module) for name, module in model.named_modules()} == before
    trials = Divergences(model, blocks, batches)
    scores = score(units)
    assert first.score == min(scores.values()) == scores[first.unit]
    with without(model, first.unit):
        again = score([unit for unit in units if unit != first.unit])
    assert second.score == min(again.values()) == again[second.unit]
    assert kind == "influence" or again != {unit: scores[unit] for unit in again}


def test_dead_blocks_go_first_and_lose_nothing():
    model = deep("llama")
    with torch.no_grad():
        for number in (1, 3):
            block = model.model.layers[number]
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    trials = Divergences(model, blocks_of(model), list(TEXT.batches(6)))
    removals = choose_removals(model, parts_of(model, "layer"), 3, trials, label="t")
    assert [removal.unit.block for removal in removals][:2] == [1, 3]
    assert [removal.score for removal in removals[:2]] == [0.0, 0.0]
    assert removals[2].score > 0.01


def test_padding_does_not_count():
    model = deep("bert")
    units = parts_of(model, "layer")
    together = influence(model, blocks_of(model), list(TEXT.batches(12)), units)
    alone = influence(model, blocks_of(model), list(TEXT.batches(1)), units)
    assert list(together.values()) == pytest.approx(list(alone.values()), abs=1e-5)


def test_pixels_have_no_padding():
    student = student_of(deep("vit"))
    batches = list(student.corpus.calibration.batches(8))
    units = parts_of(student.model, "layer")
    scores = influence(student.model, blocks_of(student.model), batches, units)
    assert all(0 < score < 2 for score in scores.values())
