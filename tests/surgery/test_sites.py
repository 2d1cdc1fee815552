"""Blocks, sites, attentions and FFNs are found by structure."""

import pytest
import torch
from families import FAMILIES, OTHERS, tiny
from transformers import AutoModel, AutoModelForCausalLM

from compresskit.errors import CompressKitError
from compresskit.passes.low_rank import LowRank
from compresskit.surgery.edits import replay
from compresskit.surgery.sites import find_anatomy, select


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_has_one_attention_and_one_ffn_of_the_configured_widths(family):
    anatomy = find_anatomy(tiny(family))
    kv_heads = getattr(FAMILIES[family], "num_key_value_heads", None) or 4
    assert len(anatomy.blocks) == 2
    assert [(a.block, a.heads, a.kv_heads, a.head_dim) for a in anatomy.attentions] == [
        (0, 4, kv_heads, 8),
        (1, 4, kv_heads, 8),
    ]
    assert [(f.block, f.neurons) for f in anatomy.feed_forwards] == [(0, 64), (1, 64)]
    gated = len(anatomy.feed_forwards[0].inputs) == 2
    assert gated == (family in ("llama", "qwen3", "mistral", "gemma3"))


@pytest.mark.parametrize("family", FAMILIES)
def test_anatomy_on_the_meta_device_is_that_of_the_model_with_weights(family):
    model = tiny(family)
    with torch.device("meta"):
        empty = (AutoModelForCausalLM if hasattr(model, "lm_head") else AutoModel).from_config(FAMILIES[family])
    assert find_anatomy(empty) == find_anatomy(model)


def test_a_padding_token_does_not_keep_a_model_without_values_from_being_seen():
    config = OTHERS["gpt2"]
    assert config.pad_token_id == 0
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    assert find_anatomy(empty) == find_anatomy(tiny("gpt2"))
    assert "warn_if_padding_and_no_attention_mask" not in vars(empty.transformer)


def test_attention_and_ffn_outputs_write_the_stream_and_the_rest_does_not():
    anatomy = find_anatomy(tiny("llama"))
    writers = [name for site in anatomy.sites if site.writes_stream for name in site.linears]
    assert [name.rsplit(".", 1)[1] for name in writers] == ["o_proj", "down_proj"] * 2


def test_factors_are_sites_of_their_own_and_the_last_one_writes_the_stream():
    model = tiny("llama")
    replay(LowRank(keep=0.5, round_to=4, pivot=False).plan(model), model)
    sites = find_anatomy(model, factors=True).sites
    assert sites[0].linears == ("model.layers.0.self_attn.q_proj.reduce",)
    writers = [site.linears[0] for site in sites if site.writes_stream]
    assert writers[:2] == ["model.layers.0.self_attn.o_proj.expand", "model.layers.0.mlp.down_proj.expand"]
    assert len(find_anatomy(model).feed_forwards) == 2, "the layers themselves are still seen as an FFN"


def test_a_glob_that_matches_nothing_names_a_close_one():
    names = find_anatomy(tiny("llama")).linears()
    with pytest.raises(CompressKitError, match="matches no module") as caught:
        select(names, "model.layers.*.mpl.*")
    assert "mlp" in str(caught.value.fix)


def test_a_model_without_blocks_is_refused():
    model = tiny("bert")
    model.encoder.layer = torch.nn.ModuleList()
    with pytest.raises(CompressKitError, match="no repeated blocks"):
        find_anatomy(model)
