"""Architectures built in unusual ways: a pass either does its work on them or refuses with one clear message."""

import copy

import pytest
import torch
from families import ENCODER_SHAPE, NoTokenizer, answer, random_model, random_sequences
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForCausalLM,
    DebertaV2Config,
    ElectraConfig,
    FalconConfig,
    GPT2Config,
    LongformerConfig,
    MixtralConfig,
    ModernBertConfig,
    MPNetConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    XLNetConfig,
)

from compresskit.data import Corpus
from compresskit.errors import CompressKitError
from compresskit.passes.low_rank import LowRank
from compresskit.passes.prune_width import PruneWidth
from compresskit.passes.quantize import Quantize
from compresskit.student import Student
from compresskit.surgery.sites import find_anatomy

CONFIGS: dict[str, PretrainedConfig] = {
    "albert": AlbertConfig(**ENCODER_SHAPE, embedding_size=16),
    "deberta-v2": DebertaV2Config(
        **ENCODER_SHAPE, relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True
    ),
    "electra": ElectraConfig(**ENCODER_SHAPE, embedding_size=16),
    "falcon": FalconConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, parallel_attn=True
    ),
    "gpt2": GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "longformer": LongformerConfig(**ENCODER_SHAPE | {"pad_token_id": 1}, attention_window=4),
    "mixtral": MixtralConfig(**ENCODER_SHAPE, num_key_value_heads=2, num_local_experts=4),
    "modernbert": ModernBertConfig(**ENCODER_SHAPE, global_attn_every_n_layers=1),
    "mpnet": MPNetConfig(**ENCODER_SHAPE | {"pad_token_id": 1}),
    "olmo2": Olmo2Config(**ENCODER_SHAPE, num_key_value_heads=4),
    "phi3": Phi3Config(**ENCODER_SHAPE, num_key_value_heads=2),
    "xlnet": XLNetConfig(vocab_size=96, d_model=32, n_layer=2, n_head=4, d_inner=64),
}
_DECODERS = {"falcon", "gpt2", "mixtral", "olmo2", "phi3"}
PASSES = {
    "low_rank": LowRank(keep=0.9, round_to=4, on_misfit="keep"),
    "prune_ffn": PruneWidth.model_validate({"keep": {"ffn": 0.75}}),
    "quantize": Quantize(bits=8, group_size=16, embeddings=None),
    "int8": Quantize(bits=8, group_size="channel", act="int8", embeddings=None),
}
#: What is refused, and the words of the message. All else must work.
REFUSED = {
    ("albert", "*"): "runs more than once",
    ("deberta-v2", "*"): "runs more than once|cannot be run",
    ("gpt2", "quantize"): "Conv1D, which stores its weight transposed",
    ("gpt2", "int8"): "Conv1D, which stores its weight transposed",
    ("longformer", "low_rank"): "which row is which token cannot be told",
    ("longformer", "quantize"): "which row is which token cannot be told",
    ("longformer", "int8"): "which row is which token cannot be told",
    ("xlnet", "*"): "cannot be walked|which row is which token|cannot be run",
    ("mixtral", "prune_ffn"): "an FFN is seen in 0 of 2 blocks",
    ("mixtral", "quantize"): "belong to no linear layer",
    ("mixtral", "int8"): "belong to no linear layer",
    ("falcon", "prune_ffn"): "an FFN is seen in",
    ("phi3", "prune_ffn"): "an FFN is seen in",
    ("modernbert", "prune_ffn"): "an FFN is seen in",
}
#: What stays as it is where misfits may: GPT-2 has no layer that can be factorised.
UNTOUCHED = {("gpt2", "low_rank")}
#: How far the answer may move, as a share of how far it moves where every linear in a block gives nothing: random
#: weights have no redundancy, so cutting them costs much and rounding little.
_BOUNDS = {"low_rank": 0.25, "prune_ffn": 0.4, "quantize": 0.03, "int8": 0.06}


def _student(name: str) -> Student:
    original = random_model(AutoModelForCausalLM if name in _DECODERS else AutoModel, CONFIGS[name])
    corpus = Corpus(random_sequences(32, seed=1), random_sequences(8, seed=2), random_sequences(8, seed=3), "random")
    task = "text-generation" if name in _DECODERS else "feature-extraction"
    return Student(copy.deepcopy(original), original, NoTokenizer(), task, corpus)


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_pass_works_or_says_clearly_why_not(name, kind):
    student, step = _student(name), PASSES[kind]
    refusal = REFUSED.get((name, kind)) or REFUSED.get((name, "*"))
    if refusal:
        with pytest.raises(CompressKitError, match=refusal) as caught:
            step.apply(student, generator=torch.Generator())
        assert caught.value.fix
        return
    truth, empty = answer(student.original), copy.deepcopy(student.original)
    with torch.no_grad():
        for linear in find_anatomy(empty).linears():
            empty.get_submodule(linear).weight.zero_()
    step.apply(student, generator=torch.Generator())
    moved, most = ((answer(model) - truth).norm() for model in (student.model, empty))
    if (name, kind) in UNTOUCHED:
        assert moved == 0
        return
    assert 0 < moved < _BOUNDS[kind] * most


def test_a_transposed_layer_cannot_be_factorised_and_the_message_says_so():
    with pytest.raises(CompressKitError, match="is a Conv1D, which stores its weight transposed"):
        LowRank(keep=0.5).plan(_student("gpt2").model)
