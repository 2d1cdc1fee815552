"""Tiny random models of four blocks, of more architectures than `families`, whose blocks are not all alike."""

import copy
from typing import Any

import torch
from families import DECODERS, ENCODER_SHAPE, ENCODERS, family_tokenizer, random_sequences
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForTokenClassification,
    GPT2Config,
    ModernBertConfig,
    PretrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    T5Config,
    ViTConfig,
)

from compresskit.data import Batch, Corpus, Examples, ModelInputs
from compresskit.models import task_of
from compresskit.student import Student

BLOCKS = 4
_TURNS = ["sliding_attention", "full_attention"] * 2
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _deep(config: PretrainedConfig, **more: Any) -> PretrainedConfig:
    said = config.to_dict() | more
    count = "n_layers" if "n_layers" in said else "num_hidden_layers"
    return type(config).from_dict(said | {count: BLOCKS})


_CAUSAL = {
    "llama": _deep(DECODERS["llama"]),
    "qwen3": _deep(DECODERS["qwen3"], layer_types=_TURNS, use_sliding_window=True, sliding_window=4),
    "gemma3": _deep(DECODERS["gemma3"], layer_types=_TURNS),
    "gpt2": GPT2Config(vocab_size=96, n_embd=32, n_layer=BLOCKS, n_head=4, n_positions=64, **_SPECIAL),
}
CONFIGS: dict[str, tuple[Any, PretrainedConfig]] = {
    **{name: (AutoModel, _deep(ENCODERS[name])) for name in ENCODERS},
    **{name: (AutoModelForCausalLM, config) for name, config in _CAUSAL.items()},
    "t5": (AutoModelForTokenClassification, T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=BLOCKS,
                                                     num_heads=4, num_labels=3)),
    "vit": (AutoModelForImageClassification, ViTConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=BLOCKS,
                                                       num_attention_heads=4, image_size=32, patch_size=8,
                                                       num_labels=5)),
}  # fmt: skip
RESNET = ResNetConfig(
    embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2], layer_type="basic", num_labels=3, hidden_act="relu"
)
MODERNBERT = ModernBertConfig(
    **ENCODER_SHAPE | {"num_hidden_layers": BLOCKS}, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
    global_attn_every_n_layers=2, local_attention=8,
)  # fmt: skip


def build(auto: Any, config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A random model whose biases and norms are not at their initial ones and zeros."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto.from_config(copy.deepcopy(config)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def deep(name: str) -> PreTrainedModel:
    """The model of `CONFIGS`."""
    return build(*CONFIGS[name])


def images(count: int, seed: int) -> ModelInputs:
    """Random pixels of 32 × 32."""
    return ModelInputs({"pixel_values": torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))})


def deep_student(model: PreTrainedModel) -> Student:
    """A copy of the model beside it, with random calibration inputs."""
    draw = images if model.main_input_name == "pixel_values" else lambda count, seed: random_sequences(count, seed=seed)
    corpus = Corpus(draw(32, 1), draw(32, 2), draw(8, 3), "random")
    return Student(copy.deepcopy(model), model, family_tokenizer(), task_of(model), corpus)


@torch.no_grad()
def reply(model: PreTrainedModel, inputs: Examples | None = None) -> torch.Tensor:
    """The model's first output on `inputs`, or on random ones; of a padded batch at real tokens only."""
    vision = model.main_input_name == "pixel_values"
    batch: Batch = next((inputs or (images(4, 3) if vision else random_sequences(8, seed=3))).batches(8))
    output = model(**batch)[0]
    return output if vision else output[batch["attention_mask"].bool()]
