"""A student at one step of its training: its losses, its gradient, its best weights so far."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresskit.data import Batch
from compresskit.distill.batching import Numbered
from compresskit.distill.checkpoint import (
    optimizer_tensors,
    prefixed,
    random_state,
    restore_optimizer,
    restore_random_state,
    under,
)
from compresskit.distill.goals import Blocks, Goal, Whole
from compresskit.distill.losses import Loss
from compresskit.distill.options import TrainingOptions, default_learning_rate, learning_rate_at
from compresskit.distill.outputs import Inner, Maps, Outputs, Projection, StepWeights, Wanted, step_weights
from compresskit.distill.parameters import find_factors
from compresskit.distill.processes import Processes
from compresskit.distill.teachers import Teacher
from compresskit.distill.token_counts import answers_alone, count_tokens
from compresskit.errors import CompressKitError, RunFailedError
from compresskit.sentence import SentenceEmbedding

_PREDICTIONS: frozenset[Wanted] = frozenset({"predictions"})


class Learner:
    """The student, what it learns from and how.

    Args:
        student: what `processes` hold; shared among them here.
        teacher, losses, options, pooling: as `compresskit.distill.trainer.train` takes them.
        chosen: the student's parameters that learn, by name.
        processes: those that train it.
        teacher_shape: a model of the teacher's widths.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: Teacher,
        losses: Sequence[Loss],
        chosen: Mapping[str, nn.Parameter],
        options: TrainingOptions,
        processes: Processes,
        pooling: SentenceEmbedding,
        teacher_shape: PreTrainedModel,
    ) -> None:
        self.student, self.teacher, self.options = student, teacher, options
        self.processes, self.accelerator = processes, processes.accelerator
        self.whole = Whole(student, losses, pooling, teacher_shape, self.accelerator.device)
        self.blocks = Blocks(student, teacher_shape) if options.block_steps else None
        self.in_blocks = self._in_blocks(chosen)
        self.factors = None if options.turns is None else find_factors(student, chosen)
        self.learned = processes.share(
            student,
            [bridge for bridge in self.whole.bridges if bridge is not None],
            dict(chosen) | self.whole.bridge_parameters(),
            reads_inside=any(isinstance(one, Inner | Maps) for one in self.whole.wants),
        )
        self.chosen = {name: self.learned[name] for name in chosen}
        self.learning_rate: float = options.learning_rate or default_learning_rate(
            student.config.get_text_config().hidden_size, writes_text=student.can_generate()
        )
        self.optimizer = torch.optim.AdamW(
            self.learned.values(), lr=self.learning_rate, weight_decay=options.weight_decay, fused=True
        )
        self.best: dict[str, Tensor] = {}
        self.best_loss, self.best_step = math.inf, 0

    def _in_blocks(self, chosen: Collection[str]) -> frozenset[str]:
        if self.blocks is None:
            return frozenset()
        found = frozenset(name for name in chosen if name.startswith(f"{self.blocks.stack}."))
        if not found:
            what = f"no parameter that learns is in a block of {self.blocks.stack}"
            raise CompressKitError(what, where="block_steps", fix="leave block_steps out, or freeze less")
        return found

    def goal_at(self, number: int) -> Goal:
        """What step `number`, from 0, is for."""
        return self.blocks if self.blocks is not None and number < self.options.block_steps else self.whole

    def resting_at(self, number: int) -> frozenset[str]:
        """Which of the parameters that learn do not in step `number`."""
        resting = frozenset(self.learned) - self.in_blocks if self.goal_at(number) is self.blocks else frozenset()
        if self.factors is None or self.options.turns is None:
            return resting
        return resting | self.factors[1 - number // self.options.turns % 2]

    @torch.no_grad()
    def measure(self, batches: Sequence[Numbered], goal: Goal | None = None) -> list[float]:
        """Each part of a goal, by default the whole, over all `batches`, without dropout; the processes share them."""
        goal = goal or self.whole
        mode = self.student.training
        self.student.eval()
        mine = self.processes.mine(batches)
        sums = [0.0] * len(goal.names)
        for batch, numbered, weights, _ in self._weighed(goal, mine, keep_targets=False):
            for i, part in enumerate(self._parts(goal, batch, weights, self._target(goal, batch, numbered))):
                sums[i] += part.item()
        self.processes.keep_pace(batches)
        self.student.train(mode)
        return self.processes.add_up(torch.tensor(sums, dtype=torch.float64)).tolist()

    def step(self, number: int, batches: Sequence[Numbered]) -> list[float]:
        """One optimiser step, the `number`-th from 0; returns each part of its goal.

        Raises:
            RunFailedError: a loss or a gradient that is not finite; the best weights are back in the model.
        """
        goal = self._begin(number)
        at, steps = self._within_stage(number)
        shares = goal.weights_at(at, steps)
        sums = [0.0] * len(goal.names)
        for batch, numbered, weights, target in self._weighed(goal, self.processes.mine(batches), keep_targets=True):
            parts = self._parts(goal, batch, weights, target or self._target(goal, batch, numbered))
            for i, part in enumerate(parts):
                sums[i] += part.item()
            if self.processes.count == 1:  # a process that stops alone would leave the others waiting
                self._require_finite(number, goal, sums)
            self.accelerator.backward(torch.stack([s * part for s, part in zip(shares, parts, strict=True)]).sum())
        sums = self.processes.add_up(torch.tensor(sums, dtype=torch.float64)).tolist()
        self._require_finite(number, goal, sums)
        self.processes.add_up_gradients(self.learned)
        norm = self.processes.shorten_gradients(self.learned, self.options.clip_norm)
        if not math.isfinite(norm):
            self._fail(number, f"the gradient's norm is {norm}")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.teacher.follow(self.processes.whole(self.chosen))
        return sums

    def _within_stage(self, number: int) -> tuple[int, int]:
        """The step's number within its stage, and the steps of that stage."""
        first = self.options.block_steps
        return (number, first) if number < first else (number - first, self.options.steps - first)

    def _begin(self, number: int) -> Goal:
        """Set the rate and who learns; a stage begins with an optimiser that remembers nothing."""
        options, (at, steps) = self.options, self._within_stage(number)
        factor = learning_rate_at(at, steps=steps, warmup=options.warmup, schedule=options.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * factor
        if number and number == options.block_steps:
            self.optimizer.state.clear()
        resting = self.resting_at(number)
        for name, value in self.learned.items():
            value.requires_grad_(name not in resting)
        return self.goal_at(number)

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

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the next step depends on, but for the text; whole in the main process."""
        tensors = {
            **prefixed("weights", self.learned),
            **prefixed("best", self.best),
            **prefixed("optimizer", optimizer_tensors(self.optimizer, self.learned)),
            **prefixed("random", random_state(self.accelerator.device)),
            **prefixed("teacher", self.teacher.memory()),
        }
        return self.processes.gather(tensors), {"best_loss": self.best_loss, "best_step": self.best_step}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Go on from a state."""
        place = self.processes.place
        with torch.no_grad():
            for name, value in under("weights", tensors).items():
                self.learned[name].copy_(place(value, self.learned[name]))
        self.best = {name: place(value, self.chosen[name]) for name, value in under("best", tensors).items()}
        self.best_loss, self.best_step = facts["best_loss"], facts["best_step"]
        restore_optimizer(self.optimizer, self.learned, under("optimizer", tensors), place)
        restore_random_state(under("random", tensors), self.accelerator.device)
        self.teacher.remember(under("teacher", tensors))

    def _weighed(
        self, goal: Goal, batches: Sequence[Numbered], *, keep_targets: bool
    ) -> list[tuple[Batch, Numbered, StepWeights, Outputs | None]]:
        """Each batch on the device, with what its places count; where the teacher had to say it, its outputs too."""
        device = self.accelerator.device
        moved = [{name: values.to(device) for name, values in numbered.batch.items()} for numbered in batches]
        targets: list[Outputs | None] = [None] * len(batches)
        counts = None
        asked = self.options.token_weight != "even" or self.teacher.leaves_out
        if asked or any(numbered.prompt is not None for numbered in batches):
            counts = []
            for i, (batch, numbered) in enumerate(zip(moved, batches, strict=True)):
                target = Outputs()
                if asked:
                    target = self._target(goal, batch, numbered, everything=keep_targets or self.teacher.leaves_out)
                    targets[i] = target if keep_targets else None
                counts.append(self._counts(batch, numbered, target))
        weights = step_weights([batch["attention_mask"] for batch in moved], counts, add_up=self.processes.add_up)
        return list(zip(moved, batches, weights, targets, strict=True))

    def _counts(self, batch: Batch, numbered: Numbered, target: Outputs) -> Tensor:
        """What each token counts, (B, L), by the rule, the teacher and where prompts end."""
        counts = torch.ones(batch["input_ids"].shape, device=batch["input_ids"].device)
        if self.options.token_weight != "even":
            assert isinstance(target.predictions, torch.Tensor | Projection)
            with self._precision():
                counts = count_tokens(self.options.token_weight, target.predictions, batch)
        if target.counts is not None:
            counts = counts * target.counts
        if numbered.prompt is None:
            return counts
        prompt = numbered.prompt.to(counts.device)
        return counts * answers_alone(prompt, next_tokens=self.student.can_generate())

    def _target(self, goal: Goal, batch: Batch, numbered: Numbered, *, everything: bool = True) -> Outputs:
        needs = goal.asks if everything else frozenset[Wanted]()
        if self.options.token_weight != "even":
            needs |= _PREDICTIONS
        with self._precision():
            return self.teacher(batch, numbered.rows, needs) if needs else Outputs()

    def _parts(self, goal: Goal, batch: Batch, weights: StepWeights, target: Outputs) -> list[Tensor]:
        with self._precision():
            return self.processes.run(lambda: goal.parts(batch, weights, target))

    def _precision(self) -> torch.autocast:
        low = self.options.precision == "bfloat16"
        return torch.autocast(self.accelerator.device.type, dtype=torch.bfloat16, enabled=low)

    def _require_finite(self, number: int, goal: Goal, sums: Sequence[float]) -> None:
        if not math.isfinite(sum(sums)):
            self._fail(number, f"the loss is {dict(zip(goal.names, sums, strict=True))}")

    def _fail(self, number: int, what: str) -> None:
        self.restore_best()
        raise RunFailedError(
            f"step {number + 1} of {self.options.steps}: {what}; the weights of step {self.best_step} are kept",
            where="distill",
            fix=f"use a learning_rate below {self.learning_rate:.2g}",
        )
