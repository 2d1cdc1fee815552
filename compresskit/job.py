"""A recipe made ready: its model and text found, every pass planned, all of it fingerprinted."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compresskit.data import Corpus, check_max_length, prepare_examples
from compresskit.data.source import open_source
from compresskit.environment import exporting_versions
from compresskit.errors import CompressKitError, ManyErrors
from compresskit.evaluate.quality import LEAST_COMPARED
from compresskit.float_types import FloatTypes
from compresskit.forecast import Forecast, foretell
from compresskit.layerwise.walk import LEAST_CALIBRATION
from compresskit.models import (
    ModelSource,
    check_weights,
    find_float_types,
    find_model,
    guess_task,
    load_config,
    load_empty,
)
from compresskit.processors import Processor, load_processor
from compresskit.recipe import Recipe, reading
from compresskit.sentence import SentenceEmbedding, read_sentence_embedding
from compresskit.store import chain, digest

#: One sequence to learn from and one held out.
LEAST_TRAINING = 2


@dataclass(frozen=True)
class Job:
    """A recipe with everything that it names found, and every pass planned."""

    recipe: Recipe
    source: ModelSource
    task: str
    tokenizer: Processor
    corpus: Corpus
    sentence: SentenceEmbedding
    forecast: Forecast


@dataclass(frozen=True)
class Prints:
    """Fingerprints of a job: of the original and after each pass, and of everything, exports included."""

    steps: tuple[str, ...]
    result: str
    identity: dict[str, Any]  # what run.json says of it


def prepare(recipe: Recipe | str | Path, *, settings: Sequence[str] = ()) -> Job:
    """Find the model and its text, and plan every pass. No weight is read, nothing is written but caches.

    Args:
        recipe: a Recipe, or the path of its YAML, whose lines are then told with mistakes.
        settings: `--set` values on top of that YAML.

    Raises:
        CompressKitError: whatever the recipe names and is not there, or does not fit; each pass's misfits at once.
    """
    with reading(recipe, settings=settings) as read:
        return _prepared(read)


def _prepared(recipe: Recipe) -> Job:
    source = find_model(recipe.model, gguf_file=recipe.gguf_file)
    task = recipe.task or guess_task(source)
    check_max_length(load_empty(source, task), recipe.data.max_length)
    forecast = foretell(recipe, source, task)
    check_weights(source, task)
    # Cutting text leaves its mark in a tokenizer, so the one that is saved with the student reads none.
    processor, config = load_processor(source, task), load_config(source)
    corpus = prepare_examples(recipe.data, processor, config, task=task, seed=recipe.seed)
    _check_amounts(recipe, task, corpus)
    _check_text(recipe, processor, corpus)
    sentence = read_sentence_embedding(source.folder)
    return Job(recipe, source, task, load_processor(source, task), corpus, sentence, forecast)


def _check_amounts(recipe: Recipe, task: str, corpus: Corpus) -> None:
    """Refuse text that is too little for what the recipe does with it, before a pass has run.

    Raises:
        ManyErrors: no sequence to train on and one to hold out, or to fit on and one to judge the fit by; fewer
            embeddings than can be compared.
    """
    found: list[CompressKitError] = []
    learner = next((i for i, one in enumerate(recipe.passes) if "training" in one.needs), None)
    if learner is not None and len(corpus.training) < LEAST_TRAINING:
        what = (
            f"{len(corpus.training)} sequences to train on; passes[{learner}] ({recipe.passes[learner].kind}) needs "
            f"{LEAST_TRAINING} or more"
        )
        fix = _more_text("training", recipe.data.training, LEAST_TRAINING)
        found.append(CompressKitError(what, where="data.training", fix=fix))
    fitted = any("calibration" in one.needs for one in recipe.passes)
    if fitted and len(corpus.calibration) < LEAST_CALIBRATION:
        what = f"{len(corpus.calibration)} calibration sequence: some are fitted on, others judge the fit"
        fix = _more_text("calibration", recipe.data.calibration, LEAST_CALIBRATION) + " (hundreds are better)"
        found.append(CompressKitError(what, where="data.calibration", fix=fix))
    compared = task == "feature-extraction" and recipe.evaluate != "never"
    if compared and len(corpus.evaluation) < LEAST_COMPARED:
        what = f"{len(corpus.evaluation)} sequences to measure with; embeddings need {LEAST_COMPARED} or more"
        fix = _more_text("evaluation", recipe.data.evaluation, LEAST_COMPARED) + ", or say evaluate: never"
        found.append(CompressKitError(what, where="data.evaluation", fix=fix))
    if found:
        raise ManyErrors(found)


def _check_text(recipe: Recipe, processor: Processor, corpus: Corpus) -> None:
    """Refuse a tokenizer or a text that a pass cannot work with.

    Raises:
        ManyErrors: what each pass says.
    """
    found: list[CompressKitError] = []
    for index, one in enumerate(recipe.passes):
        try:
            one.check_text(processor, corpus)
        except CompressKitError as error:
            found += [mistake.at(f"passes[{index}] ({one.kind})") for mistake in error.each]
    if found:
        raise ManyErrors(found)


def _more_text(part: str, asked: int, least: int) -> str:
    return f"use {part}: {least} or more" if asked < least else "give more text"


def take_prints(job: Job) -> Prints:
    """The fingerprints of a job; the model's files are read for it."""
    recipe = job.recipe
    start = digest([job.source.fingerprint, job.task, job.corpus.fingerprint, recipe.seed])
    read = [
        [
            *(find_model(name).fingerprint for name in one.models_read()),
            *(open_source(t).digest for t in one.texts_read()),
        ]
        for one in recipe.passes
    ]
    types = find_float_types(job.source)
    # Students of an original in float32 are what they were before they were stored in their original's float type.
    first = start if types == FloatTypes() else digest([start, str(types)])
    chained = (first, *chain(first, recipe.passes, read))
    steps = (start, *chained[1:])
    written = [[one.version, one.model_dump(mode="json", serialize_as_any=True)] for one in recipe.export]
    result = digest([chained[-1], written, recipe.evaluate, exporting_versions() if written else {}])
    said = recipe.model_dump(mode="json", include={"model", "gguf_file", "data", "seed"})
    return Prints(steps, result, {**said, "task": job.task, "source": job.source.fingerprint, "fingerprint": start})
