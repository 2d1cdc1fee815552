"""Text to token sequences: one source, three parts that never overlap."""

from compresskit.data.prepare import check_max_length, prepare_corpus
from compresskit.data.sequences import Batch, Corpus, Examples, ModelInputs, Sequences, token_rows
from compresskit.data.source import DataSource

__all__ = [
    "Batch",
    "Corpus",
    "DataSource",
    "Examples",
    "ModelInputs",
    "Sequences",
    "check_max_length",
    "prepare_corpus",
    "token_rows",
]
