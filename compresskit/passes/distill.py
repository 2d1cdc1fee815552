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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresskit.cache import cache_folder
from compresskit.data import Corpus, DataSource, Sequences, check_max_length, prepare_corpus
from compresskit.data.source import called, open_source
from compresskit.distill.cached import CachedTeacher, CacheIdentity, write_cache
from compresskit.distill.checkpoint import forget_old_states, forget_state
from compresskit.distill.goals import Blocks
from compresskit.distill.lineage import Lineage, missing_layer
from compresskit.distill.losses import KL, Loss
from compresskit.distill.several import SeveralTeachers
from compresskit.distill.teachers import Teacher
from compresskit.distill.tracking import tracked
from compresskit.distill.trainer import train
from compresskit.errors import CompressKitError, RunFailedError
from compresskit.fingerprint import model_fingerprint
from compresskit.models import task_of
from compresskit.passes.base import PASSES, Pass, TextPart, Trait
from compresskit.passes.distill_options import AVERAGE, ORIGINAL, DistillOptions
from compresskit.passes.distill_teachers import (
    Loaded,
    bring,
    check_ids,
    lineage_to,
    load_teacher,
    on_device,
    shape_of,
)
from compresskit.processors import Processor
from compresskit.student import Student
from compresskit.surgery.edits import Edit

LOG = logging.getLogger(__name__)


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


