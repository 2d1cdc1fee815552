"""Tiny random models of several architectures, and a corpus of random tokens for them."""

import copy
import string
from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
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
_TASKS = {"gpt2": "text-generation", "t5": "token-classification", "vit": "image-classification"}


def task_of(family: str) -> str:
    """The task that the family is tested with."""
    return _TASKS.get(family) or ("text-generation" if family in DECODERS else "feature-extraction")


def tiny(family: str, seed: int = 0, **changes: int) -> PreTrainedModel:
    """A random model whose biases and norms are not at their initial ones and zeros; `changes` go to its config."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = copy.deepcopy({**FAMILIES, **OTHERS}[family])
        config.update(changes)
        model = TASKS[task_of(family)].from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def random_sequences(count: int, *, seed: int = 0, shortest: int = 6, longest: int = 20) -> Sequences:
    """Rows of random tokens of uneven lengths."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=draw).tolist()
    return Sequences([torch.randint(5, 96, (n,), generator=draw).tolist() for n in lengths], pad_token_id=0)


def random_examples(family: str, count: int, *, seed: int = 0) -> Examples:
    """What the family reads: rows of random tokens, or images of noise."""
    if family != "vit":
        return random_sequences(count, seed=seed)
    return ModelInputs({"pixel_values": torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))})


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
    tokenizer = Tokenizer(models.WordPiece(vocab={piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.WordPiece()  # pyright: ignore[reportAttributeAccessIssue]
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **dict(zip(names, special, strict=True)))


def family_tokenizer() -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer of the families' 96 tokens: five special ones, letters, and words of two."""
    return copy.deepcopy(_tokenizer())


def tiny_student(family: str, *, original: PreTrainedModel | None = None, sequences: int = 32) -> Student:
    """A fresh copy of a tiny original beside it, with random calibration tokens."""
    original = original or tiny(family)
    corpus = Corpus(
        calibration=random_examples(family, sequences, seed=1),
        training=random_examples(family, 32, seed=2),
        evaluation=random_examples(family, 8, seed=3),
        fingerprint="random",
    )
    return Student(copy.deepcopy(original), original, family_tokenizer(), task_of(family), corpus)


@torch.no_grad()
def answer(model: PreTrainedModel, sequences: Examples | None = None) -> torch.Tensor:
    """The model's first output on a padded batch, real tokens only, (tokens, width)."""
    family = "vit" if model.main_input_name == "pixel_values" else ""
    return read_answer(model, next((sequences or random_examples(family, 8, seed=3)).batches(8)))
