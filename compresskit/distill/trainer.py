"""The one training loop: a student learns from its teacher, and ends with the best weights it had on held-out text.

Each optimiser step sums the losses of `accumulate` batches, weighted once over the whole step; AdamW follows a learning
rate with warm-up and decay. Every `held_out_every` steps the same losses are measured on sequences kept apart from the
training part, and the weights of the least held-out loss stay. Step 0 counts, so training never makes it worse. With
`block_steps` a first stage trains each block alone (`compresskit.distill.goals`), with a rate that rises and falls for
itself and an optimiser of its own; what is kept is chosen by the losses of the whole model all along.

Under `accelerate launch` the processes share a step's batches, and add up their gradients: one process, two of them,
and twice the accumulation give the same step. Each holds the whole student, or under FSDP2 its share of it
(`compresskit.distill.sharded`); the first writes checkpoints.

On a CPU two runs from the same generator end with the same bits, and so does one that was killed and goes on from its
checkpoint. Dropout stays off unless asked for: the teacher runs without it, and a student that is to agree with it
gains nothing from noise.
"""

import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from compresskit.data import Sequences
from compresskit.distill.batching import Numbered, by_length, split_held_out, training_steps
from compresskit.distill.checkpoint import load_state, save_state
from compresskit.distill.learner import Learner
from compresskit.distill.losses import Loss
from compresskit.distill.options import TrainingOptions
from compresskit.distill.parameters import choose_parameters, only_these_learn, recomputed_blocks
from compresskit.distill.progress import TrainingBar
from compresskit.distill.sharded import processes_of
from compresskit.distill.teachers import Teacher
from compresskit.errors import CompressKitError, RunFailedError
from compresskit.kernels.linear_kl import release_memory
from compresskit.sentence import MEAN_POOLED, SentenceEmbedding

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingResult:
    """What training did; losses are weighted sums as they are minimised at the end, `parts` each loss alone.

    `elsewhere` is the same weighted sum on a second text, None where none was given; `blocks` the mean relative error
    of each block alone on held-out text, before the stage in which they learn so and after it, None without one;
    `learning_rate` the highest of all steps.
    """

    held_out_loss_before: float
    held_out_loss_after: float
    parts_before: dict[str, float]
    parts_after: dict[str, float]
    elsewhere_before: float | None
    elsewhere_after: float | None
    blocks_before: float | None
    blocks_after: float | None
    best_step: int
    learning_rate: float
    trained_params: int
    tokens: int
    tokens_per_s: float


def train(
    student: PreTrainedModel,
    teacher: Teacher,
    losses: Sequence[Loss],
    training: Sequences,
    options: TrainingOptions,
    *,
    generator: torch.Generator,
    accelerator: Accelerator,
    teacher_shape: PreTrainedModel | None = None,
    pooling: SentenceEmbedding = MEAN_POOLED,
    elsewhere: Sequences | None = None,
    checkpoint: Path | None = None,
) -> TrainingResult:
    """Train `student` in place, in eval mode and without gradients afterwards.

    Args:
        student: any model whose chosen parameters are float, on `accelerator.device`, the same in every process.
        teacher: gives the targets; see `compresskit.distill.teachers`.
        losses: at least one; their `check` has passed.
        training: sequences, of which `options.held_out` are kept apart.
        options: see there.
        generator: decides the split, the order and the dropout; the only randomness, the same in every process.
        accelerator: of one process or several, each of which holds the whole teacher, and the student as FSDP2 or not.
        teacher_shape: a model of the teacher's widths, perhaps without weights, where they are not the student's.
        pooling: how the student's hidden states become sentence embeddings.
        elsewhere: text of another kind, in the student's tokens, on which the same losses are watched.
        checkpoint: a folder for the state of the training; where it holds one, training goes on from it.

    Raises:
        CompressKitError: nothing to train, patterns that match nothing, fewer than two sequences, losses that all end
            at 0, batches that the processes cannot share evenly, settings of FSDP that are not followed, a checkpoint
            that is damaged.
        RunFailedError: a loss that is not finite; the student then holds the best weights so far.

    Cost: `steps` · `accumulate` forward and backward passes, and one extra copy of the trained weights.
    """
    _check(losses, training, options, accelerator)
    processes = processes_of(accelerator)
    rows, held_out = split_held_out(len(training.rows), options.held_out, generator=generator)
    apart = by_length(training, held_out, options.batch_size, max_length=options.max_length)
    others = [] if elsewhere is None else _numbered_apart(elsewhere, options)
    steps = training_steps(
        training,
        rows,
        batch_size=options.batch_size,
        accumulate=options.accumulate,
        max_length=options.max_length,
        generator=generator,
    )
    seed = int(torch.randint(2**62, (), generator=generator))
    with processes.holding(student) as held:
        chosen = choose_parameters(held, options.train, options.freeze)
        running = recomputed_blocks(held) if options.recompute else nullcontext()
        with (
            only_these_learn(held, chosen, dropout=options.dropout),
            _seeded(seed, accelerator.device),
            running,
        ):
            learner = Learner(held, teacher, losses, chosen, options, processes, pooling, teacher_shape or held)
            try:
                return _Run(learner, apart, others, checkpoint).finish(steps)
            finally:
                release_memory()


