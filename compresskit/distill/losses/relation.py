"""Match how tokens relate to one another inside an attention: by queries, by keys, by values.

    R = softmax(X Xᵀ / √d)  for each of A relation heads, X (L, d) its share of the queries (keys, values)
    loss = mean over tokens, heads and kinds of KL(R_teacher ‖ R_student)

The relations are L × L whatever the widths, so teacher and student may have other head counts and sizes: their
queries are cut into the same number A of relation heads, of other widths. Source: MiniLMv2 (arXiv:2012.15828), which
matches one layer. Where heads of the original were cut, its remaining ones are compared.

Not beside `kl` in the recovery of a pruned decoder, where it added nothing (Minitron, arXiv:2407.14679).
"""

from math import gcd, sqrt
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from compresskit.data import Batch
from compresskit.distill.losses.base import LOSSES, Loss
from compresskit.distill.outputs import Inner, Outputs, StepWeights, Wanted
from compresskit.errors import CompressKitError
from compresskit.kernels.kl_div import kl_div
from compresskit.surgery.sites import Attention, find_anatomy

# B sequences, L tokens, A relation heads, W width of queries (keys, values)

Kind = Literal["query", "key", "value"]
_MOST_HEADS = 16


def relation_kl(student: Tensor, teacher: Tensor, mask: Tensor, *, token: Tensor, heads: int) -> Tensor:
    """Σ token · mean over heads of KL(R_teacher ‖ R_student), a scalar.

    Args:
        student: (B, L, W_s).
        teacher: (B, L, W_t), without gradient.
        mask: (B, L), 0 at padding, which nothing relates to.
        token: (B, L) ≥ 0, what each token counts, already normalised.
        heads: A, a divisor of W_s and W_t.
    """
    ours, theirs = (_relations(given, mask, heads) for given in (student, teacher.detach()))
    weight = (token / heads)[:, None, :].expand(-1, heads, -1)
    return kl_div(ours.flatten(0, 2), theirs.flatten(0, 2), token_weight=weight.flatten())


def _relations(given: Tensor, mask: Tensor, heads: int) -> Tensor:
    """Scaled products of each pair of tokens, (B, A, L, L), −∞ towards padding."""
    split = given.unflatten(-1, (heads, -1)).transpose(1, 2)
    products = split @ split.transpose(-1, -2) / sqrt(split.shape[-1])
    return products.masked_fill(mask[:, None, None, :] == 0, float("-inf"))


@LOSSES.add
class Relation(Loss):
    """Match the relations between tokens that queries, keys and values of one layer give."""

    kind: Literal["relation"] = "relation"
    of: tuple[Kind, ...] = Field(
        default=("query", "key", "value"), min_length=1, description="query, key and value relations, or some of them"
    )
    layer: int | None = Field(default=None, ge=1, description="the student's block, 1 the first; by default the last")
    heads: int | None = Field(
        default=None,
        ge=1,
        description="relation heads; by default the most, up to 16, that divide both widths",
    )

    def _role(self, kind: str) -> str:
        return f"relation {kind} {self.layer}"

    def _attention(self, student: PreTrainedModel) -> Attention:
        attentions = find_anatomy(student).attentions
        chosen = [one for one in attentions if self.layer in (None, one.block + 1)]
        if not chosen:
            blocks = ", ".join(str(one.block + 1) for one in attentions) or "none"
            what = f"no attention in block {self.layer}" if self.layer else "the student has no attention that is known"
            raise CompressKitError(f"{what} (there are some in: {blocks})", where="relation.layer", fix="use hidden")
        return chosen[-1]

    def wants(self, student: PreTrainedModel) -> frozenset[Wanted]:
        """The outputs of the layers that make queries, keys and values."""
        attention = self._attention(student)
        if attention.fused:
            return frozenset({Inner(attention.query, self._role("fused"))})
        return frozenset(Inner(getattr(attention, kind), self._role(kind)) for kind in self.of)

    def check(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        """Refuse a layer without an attention, and relation heads that its widths cannot be cut into."""
        attention = self._attention(student)
        if self.heads is None or attention.fused:
            return
        for kind in self.of:
            width = getattr(student.get_submodule(getattr(attention, kind)), "out_features", None)
            if width is not None and width % self.heads:
                what = f"{self.heads} heads do not divide the {width} {kind} channels of the student"
                raise CompressKitError(what, where="relation.heads", fix=f"use a divisor of {width}, or leave it out")

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch, weights: StepWeights) -> Tensor:
        """The mean over kinds."""
        parts = []
        for kind in self.of:
            ours, theirs = self._given(student, kind), self._given(teacher, kind)
            heads = self._heads(ours.shape[-1], theirs.shape[-1])
            mask = batch["attention_mask"]
            parts.append(relation_kl(ours, theirs, mask, token=weights.token, heads=heads))
        return torch.stack(parts).mean()

    def _given(self, outputs: Outputs, kind: Kind) -> Tensor:
        alone = outputs.role(self._role(kind))
        if alone:
            return next(iter(alone.values()))
        fused = next(iter(outputs.role(self._role("fused")).values()))
        return fused.chunk(3, -1)[("query", "key", "value").index(kind)]

    def _heads(self, ours: int, theirs: int) -> int:
        shared = gcd(ours, theirs)
        if self.heads is None:
            return max(count for count in range(1, _MOST_HEADS + 1) if shared % count == 0)
        if shared % self.heads:
            what = f"{self.heads} heads do not divide both widths, {ours} of the student and {theirs} of the teacher"
            raise CompressKitError(what, where="relation.heads", fix=f"use a divisor of {shared}, or leave it out")
        return self.heads
