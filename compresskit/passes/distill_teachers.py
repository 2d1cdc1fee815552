"""The teachers of `distill`: named, found, checked against the student, and brought before it as one."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresskit.data import Sequences
from compresskit.distill.lineage import Lineage
from compresskit.distill.outputs import Need
from compresskit.distill.teachers import AverageTeacher, LiveTeacher, Teacher, TwoVocabularies
from compresskit.errors import CompressKitError
from compresskit.models import find_model, load_config, load_model, load_shapes, load_tokenizer
from compresskit.passes.distill_options import AVERAGE, ORIGINAL
from compresskit.processors import Processor
from compresskit.sentence import SentenceEmbedding, read_sentence_embedding
from compresskit.student import Student
from compresskit.surgery.plugin import edits_of
from compresskit.surgery.vocabulary_edits import PruneVocabulary, narrowed


def shape_of(name: str, model: PreTrainedModel, task: str, *, where: str) -> PreTrainedModel:
    """A model of the teacher's shapes, where the student-to-be is `model`; perhaps without weights.

    Raises:
        CompressKitError: it is not there; said of `where` in the recipe.
    """
    if name in (ORIGINAL, AVERAGE):
        return model
    try:
        return load_shapes(find_model(name), task)
    except CompressKitError as error:
        error.where = where if error.where in (None, "model") else f"{where}: {error.where}"
        raise


def check_ids(name: str, processor: Processor) -> None:
    """Refuse a teacher that reads other token ids than the original, before any weight is read.

    Raises:
        CompressKitError: as `_known_ids`.
    """
    if name in (ORIGINAL, AVERAGE):
        return
    source = find_model(name)
    fewer = any(isinstance(edit, PruneVocabulary) for edit in edits_of(load_config(source)))
    if not fewer:  # a student with fewer tokens is compared with the student, once that has as few
        assert isinstance(processor, PreTrainedTokenizerBase)
        _known_ids(name, load_tokenizer(source).get_vocab(), processor.get_vocab())


def _known_ids(name: str, theirs: Mapping[str, int], ours: Mapping[str, int]) -> None:
    """Refuse a teacher to which a token of `ours` has another id, or none.

    Raises:
        CompressKitError: names the first token.
    """
    other = sorted(token for token, index in ours.items() if theirs.get(token) != index)
    if not other:
        return
    token = other[0]
    there = "not known" if token not in theirs else f"{theirs[token]}"
    what = (
        f"{name} and the original do not read the same ids, so what it says of a token means another here: {token!r} "
        f"is {there} there and {ours[token]} here ({len(other)} of {len(ours)} tokens differ)"
    )
    raise CompressKitError(what, where="teacher", fix="use a teacher of the same tokenizer")


@dataclass(frozen=True)
class Loaded:
    """A teacher's weights, and how it speaks to the student.

    Attributes:
        name: as the recipe says it.
        model: None only where it is made of the student.
        reads_student: whether it reads the student's tokens where these are fewer than the original's.
        vocabulary: how many tokens it shares with the student, where its head has others.
    """

    name: str
    model: PreTrainedModel
    sentence: SentenceEmbedding
    reads_student: bool = False
    vocabulary: int | None = None


def load_teacher(name: str, student: Student) -> Loaded:
    """The teacher of that name; the original is the student's own, the average starts as the student.

    Raises:
        CompressKitError: it is not there, or reads other ids.
    """
    if name == ORIGINAL:
        return Loaded(name, student.original, student.sentence)
    if name == AVERAGE:
        return Loaded(name, student.model, student.sentence, reads_student=True)
    source = find_model(name)
    theirs = load_tokenizer(source).get_vocab()
    whole, own = student.original_tokenizer, student.tokenizer
    assert isinstance(whole, PreTrainedTokenizerBase)
    assert isinstance(own, PreTrainedTokenizerBase)
    reads_student = student.whole is not None and theirs == own.get_vocab()
    ours = (own if reads_student else whole).get_vocab()
    _known_ids(name, theirs, ours)
    model = load_model(source, student.task).requires_grad_(False)
    widths = {_tokens_of(one) for one in (model, student.model if reads_student else student.original)}
    shared = None if theirs == ours and len(widths) == 1 else max(ours.values()) + 1
    return Loaded(name, model, read_sentence_embedding(source.folder), reads_student, shared)


def _tokens_of(model: PreTrainedModel) -> int | None:
    """Tokens that its head over tokens answers in."""
    head = model.get_output_embeddings()
    return None if head is None else model.config.get_text_config().vocab_size


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.named_parameters()}


def lineage_to(student: Student, teacher: PreTrainedModel) -> Lineage:
    """What of the teacher the student's parts stand for: by the record of edits, where it is shaped as the original."""
    if teacher is not student.model and _shapes(teacher) == _shapes(student.original):
        return Lineage.of(student.edits, student.original)
    return Lineage.to_other(student.model, teacher)


def bring(loaded: Loaded, student: Student, *, decay: float, max_length: int | None) -> Teacher:
    """What gives this teacher's targets; beside a student with fewer tokens a twin of it reads these."""
    if loaded.name == AVERAGE:
        return AverageTeacher(student.model, loaded.sentence, decay=decay)
    lineage = lineage_to(student, loaded.model)
    live = LiveTeacher(loaded.model, loaded.sentence, lineage=lineage, vocabulary=loaded.vocabulary)
    if student.whole is None or loaded.reads_student:
        return live
    own = student.original_corpus.training
    assert isinstance(own, Sequences)
    of_texts: set[Need] = {"sentence"}
    if student.task == "text-classification":
        of_texts.add("predictions")
    twin = LiveTeacher(narrowed(loaded.model, student.whole.kept), loaded.sentence, lineage=lineage)
    return TwoVocabularies(live, twin, own, max_length=max_length, of_texts=frozenset(of_texts))


@contextmanager
def on_device(models: list[PreTrainedModel], device: torch.device) -> Iterator[None]:
    """Within it the models are on `device`, afterwards where they were."""
    homes = [model.device for model in models]
    try:
        for model in models:
            model.to(device)  # type: ignore[arg-type]
        yield
    finally:
        for model, home in zip(models, homes, strict=True):
            model.to(home)  # type: ignore[arg-type]
