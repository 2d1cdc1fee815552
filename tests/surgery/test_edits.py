"""Edits: slices equal masks, replay gives the same shapes, and nothing outside the model is reached."""

import pytest
import torch
from families import FAMILIES, answer, tiny
from pydantic import ValidationError
from transformers import AutoModel, AutoModelForCausalLM

from compresskit.errors import CompressKitError
from compresskit.passes.low_rank import LowRank
from compresskit.passes.prune_width import PruneWidth
from compresskit.passes.quantize import Quantize
from compresskit.surgery.cuts import AddBias, PruneFusedHeads, PruneHeads, PruneNeurons
from compresskit.surgery.edits import (
    EDITS,
    MakeLowRank,
    get_module,
    read_ranges,
    replay,
    write_ranges,
)
from compresskit.surgery.provenance import Provenance
from compresskit.surgery.sites import find_anatomy


@pytest.mark.parametrize("indices", [[0], [0, 1, 2, 7], [3, 5, 9], list(range(100))])
def test_ranges_round_trip(indices):
    assert read_ranges(write_ranges(indices)) == indices


@pytest.mark.parametrize(
    "text", ["", "3-1", "5,4", "a", "1,1", "-1", "0-", "0-2,2", "0-1-2", "1_0", "+1", " 1", "1\n", "9" * 40]
)
def test_ranges_that_are_not_ascending_are_refused(text):
    with pytest.raises(ValueError):
        read_ranges(text)


def test_ranges_are_bounded_before_they_are_expanded():
    for text in ("0-99999999999", "5,99999999999"):
        with pytest.raises(CompressKitError, match="reach 99999999999, and there are at most 1048576"):
            read_ranges(text)
        with pytest.raises(CompressKitError, match="reach 99999999999"):
            EDITS.parse({"kind": "prune_neurons", "inputs": ["up"], "output": "down", "keep": text})
    assert read_ranges("0-7", limit=8) == list(range(8))
    with pytest.raises(CompressKitError, match=r"'0-8' reach 8, and there are at most 8 \(counted from 0\)"):
        read_ranges("0-8", limit=8)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_neurons_and_heads_that_the_layer_lacks_cannot_be_kept(device):
    model = tiny("llama").to(device)
    anatomy = find_anatomy(model)
    ffn, attention = anatomy.feed_forwards[0], anatomy.attentions[0]
    names = {name: getattr(attention, name) for name in ("module", "query", "key", "value", "output")}
    edits = (
        PruneNeurons(inputs=ffn.inputs, output=ffn.output, keep="0-64"),
        PruneHeads(**names, head_dim=8, keep="0-5", keep_kv="0-1"),
        PruneHeads(**names, head_dim=8, keep="0-3", keep_kv="2"),
        PruneHeads(**names, head_dim=10**12, keep="0", keep_kv="0"),
    )
    before = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for edit in edits:
        with pytest.raises(CompressKitError, match="and there are at most"):
            edit.apply(model)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == before
    with pytest.raises(ValidationError):
        PruneHeads(**names, head_dim=0, keep="0", keep_kv="0")


