"""Tiny random models of several architectures, and a corpus of random tokens for them."""

import copy
import string
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordPiece
from transformers import (
    BartConfig,
    BertConfig,
    DistilBertConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    RobertaConfig,
    T5Config,
    ViTConfig,
)

from compresskit import models
from compresskit.data import Corpus, Examples, ModelInputs, Sequences
from compresskit.layerwise.answer import read_answer
from compresskit.models import TASKS
from compresskit.student import Student

_DECODER = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
ENCODER_SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
DECODERS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_DECODER, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**_DECODER, tie_word_embeddings=False),
    "mistral": MistralConfig(**_DECODER),
    "gemma3": Gemma3TextConfig(**_DECODER, sliding_window=4),
}
ENCODERS: dict[str, PretrainedConfig] = {
    "bert": BertConfig(**ENCODER_SHAPE),
    "roberta": RobertaConfig(**ENCODER_SHAPE | {"pad_token_id": 1}),
    "distilbert": DistilBertConfig(
        vocab_size=96, dim=32, hidden_dim=64, n_layers=2, n_heads=4, max_position_embeddings=64
    ),
}
FAMILIES = {**ENCODERS, **DECODERS}
#: Built in other ways: transposed and fused projections, no biases and a position bias, images.
OTHERS: dict[str, PretrainedConfig] = {
    "gpt2": GPT2Config(vocab_size=96, n_embd=32, n_inner=64, n_layer=2, n_head=4, n_positions=64, pad_token_id=0),
    "t5": T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=0, num_labels=5),
    "vit": ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        num_labels=5,
    ),
}
#: Whose encoder and decoder have tables of their own, tied to one.
ENCODER_DECODERS: dict[str, PretrainedConfig] = {
    "bart": BartConfig(
        vocab_size=96,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        pad_token_id=0,
    ),
}
_TASKS = {"gpt2": "text-generation", "t5": "token-classification", "vit": "image-classification"}


def task_of(family: str) -> str:
    """The task that the family is tested with."""
    return _TASKS.get(family) or ("text-generation" if family in DECODERS else "feature-extraction")


def random_model(auto: Any, config: PretrainedConfig, seed: int = 0, *, scale: float = 0.1) -> PreTrainedModel:
    """A random model of an auto class whose biases and norms are not at their initial ones and zeros."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto.from_config(copy.deepcopy(config)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * scale)
    return model


def tiny(family: str, seed: int = 0, **changes: int) -> PreTrainedModel:
    """The random model of a family; `changes` go to its config."""
    config = copy.deepcopy({**FAMILIES, **OTHERS, **ENCODER_DECODERS}[family])
    config.update(changes)
    return random_model(TASKS[task_of(family)], config, seed)


def random_sequences(count: int, *, seed: int = 0, shortest: int = 6, longest: int = 20) -> Sequences:
    """Rows of random tokens of uneven lengths."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=draw).tolist()
    return Sequences([torch.randint(5, 96, (n,), generator=draw).tolist() for n in lengths], pad_token_id=0)


def random_examples(model: PreTrainedModel, count: int, *, seed: int = 0) -> Examples:
    """What a model reads: rows of random tokens, or images of noise."""
    if model.main_input_name != "pixel_values":
        return random_sequences(count, seed=seed)
    side = getattr(model.config, "image_size", 32)
    draw = torch.Generator().manual_seed(seed)
    return ModelInputs({"pixel_values": torch.randn(count, 3, side, side, generator=draw)})


class NoTokenizer(PreTrainedTokenizerBase):
    """Stands where a tokenizer is saved and nothing is tokenised."""

    def __init__(self) -> None:
        pass

    def __len__(self) -> int:
        return 96

    @property
    def all_special_ids(self) -> list[int]:
        return [0, 1, 2, 3]

    def save_pretrained(self, *args: object, **kwargs: object) -> tuple[str, ...]:  # type: ignore[override]
        return ()


@cache
def _tokenizer() -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pairs = [a + b for a in string.ascii_lowercase for b in "aei"]
    pieces = [*special, *string.ascii_lowercase, *pairs][:96]
    tokenizer = Tokenizer(WordPiece(vocab={piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.WordPiece()  # pyright: ignore[reportAttributeAccessIssue]
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **dict(zip(names, special, strict=True)))


def family_tokenizer() -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer of the families' 96 tokens: five special ones, letters, and words of two."""
    return copy.deepcopy(_tokenizer())


def student_of(original: PreTrainedModel, *, sequences: int = 32) -> Student:
    """A fresh copy of an original beside it, with random calibration inputs."""
    corpus = Corpus(
        calibration=random_examples(original, sequences, seed=1),
        training=random_examples(original, 32, seed=2),
        evaluation=random_examples(original, 8, seed=3),
        fingerprint="random",
    )
    return Student(copy.deepcopy(original), original, family_tokenizer(), models.task_of(original), corpus)


def tiny_student(family: str, *, sequences: int = 32) -> Student:
    """The student of a family's random model."""
    return student_of(tiny(family), sequences=sequences)


@torch.no_grad()
def answer(model: PreTrainedModel, inputs: Examples | None = None) -> torch.Tensor:
    """The model's first output on `inputs`, or on eight random ones; of padded text at real tokens only."""
    return read_answer(model, next((inputs or random_examples(model, 8, seed=3)).batches(8)))
