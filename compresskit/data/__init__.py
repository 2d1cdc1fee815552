"""Text to token sequences, images to pixels: one source, three parts that never overlap."""

from compresskit.data.examples import prepare_examples
from compresskit.data.prepare import check_max_length, prepare_corpus, token_positions
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
    "prepare_examples",
    "token_positions",
    "token_rows",
]