def _check(losses: Sequence[Loss], training: Sequences, options: TrainingOptions, accelerator: Accelerator) -> None:
    processes = accelerator.num_processes
    if options.accumulate % processes:
        what = f"{options.accumulate} batches of a step cannot be shared by {processes} processes"
        raise CompressKitError(what, where="accumulate", fix=f"use a multiple of {processes}")
    if len(training.rows) < 2:
        raise CompressKitError(f"{len(training.rows)} training sequences are too few", where="data", fix="add text")
    if not any(loss.final_weight for loss in losses):
        what = "every loss counts 0 at the end, by which weights are chosen"
        raise CompressKitError(what, where="losses", fix="give one of them a weight_end above 0")


def _numbered_apart(elsewhere: Sequences, options: TrainingOptions) -> list[Numbered]:
    """The batches of another text: negative numbers, at which teachers remember nothing."""
    found = by_length(elsewhere, range(len(elsewhere)), options.batch_size, max_length=options.max_length)
    return [replace(numbered, rows=[-1 - row for row in numbered.rows]) for numbered in found]


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's global randomness (dropout reads it) from `seed`, and as it was afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class _Run:
    """One training under way: what was measured so far, and when its state was last written."""

    def __init__(
        self, learner: Learner, apart: Sequence[Numbered], others: Sequence[Numbered], checkpoint: Path | None
    ) -> None:
        self.learner, self.apart, self.others, self.checkpoint = learner, apart, others, checkpoint
        self.done, self.tokens, self.training_s = 0, 0, 0.0
        self.before = self.after = [0.0] * len(learner.whole.losses)
        self.elsewhere: list[float] = []  # before training, at the best step
        self.blocks: list[float] = []  # each block alone, before training and after its stage
        self.written = time.monotonic()

    def finish(self, steps: Iterable[list[Numbered]]) -> TrainingResult:
        """Every step that is missing; the student ends with its best weights."""
        learner, options = self.learner, self.learner.options
        if not self._go_on():
            self._measure_first()
        with TrainingBar("distill", options.steps) as bar:
            for number, batches in zip(range(options.steps), steps, strict=False):
                if number < self.done:
                    continue
                started = time.perf_counter()
                parts = learner.step(number, batches)
                self.training_s += time.perf_counter() - started
                self.tokens += sum(int(numbered.batch["attention_mask"].sum()) for numbered in batches)
                self.done = number + 1
                told = dict(zip(learner.goal_at(number).names, parts, strict=True))
                bar.advance(told, self.tokens / self.training_s)
                learner.accelerator.log({**told, "tokens_per_s": self.tokens / self.training_s}, step=self.done)
                if self.done == options.block_steps:
                    self.blocks.append(learner.measure(self.apart, learner.blocks)[0])
                if self.done % options.held_out_every == 0 or self.done == options.steps:
                    self._look()
                    self._write()
        learner.restore_best()
        self._warn_of_drift()
        return self._result()

    def _measure_first(self) -> None:
        learner = self.learner
        self.before = self.after = learner.measure(self.apart)
        if not math.isfinite(learner.whole.total(self.before)):
            raise RunFailedError(
                f"the held-out loss is {learner.whole.total(self.before)} before any step", where="distill"
            )
        if learner.blocks is not None:
            self.blocks = learner.measure(self.apart, learner.blocks)
        learner.keep_if_best(0, learner.whole.total(self.before))
        if self.others:
            self.elsewhere = [learner.whole.total(learner.measure(self.others))] * 2

    def _look(self) -> None:
        """Measure on held-out text, and on the other one where it matters."""
        learner = self.learner
        now = learner.measure(self.apart)
        learner.keep_if_best(self.done, learner.whole.total(now))
        told = f"step {self.done}: held-out loss {learner.whole.total(now):.5f}"
        if learner.best_step == self.done:
            self.after = now
            if self.others:
                self.elsewhere[1] = learner.whole.total(learner.measure(self.others))
                told += f", on the other text {self.elsewhere[1]:.5f}"
        log.info(told)

    def _warn_of_drift(self) -> None:
        if self.elsewhere and self.learner.best_step and self.elsewhere[1] > self.elsewhere[0]:
            log.warning(
                "distill: on its own text the student gained, on the other one it lost "
                "(%.5f → %.5f): train on text of more kinds, for fewer steps, or at a lower learning_rate",
                *self.elsewhere,
            )

    def _go_on(self) -> bool:
        """Take up the training that the checkpoint holds."""
        found = load_state(self.checkpoint) if self.checkpoint else None
        if found is None:
            return False
        tensors, facts = found
        self.learner.restore(tensors, facts.pop("learner"))
        for name, value in facts.items():
            setattr(self, name, value)
        log.info("distill: going on after step %d", self.done)
        return True

    def _write(self) -> None:
        """Put the state on the disk if the last one is old enough; a full disk costs the checkpoint, not the run."""
        learner, minutes = self.learner, self.learner.options.checkpoint_minutes
        due = minutes is not None and time.monotonic() - self.written >= 60 * minutes
        if self.checkpoint is None or not learner.processes.join_in_writing(due):
            return
        names = ("done", "tokens", "training_s", "before", "after", "elsewhere", "blocks")
        tensors, facts = learner.state()
        if not learner.accelerator.is_main_process:
            return
        try:
            save_state(self.checkpoint, tensors, {"learner": facts, **{name: getattr(self, name) for name in names}})
        except RunFailedError as error:
            log.warning("distill: no checkpoint after step %d: %s", self.done, error)
        self.written = time.monotonic()

    def _result(self) -> TrainingResult:
        learner = self.learner
        return TrainingResult(
            held_out_loss_before=learner.whole.total(self.before),
            held_out_loss_after=learner.best_loss,
            parts_before=dict(zip(learner.whole.names, self.before, strict=True)),
            parts_after=dict(zip(learner.whole.names, self.after, strict=True)),
            elsewhere_before=self.elsewhere[0] if self.elsewhere else None,
            elsewhere_after=self.elsewhere[1] if self.elsewhere else None,
            blocks_before=self.blocks[0] if self.blocks else None,
            blocks_after=self.blocks[1] if self.blocks else None,
            best_step=learner.best_step,
            learning_rate=learner.learning_rate,
            trained_params=sum(value.numel() for value in learner.chosen.values()),
            tokens=self.tokens,
            tokens_per_s=self.tokens / self.training_s,
        )
