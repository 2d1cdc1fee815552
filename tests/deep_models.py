"""Tiny random models of four blocks, of more architectures than `families`, whose blocks are not all alike."""

from typing import Any

from families import DECODERS, ENCODER_SHAPE, ENCODERS, random_model
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


def deep(name: str) -> PreTrainedModel:
    """The model of `CONFIGS`."""
    return random_model(*CONFIGS[name])
