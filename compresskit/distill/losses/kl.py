"""Forward KL from the teacher's predictions to the student's.

    loss = (1 − α) · τ² · mean KL(softmax(z_t/τ) ‖ softmax(z_s/τ)) + α · cross-entropy(labels)

The mean runs over real tokens for heads over tokens, over sequences for heads over sequences. With α = 0, the default,
no label is read: both models predict at the same place, so nothing is shifted. Labels of a language model are its next
tokens. KL alone beats every mixture when a pruned language model is recovered (Minitron, arXiv:2407.14679, table 8:
2.107 against 2.140 with reverse KL); τ = 1 was best there.

Not for models without a head (use `embedding`), nor for heads that regress or give several labels at once.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresskit.data import Batch
from compresskit.distill.losses.base import LOSSES, Loss
from compresskit.distill.outputs import Need, Outputs, StepWeights, has_head
from compresskit.errors import CompressKitError
from compresskit.kernels.kl_div import kl_div


def next_token_cross_entropy(logits: Tensor, input_ids: Tensor, next_token: Tensor) -> Tensor:
    """Σ next_token · (−log softmax(logits)[following token]), a scalar, from (B, L, V), (B, L) and (B, L − 1)."""
    flat = logits[:, :-1].flatten(0, 1).float()
    per_token = nn.functional.cross_entropy(flat, input_ids[:, 1:].flatten(), reduction="none")
    return (per_token * next_token.flatten()).sum()


@LOSSES.add
class KL(Loss):
    """Match the teacher's output distribution."""

    kind: Literal["kl"] = "kl"
    temperature: float = Field(default=1.0, gt=0, description="τ; above 1, small probabilities count more")
    alpha: float = Field(
        default=0.0, ge=0, lt=1, description="share of cross-entropy with the next token (language models)"
    )

    needs: ClassVar[frozenset[Need]] = frozenset({"logits"})

    def check(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        """Refuse models without logits, heads whose outputs are no distribution, and labels that there are not."""
        if not has_head(student) or not has_head(teacher):
            raise CompressKitError(
                f"loss kl compares logits, and {type(student).__name__} has no head",
                fix="use losses: [{kind: embedding}]",
            )
        problem = getattr(student.config, "problem_type", None)
        if "SequenceClassification" in type(student).__name__ and (
            student.config.num_labels == 1 or problem in ("regression", "multi_label_classification")
        ):
            raise CompressKitError(
                f"loss kl compares distributions over classes, and this head gives {problem or 'a single number'}",
                fix="use losses: [{kind: hidden}]",
            )
        if self.alpha and not student.can_generate():
            raise CompressKitError(
                f"alpha {self.alpha:g} mixes in labels, and only a language model's text holds them",
                where="kl.alpha",
                fix="leave alpha out",
            )

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch, weights: StepWeights) -> Tensor:
        """(1 − α) KL + α cross-entropy."""
        student_logits, teacher_logits = student.get("logits"), teacher.get("logits")
        assert isinstance(student_logits, Tensor)
        assert isinstance(teacher_logits, Tensor)
        weight = weights.token.flatten() if student_logits.ndim == 3 else weights.row
        divergence = kl_div(
            student_logits.flatten(0, -2),
            teacher_logits.flatten(0, -2),
            token_weight=weight,
            temperature=self.temperature,
        )
        if not self.alpha:
            return divergence
        labels = next_token_cross_entropy(student_logits, batch["input_ids"], weights.next_token)
        return torch.lerp(divergence, labels, self.alpha)
