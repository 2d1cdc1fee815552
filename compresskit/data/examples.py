"""The parts of whatever a task reads: text as token sequences, images as pixels."""

from transformers import BaseImageProcessor, PretrainedConfig

from compresskit.data.images import prepare_images
from compresskit.data.prepare import prepare_corpus
from compresskit.data.sequences import Corpus
from compresskit.data.source import DataSource
from compresskit.processors import Processor


def prepare_examples(
    source: DataSource, processor: Processor, config: PretrainedConfig, *, task: str, seed: int = 0
) -> Corpus:
    """`prepare_images` for an image processor, else `prepare_corpus`, packed for text generation; same errors."""
    if isinstance(processor, BaseImageProcessor):
        return prepare_images(source, processor, config, seed=seed)
    return prepare_corpus(source, processor, pack=task == "text-generation", seed=seed)
