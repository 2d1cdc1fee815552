"""The plug-in: a student of any architecture reloads, whatever its `_init_weights` reaches for."""

import copy

import pytest
import torch
from families import answer, student_of
from transformers import AutoModel, ModernBertConfig

from compresskit.passes.low_rank import LowRank
from compresskit.passes.quantize import Quantize
from compresskit.student import load_student_model, needs_plugin, save_student
from compresskit.surgery.edits import MakeLowRank
from compresskit.surgery.plugin import _INSERTED


@pytest.fixture
def modernbert():
    """ModernBERT: its `_init_weights` reaches from a block into its children's weights."""
    config = ModernBertConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        local_attention=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return student_of(AutoModel.from_config(copy.deepcopy(config)).eval())


@pytest.mark.parametrize(
    "one",
    [
        LowRank(keep=0.6, round_to=4),
        Quantize(bits=4, group_size=16, embeddings=8),
        Quantize(bits=8, act="int8", group_size="channel", embeddings=4),
    ],
    ids=["low_rank", "quantize", "int8"],
)
def test_a_student_whose_blocks_initialise_their_children_reloads_bit_identically(one, modernbert, tmp_path):
    one.apply(modernbert, generator=torch.Generator().manual_seed(0))
    save_student(modernbert, tmp_path)
    assert needs_plugin(tmp_path)
    model, edits = load_student_model(tmp_path, "feature-extraction")
    assert edits == modernbert.edits
    assert torch.equal(answer(model), answer(modernbert.model))
    expected, loaded = modernbert.model.state_dict(), model.state_dict()
    assert expected.keys() == loaded.keys()
    assert all(torch.equal(expected[name], loaded[name]) for name in expected)


def test_nothing_that_stands_in_for_a_weight_outlives_loading(modernbert, tmp_path):
    names = [name for name, module in modernbert.model.named_modules() if name.endswith("Wqkv")]
    for name in names:
        modernbert.edit(MakeLowRank(targets=(name,), rank=4, bias=False))
    save_student(modernbert, tmp_path)
    model, _ = load_student_model(tmp_path, "feature-extraction")
    inserted = [module for module in model.modules() if isinstance(module, _INSERTED)]
    assert len(inserted) == len(names) == 2
    assert not any({"weight", "bias"} & vars(module).keys() for module in inserted)
