"""Image files to model inputs, and a whole run of an image classifier."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, ResNetConfig, ResNetForImageClassification

import compresskit
from compresskit import OnnxExport, TensorDecomposition
from compresskit.data import DataSource, ModelInputs, prepare_examples
from compresskit.errors import CompressKitError
from compresskit.listing import list_modules
from compresskit.models import find_model, load_config, load_empty
from compresskit.processors import load_processor

Image = pytest.importorskip("PIL.Image")
CLASSES = ("cat", "dog", "owl")


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory) -> Path:
    """60 random images in folders called as their classes, of two sizes; one of them twice."""
    folder, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(60):
        place = folder / CLASSES[number % 3]
        place.mkdir(exist_ok=True)
        shade = draw.integers(0, 256, (1, 1, 3))
        pixels = (shade + draw.integers(0, 60, (24 + number % 2 * 8, 30, 3))) % 256
        Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number}.png")
    Image.open(folder / "cat" / "0.png").save(folder / "cat" / "again.png")
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """A random ResNet whose classes are named owl, dog, cat, with its image processor."""
    folder = tmp_path_factory.mktemp("models") / "tiny-resnet"
    names = {0: "owl", 1: "dog", 2: "cat"}
    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[16, 32],
        depths=[1, 1],
        layer_type="basic",
        id2label=names,
        label2id={name: number for number, name in names.items()},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ResNetForImageClassification(config).save_pretrained(folder)
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(str(processor).replace("'", '"'))
    assert AutoImageProcessor.from_pretrained(folder).model_input_names == ["pixel_values"]
    return folder


def corpus_of(model_folder: Path, **source):
    found = find_model(model_folder)
    said = DataSource.model_validate({"calibration": 10, "evaluation": 12, **source})
    processor = load_processor(found, "image-classification")
    return prepare_examples(said, processor, load_config(found), task="image-classification")


def test_parts_share_no_image_and_classes_are_matched_by_name(image_folder, model_folder):
    corpus = corpus_of(model_folder, source="imagefolder", path=str(image_folder))
    calibration, evaluation = corpus.calibration, corpus.evaluation
    assert isinstance(calibration, ModelInputs)
    assert isinstance(evaluation, ModelInputs)
    assert (len(calibration), len(evaluation), len(corpus.training)) == (10, 12, 0)
    pixels = [image.flatten() for part in (calibration, evaluation) for image in part.tensors["pixel_values"]]
    assert len({tuple(one.tolist()) for one in pixels}) == 22
    assert corpus.origin.startswith("60 images"), "the same image twice counts once"
    assert evaluation.labels is not None
    assert set(evaluation.labels.tolist()) == {0, 1, 2}
    again = corpus_of(model_folder, source="imagefolder", path=str(image_folder))
    assert again.fingerprint == corpus.fingerprint
    assert torch.equal(again.evaluation.labels, evaluation.labels)


def test_a_parquet_file_of_images_gives_the_same_parts(image_folder, model_folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.load_dataset(
        "imagefolder", data_dir=str(image_folder), split="train", cache_dir=str(tmp_path / "cache")
    )
    table.to_parquet(str(tmp_path / "images.parquet"))
    corpus = corpus_of(model_folder, source="parquet", path=str(tmp_path / "images.parquet"))
    direct = corpus_of(model_folder, source="imagefolder", path=str(image_folder))
    for part in ("calibration", "evaluation"):
        one, other = getattr(corpus, part), getattr(direct, part)
        assert torch.equal(one.tensors["pixel_values"], other.tensors["pixel_values"])
        assert torch.equal(one.labels, other.labels)


def test_classes_that_the_model_does_not_know_leave_labels_out(image_folder, model_folder, tmp_path):
    for index, name in enumerate(("cat", "dog")):
        (tmp_path / f"my {name}").mkdir()
        for file in sorted((image_folder / CLASSES[index]).glob("*.png")):
            (tmp_path / f"my {name}" / file.name).write_bytes(file.read_bytes())
    corpus = corpus_of(model_folder, source="imagefolder", path=str(tmp_path), evaluation=8, calibration=8)
    assert corpus.evaluation.labels is None


def test_what_is_no_image_and_too_few_images_are_said(image_folder, model_folder, tmp_path):
    with pytest.raises(CompressKitError, match="the task reads images, and 'python-docs' has none"):
        corpus_of(model_folder)
    with pytest.raises(CompressKitError, match=r"cannot read this as imagefolder|no file"):
        corpus_of(model_folder, source="imagefolder", path=str(tmp_path / "nothing"))
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.png").write_bytes((image_folder / "cat" / "0.png").read_bytes())
    with pytest.raises(CompressKitError, match="too few images: 1 different ones"):
        corpus_of(model_folder, source="imagefolder", path=str(tmp_path))
    for number in range(50):
        (tmp_path / "cat" / f"{number}.png").write_bytes(f"no image {number}".encode())
    with pytest.raises(CompressKitError, match="is no image"):
        corpus_of(model_folder, source="imagefolder", path=str(tmp_path))


def test_an_image_classifier_runs_through_recipe_report_and_export(image_folder, model_folder, tmp_path):
    data = {"source": "imagefolder", "path": str(image_folder), "calibration": 10, "evaluation": 12}
    report = compresskit.compress(
        model_folder,
        passes=[TensorDecomposition(keep=0.5, on_misfit="keep")],
        data=data,
        output=tmp_path / "out",
        export=[OnnxExport(rounds=3, threads=1, texts=8)],
    )
    first, last = (entry["metrics"] for entry in report["passes"])
    assert first["kl_to_original"] == 0
    assert last["kl_to_original"] > 0
    assert 0 <= last["accuracy"] <= 1
    assert report["passes"][1]["params"] < report["passes"][0]["params"]
    assert report["export"][0]["parity"]["relative_error"] < 1e-4
    model, processor = compresskit.load(tmp_path / "out")
    pixels = processor(images=[Image.new("RGB", (40, 40))], return_tensors="pt")["pixel_values"]
    assert model(pixel_values=pixels).logits.shape == (1, 3)
    figures = compresskit.measure(tmp_path / "out")
    assert figures["student"]["kl_to_original"] == pytest.approx(last["kl_to_original"])


def test_the_listing_names_convolutions(model_folder):
    rows = list_modules(load_empty(find_model(model_folder), "image-classification")).rows
    assert ("resnet.embedder.embedder.convolution", "8 × 3 × 7 × 7", "outside the blocks") in rows
