"""Match sentence embeddings: each one's direction, and how each batch's sentences lie to one another.

    loss = cosine · mean(1 − cos(s_i, t_i)) + mse · mean ‖s_i − t_i‖² / ‖t_i‖² + similarity · mean KL(p_i ‖ q_i)
    p_i = softmax over j ≠ i of cos(t_i, t_j)/τ,   q_i = softmax over j ≠ i of cos(s_i, s_j)/τ

The first two parts hold each vector in place (so an index built by the original still serves), in its direction and in
its length too; the last holds the ranking of neighbours, which is what retrieval uses. Sentences are compared within
one batch: with `accumulate` the last part sees fewer neighbours than one large batch would show. Embeddings are hidden
states pooled as the model's folder says, the mean over real tokens where it says nothing.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresskit.data import Batch
from compresskit.distill.losses.base import LOSSES, Loss
from compresskit.distill.outputs import Need, Outputs, StepWeights
from compresskit.errors import CompressKitError
from compresskit.kernels.kl_div import kl_div


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """1 − cos of each pair of rows, (…,) in [0, 2], from (…, H) and (…, H)."""
    return 1 - nn.functional.cosine_similarity(student, teacher, dim=-1)


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """‖s − t‖² / ‖t‖² of each pair of rows, (…,), from (…, H) and (…, H)."""
    return (student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp_min(torch.finfo(teacher.dtype).tiny)


def similarity_kl(student: Tensor, teacher: Tensor, *, row_weight: Tensor, temperature: float) -> Tensor:
    """Σ_i row_weight_i KL(p_i ‖ q_i), a scalar, where p_i and q_i are softmaxes of row i's cosines to the other rows.

    Args:
        student: (B, H_s).
        teacher: (B, H_t), without gradient; the widths may differ.
        row_weight: (B,), already normalised; rows of weight 0 are compared with nothing.
        temperature: τ > 0, divides the cosines; there is no factor τ².

    Returns:
        0 where there is no other row to compare with (B < 2).
    """
    kept = row_weight.nonzero().flatten()
    if len(kept) < 2:
        return student.sum() * 0
    student, teacher, row_weight = student[kept], teacher[kept], row_weight[kept]
    itself = torch.eye(len(student), dtype=torch.bool, device=student.device)
    student_cos, teacher_cos = (
        (unit @ unit.T / temperature).masked_fill(itself, float("-inf"))
        for unit in (nn.functional.normalize(student, dim=-1), nn.functional.normalize(teacher, dim=-1))
    )
    return kl_div(student_cos, teacher_cos, token_weight=row_weight)


@LOSSES.add
class Embedding(Loss):
    """Match the teacher's sentence embeddings."""

    kind: Literal["embedding"] = "embedding"
    cosine: float = Field(default=1.0, ge=0, description="what the distance between a sentence's two embeddings counts")
    mse: float = Field(default=0.0, ge=0, description="what their relative squared error counts, length included")
    similarity: float = Field(default=1.0, ge=0, description="what the divergence between in-batch similarities counts")
    temperature: float = Field(
        default=0.05, gt=0, description="τ of the similarities; small ones look at near neighbours only"
    )

    needs: ClassVar[frozenset[Need]] = frozenset({"sentence"})

    def check(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        """Refuse embeddings of different widths, and all shares 0."""
        if not self.cosine and not self.mse and not self.similarity:
            raise CompressKitError("cosine, mse and similarity are all 0", where="embedding", fix="raise one of them")
        ours, theirs = student.config.hidden_size, teacher.config.hidden_size
        if (self.cosine or self.mse) and ours != theirs:
            raise CompressKitError(
                f"the student's embeddings have {ours} numbers, the teacher's {theirs}",
                where="embedding.cosine" if self.cosine else "embedding.mse",
                fix="set cosine: 0 and mse: 0 and keep similarity, which compares any widths, or use contrastive",
            )

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch, weights: StepWeights) -> Tensor:
        """cosine · distance + mse · error + similarity · divergence."""
        ours, theirs = student.get("sentence"), teacher.get("sentence")
        assert isinstance(ours, Tensor)
        assert isinstance(theirs, Tensor)
        loss = ours.new_zeros(())
        if self.cosine:
            loss = loss + self.cosine * (weights.row * cosine_distance(ours, theirs)).sum()
        if self.mse:
            loss = loss + self.mse * (weights.row * relative_error(ours, theirs)).sum()
        if self.similarity:
            divergence = similarity_kl(ours, theirs, row_weight=weights.row, temperature=self.temperature)
            loss = loss + self.similarity * divergence
        return loss
