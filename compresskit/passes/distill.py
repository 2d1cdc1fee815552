"""Recover what the passes before lost: the student learns to give what the untouched original gives.

    before   the student's weights as the last pass left them
    after    weights that minimise Σ weight · loss(student, original) over the training text

No label is needed; the text is the training part of the recipe's data. Shapes stay as they are, so `plan` asks for no
edit. Use it after low_rank and prune_width, whose errors are large and smooth, and before quantize, whose integers have
no gradient. It is not worth its time after a pass that lost almost nothing.
"""

import copy
import hashlib
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate import Accelerator
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresskit.cache import cache_folder
from compresskit.config import Config
from compresskit.data import DataSource, Sequences, prepare_corpus
from compresskit.data.source import open_source
from compresskit.distill.cached import CachedTeacher, CacheIdentity, Keep, write_cache
from compresskit.distill.checkpoint import forget_state
from compresskit.distill.lineage import Lineage, missing_layer
from compresskit.distill.losses import KL, AnyLoss, Hidden, Loss
from compresskit.distill.options import TrainingOptions
from compresskit.distill.outputs import Need, has_head
from compresskit.distill.parameters import choose_parameters
from compresskit.distill.teachers import LiveTeacher, Teacher, TwoVocabularies
from compresskit.distill.trainer import train
from compresskit.errors import CompressKitError, ManyErrors, RunFailedError
from compresskit.models import (
    ModelSource,
    answer_kind,
    find_model,
    load_empty,
    load_model,
    load_tokenizer,
    model_fingerprint,
    task_of,
)
from compresskit.passes.base import PASSES, Part, Pass, Trait
from compresskit.sentence import read_sentence_embedding
from compresskit.student import Student
from compresskit.surgery.edits import Edit
from compresskit.surgery.vocabulary_edits import narrowed

LOG = logging.getLogger(__name__)


def default_losses(model: PreTrainedModel) -> tuple[Loss, ...]:
    """KL on logits for a model with a head over classes or tokens; hidden states of every block for any other.

    After a least-squares refit of all-MiniLM-L6-v2, hidden states at a learning rate of 1e-4 gained within 60 steps of
    32 sentences; `embedding` with its in-batch similarities did not gain within 80 (one seed each).
    """
    return (KL(),) if answer_kind(model) == "classes" else (Hidden(),)


def _check_same_ids(teacher: ModelSource, student: Student) -> None:
    """Refuse a teacher that reads other token ids.

    Raises:
        CompressKitError: a token has another id there, or is not known.
    """
    tokenizer = student.original_tokenizer
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    ours, theirs = tokenizer.get_vocab(), load_tokenizer(teacher).get_vocab()
    if ours != theirs:
        token = min(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
        what = (
            f"{teacher.name} and the original do not read the same ids: {token!r} is {theirs.get(token)} there and "
            f"{ours.get(token)} here"
        )
        raise CompressKitError(what, where="teacher", fix="use a teacher of the same tokenizer")


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.named_parameters()}


def _lineage(student: Student, teacher: PreTrainedModel) -> Lineage:
    """What of the teacher the student's parts stand for: by the record of edits, where it is shaped as the original."""
    if _shapes(teacher) == _shapes(student.original):
        return Lineage.of(student.edits, student.original)
    return Lineage.to_other(student.model, teacher)


