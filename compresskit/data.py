"""Text to token sequences: one source, three parts that never overlap."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from compresskit.config import Config

Batch = dict[str, Tensor]  # input_ids and attention_mask, (batch, length) int64; masked positions are padding


class DataSource(Config):
    """Where text comes from and how much of it is used."""

    source: Literal["python-docs", "json", "csv", "parquet", "text", "hub"] = "python-docs"
    path: str | None = None
    column: str = "text"
    #: tokens in a sequence; texts are cut, or for language models packed, to it
    max_length: int = 128
    #: sequences in each part
    calibration: int = 128
    training: int = 4096
    evaluation: int = 200


@dataclass(frozen=True)
class Sequences:
    """Token sequences of one part."""

    rows: list[list[int]]
    pad_token_id: int

    def batches(
        self, size: int, *, limit: int | None = None, generator: torch.Generator | None = None
    ) -> Iterator[Batch]:
        """Padded batches in order, or endlessly shuffled ones where a generator is given."""
        raise NotImplementedError


@dataclass(frozen=True)
class Corpus:
    """Three parts of one text that share no sequence."""

    calibration: Sequences
    training: Sequences
    evaluation: Sequences
    fingerprint: str


def prepare_corpus(source: DataSource, tokenizer: PreTrainedTokenizerBase, *, pack: bool, seed: int = 0) -> Corpus:
    """Read, split and tokenise `source`; cached by fingerprint."""
    raise NotImplementedError
