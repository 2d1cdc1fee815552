"""Blocks that go leave a model like one built with fewer; branches that go add nothing."""

import subprocess
import sys
from collections import Counter
from contextlib import ExitStack

import onnx
import pytest
import torch
from deep_models import BLOCKS, CONFIGS, MODERNBERT, deep
from families import FAMILIES, answer, random_model, student_of, tiny, tiny_student
from transformers import AlbertConfig, AutoModel, AutoModelForCausalLM, BartConfig, PretrainedConfig, T5Config

from compresskit.errors import CompressKitError
from compresskit.export.files import save_graph
from compresskit.export.trace import trace
from compresskit.layerwise.removal import Unit, without
from compresskit.passes.prune_width import PruneWidth
from compresskit.student import load_student_model, needs_plugin, save_student
from compresskit.surgery.cuts import PruneNeurons
from compresskit.surgery.depth_edits import DropBlocks, EmptyLinears, cut_depth, find_stack, get_stack
from compresskit.surgery.edits import EDITS, MakeLowRank, replay
from compresskit.surgery.plugin import stock_config
from compresskit.surgery.provenance import Provenance
from compresskit.surgery.sites import find_anatomy, find_blocks

LOAD_PLAIN = """
import sys, torch
from transformers import {auto}
model = {auto}.from_pretrained(sys.argv[1]).eval()
assert "compresskit" not in sys.modules
inputs = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(model(**inputs)[0], sys.argv[3])
"""
CAUSAL = [name for name, (auto, _) in CONFIGS.items() if auto is AutoModelForCausalLM]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("keep", ["0,2-3", "0", "0,3"])
def test_dropped_blocks_equal_blocks_that_hand_on_what_they_read(name, keep):
    model, masked = deep(name), deep(name)
    stack = find_stack(model)
    DropBlocks(stack=stack, keep=keep).apply(model)
    kept = Provenance([DropBlocks(stack=stack, keep=keep)]).stacks[stack]
    whole = answer(masked)
    with ExitStack() as removed:
        for number in set(range(BLOCKS)) - set(kept):
            removed.enter_context(without(masked, Unit(number, f"{stack}.{number}")))
        expected = answer(masked)
    assert len(get_stack(model, stack)) == len(kept)
    assert model.config.num_hidden_layers == len(kept)
    torch.testing.assert_close(answer(model), expected, atol=1e-5, rtol=0)
    assert not torch.allclose(answer(model), whole, atol=1e-2)
    assert torch.equal(answer(masked), whole), "outside the context nothing is removed"


@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_know_their_new_numbers_and_the_config_their_kinds(name):
    model = deep(name)
    kinds = getattr(model.config, "layer_types", None)
    stack = find_stack(model)
    DropBlocks(stack=stack, keep="0,3").apply(model)
    for number, block in enumerate(get_stack(model, stack)):
        assert {module.layer_idx for module in block.modules() if hasattr(module, "layer_idx")} <= {number}
    assert getattr(model.config, "layer_types", None) == (kinds and [kinds[0], kinds[3]])


@pytest.mark.parametrize("name", CAUSAL)
def test_generation_with_a_cache_equals_generation_without(name):
    model = deep(name)
    DropBlocks(stack=find_stack(model), keep="1-2").apply(model)
    prompt = torch.arange(10, 18)[None]
    texts = [
        model.generate(prompt, max_new_tokens=12, do_sample=False, use_cache=cached, pad_token_id=0, eos_token_id=None)
        for cached in (True, False)
    ]
    assert texts[0].shape == (1, 20)
    assert torch.equal(*texts)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_student_with_fewer_blocks_is_a_stock_checkpoint_that_answers_alike(name, tmp_path):
    student = student_of(deep(name))
    student.edit(DropBlocks(stack=find_stack(student.model), keep="0,2-3"))
    save_student(student, tmp_path)
    assert not needs_plugin(tmp_path)
    model, edits = load_student_model(tmp_path, student.task)
    assert edits == student.edits
    assert torch.equal(answer(model), answer(student.model))
    assert model.state_dict().keys() == student.model.state_dict().keys()


