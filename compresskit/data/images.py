"""Image files to parts of model inputs that share no image."""

import hashlib
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import BaseImageProcessor, PretrainedConfig

from compresskit.data.prepare import SMALLEST_PART, Sizes
from compresskit.data.sequences import Corpus, ModelInputs
from compresskit.data.source import READ_ERRORS, DataSource, expand, first_line, watched
from compresskit.errors import CompressKitError
from compresskit.progress import track

#: Raised by one whenever the same files and options would give other inputs.
VERSION = 1
_LABELS = ("label", "labels")
_IMAGES_AT_A_TIME = 16
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Image:
    """A file's bytes, and its class as the model counts it, if it is known."""

    content: bytes
    label: int | None


def prepare_images(source: DataSource, processor: BaseImageProcessor, config: PretrainedConfig, *, seed: int) -> Corpus:
    """Read and split image files, and process them as the model wants: evaluation and calibration share no image.

    Files are ordered by their content's hash and the seed; equal ones count once. Nothing trains on images, so the
    training part is empty. Classes are matched to the model's by name; where one has no such name, there are no labels.

    Args:
        source: `imagefolder` (a folder with one folder a class, or with images alone), or `parquet` or `hub` with a
            column of images.
        processor: of the model.
        config: of the model, for the names of its classes.
        seed: of the order.

    Raises:
        CompressKitError: a source of text, files that are not there or are no images, or too few of them.
    """
    images = _read_images(source, config)
    salt = f"{seed}\0".encode()
    ordered = sorted({one.content: one for one in images}.values(), key=lambda one: _sha(salt + one.content).digest())
    sizes = Sizes(source.evaluation, source.calibration, 0).within(len(ordered))
    for name, found, asked in (
        ("evaluation", sizes.evaluation, source.evaluation),
        ("calibration", sizes.calibration, source.calibration),
    ):
        if found < min(asked, SMALLEST_PART):
            what = f"too few images: {len(ordered)} different ones give {found} for {name}, which needs "
            raise CompressKitError(what + str(min(asked, SMALLEST_PART)), where="data", fix="give more images")
    parts = ordered[: sizes.evaluation], ordered[sizes.evaluation : sizes.evaluation + sizes.calibration]
    evaluation, calibration = (_process(part, processor) for part in parts)
    facts = [VERSION, seed, processor.to_json_string(), sizes, [_sha(one.content).hexdigest() for one in ordered]]
    fingerprint = _sha(repr([*facts, [one.label for one in ordered]]).encode()).hexdigest()
    origin = f"{len(ordered)} images of {source.source}: {', '.join(source.path)}"
    return Corpus(calibration, calibration.limit(0), evaluation, fingerprint, origin)


def _sha(content: bytes) -> Any:
    return hashlib.sha256(content)


def _read_images(source: DataSource, config: PretrainedConfig) -> list[_Image]:
    """Every image of the source, still encoded."""
    if source.source not in ("imagefolder", "parquet", "hub"):
        fix = "data: {source: imagefolder, path: FOLDER}, or parquet or hub with a column of images"
        raise CompressKitError(f"the task reads images, and {source.source!r} has none", where="data.source", fix=fix)
    if source.prompt is not None:
        raise CompressKitError("images have no prompt", where="data.prompt", fix="leave it out")
    # The library's own cache would hold a second copy and knows files by their time stamp.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        try:
            with watched():
                return _encoded(_load_table(source, scratch), source, config)
        except READ_ERRORS as error:
            cause = error.__cause__ or error
            raise CompressKitError(
                f"cannot read this as {source.source}: {first_line(cause)}",
                where=", ".join(source.path[:3]),
                fix="name a folder of images, with one folder a class, or files that hold a column of images",
            ) from error


def _load_table(source: DataSource, scratch: str) -> datasets.Dataset:
    if source.source == "hub":
        return datasets.load_dataset(source.path[0], source.name, split=source.split or "train")
    folders = [place for path in source.path if (place := Path(path).expanduser()).is_dir()]
    if source.source == "imagefolder" and folders:
        said: dict[str, Any] = {"data_dir": str(folders[0])}
    else:
        said = {"data_files": [str(file) for path in source.path for file in expand(path)]}
    return datasets.load_dataset(source.source, split="train", cache_dir=scratch, **said)


def _encoded(table: datasets.Dataset, source: DataSource, config: PretrainedConfig) -> list[_Image]:
    columns = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    if not columns:
        listed = ", ".join(map(repr, table.column_names)) or "none"
        raise CompressKitError(
            f"no column of images in {', '.join(source.path)}; it has {listed}", where="data.path", fix="give images"
        )
    column = source.column if source.column in columns else columns[0]
    label = next((name for name in _LABELS if name in table.features), None)
    known = _classes(table.features[label], config) if label else None
    rows = table.cast_column(column, datasets.Image(decode=False))
    found: list[_Image] = []
    for row in map(dict[str, Any], rows):
        cell = row[column]
        content = cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
        found.append(_Image(content, known[row[label]] if known and label else None))
    return found


def _classes(feature: Any, config: PretrainedConfig) -> list[int] | None:
    """The model's number of each class of the table; None where one has no name that the model knows."""
    numbers = {str(name): int(number) for name, number in (config.label2id or {}).items()}
    names = getattr(feature, "names", None)
    if not names or any(name not in numbers for name in names):
        _log.info("classes %s are not all among the model's: accuracy is left out", names)
        return None
    return [numbers[name] for name in names]


def _process(images: Sequence[_Image], processor: BaseImageProcessor) -> ModelInputs:
    """What the model reads of these images, all of one size, and their classes where all are known."""
    found: list[Tensor] = []
    for first in track(range(0, len(images), _IMAGES_AT_A_TIME), "processing images"):
        decoded = [_decode(one.content) for one in images[first : first + _IMAGES_AT_A_TIME]]
        found.append(processor(images=decoded, return_tensors="pt")["pixel_values"])
    if len({tuple(one.shape[1:]) for one in found}) != 1:
        what = f"the image processor gives images of different sizes: {sorted({tuple(one.shape[1:]) for one in found})}"
        raise CompressKitError(what, where="data", fix="set a fixed size in the model's preprocessor_config.json")
    labels = [one.label for one in images]
    known = [label for label in labels if label is not None]
    return ModelInputs({"pixel_values": torch.cat(found)}, torch.tensor(known) if len(known) == len(labels) else None)


def _decode(content: bytes) -> Any:
    """An RGB image."""
    try:
        return datasets.Image().decode_example({"bytes": content, "path": None}).convert("RGB")
    except OSError as error:
        what = f"a file of {len(content)} bytes is no image ({error})"
        raise CompressKitError(what, where="data.path", fix="remove what is not an image") from error
