"""Match hidden states of chosen layers, token by token.

    mse:  ‖s − t‖² / ‖t‖²      cosine:  1 − cos(s, t)      normalised:  ‖n(s) − n(t)‖² / H

averaged over real tokens, then over layers; n(x) = (x − mean x) / std x over channels, as a layer norm reads it. Layer
0 is the embeddings' output, layer k that of block k. Where blocks of the original were dropped, a layer is mapped to
the state that the next block read there, the last one to the last. A student with fewer blocks than another teacher is
mapped evenly, its layer k to the teacher's round(k · N_t / N_s). All measures are free of the scale of the teacher's
states, `cosine` and `normalised` of the student's too.

With `modules` the outputs of linear layers are matched instead: queries, keys, values, the neurons of an FFN. Where
heads or neurons were cut, the teacher's are gathered: those that the student still has, by the record of edits.

A teacher of another width is reached through one projection a layer, trained beside the student and thrown away.

Where blocks were dropped, a hidden loss beside `kl` helps a little (Minitron, arXiv:2407.14679: 2.155 → 2.141), where
only widths were pruned it does not (58.3 → 58.0 MMLU).
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresskit.data import Batch
from compresskit.distill.lineage import even_layer
from compresskit.distill.losses.base import LOSSES, Loss
from compresskit.distill.losses.bridge import HiddenBridge
from compresskit.distill.losses.embedding import cosine_distance, relative_error
from compresskit.distill.outputs import Inner, Need, Outputs, StepWeights, Wanted
from compresskit.errors import CompressKitError
from compresskit.surgery.sites import find_anatomy, select


def normalised_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the two rows at mean 0 and variance 1, (…,) in [0, 4], from (…, H) and (…, H)."""
    width = student.shape[-1:]
    return (nn.functional.layer_norm(student, width) - nn.functional.layer_norm(teacher, width)).square().mean(-1)


_MEASURES = {"mse": relative_error, "cosine": cosine_distance, "normalised": normalised_error}


@LOSSES.add
class Hidden(Loss):
    """Match the teacher's hidden states, or what chosen layers give."""

    kind: Literal["hidden"] = "hidden"
    measure: Literal["mse", "cosine", "normalised"] = Field(
        default="mse", description="relative squared error, 1 − cosine, or squared error at mean 0 and variance 1"
    )
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        default=None, description="layers of the student, 0 the embeddings; by default every block's output"
    )
    modules: str | None = Field(
        default=None,
        description="glob over the student's linear layers inside blocks, whose outputs are matched instead",
    )

    needs: ClassVar[frozenset[Need]] = frozenset({"hidden"})

    @property
    def _role(self) -> str:
        return f"hidden {self.modules}"

    def wants(self, student: PreTrainedModel) -> frozenset[Wanted]:
        """Hidden states, or what the chosen modules give."""
        if self.modules is None:
            return frozenset(self.needs)
        names = select(find_anatomy(student).linears(), self.modules, where="hidden.modules")
        return frozenset(Inner(name, self._role) for name in names)

    def bridge(self, student: PreTrainedModel, teacher: PreTrainedModel) -> nn.Module | None:
        """One projection a layer, for a teacher of another width."""
        ours, theirs = student.config.hidden_size, teacher.config.hidden_size
        if self.modules is not None or ours == theirs:
            return None
        return HiddenBridge(self._layers(student.config.num_hidden_layers), ours, theirs)

    def _layers(self, blocks: int) -> tuple[int, ...]:
        return tuple(range(1, blocks + 1)) if self.layers is None else self.layers

    def check(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        """Refuse layers and modules that there are not, and both at once."""
        if self.modules is not None:
            if self.layers is not None:
                what = "layers choose hidden states and modules what linear layers give"
                raise CompressKitError(what, where="hidden", fix="write two hidden losses, one with each")
            self.wants(student)
            return
        blocks = student.config.num_hidden_layers
        beyond = [layer for layer in self.layers or () if layer > blocks]
        if beyond or self.layers == ():
            what = f"{beyond[0]} is no layer: the student has {blocks} blocks" if beyond else "no layer is named"
            raise CompressKitError(what, where="hidden.layers", fix=f"use layers from 0 to {blocks}, or leave it out")

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch, weights: StepWeights) -> Tensor:
        """The mean over layers of the weighted sum over tokens."""
        kept = weights.token.flatten().nonzero().flatten()
        weight, parts = weights.token.flatten()[kept], []
        for name, ours, theirs in self._pairs(student, teacher):
            if ours.shape != theirs.shape:
                what = f"{name} gives {ours.shape[-1]} numbers, the teacher's {theirs.shape[-1]}"
                fix = "use losses: [{kind: relation}], which compares any widths"
                raise CompressKitError(what, where="hidden.modules", fix=fix)
            distance = _MEASURES[self.measure](ours.flatten(0, -2)[kept], theirs.flatten(0, -2)[kept])
            parts.append((weight * distance).sum())
        return torch.stack(parts).mean()

    def _pairs(self, student: Outputs, teacher: Outputs) -> list[tuple[str, Tensor, Tensor]]:
        """Name, ours and theirs of each layer that is compared."""
        if self.modules is not None:
            theirs = teacher.role(self._role)
            return [(name, given, theirs[name]) for name, given in sorted(student.role(self._role).items())]
        ours, states = student.get("hidden"), teacher.get("hidden")
        assert isinstance(ours, tuple)
        assert isinstance(states, tuple)
        blocks = len(ours) - 1
        return [
            (f"layer {layer}", ours[layer], states[even_layer(layer, blocks, len(states) - 1)])
            for layer in self._layers(blocks)
        ]
