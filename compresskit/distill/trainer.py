"""The one training loop: a student learns from its teacher, and ends with the best weights it had on held-out text.

Each optimiser step sums the losses of `accumulate` batches, weighted once over the whole step; AdamW follows a learning
rate with warm-up and decay. Every `held_out_every` steps the same losses are measured on sequences kept apart from the
training part, and the weights of the least held-out loss stay. Step 0 counts, so training never makes it worse.

On a CPU two runs from the same generator end with the same bits. Dropout stays off unless asked for: the teacher runs
without it, and a student that is to agree with it gains nothing from noise.
"""

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from accelerate import Accelerator
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresskit.config import Config, did_you_mean
from compresskit.data import Sequences
from compresskit.distill.batching import Numbered, by_length, split_held_out, training_steps
from compresskit.distill.losses import Loss
from compresskit.distill.outputs import Need, StepWeights, observe, step_weights
from compresskit.distill.progress import TrainingBar
from compresskit.distill.teachers import Teacher
from compresskit.errors import CompressKitError, RunFailedError
from compresskit.sentence import MEAN_POOLED, SentenceEmbedding

log = logging.getLogger(__name__)


class TrainingOptions(Config):
    """How to train, whatever the losses are."""

    steps: int = Field(default=300, ge=1, description="optimiser steps")
    batch_size: int = Field(default=32, ge=1, description="sequences in a batch")
    accumulate: int = Field(default=1, ge=1, description="batches in an optimiser step")
    learning_rate: float = Field(default=1e-4, gt=0, description="of AdamW, at its highest")
    schedule: Literal["cosine", "linear"] = Field(default="cosine", description="how the learning rate falls to 0")
    warmup: float = Field(default=0.1, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    weight_decay: float = Field(default=0.0, ge=0, description="of AdamW")
    clip_norm: float = Field(default=1.0, gt=0, description="longer gradients are shortened to this norm")
    max_length: int | None = Field(default=None, ge=2, description="tokens of a sequence that are used; by default all")
    held_out: int = Field(
        default=128, ge=1, description="training sequences, at most a tenth, that choose the best weights"
    )
    held_out_every: int = Field(default=50, ge=1, description="optimiser steps between two looks at the held-out loss")
    train: tuple[str, ...] = Field(default=("*",), description="globs over the names of parameters that learn")
    freeze: tuple[str, ...] = Field(default=(), description="globs over the names among those that do not")
    dropout: bool = Field(default=False, description="whether the model's dropout is on while it learns")


@dataclass(frozen=True)
class TrainingResult:
    """What training did; losses are weighted sums as they are minimised, `parts` each loss alone."""

    held_out_loss_before: float
    held_out_loss_after: float
    parts_before: dict[str, float]
    parts_after: dict[str, float]
    best_step: int
    trained_params: int
    tokens: int
    tokens_per_s: float


def learning_rate_at(step: int, *, steps: int, warmup: float, schedule: str) -> float:
    """The factor of the learning rate at `step` (0 to steps − 1): rises over the warm-up, then falls towards 0."""
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    left = 1 - (step - rising) / (steps - rising)
    return left if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))


