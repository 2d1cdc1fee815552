"""Cutting a vocabulary: sliced tables answer as whole ones, tied stays tied, ids in the config are renumbered."""

import copy

import pytest
import torch
from families import FAMILIES, tiny
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    PreTrainedModel,
    RobertaConfig,
    RobertaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from compresskit.errors import CompressKitError
from compresskit.passes.low_rank import LowRank
from compresskit.passes.quantize import Quantize
from compresskit.student import Student
from compresskit.surgery.edits import replay, write_ranges
from compresskit.surgery.vocabulary_edits import (
    PruneVocabulary,
    config_token_ids,
    narrowed,
    say_vocabulary,
    vocabulary_parameters,
)

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
KEPT = [0, 1, 2, 3, 7, 8, 9, 20, 21, 33, 40, 64, 65, 66, 94, 95]


def _random(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def make(family: str) -> PreTrainedModel:
    if family in FAMILIES:
        return tiny(family)
    bert = BertConfig(vocab_size=96, pad_token_id=0, max_position_embeddings=64, is_decoder=True, **SMALL)
    makers = {
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=95, eos_token_id=95)
        ),
        "bert-lm": lambda: BertLMHeadModel(bert),
        "bert-mlm": lambda: BertForMaskedLM(copy.deepcopy(bert)),
        "roberta-lm": lambda: RobertaForCausalLM(
            RobertaConfig(vocab_size=96, pad_token_id=1, max_position_embeddings=64, is_decoder=True, **SMALL)
        ),
        "t5": lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
        ),
    }
    return _random(makers[family]())


def batch(model: PreTrainedModel, rows: list[list[int]]) -> dict[str, torch.Tensor]:
    ids = torch.tensor(rows)
    extra = {"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **extra}


ALL = [*FAMILIES, "gpt2", "bert-lm", "bert-mlm", "roberta-lm", "t5"]


@torch.no_grad()
@pytest.mark.parametrize("family", ALL)
def test_a_narrowed_model_answers_as_the_whole_one_on_kept_tokens(family):
    model = make(family)
    before = copy.deepcopy(model.state_dict())
    twin = narrowed(model, KEPT)
    draw = torch.Generator().manual_seed(0)
    ours = torch.randint(4, len(KEPT), (3, 9), generator=draw)
    theirs = torch.tensor(KEPT)[ours]
    said, whole = twin(**batch(twin, ours.tolist()))[0], model(**batch(model, theirs.tolist()))[0]
    if model.get_output_embeddings() is not None:
        whole = whole[..., KEPT]
        assert said.shape[-1] == len(KEPT)
    torch.testing.assert_close(said, whole, rtol=0, atol=1e-5)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before), "the whole one is as it was"
    assert model.config.vocab_size == 96
    assert twin.config.vocab_size == len(KEPT)
    named = dict(model.named_parameters())
    cut = set(vocabulary_parameters(model))
    assert all(p is named[name] for name, p in twin.named_parameters() if name not in cut and name in named)


@pytest.mark.parametrize("family", ALL)
def test_tied_rows_stay_tied_and_an_empty_model_gets_the_same_shapes(family):
    model = make(family)
    edit = PruneVocabulary(parameters=vocabulary_parameters(model), keep=write_ranges(KEPT))
    with torch.device("meta"):
        empty = type(model)(copy.deepcopy(model.config))
    assert vocabulary_parameters(empty) == edit.parameters
    tied = {(a, b) for a, p in _named(model) for b, q in _named(model) if a < b and p is q}
    for one in (model, empty):
        replay([edit], one)
        assert {(a, b) for a, p in _named(one) for b, q in _named(one) if a < b and p is q} == tied
        assert one.get_input_embeddings().num_embeddings == len(KEPT)
        head = one.get_output_embeddings()
        assert head is None or head.out_features == len(KEPT)
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    assert {name: tuple(t.shape) for name, t in empty.state_dict().items()} == shapes
    fresh = type(model)(copy.deepcopy(model.config))
    assert {name: tuple(t.shape) for name, t in fresh.state_dict().items()} == shapes, "the config says them all"


def _named(model: nn.Module):
    return list(model.named_parameters(remove_duplicate=False))


def test_ids_in_configs_are_renumbered_and_dropped_ones_go():
    config = LlamaConfig(vocab_size=96, pad_token_id=95, bos_token_id=7, eos_token_id=[8, 50, 94])
    generation = GenerationConfig(
        bos_token_id=7, eos_token_id=[8, 94], pad_token_id=50, suppress_tokens=[9, 50], bad_words_ids=[[7, 8], [50, 7]]
    )
    assert config_token_ids(config) == {95, 7, 8, 50, 94}
    assert config_token_ids(generation) == {7, 8, 94, 50, 9}
    for one in (config, generation):
        say_vocabulary(one, KEPT)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (15, 4, [5, 14])
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (4, [5, 14], None)
    assert (generation.suppress_tokens, generation.bad_words_ids) == ([6], [[4, 5]])
    assert config.vocab_size == len(KEPT)
    assert config_token_ids(None) == set()
    inner = Gemma3TextConfig(vocab_size=96, pad_token_id=0)
    say_vocabulary(inner, KEPT)
    assert inner.vocab_size == len(KEPT)


def test_models_whose_rows_cannot_be_cut_are_refused():
    with pytest.raises(CompressKitError, match="it reads 'pixel_values'") as caught:
        vocabulary_parameters(ViTModel(ViTConfig(**SMALL, image_size=16, patch_size=8)))
    assert caught.value.fix == "leave prune_vocab out"
    model = tiny("bert")
    student = Student(model, tiny("bert"), None, "feature-extraction", None)  # type: ignore[arg-type]
    for edit in Quantize(bits=8, group_size=16, method="rtn").plan(model):
        student.edit(edit)
    with pytest.raises(CompressKitError, match="held by a QuantEmbedding") as caught:
        vocabulary_parameters(student.model)
    assert caught.value.fix == "put prune_vocab before the pass that replaced it"
    doubled = tiny("bert")
    doubled.extra = nn.Embedding(96, 4)
    with pytest.raises(CompressKitError, match="extra has a row for each of 96 things too"):
        vocabulary_parameters(doubled)


def test_edits_that_do_not_fit_are_refused():
    model = tiny("bert")
    name = "embeddings.word_embeddings.weight"
    with pytest.raises(CompressKitError, match="reach 96, and there are at most 96"):
        PruneVocabulary(parameters=(name,), keep="0-96").apply(model)
    with pytest.raises(CompressKitError, match=r"no parameter '\.\./x'"):
        PruneVocabulary(parameters=("../x",), keep="0-9").apply(model)
    with pytest.raises(ValueError, match="not ascending ranges"):
        PruneVocabulary(parameters=(name,), keep="9-0")


def test_low_rank_blocks_do_not_stand_in_the_way():
    model = tiny("llama")
    edits = LowRank(keep=0.6, round_to=4, on_misfit="keep").plan(model)
    replay(edits, model)
    assert vocabulary_parameters(model) == ("model.embed_tokens.weight", "lm_head.weight")
