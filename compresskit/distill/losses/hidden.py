"""Match hidden states of chosen layers, token by token.

    mse:    ‖s − t‖² / ‖t‖²        cosine:  1 − cos(s, t)        averaged over real tokens, then over layers

Layer 0 is the embeddings' output, layer k that of block k. Where blocks of the original were dropped, a layer is mapped
to the state that the next block read there, the last one to the last. A student with fewer blocks than another teacher
is mapped evenly: its layer k to the teacher's layer round(k · N_t / N_s). Both measures are free of the scale of hidden
states.

Where blocks were dropped, a hidden loss beside `kl` helps a little (Minitron, arXiv:2407.14679: 2.155 → 2.141), where
only widths were pruned it does not (58.3 → 58.0 MMLU).
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from compresskit.data import Batch
from compresskit.distill.losses.base import LOSSES, Loss
from compresskit.distill.losses.embedding import cosine_distance
from compresskit.distill.outputs import Need, Outputs, StepWeights
from compresskit.errors import CompressKitError


def even_layer(layer: int, student_blocks: int, teacher_blocks: int) -> int:
    """The teacher's layer for the student's, both 0 (embeddings) to their number of blocks; halves round up."""
    return (2 * layer * teacher_blocks + student_blocks) // (2 * student_blocks)


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """‖s − t‖² / ‖t‖² of each pair of rows, (…,), from (…, H) and (…, H)."""
    return (student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp_min(torch.finfo(teacher.dtype).tiny)


_MEASURES = {"mse": relative_error, "cosine": cosine_distance}


@LOSSES.add
class Hidden(Loss):
    """Match the teacher's hidden states."""

    kind: Literal["hidden"] = "hidden"
    measure: Literal["mse", "cosine"] = Field(default="mse", description="relative squared error, or 1 − cosine")
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        default=None, description="layers of the student, 0 the embeddings; by default every block's output"
    )

    needs: ClassVar[frozenset[Need]] = frozenset({"hidden"})

    def check(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        """Refuse hidden states of different widths and layers that there are not."""
        ours, theirs = student.config.hidden_size, teacher.config.hidden_size
        if ours != theirs:
            raise CompressKitError(
                f"hidden states have width {ours} in the student and {theirs} in the teacher",
                where="hidden",
                fix="use kl (models with a head) or embedding with cosine: 0",
            )
        blocks = student.config.num_hidden_layers
        beyond = [layer for layer in self.layers or () if layer > blocks]
        if beyond or self.layers == ():
            what = f"{beyond[0]} is no layer: the student has {blocks} blocks" if beyond else "no layer is named"
            raise CompressKitError(what, where="hidden.layers", fix=f"use layers from 0 to {blocks}, or leave it out")

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch, weights: StepWeights) -> Tensor:
        """The mean over layers of the weighted sum over tokens."""
        ours, theirs = student.get("hidden"), teacher.get("hidden")
        assert isinstance(ours, tuple)
        assert isinstance(theirs, tuple)
        blocks = len(ours) - 1
        layers = range(1, blocks + 1) if self.layers is None else self.layers
        kept = weights.token.flatten().nonzero().flatten()
        weight, parts = weights.token.flatten()[kept], []
        for layer in layers:
            target = theirs[even_layer(layer, blocks, len(theirs) - 1)]
            distance = _MEASURES[self.measure](ours[layer].flatten(0, 1)[kept], target.flatten(0, 1)[kept])
            parts.append((weight * distance).sum())
        return torch.stack(parts).mean()