def choose_parameters(model: nn.Module, train: tuple[str, ...], freeze: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """The float parameters whose names match `train` and not `freeze`; shared ones once.

    Raises:
        CompressKitError: a pattern that matches nothing, or nothing left to train.
    """
    named = {name: value for name, value in model.named_parameters() if value.is_floating_point()}
    if not named:
        raise CompressKitError("the model has no float weight left to train", fix="move distill before quantize")
    for field, patterns in (("train", train), ("freeze", freeze)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in named):
                near = did_you_mean(pattern, named)
                fix = f"did you mean {near!r}?" if near else "`compresskit modules MODEL` lists the names"
                raise CompressKitError(f"{pattern!r} matches no parameter", where=field, fix=fix)
    chosen = {
        name: value
        for name, value in named.items()
        if any(fnmatchcase(name, pattern) for pattern in train)
        and not any(fnmatchcase(name, pattern) for pattern in freeze)
    }
    if not chosen:
        raise CompressKitError("every parameter is frozen", where="freeze", fix="freeze fewer names")
    return chosen


@contextmanager
def _only_these_learn(model: nn.Module, chosen: Mapping[str, nn.Parameter], *, dropout: bool) -> Iterator[None]:
    """Gradients for `chosen` alone; afterwards none, no requires_grad and eval mode."""
    model.requires_grad_(False).train(dropout)
    for value in chosen.values():
        value.requires_grad_(True)
    try:
        yield
    finally:
        model.eval().requires_grad_(False).zero_grad(set_to_none=True)


class _Trainer:
    """State of one training run."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: Teacher,
        losses: Sequence[Loss],
        chosen: Mapping[str, nn.Parameter],
        options: TrainingOptions,
        accelerator: Accelerator,
        pooling: SentenceEmbedding,
    ) -> None:
        self.student, self.teacher, self.losses, self.chosen = student, teacher, losses, chosen
        self.options, self.accelerator, self.pooling = options, accelerator, pooling
        self.needs: frozenset[Need] = frozenset().union(*(loss.needs for loss in losses))
        self.names = [
            loss.kind if sum(other.kind == loss.kind for other in losses) == 1 else f"{loss.kind}[{i}]"
            for i, loss in enumerate(losses)
        ]
        self.optimizer = torch.optim.AdamW(
            chosen.values(), lr=options.learning_rate, weight_decay=options.weight_decay, fused=True
        )
        self.best: dict[str, Tensor] = {}
        self.best_loss, self.best_step = math.inf, 0

    def batch_losses(self, numbered: Numbered, weights: StepWeights) -> list[Tensor]:
        """Each loss of one batch, in the order of `losses`."""
        device = self.accelerator.device
        batch = {name: values.to(device) for name, values in numbered.batch.items()}
        weights = StepWeights(weights.token.to(device), weights.row.to(device), weights.next_token.to(device))
        target = self.teacher(batch, numbered.rows, self.needs)
        ours = observe(self.student, batch, self.needs, self.pooling)
        return [loss(ours, target, batch, weights) for loss in self.losses]

    def total(self, parts: Iterable[float]) -> float:
        """The weighted sum that is minimised."""
        return sum(loss.weight * part for loss, part in zip(self.losses, parts, strict=True))

    @torch.no_grad()
    def measure(self, batches: Sequence[Numbered]) -> list[float]:
        """Each loss over all `batches`, without dropout."""
        mode = self.student.training
        self.student.eval()
        sums = [0.0] * len(self.losses)
        for numbered, weights in zip(batches, step_weights(b.batch["attention_mask"] for b in batches), strict=True):
            for i, part in enumerate(self.batch_losses(numbered, weights)):
                sums[i] += part.item()
        self.student.train(mode)
        return sums

    def keep_if_best(self, step: int, loss: float) -> None:
        """Remember the weights where `loss` is the least so far."""
        if loss < self.best_loss:
            self.best_loss, self.best_step = loss, step
            self.best = {name: value.detach().clone() for name, value in self.chosen.items()}

    def restore_best(self) -> None:
        """Put the remembered weights back."""
        with torch.no_grad():
            for name, value in self.best.items():
                self.chosen[name].copy_(value)

    def step(self, number: int, batches: Sequence[Numbered]) -> list[float]:
        """One optimiser step; returns each loss.

        Raises:
            RunFailedError: a loss or a gradient that is not finite; the best weights are back in the model.
        """
        options = self.options
        factor = learning_rate_at(number, steps=options.steps, warmup=options.warmup, schedule=options.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = options.learning_rate * factor
        sums = [0.0] * len(self.losses)
        for numbered, weights in zip(batches, step_weights(b.batch["attention_mask"] for b in batches), strict=True):
            parts = self.batch_losses(numbered, weights)
            for i, part in enumerate(parts):
                sums[i] += part.item()
            if not math.isfinite(sum(sums)):
                self._fail(number, f"the loss is {dict(zip(self.names, sums, strict=True))}")
            scaled = [loss.weight * part for loss, part in zip(self.losses, parts, strict=True)]
            self.accelerator.backward(torch.stack(scaled).sum())
        norm = self.accelerator.clip_grad_norm_(list(self.chosen.values()), options.clip_norm)
        if norm is not None and not math.isfinite(float(norm)):
            self._fail(number, f"the gradient's norm is {float(norm)}")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return sums

    def _fail(self, number: int, what: str) -> None:
        self.restore_best()
        raise RunFailedError(
            f"step {number + 1} of {self.options.steps}: {what}; the weights of step {self.best_step} are kept",
            where="distill",
            fix="lower learning_rate",
        )


def train(
    student: PreTrainedModel,
    teacher: Teacher,
    losses: Sequence[Loss],
    training: Sequences,
    options: TrainingOptions,
    *,
    generator: torch.Generator,
    accelerator: Accelerator,
    pooling: SentenceEmbedding = MEAN_POOLED,
) -> TrainingResult:
    """Train `student` in place, in eval mode and without gradients afterwards.

    Args:
        student: any model whose chosen parameters are float, on `accelerator.device`.
        teacher: gives the targets; see `compresskit.distill.teachers`.
        losses: at least one; their `check` has passed.
        training: sequences, of which `options.held_out` are kept apart.
        options: see there.
        generator: decides the split, the order and the dropout; the only randomness.
        accelerator: one process; more are refused.
        pooling: how the student's hidden states become sentence embeddings.

    Raises:
        CompressKitError: nothing to train, patterns that match nothing, fewer than two sequences, several processes.
        RunFailedError: a loss that is not finite; the student then holds the best weights so far.

    Cost: `steps` · `accumulate` forward and backward passes, and one extra copy of the trained weights.
    """
    if accelerator.num_processes > 1:
        raise CompressKitError("distill runs in one process", fix="start compresskit without a launcher")
    if len(training.rows) < 2:
        raise CompressKitError(f"{len(training.rows)} training sequences are too few", where="data", fix="add text")
    chosen = choose_parameters(student, options.train, options.freeze)
    rows, held_out = split_held_out(len(training.rows), options.held_out, generator=generator)
    apart = by_length(training, held_out, options.batch_size, max_length=options.max_length)
    steps = training_steps(
        training,
        rows,
        batch_size=options.batch_size,
        accumulate=options.accumulate,
        max_length=options.max_length,
        generator=generator,
    )
    seed = int(torch.randint(2**62, (), generator=generator))
    with _only_these_learn(student, chosen, dropout=options.dropout), _seeded(seed, accelerator.device):
        trainer = _Trainer(student, teacher, losses, chosen, options, accelerator, pooling)
        return _run(trainer, steps, apart)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's global randomness (dropout reads it) from `seed`, and as it was afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _run(trainer: _Trainer, steps: Iterable[list[Numbered]], apart: Sequence[Numbered]) -> TrainingResult:
    options, tokens, training_s = trainer.options, 0, 0.0
    before = after = trainer.measure(apart)
    if not math.isfinite(trainer.total(before)):
        raise RunFailedError(f"the held-out loss is {trainer.total(before)} before any step", where="distill")
    trainer.keep_if_best(0, trainer.total(before))
    with TrainingBar("distill", options.steps, trainer.names) as bar:
        for number, batches in zip(range(options.steps), steps, strict=False):
            started = time.perf_counter()
            parts = trainer.step(number, batches)
            training_s += time.perf_counter() - started
            tokens += sum(int(numbered.batch["attention_mask"].sum()) for numbered in batches)
            bar.advance(parts, tokens / training_s)
            if (number + 1) % options.held_out_every == 0 or number + 1 == options.steps:
                now = trainer.measure(apart)
                trainer.keep_if_best(number + 1, trainer.total(now))
                if trainer.best_step == number + 1:
                    after = now
                log.info("step %d: held-out loss %.5f", number + 1, trainer.total(now))
    trainer.restore_best()
    return TrainingResult(
        held_out_loss_before=trainer.total(before),
        held_out_loss_after=trainer.best_loss,
        parts_before=dict(zip(trainer.names, before, strict=True)),
        parts_after=dict(zip(trainer.names, after, strict=True)),
        best_step=trainer.best_step,
        trained_params=sum(value.numel() for value in trainer.chosen.values()),
        tokens=tokens,
        tokens_per_s=tokens / training_s,
    )
