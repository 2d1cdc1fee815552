"""Match attention maps: where each head of each block looks.

    loss = mean over tokens, heads and blocks of KL(P_teacher ‖ P_student),   P (L, L) a head's probabilities

A student's block and head are compared with those that they were in the original, by the record of edits: the maps of
dropped blocks and cut heads are left out. Source: attention transfer (arXiv:1612.03928), as divergences
(arXiv:2002.10957).

Not where the teacher has other heads: `relation` compares any. Maps are made by eager attention, slower than the fused
one, and kept for the gradient: (B, heads, L, L) numbers a block.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from compresskit.data import Batch
from compresskit.distill.losses.base import LOSSES, Loss
from compresskit.distill.outputs import Maps, Outputs, StepWeights, Wanted
from compresskit.errors import CompressKitError
from compresskit.surgery.sites import find_anatomy


def map_kl(student: Tensor, teacher: Tensor, token: Tensor) -> Tensor:
    """Σ token · mean over heads of KL(P_t ‖ P_s), a scalar.

    Args:
        student, teacher: (B, heads, L, L), rows that sum to 1.
        token: (B, L) ≥ 0, what each token counts, already normalised.
    """
    least = torch.finfo(student.dtype).tiny
    log_ratio = teacher.clamp_min(least).log() - student.clamp_min(least).log()
    # Σ (q − p) is 0: with it what rounding does to a row's sum is of second order
    per_row = (teacher * log_ratio + student - teacher).sum(-1).mean(1)
    return (token * torch.where(token > 0, per_row, 0)).sum()


@LOSSES.add
class AttentionMaps(Loss):
    """Match where each head looks."""

    kind: Literal["attention"] = "attention"
    layers: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        default=None, min_length=1, description="blocks of the student, 1 the first; by default all with an attention"
    )

    def wants(self, student: PreTrainedModel) -> frozenset[Wanted]:
        """The maps of these blocks."""
        attentions = {one.block + 1: one for one in find_anatomy(student).attentions}
        missing = sorted(set(self.layers or ()) - set(attentions))
        if missing or not attentions:
            what = f"no attention in block {missing[0]}" if missing else "the student has no attention that is known"
            fix = f"use {', '.join(map(str, attentions))}" if attentions else "use hidden"
            raise CompressKitError(what, where="attention.layers", fix=fix)
        chosen = [attentions[layer] for layer in self.layers or attentions]
        return frozenset(Maps(one.block, one.query, one.head_dim) for one in chosen)

    def check(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        """Refuse blocks without an attention."""
        self.wants(student)

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch, weights: StepWeights) -> Tensor:
        """The mean over blocks."""
        parts = []
        for key, ours in sorted(student.inner.items(), key=str):
            if not isinstance(key, Maps) or (self.layers is not None and key.block + 1 not in self.layers):
                continue
            theirs = teacher.inner[key]
            if ours.shape != theirs.shape:
                what = f"block {key.block + 1} has {ours.shape[1]} heads, and {theirs.shape[1]} in the teacher"
                fix = "use losses: [{kind: relation}], which compares any heads"
                raise CompressKitError(what, where="attention", fix=fix)
            parts.append(map_kl(ours, theirs.detach(), weights.token))
        return torch.stack(parts).mean()