@pytest.mark.parametrize("family", FAMILIES)
def test_sliced_neurons_equal_masked_neurons(family):
    model, masked = tiny(family), tiny(family)
    ffn = find_anatomy(model).feed_forwards[1]
    keep = [i for i in range(64) if i % 3]
    with torch.no_grad():
        drop = torch.ones(64)
        drop[keep] = 0
        masked.get_submodule(ffn.output).weight.mul_(1 - drop)
    PruneNeurons(inputs=ffn.inputs, output=ffn.output, keep=write_ranges(keep)).apply(model)
    assert model.get_submodule(ffn.output).in_features == len(keep)
    torch.testing.assert_close(answer(model), answer(masked), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_sliced_heads_equal_masked_heads(family):
    model, masked = tiny(family), tiny(family)
    attention = find_anatomy(model).attentions[0]
    per_group = attention.heads // attention.kv_heads
    groups = [g for g in range(attention.kv_heads) if g != 0]
    heads = [g * per_group + q for g in groups for q in range(per_group)]
    edit = PruneHeads(
        module=attention.module,
        query=attention.query,
        key=attention.key,
        value=attention.value,
        output=attention.output,
        head_dim=8,
        keep=write_ranges(heads),
        keep_kv=write_ranges(groups),
    )
    with torch.no_grad():
        mask = torch.zeros(32)
        mask[edit.rows()[0]] = 1
        masked.get_submodule(attention.output).weight.mul_(mask)
    edit.apply(model)
    torch.testing.assert_close(answer(model), answer(masked), atol=1e-5, rtol=0)
    assert find_anatomy(model).attentions[0].heads == len(heads)


@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_edits_give_the_shapes_of_the_edited_model(family):
    model = tiny(family)
    edits = []
    for step in (
        LowRank(keep=0.6, targets="*", round_to=4, on_misfit="keep"),
        PruneWidth.model_validate({"keep": {"ffn": 0.5, "heads": 0.5}, "round_to": 16}),
        Quantize(bits=8, group_size=16, on_misfit="keep"),
    ):
        planned = step.plan(model)
        assert planned
        replay(planned, model)
        edits += planned
    auto = AutoModelForCausalLM if hasattr(model, "lm_head") else AutoModel
    with torch.device("meta"):
        empty = auto.from_config(FAMILIES[family])
    replay([EDITS.parse(edit.model_dump(mode="json")) for edit in edits], empty)
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in empty.state_dict().items()}
    assert shapes == {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc", "encoder.__class__", "encoder..layer", ""])
def test_names_that_are_no_module_paths_are_refused(name):
    with pytest.raises(CompressKitError, match="is not a module name"):
        get_module(tiny("bert"), name)


def test_a_module_that_is_not_there_is_named():
    with pytest.raises(CompressKitError, match=r"no module 'encoder\.layers'"):
        MakeLowRank(targets=("encoder.layers",), rank=4, bias=True).apply(tiny("bert"))


def test_unknown_keys_of_an_edit_are_refused():
    with pytest.raises(ValidationError, match="Extra inputs"):
        EDITS.parse({"kind": "low_rank", "targets": ["a"], "rank": 2, "bias": False, "import": "os"})


def test_an_edit_that_names_a_layer_twice_is_refused():
    with pytest.raises(ValidationError, match="up is listed twice"):
        PruneNeurons(inputs=("up", "up"), output="down", keep="0")
    with pytest.raises(ValidationError, match="key is listed twice"):
        PruneHeads(module="m", query="query", key="key", value="key", output="o", head_dim=8, keep="0", keep_kv="0")


def test_heads_that_cannot_share_what_is_kept_of_keys_and_values_are_refused():
    names = {name: name for name in ("module", "query", "key", "value", "output")}
    with pytest.raises(ValidationError, match="3 kept heads cannot share 2 key/value heads evenly"):
        PruneHeads(**names, head_dim=8, keep="0-2", keep_kv="0-1")


def test_fused_heads_are_cut_in_queries_keys_and_values():
    model = tiny("gpt2")
    attention = find_anatomy(model).attentions[0]
    assert attention.fused
    layer = model.get_submodule(attention.query)
    before, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    said = {"module": attention.module, "projection": attention.query, "output": attention.output, "head_dim": 8}
    edit = PruneFusedHeads(**said, heads=4, keep="1,3")
    edit.apply(model)
    rows = [32 * third + 8 * head + i for third in range(3) for head in (1, 3) for i in range(8)]
    assert torch.equal(layer.weight, before[:, rows])
    assert torch.equal(layer.bias, bias[rows])
    assert Provenance([edit]).kept[attention.query].tolist() == rows
    assert find_anatomy(model).attentions[0].heads == 2
    with pytest.raises(CompressKitError, match="not 4 heads of 8"):
        edit.apply(model)


def test_a_bias_is_added_once_and_only_to_linears():
    model = tiny("llama")
    name = find_anatomy(model).feed_forwards[0].output
    edit = AddBias(targets=(name,))
    edit.apply(model)
    layer = model.get_submodule(name)
    assert layer.bias.tolist() == [0.0] * 32
    torch.nn.init.ones_(layer.bias)
    edit.apply(model)
    assert layer.bias.tolist() == [1.0] * 32
    with pytest.raises(CompressKitError, match="cannot add a bias to a layer of type Embedding"):
        AddBias(targets=("model.embed_tokens",)).apply(model)
