"""How a student is trained, whatever its losses are."""

import math
from typing import Literal

from pydantic import Field, model_validator

from compresskit.config import Config
from compresskit.distill.token_counts import TokenRule


class TrainingOptions(Config):
    """How to train, whatever the losses are."""

    steps: int = Field(default=300, ge=1, description="optimiser steps")
    block_steps: int = Field(
        default=0, ge=0, description="of the steps, so many at the beginning in which each block learns alone"
    )
    batch_size: int = Field(default=32, ge=1, description="sequences in a batch")
    accumulate: int = Field(default=1, ge=1, description="batches in an optimiser step; several processes share them")
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        description="of AdamW, at its highest; by default 1e-4, of language models 0.2 / width, at most 5e-4",
    )
    schedule: Literal["cosine", "linear"] = Field(default="cosine", description="how the learning rate falls to 0")
    warmup: float = Field(default=0.1, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    weight_decay: float = Field(default=0.0, ge=0, description="of AdamW")
    clip_norm: float = Field(default=1.0, gt=0, description="longer gradients are shortened to this norm")
    max_length: int | None = Field(default=None, ge=2, description="tokens of a sequence that are used; by default all")
    token_weight: TokenRule = Field(
        default="even",
        description="what tokens count: all the same, more where the teacher is surprised (tsld) or unsure (entropy)",
    )
    held_out: int = Field(
        default=128, ge=1, description="training sequences, at most a tenth, that choose the best weights"
    )
    held_out_every: int = Field(default=50, ge=1, description="optimiser steps between two looks at the held-out loss")
    train: tuple[str, ...] = Field(default=("*",), description="globs over the names of parameters that learn")
    freeze: tuple[str, ...] | None = Field(
        default=None,
        description="globs over the names among those that do not; where neither is said, a head over the vocabulary "
        "that no pass cut rests, with the table that it is tied to",
    )
    turns: int | None = Field(
        default=None,
        ge=1,
        description="steps for which only the B of low-rank layers y = B A x learn, then only the A, and so on; "
        "by default both always",
    )
    dropout: bool = Field(default=False, description="whether the model's dropout is on while it learns")
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of the products; weights and losses stay float32"
    )
    recompute: bool = Field(
        default=False, description="blocks are run again in the backward pass: less memory, about a third more time"
    )
    checkpoint_minutes: float | None = Field(
        default=15.0,
        ge=0,
        description="training that is killed goes on from a state at most so old (and one look); null: from the start",
    )

    @model_validator(mode="after")
    def _leaves_steps_for_the_whole(self) -> "TrainingOptions":
        if self.block_steps >= self.steps:
            raise ValueError(f"block_steps {self.block_steps} leaves none of {self.steps} steps for the whole model")
        return self


def default_learning_rate(width: int, *, writes_text: bool) -> float:
    """AdamW's rate for hidden states of `width` numbers; for language models it falls as 1 / width (arXiv:2203.03466).

    The constants, each from one model: SmolLM2-135M (width 576) without 6 of its 30 blocks gained more within 25 k
    tokens at 3e-4 than at 1e-4 or 6e-4, all-MiniLM-L6-v2 with fewer neurons and heads more at 1e-4 than at 5e-4.
    """
    return min(5e-4, 0.2 / width) if writes_text else 1e-4


def learning_rate_at(step: int, *, steps: int, warmup: float, schedule: str) -> float:
    """The factor of the learning rate at `step` (0 to steps − 1): rises over the warm-up, then falls towards 0."""
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    left = 1 - (step - rising) / (steps - rising)
    return left if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))
