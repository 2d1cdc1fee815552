"""Tiny random models of several architectures, and a corpus of random tokens for them."""

import copy

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    DistilBertConfig,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    RobertaConfig,
)

from compresskit.data import Corpus, Sequences
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


def task_of(family: str) -> str:
    """The task that the family is tested with."""
    return "text-generation" if family in DECODERS else "feature-extraction"


def tiny(family: str, seed: int = 0, **changes: int) -> PreTrainedModel:
    """A random model whose biases and norms are not at their initial ones and zeros; `changes` go to its config."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = copy.deepcopy(FAMILIES[family])
        config.update(changes)
        auto = AutoModelForCausalLM if family in DECODERS else AutoModel
        model = auto.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def random_sequences(count: int, *, seed: int = 0, shortest: int = 6, longest: int = 20) -> Sequences:
    """Rows of random tokens of uneven lengths."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=draw).tolist()
    return Sequences([torch.randint(5, 96, (n,), generator=draw).tolist() for n in lengths], pad_token_id=0)


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


def tiny_student(family: str, *, original: PreTrainedModel | None = None, sequences: int = 32) -> Student:
    """A fresh copy of a tiny original beside it, with random calibration tokens."""
    original = original or tiny(family)
    corpus = Corpus(
        calibration=random_sequences(sequences, seed=1),
        training=random_sequences(32, seed=2),
        evaluation=random_sequences(8, seed=3),
        fingerprint="random",
    )
    return Student(copy.deepcopy(original), original, NoTokenizer(), task_of(family), corpus)


@torch.no_grad()
def answer(model: PreTrainedModel, sequences: Sequences | None = None) -> torch.Tensor:
    """The model's first output on a padded batch, real tokens only, (tokens, width)."""
    batch = next((sequences or random_sequences(8, seed=3)).batches(8))
    return model(**batch)[0][batch["attention_mask"].bool()]