@pytest.mark.parametrize("name", ["bert", "gemma3"])
def test_it_loads_in_a_process_that_never_imports_compresskit(name, tmp_path):
    student = student_of(deep(name))
    student.edit(DropBlocks(stack=find_stack(student.model), keep="0-1,3"))
    save_student(student, tmp_path)
    batch = next(student.corpus.evaluation.batches(4))
    torch.save(batch, tmp_path / "in.pt")
    code = LOAD_PLAIN.format(auto="AutoModel" if name == "bert" else "AutoModelForCausalLM")
    paths = [str(tmp_path), str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    subprocess.run([sys.executable, "-c", code, *paths], check=True, timeout=300)
    with torch.no_grad():
        expected = student.model(**batch)[0]
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("first", ["depth", "width"])
@pytest.mark.parametrize("name", ["bert", "llama", "qwen3", "gemma3"])
def test_with_widths_cut_before_or_after_it_stays_stock(name, first, tmp_path):
    student = student_of(deep(name))
    keep = {"ffn": 0.5} if name == "bert" else {"ffn": 0.5, "heads": 0.5}
    drop = DropBlocks(stack=find_stack(student.model), keep="0,2-3")
    if first == "depth":
        student.edit(drop)
    PruneWidth.model_validate({"keep": keep}).apply(student, generator=torch.Generator())
    if first == "width":
        student.edit(drop)
    config = stock_config(student.original, student.edits)
    assert config is not None
    assert (config.num_hidden_layers, config.intermediate_size) == (3, 32)
    save_student(student, tmp_path)
    assert not needs_plugin(tmp_path)
    assert torch.equal(answer(load_student_model(tmp_path, student.task)[0]), answer(student.model))


def test_widths_that_are_uniform_only_in_the_blocks_that_stay_are_stock_and_others_are_not():
    model = deep("llama")
    stack = find_stack(model)

    def narrow(block):
        names = tuple(f"{stack}.{block}.mlp.{part}_proj" for part in ("gate", "up"))
        return PruneNeurons(inputs=names, output=f"{stack}.{block}.mlp.down_proj", keep="0-31")

    drop = DropBlocks(stack=stack, keep="1-3")
    assert stock_config(model, [narrow(1), narrow(2), narrow(3), drop]) is not None
    assert stock_config(model, [drop, narrow(0), narrow(1), narrow(2)]) is not None
    assert stock_config(model, [narrow(0), narrow(1), narrow(2), drop]) is None


@pytest.mark.parametrize(("keep", "stock"), [("0-2", True), ("0,2", True), ("1-3", False)])
def test_a_block_that_is_what_its_place_makes_it_needs_the_plugin_elsewhere(keep, stock, tmp_path):
    """ModernBERT's first block has no norm before its attention."""
    student = student_of(random_model(AutoModel, MODERNBERT))
    student.edit(DropBlocks(stack=find_stack(student.model), keep=keep))
    save_student(student, tmp_path)
    assert needs_plugin(tmp_path) is not stock
    model, _ = load_student_model(tmp_path, student.task)
    assert torch.equal(answer(model), answer(student.model))
    assert model.config.num_hidden_layers == len(get_stack(model, find_stack(model)))


def test_replay_on_an_empty_model_gives_the_shapes_and_numbers():
    model, empty = deep("gemma3"), random_model(AutoModelForCausalLM, CONFIGS["gemma3"][1]).to("meta")
    edits = [DropBlocks(stack="model.layers", keep="0,2-3"), DropBlocks(stack="model.layers", keep="1-2")]
    replay(edits, model)
    replay([EDITS.parse(edit.model_dump(mode="json")) for edit in edits], empty)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    assert model.config.layer_types == empty.config.layer_types == ["sliding_attention", "full_attention"]


def test_only_lists_with_one_entry_a_block_are_cut():
    config = PretrainedConfig(num_hidden_layers=3, eos_token_id=[1, 2, 3])
    config.attention_window, config.sizes, config.architectures = [4, 8, 16], [1, 2], ["a", "b", "c"]
    cut_depth(config, [0, 2], of=3)
    assert (config.num_hidden_layers, config.attention_window, config.sizes) == (2, [4, 16], [1, 2])
    assert (config.eos_token_id, config.architectures) == ([1, 2, 3], ["a", "b", "c"])


def test_the_record_says_which_block_of_the_original_each_is():
    drop = [DropBlocks(stack="model.layers", keep="0,2-5"), DropBlocks(stack="model.layers", keep="1,3-4")]
    ffn = PruneNeurons(inputs=("model.layers.2.mlp.up_proj",), output="model.layers.2.mlp.down_proj", keep="0,2")
    again = PruneNeurons(inputs=("model.layers.0.mlp.up_proj",), output="model.layers.0.mlp.down_proj", keep="1")
    found = Provenance([ffn, *drop, again])
    assert found.stacks == {"model.layers": [2, 4, 5]}
    assert found.original_name("model.layers.1.mlp.up_proj") == "model.layers.4.mlp.up_proj"
    assert found.original_name("model.norm") == "model.norm"
    assert [found.is_left(f"model.layers.{number}.x") for number in range(6)] == [False, False, True, False, True, True]
    assert found.kept["model.layers.2.mlp.up_proj"].tolist() == [2], "cuts before and after compose"
    assert found.hidden_layers("model.layers", 6) == (0, 4, 5, 6)


def test_blocks_that_there_are_not_cannot_be_kept():
    model = deep("llama")
    with pytest.raises(CompressKitError, match="reach 4, and there are at most 4"):
        DropBlocks(stack="model.layers", keep="0-4").apply(model)
    with pytest.raises(CompressKitError, match="not a list of blocks"):
        DropBlocks(stack="model.norm", keep="0").apply(model)
    assert len(model.model.layers) == BLOCKS


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (AlbertConfig(vocab_size=96, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, embedding_size=16,
                      intermediate_size=64), "no one list of the 4 blocks"),
        (T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4), "encoder and decoder"),
        (BartConfig(vocab_size=96, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                    decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64), "encoder and decoder"),
    ],
    ids=["albert", "t5", "bart"],
)  # fmt: skip
def test_shared_blocks_and_two_stacks_are_refused(config, match):
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    with pytest.raises(CompressKitError, match=match) as caught:
        find_stack(model)
    assert caught.value.fix