def _check_layers(
    lineage: Lineage, losses: tuple[Loss, ...], student: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    """Refuse losses on layers that the teacher does not have.

    Raises:
        CompressKitError: names the first.
    """
    for i, loss in enumerate(losses):
        missing = missing_layer(lineage, loss.asks(student), teacher)
        if missing is not None:
            what = f"the teacher has no layer {missing!r} to compare the student's with"
            fix = "use kl, hidden without modules, embedding or contrastive, or a teacher built as the original"
            raise CompressKitError(what, where=f"losses[{i}] ({loss.kind})", fix=fix)


def _one_process() -> Accelerator:
    """Refuse a launcher: several processes would each run the whole recipe.

    Raises:
        CompressKitError: there are several.
    """
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        fix = "start compresskit without a launcher, or call compresskit.distill.trainer.train from a script under it"
        raise CompressKitError(f"a recipe runs in one process, and this is one of {accelerator.num_processes}", fix=fix)
    return accelerator


def _forget(state: Path | None) -> None:
    if state is not None:
        forget_state(state)


class TeacherCache(Config):
    """What of the teacher's answers is kept on the disk, and where."""

    keep: Keep = Field(
        default="hidden", description="states before its head (exact), or its `k` largest logits (small)"
    )
    k: int = Field(default=64, ge=1, description="logits that top_k keeps of each token")
    path: str | None = Field(default=None, description="folder for it; by default one of the cache folder, by its key")


@PASSES.add
class Distill(TrainingOptions, Pass):
    """Train the student to agree with the original."""

    kind: Literal["distill"] = "distill"
    losses: tuple[AnyLoss, ...] | None = Field(
        default=None, min_length=1, description="what to agree on; by default kl, or without a head hidden"
    )

    teacher: str | None = Field(
        default=None, description="another model to learn from, of the same tokenizer; by default the original"
    )
    cache: TeacherCache | None = Field(
        default=None, description="keep what the teacher says on the disk, for this and later students; by default not"
    )
    other_text: DataSource | None = Field(
        default=None, description="text of another kind, its evaluation part: a warning where the student loses there"
    )

    refuses: ClassVar[frozenset[Trait]] = frozenset({"quantized"})
    version: ClassVar[int] = 3
    needs: ClassVar[frozenset[Part]] = frozenset({"training"})
    learns: ClassVar[bool] = True

    def plan(self, model: torch.nn.Module) -> list[Edit]:
        """No edit; refuses losses that do not suit the model, and patterns that match nothing."""
        assert isinstance(model, PreTrainedModel)
        if model.main_input_name != "input_ids":
            what = f"training needs token sequences, and {type(model).__name__} reads {model.main_input_name!r}"
            raise CompressKitError(what, where=self.kind, fix="leave distill out")
        teacher = model if self.teacher is None else load_empty(find_model(self.teacher), task_of(model))
        self._check_cache(self._checked_losses(model, teacher), model)
        self._check_token_weight(model)
        choose_parameters(model, self.train, self.freeze)
        if self.other_text is not None:
            open_source(self.other_text)
        return []

    def _check_token_weight(self, model: PreTrainedModel) -> None:
        per_token = has_head(model) and "SequenceClassification" not in type(model).__name__
        if self.token_weight == "even" or (model.can_generate() if self.token_weight == "tsld" else per_token):
            return
        told = "what it says of each next token" if self.token_weight == "tsld" else "its predictions for each token"
        what = f"{self.token_weight} weighs tokens by {told}, and {type(model).__name__} gives none"
        raise CompressKitError(what, where="token_weight", fix="leave token_weight out")

    def models_read(self) -> tuple[str, ...]:
        """The teacher, where it is not the original."""
        return () if self.teacher is None else (self.teacher,)

    def texts_read(self) -> tuple[DataSource, ...]:
        """The other text, where there is one."""
        return () if self.other_text is None else (self.other_text,)

    def apply(self, student: Student, *, generator: torch.Generator) -> dict[str, Any]:
        """Train `student.model` in place against its teacher; eval mode, no gradients afterwards."""
        training = student.corpus.training
        assert isinstance(training, Sequences)
        teacher, sentence = student.original, student.sentence
        if self.teacher is not None:
            source = find_model(self.teacher)
            _check_same_ids(source, student)
            teacher = load_model(source, student.task).requires_grad_(False)
            sentence = read_sentence_embedding(source.folder)
        losses, lineage = self._checked_losses(student.model, teacher), _lineage(student, teacher)
        _check_layers(lineage, losses, student.model, teacher)
        accelerator = _one_process()
        home, state = student.model.device, self._state_folder(student, teacher, generator)
        student.model.to(accelerator.device)  # type: ignore[arg-type]
        teacher.to(accelerator.device)  # type: ignore[arg-type]
        try:
            teaching = self._teaching(student, LiveTeacher(teacher, sentence, lineage=lineage))
            if self.cache is not None:
                teaching = self._cached(student, teaching, losses, teacher, accelerator.device)
            result = train(
                student.model,
                teaching,
                losses,
                training,
                self,
                generator=generator,
                accelerator=accelerator,
                teacher_shape=teacher,
                pooling=student.sentence,
                elsewhere=self._elsewhere(student),
                checkpoint=state,
            )
        except RunFailedError:
            _forget(state)  # the same would happen again
            raise
        finally:
            student.model.to(home)  # type: ignore[arg-type]
            teacher.to(home)  # type: ignore[arg-type]
        _forget(state)
        if not result.best_step:
            LOG.warning("distill: no step was better than the start, so the student stays as it was; try more steps")
        notes = {"losses": [loss.model_dump(mode="json") for loss in losses], **asdict(result)}
        if isinstance(teaching, CachedTeacher):
            notes["cache"] = {name: teaching.facts[name] for name in ("keep", "tokens", "bytes_per_token")}
        return notes

    def _state_folder(self, student: Student, teacher: PreTrainedModel, generator: torch.Generator) -> Path | None:
        """Where the state of this very training lies if it is killed: whatever decides its result is in the name."""
        if self.checkpoint_minutes is None:
            return None
        key = hashlib.sha256(generator.get_state().numpy().tobytes())
        told = [
            self.version,
            self.model_dump(mode="json", serialize_as_any=True, exclude={"checkpoint_minutes"}),
            student.corpus.fingerprint,
            student.original_corpus.fingerprint,
            model_fingerprint(student.model),
            model_fingerprint(teacher),
            [open_source(text).digest for text in self.texts_read()],
        ]
        key.update(json.dumps(told, sort_keys=True, default=str).encode())
        return cache_folder() / "training" / key.hexdigest()[:32]

    def _cached(
        self, student: Student, live: Teacher, losses: tuple[Loss, ...], teacher: PreTrainedModel, device: torch.device
    ) -> CachedTeacher:
        """What was kept of the teacher's answers to this text, made first where it is not there."""
        assert self.cache is not None
        training = student.corpus.training
        assert isinstance(training, Sequences)
        asked = {str(one) for loss in losses for one in loss.asks(student.model)}
        temperatures = {loss.temperature for loss in losses if isinstance(loss, KL)}
        identity = CacheIdentity(
            teacher=model_fingerprint(teacher),
            text=f"{student.corpus.fingerprint} {student.original_corpus.fingerprint}",
            max_length=self.max_length,
            keep=self.cache.keep,
            k=self.cache.k,
            temperatures=tuple(sorted({1.0, 2.0, 4.0} | temperatures)),
            needs=tuple(sorted(asked | ({"predictions"} if self.token_weight != "even" else set()))),
        )
        folder = Path(self.cache.path) if self.cache.path else cache_folder() / "teachers" / identity.key
        if not folder.exists():
            write_cache(folder, identity, live, training, batch_size=self.batch_size, device=device)
        temperature = next(iter(temperatures), 1.0)
        return CachedTeacher(folder, identity, training, device=device, temperature=temperature, live=live)

    def _check_cache(self, losses: tuple[Loss, ...], model: PreTrainedModel) -> None:
        if self.cache is None:
            return
        inner = [loss.kind for loss in losses if loss.asks(model) - {"predictions", "sentence"}]
        if inner:
            what = f"loss {inner[0]} reads inner layers of the teacher, which are too large to keep"
            raise CompressKitError(
                what, where="cache", fix="leave cache out, or use kl, embedding and contrastive alone"
            )
        if self.cache.keep == "top_k" and self.token_weight != "even":
            what = f"token_weight {self.token_weight} reads all that the teacher says"
            raise CompressKitError(what, where="cache.keep", fix="use keep: hidden")
        if len({loss.temperature for loss in losses if isinstance(loss, KL)}) > 1 and self.cache.keep == "top_k":
            what = "two kl losses of different temperatures cannot read one top k"
            raise CompressKitError(what, where="cache.keep", fix="use keep: hidden")

    def _elsewhere(self, student: Student) -> Sequences | None:
        """The other text as the student reads it."""
        if self.other_text is None:
            return None
        tokenizer = copy.deepcopy(student.tokenizer)  # tokenising leaves its mark in a tokenizer
        assert isinstance(tokenizer, PreTrainedTokenizerBase)
        try:
            corpus = prepare_corpus(self.other_text, tokenizer, pack=student.task == "text-generation", seed=0)
        except CompressKitError as error:
            raise error.at("other_text") from None
        assert isinstance(corpus.evaluation, Sequences)
        return corpus.evaluation

    def _teaching(self, student: Student, live: LiveTeacher) -> Teacher:
        """What gives the targets: the teacher, and beside a student with fewer tokens a twin that reads these."""
        if student.whole is None:
            return live
        own = student.original_corpus.training
        assert isinstance(own, Sequences)
        of_texts: set[Need] = {"sentence"}
        if student.task == "text-classification":
            of_texts.add("predictions")
        twin = LiveTeacher(narrowed(live.model, student.whole.kept), live.pooling, lineage=live.lineage)
        return TwoVocabularies(live, twin, own, max_length=self.max_length, of_texts=frozenset(of_texts))

    def _checked_losses(self, model: PreTrainedModel, original: PreTrainedModel) -> tuple[Loss, ...]:
        losses, errors = self.losses or default_losses(model), []
        for i, loss in enumerate(losses):
            try:
                loss.check(model, original)
            except CompressKitError as error:
                errors.append(error.at(f"losses[{i}]"))
        if len(errors) > 1:
            raise ManyErrors(errors)
        if errors:
            raise errors[0]
        return losses
