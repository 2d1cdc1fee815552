"""Tell each sentence's teacher embedding from those of the batch's other sentences (InfoNCE).

    loss = mean over i of −log softmax_j(cos(s_i, t_j) / τ)[i]

The other sentences of a batch are the negatives; two of which the teacher says the very same are none. It is not 0
where student and teacher agree. It beat matching logits for images (CRD, arXiv:1910.10699: 74.14 against 73.54) and
lost to matching features for image and text (CLIP-KD, arXiv:2307.12732: 31.94 against 34.23). Use it beside
`embedding`, or alone with a teacher of another width, which is reached through a projection trained beside the student.

More negatives say more: raise `batch_size` rather than `accumulate`.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresskit.data import Batch
from compresskit.distill.losses.base import LOSSES, Loss
from compresskit.distill.losses.bridge import SentenceBridge
from compresskit.distill.outputs import Need, Outputs, StepWeights


def info_nce(student: Tensor, teacher: Tensor, *, row_weight: Tensor, temperature: float) -> Tensor:
    """Σ_i row_weight_i · (−log softmax_j(cos(s_i, t_j)/τ)[i]), a scalar, from (B, H) and (B, H).

    Rows of weight 0 are neither asked nor negatives. 0 where there is no other row (B < 2).
    """
    kept = row_weight.nonzero().flatten()
    if len(kept) < 2:
        return student.sum() * 0
    ours, theirs = (nn.functional.normalize(rows[kept], dim=-1) for rows in (student, teacher.detach()))
    same = (theirs[:, None] == theirs[None]).all(-1) & ~torch.eye(len(kept), dtype=torch.bool, device=ours.device)
    scores = (ours @ theirs.T / temperature).masked_fill(same, float("-inf"))
    return -(row_weight[kept] * scores.log_softmax(-1).diagonal()).sum()


@LOSSES.add
class Contrastive(Loss):
    """Know one's own teacher embedding among those of the batch."""

    kind: Literal["contrastive"] = "contrastive"
    temperature: float = Field(
        default=0.05, gt=0, description="τ of the similarities; small ones look at near neighbours"
    )

    needs: ClassVar[frozenset[Need]] = frozenset({"sentence"})

    def bridge(self, student: PreTrainedModel, teacher: PreTrainedModel) -> nn.Module | None:
        """One projection, for a teacher of another width."""
        ours, theirs = student.config.hidden_size, teacher.config.hidden_size
        return None if ours == theirs else SentenceBridge(ours, theirs)

    def check(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        """Any two models that give sentence embeddings will do."""

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch, weights: StepWeights) -> Tensor:
        """InfoNCE over the batch."""
        ours, theirs = student.get("sentence"), teacher.get("sentence")
        assert isinstance(ours, Tensor)
        assert isinstance(theirs, Tensor)
        return info_nce(ours, theirs, row_weight=weights.row, temperature=self.temperature)
