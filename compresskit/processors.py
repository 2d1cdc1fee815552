"""What turns raw examples into a model's inputs: a text model's tokenizer, a vision model's processor."""

import importlib.util

from transformers import AutoImageProcessor, BaseImageProcessor, PreTrainedTokenizerBase

from compresskit.errors import CompressKitError
from compresskit.models import ModelSource, explained, load_tokenizer

Processor = PreTrainedTokenizerBase | BaseImageProcessor
#: Tasks whose models read images.
IMAGE_TASKS = frozenset({"image-classification"})


def load_processor(source: ModelSource, task: str) -> Processor:
    """The model's tokenizer, or for tasks on images its image processor.

    Raises:
        CompressKitError: files that are absent, damaged or want code of their own; no Pillow to read images with.
    """
    if task not in IMAGE_TASKS:
        return load_tokenizer(source)
    if importlib.util.find_spec("PIL") is None:
        raise CompressKitError(
            "reading images needs the package Pillow", where="data.source", fix="pip install 'compresskit[vision]'"
        )
    fix = "put preprocessor_config.json beside config.json: image_processor.save_pretrained(folder)"
    with explained(source, "the image processor", fix):
        return AutoImageProcessor.from_pretrained(source.folder, trust_remote_code=False)