def _check_blocks(lineage: Lineage, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Refuse a teacher without the student's stack of blocks.

    Raises:
        CompressKitError: there is none of that name.
    """
    missing = missing_layer(lineage, Blocks(student, teacher).asks, teacher)
    if missing is not None:
        what = f"the teacher has no blocks called {missing!r} for the student's to learn from"
        raise CompressKitError(what, where="block_steps", fix="leave block_steps out, or use a teacher built alike")


def _forget(state: Path | None) -> None:
    if state is not None:
        forget_state(state)


@PASSES.add
class Distill(DistillOptions, Pass):
    """Train the student to agree with the original."""

    kind: Literal["distill"] = "distill"
    refuses: ClassVar[frozenset[Trait]] = frozenset({"quantized"})
    version: ClassVar[int] = 7
    needs: ClassVar[frozenset[TextPart]] = frozenset({"training"})
    inert: ClassVar[frozenset[str]] = frozenset({"checkpoint_minutes", "tracker", "tracker_folder"})
    learns: ClassVar[bool] = True

    def plan(self, model: torch.nn.Module) -> list[Edit]:
        """No edit; refuses losses that do not suit the model, and patterns that match nothing."""
        assert isinstance(model, PreTrainedModel)
        if model.main_input_name != "input_ids":
            what = f"training needs token sequences, and {type(model).__name__} reads {model.main_input_name!r}"
            raise CompressKitError(what, where=self.kind, fix="leave distill out")
        named = zip(self.names, self.places, strict=True)
        self.check(model, [shape_of(name, model, task_of(model), where=place) for name, place in named])
        if self.other_text is not None:
            with called("other_text"):
                open_source(self.other_text)
                check_max_length(model, self.other_text.max_length)
        return []

    def check_text(self, processor: Processor, corpus: Corpus) -> None:
        """Refuse teachers of other tokenizers."""
        for name in self.names:
            check_ids(name, processor)

    def models_read(self) -> tuple[str, ...]:
        """The teachers that are models elsewhere."""
        return tuple(name for name in self.names if name not in (ORIGINAL, AVERAGE))

    def texts_read(self) -> tuple[DataSource, ...]:
        """The other text, where there is one."""
        return () if self.other_text is None else (self.other_text,)

    def apply(self, student: Student, *, generator: torch.Generator) -> dict[str, Any]:
        """Train `student.model` in place against its teacher; eval mode, no gradients afterwards."""
        training = student.corpus.training
        assert isinstance(training, Sequences)
        loaded = [load_teacher(name, student) for name in self.names]
        first = loaded[0].model
        losses, *_ = [self.checked_losses(student.model, one.model) for one in loaded]
        self.check_teachers(losses, student.model, [one.model for one in loaded])
        for one in loaded:
            lineage = lineage_to(student, one.model)
            _check_layers(lineage, losses, student.model, one.model)
            if self.block_steps:
                _check_blocks(lineage, student.model, one.model)
        state = self._state_folder(student, loaded, generator)
        if state is not None:
            forget_old_states(state.parent, besides=state)
        try:
            with (
                self._tracked() as accelerator,
                on_device([student.model, *(one.model for one in loaded)], accelerator.device),
            ):
                teaching = self._teaching(student, loaded)
                if self.cache is not None:
                    teaching = self._cached(student, teaching, losses, loaded[0], accelerator.device)
                result = train(
                    student.model,
                    teaching,
                    losses,
                    training,
                    self,
                    generator=generator,
                    accelerator=accelerator,
                    teacher_shape=first,
                    pooling=student.sentence,
                    elsewhere=self._elsewhere(student),
                    checkpoint=state,
                )
        except RunFailedError:
            _forget(state)  # the same would happen again
            raise
        _forget(state)
        if not result.best_step:
            LOG.warning("distill: no step was better than the start, so the student stays as it was; try more steps")
        notes = {"losses": [loss.model_dump(mode="json") for loss in losses], **asdict(result)}
        if isinstance(teaching, CachedTeacher):
            notes["cache"] = {name: teaching.facts[name] for name in ("keep", "tokens", "bytes_per_token")}
        if isinstance(teaching, SeveralTeachers):
            notes["disagreement"] = teaching.tally.summary(self.names)
        return notes

    @contextmanager
    def _tracked(self) -> Iterator[Accelerator]:
        """Refuse a launcher: several processes would each run the whole recipe.

        Raises:
            CompressKitError: there are several.
        """
        with tracked(self.tracker, self.tracker_folder or "runs") as accelerator:
            if accelerator.num_processes > 1:
                what = f"a recipe runs in one process, and this is one of {accelerator.num_processes}"
                fix = "start compresskit without a launcher, or call compresskit.distill.trainer.train under it"
                raise CompressKitError(what, fix=fix)
            yield accelerator

    def _teaching(self, student: Student, loaded: Sequence[Loaded]) -> Teacher:
        """What gives the targets: the teacher, or several as one."""
        decay = 0.99 if self.decay is None else self.decay
        each = [bring(one, student, decay=decay, max_length=self.max_length) for one in loaded]
        if self.teachers is None:
            return each[0]
        return SeveralTeachers(
            each,
            [one.weight for one in self.teachers],
            self.rule(student.model),
            next_tokens=student.model.can_generate(),
        )

    def _state_folder(self, student: Student, loaded: Sequence[Loaded], generator: torch.Generator) -> Path | None:
        """Where the state of this very training lies if it is killed: whatever decides its result is in the name."""
        if self.checkpoint_minutes is None:
            return None
        key = hashlib.sha256(generator.get_state().numpy().tobytes())
        told = [
            self.version,
            self.deciding_options(),
            student.corpus.fingerprint,
            student.original_corpus.fingerprint,
            student.fingerprint(),
            [model_fingerprint(one.model) for one in loaded],
            [open_source(text).digest for text in self.texts_read()],
        ]
        key.update(json.dumps(told, sort_keys=True, default=str).encode())
        return cache_folder() / "training" / key.hexdigest()[:32]

    def _cached(
        self, student: Student, live: Teacher, losses: tuple[Loss, ...], loaded: Loaded, device: torch.device
    ) -> CachedTeacher:
        """What was kept of the teacher's answers to this text, made first where it is not there."""
        assert self.cache is not None
        training = student.corpus.training
        assert isinstance(training, Sequences)
        asked = {str(one) for loss in losses for one in loss.asks(student.model)}
        temperatures = {loss.temperature for loss in losses if isinstance(loss, KL)}
        identity = CacheIdentity(
            teacher=model_fingerprint(loaded.model),
            text=f"{student.corpus.fingerprint} {student.original_corpus.fingerprint}",
            max_length=self.max_length,
            keep=self.cache.keep,
            k=self.cache.k,
            temperatures=tuple(sorted({1.0, 2.0, 4.0} | temperatures)),
            needs=tuple(sorted(asked | ({"predictions"} if self.token_weight != "even" else set()))),
            vocabulary=loaded.vocabulary,
        )
        folder = Path(self.cache.path) if self.cache.path else cache_folder() / "teachers" / identity.key
        if not folder.exists():
            write_cache(folder, identity, live, training, batch_size=self.batch_size, device=device)
        temperature = next(iter(temperatures), 1.0)
        return CachedTeacher(folder, identity, training, device=device, temperature=temperature, live=live)

    def _elsewhere(self, student: Student) -> Sequences | None:
        """The other text as the student reads it."""
        if self.other_text is None:
            return None
        tokenizer = copy.deepcopy(student.tokenizer)  # tokenising leaves its mark in a tokenizer
        assert isinstance(tokenizer, PreTrainedTokenizerBase)
        with called("other_text"):
            corpus = prepare_corpus(self.other_text, tokenizer, pack=student.task == "text-generation", seed=0)
        assert isinstance(corpus.evaluation, Sequences)
        return corpus.evaluation