def branch(model, unit, block):
    anatomy = find_anatomy(model)
    if unit == "attention":
        a = anatomy.attentions[block]
        return a.output, (a.query, a.key, a.value, a.output)
    f = anatomy.feed_forwards[block]
    return f.output, (*f.inputs, f.output)


@pytest.mark.parametrize("unit", ["attention", "ffn"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_branch_equals_one_whose_last_weights_are_zero_and_reloads(family, unit, tmp_path):
    masked, student = tiny(family), tiny_student(family)
    output, linears = branch(masked, unit, 1)
    with torch.no_grad():
        for parameter in masked.get_submodule(output).parameters():
            parameter.zero_()
    student.edit(EmptyLinears(targets=linears))
    assert not any(name.startswith(linears) for name in student.model.state_dict())
    torch.testing.assert_close(answer(student.model), answer(masked), atol=1e-5, rtol=0)
    assert find_blocks(student.model) == find_blocks(masked)
    save_student(student, tmp_path)
    assert needs_plugin(tmp_path)
    model, edits = load_student_model(tmp_path, student.task)
    assert edits == student.edits
    assert torch.equal(answer(model), answer(student.model))


def test_the_graph_of_an_empty_branch_holds_nothing_of_it(tmp_path):
    student = tiny_student("bert")
    batch = next(student.corpus.evaluation.batches(2))
    operators = []
    for name in ("whole", "empty"):
        if name == "empty":
            student.edit(EmptyLinears(targets=branch(student.model, "attention", 1)[1]))
        graph = trace(student.model, batch, output="last_hidden_state", fuse=True, opset=None)
        save_graph(graph, tmp_path / f"{name}.onnx")
        model = onnx.load(tmp_path / f"{name}.onnx")
        operators.append(Counter(node.op_type for node in model.graph.node))
    whole, empty = operators
    assert [counts["Attention"] for counts in operators] == [2, 1], "the projections are inside it"
    assert whole["MatMul"] - empty["MatMul"] == 1


def test_branches_in_low_rank_go_too_and_what_is_no_linear_does_not():
    model = tiny("bert")
    linears = branch(model, "ffn", 0)[1]
    MakeLowRank(targets=linears[:1], rank=4, bias=True).apply(model)
    EmptyLinears(targets=linears).apply(model)
    assert torch.isfinite(answer(model)).all()
    with pytest.raises(CompressKitError, match="not a linear layer"):
        EmptyLinears(targets=("embeddings.LayerNorm",)).apply(model)
