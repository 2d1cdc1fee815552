"""Recover what the passes before lost: the student learns to give what the untouched original gives.

    before   the student's weights as the last pass left them
    after    weights that minimise Σ weight · loss(student, original) over the training text

No label is needed; the text is the training part of the recipe's data. Shapes stay as they are, so `plan` asks for no
edit. Use it after low_rank and prune_width, whose errors are large and smooth, and before quantize, whose integers have
no gradient. It is not worth its time after a pass that lost almost nothing.
"""

import logging
from dataclasses import asdict
from typing import Any, ClassVar, Literal

import torch
from accelerate import Accelerator
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresskit.data import Sequences
from compresskit.distill.losses import KL, AnyLoss, Hidden, Loss
from compresskit.distill.outputs import Need
from compresskit.distill.teachers import LiveTeacher, Teacher, TwoVocabularies
from compresskit.distill.trainer import TrainingOptions, choose_parameters, train
from compresskit.errors import CompressKitError, ManyErrors
from compresskit.models import ModelSource, answer_kind, find_model, load_empty, load_model, load_tokenizer, task_of
from compresskit.passes.base import PASSES, Part, Pass, Trait
from compresskit.sentence import SentenceEmbedding, read_sentence_embedding
from compresskit.student import Student
from compresskit.surgery.depth_edits import get_stack
from compresskit.surgery.edits import Edit
from compresskit.surgery.provenance import Provenance
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


def _layers_left(student: Student) -> tuple[int, ...] | None:
    """Which of the original's hidden states the student's stand for, where blocks were dropped."""
    provenance = Provenance(student.edits)
    stack = next(iter(provenance.stacks), None)
    if stack is None:
        return None
    return provenance.hidden_layers(stack, len(get_stack(student.original, stack)))


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

    refuses: ClassVar[frozenset[Trait]] = frozenset({"quantized"})
    version: ClassVar[int] = 2
    needs: ClassVar[frozenset[Part]] = frozenset({"training"})
    learns: ClassVar[bool] = True

    def plan(self, model: torch.nn.Module) -> list[Edit]:
        """No edit; refuses losses that do not suit the model, and patterns that match nothing."""
        assert isinstance(model, PreTrainedModel)
        if model.main_input_name != "input_ids":
            what = f"training needs token sequences, and {type(model).__name__} reads {model.main_input_name!r}"
            raise CompressKitError(what, where=self.kind, fix="leave distill out")
        teacher = model if self.teacher is None else load_empty(find_model(self.teacher), task_of(model))
        self._checked_losses(model, teacher)
        choose_parameters(model, self.train, self.freeze)
        return []

    def models_read(self) -> tuple[str, ...]:
        """The teacher, where it is not the original."""
        return () if self.teacher is None else (self.teacher,)

    def apply(self, student: Student, *, generator: torch.Generator) -> dict[str, Any]:
        """Train `student.model` in place against its teacher; eval mode, no gradients afterwards."""
        training = student.corpus.training
        assert isinstance(training, Sequences)
        teacher, sentence, layers = student.original, student.sentence, _layers_left(student)
        if self.teacher is not None:
            source = find_model(self.teacher)
            _check_same_ids(source, student)
            teacher = load_model(source, student.task).requires_grad_(False)
            sentence, layers = read_sentence_embedding(source.folder), None
        losses = self._checked_losses(student.model, teacher)
        accelerator = Accelerator()
        home = student.model.device
        student.model.to(accelerator.device)  # type: ignore[arg-type]
        teacher.to(accelerator.device)  # type: ignore[arg-type]
        teaching = self._teaching(student, teacher, sentence, layers)
        try:
            result = train(
                student.model,
                teaching,
                losses,
                training,
                self,
                generator=generator,
                accelerator=accelerator,
                pooling=student.sentence,
            )
        finally:
            student.model.to(home)  # type: ignore[arg-type]
            teacher.to(home)  # type: ignore[arg-type]
        if not result.best_step:
            LOG.warning("distill: no step was better than the start, so the student stays as it was; try more steps")
        return {"losses": [loss.model_dump(mode="json") for loss in losses], **asdict(result)}

    def _teaching(
        self,
        student: Student,
        teacher: PreTrainedModel,
        sentence: SentenceEmbedding,
        layers: tuple[int, ...] | None,
    ) -> Teacher:
        """What gives the targets: the teacher, and beside a student with fewer tokens a twin that reads these."""
        live = LiveTeacher(teacher, sentence, layers=layers)
        if student.whole is None:
            return live
        own = student.original_corpus.training
        assert isinstance(own, Sequences)
        of_texts: set[Need] = {"sentence"}
        if student.task == "text-classification":
            of_texts.add("predictions")
        twin = LiveTeacher(narrowed(teacher, student.whole.kept), sentence, layers=layers)
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
