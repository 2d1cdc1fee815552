import copy

import pytest
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from compresskit.distill.lineage import Lineage, missing_layer
from compresskit.distill.losses import AttentionMaps, Hidden, Relation
from compresskit.distill.outputs import Inner, Maps, observe, step_weights
from compresskit.distill.teachers import LiveTeacher
from compresskit.surgery.depth_edits import DropBlocks
from compresskit.surgery.parts import heads_of, neurons_of
from compresskit.surgery.sites import find_anatomy

BATCH = {
    "input_ids": torch.tensor([[5, 9, 30, 7], [8, 6, 0, 0]]),
    "attention_mask": torch.tensor([[1] * 4, [1, 1, 0, 0]]),
}


def cut_widths(model, block, *, half=1, neurons_only=False):
    """A copy with one half of the heads and neurons of one block left, and the edits that made it."""
    student, anatomy = copy.deepcopy(model), find_anatomy(model)
    parts = [neurons_of(anatomy.feed_forwards[block], model)]
    if not neurons_only:
        parts.append(heads_of(anatomy.attentions[block], model))
    edits = [part.edit(torch.arange(len(part.groups)).chunk(2)[half]) for part in parts]
    for edit in edits:
        edit.apply(student)
    return student, edits


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1)
    return GPT2LMHeadModel(config).eval().requires_grad_(False)


@pytest.fixture(params=["tiny_bert", "tiny_llama", "gpt2"])
def original(request):
    model = gpt2() if request.param == "gpt2" else copy.deepcopy(request.getfixturevalue(request.param))
    for name, value in model.named_parameters():
        if value.ndim == 2 and "embed" not in name:
            value.data *= 10  # random weights are small: every map would be nearly even
    return model


def loss_of(loss, student, original, lineage):
    (weights,) = step_weights([BATCH["attention_mask"]])
    wants = loss.wants(student)
    teacher = LiveTeacher(original, lineage=lineage)(BATCH, [0, 1], wants)
    with torch.no_grad():
        return float(loss(observe(student, BATCH, wants), teacher, BATCH, weights))


def test_what_is_left_of_a_cut_block_is_compared_with_the_same_channels_of_the_original(original):
    student, edits = cut_widths(original, 0)
    lineage, attention = Lineage.of(edits, original), find_anatomy(student).attentions[0]
    # the first attention reads the same in both, so what it computes inside is the same where it is compared rightly
    inside = (Hidden(modules=attention.query), Relation(layer=1), AttentionMaps(layers=(1,)))
    wrong = Lineage.of(cut_widths(original, 0, half=0)[1], original)
    for loss in inside:
        rightly, wrongly = (loss_of(loss, student, original, one) for one in (lineage, wrong))
        assert rightly < 1e-9
        assert wrongly > 1e-6
    narrow, edits = cut_widths(original, 0, neurons_only=True)
    neurons = Hidden(modules=find_anatomy(narrow).feed_forwards[0].inputs[0])
    assert loss_of(neurons, narrow, original, Lineage.of(edits, original)) < 1e-10


def test_a_map_of_a_student_with_fewer_blocks_is_that_of_the_block_that_it_was(tiny_llama):
    student = copy.deepcopy(tiny_llama)
    edit = DropBlocks(stack="model.layers", keep="1")
    edit.apply(student)
    lineage = Lineage.of([edit], tiny_llama)
    (maps,) = AttentionMaps().wants(student)
    (asked,) = lineage.asked(frozenset({maps}))
    assert (maps.block, asked.block) == (0, 1)
    assert asked.query == "model.layers.1.self_attn.q_proj"
    given = LiveTeacher(tiny_llama, lineage=lineage)(BATCH, [0, 1], frozenset({maps})).inner[maps]
    own = observe(tiny_llama, BATCH, frozenset({asked})).inner[asked]
    assert torch.equal(given, own)


def test_another_teacher_is_mapped_evenly_and_its_last_block_to_the_last(tiny_bert):
    config = BertConfig.from_dict(tiny_bert.config.to_dict() | {"num_hidden_layers": 6, "hidden_size": 64})
    deeper = BertModel(config)
    lineage = Lineage.to_other(tiny_bert, deeper)
    asked = {one.module for one in lineage.asked(Relation().wants(tiny_bert))}
    assert asked == {f"encoder.layer.5.attention.self.{kind}" for kind in ("query", "key", "value")}
    assert loss_of(Relation(), tiny_bert, deeper.eval(), lineage) > 0


def test_a_layer_that_the_teacher_lacks_is_named(tiny_bert, tiny_llama):
    lineage = Lineage.to_other(tiny_bert, tiny_llama)
    found = missing_layer(lineage, Relation().wants(tiny_bert), tiny_llama)
    assert found == "encoder.layer.1.attention.self.key"
    assert missing_layer(lineage, frozenset({"hidden"}), tiny_llama) is None
    own = frozenset(
        {Inner("encoder.layer.0.attention.self.key", "x"), Maps(0, "encoder.layer.0.attention.self.query", 8)}
    )
    assert missing_layer(Lineage.of([], tiny_bert), own, tiny_bert) is None
