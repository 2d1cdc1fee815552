"""A divergence between the teacher's predictions p and the student's q, by default forward KL.

    loss = (1 − α) · τ² · mean D(p, q) + α · cross-entropy(labels),     p = softmax(z_t/τ), q = softmax(z_s/τ)

    forward_kl   KL(p ‖ q)                    covers all that the teacher says
    reverse_kl   KL(q ‖ p)                    stays with what it says most
    jsd          β KL(p ‖ m) + (1−β) KL(q ‖ m),  m = β p + (1−β) q          arXiv:2306.13649
    skew_forward_kl, skew_reverse_kl          the second of the two mixed with a share of the first: bounded gradients
                                              arXiv:2402.03898
    total_variation   ½ Σ |p − q|

The mean runs over real tokens for heads over tokens, over sequences for heads over sequences. With α = 0, the default
of this loss, no label is read: both models predict at the same place, so nothing is shifted. Labels of a language model
are its next tokens. Forward KL beats the other divergences when a pruned language model is recovered (Minitron,
arXiv:2407.14679, table 8: 2.107 against 2.140 with reverse KL); τ = 1 was best there. So was no label, over far more
text than a small budget holds; where `distill` chooses the losses itself, it takes a small α (`default_losses`).

With α = 1 only labels are learnt and the teacher is not run: the control that a distillation has to beat.

Where a model exposes its head over the vocabulary, the logits are never made: `compresskit.kernels.linear_kl` applies
the head chunk by chunk. Other heads are over few classes and compared as they are.

Not for models without a head (use `embedding`), nor for heads that regress or give several labels at once.
"""

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresskit.data import Batch
from compresskit.distill.losses.base import LOSSES, Loss
from compresskit.distill.outputs import Need, Outputs, Projection, StepWeights, Wanted, has_head
from compresskit.errors import CompressKitError
from compresskit.kernels.divergence import MIXED, Kind, working_dtype
from compresskit.kernels.kl_div import divergence_loss
from compresskit.kernels.linear_kl import Divergence, Head, TopK, linear_kl
from compresskit.models import answer_kind


def next_token_cross_entropy(logits: Tensor, input_ids: Tensor, next_token: Tensor) -> Tensor:
    """Σ next_token · (−log softmax(logits)[following token]), a scalar, from (B, L, V), (B, L) and (B, L − 1)."""
    flat = logits[:, :-1].flatten(0, 1).to(working_dtype(logits.dtype))
    per_token = nn.functional.cross_entropy(flat, input_ids[:, 1:].flatten(), reduction="none")
    return (per_token * next_token.flatten()).sum()


def logits_of(predictions: Tensor | Projection) -> Tensor:
    """The logits, made where they were not."""
    if isinstance(predictions, Tensor):
        return predictions
    return predictions.head.logits_of_reduced(predictions.head.reduced(predictions.hidden))


def _frozen(head: Head) -> Head:
    """The head as a constant."""
    parts = {name: value.detach() for name, value in vars(head).items() if isinstance(value, Tensor)}
    return replace(head, **parts)


def _next_tokens(batch: Batch, weights: StepWeights) -> tuple[Tensor, Tensor]:
    """Each token's label, the token after it, and what that counts, (B · L,) each; the last ones count nothing."""
    labels = nn.functional.pad(batch["input_ids"][:, 1:], (0, 1)).flatten()
    return labels, nn.functional.pad(weights.next_token, (0, 1)).flatten()


_OTHER_ANSWERS = {"scores": "a single number, or several", "labels": "a yes or no for each label"}


@LOSSES.add
class KL(Loss):
    """Match the teacher's output distribution."""

    kind: Literal["kl"] = "kl"
    divergence: Kind = Field(default="forward_kl", description="which divergence of the student from the teacher")
    mix: float | None = Field(
        default=None, gt=0, lt=1, description="β of jsd (by default 0.5), the mixed share of the skew ones (0.1)"
    )
    temperature: float = Field(default=1.0, gt=0, description="τ; above 1, small probabilities count more")
    alpha: float = Field(
        default=0.0, ge=0, le=1, description="share of cross-entropy with the next token (language models)"
    )
    memory_mb: int = Field(
        default=1024, ge=1, description="working memory of the loss in MiB, for a head over a vocabulary"
    )

    needs: ClassVar[frozenset[Need]] = frozenset({"predictions"})

    @model_validator(mode="after")
    def _mixes(self) -> "KL":
        if self.mix is not None and self.divergence not in MIXED:
            raise ValueError(f"mix is not read by {self.divergence}; leave it out, or use {', '.join(sorted(MIXED))}")
        return self

    def _divergence(self) -> Divergence:
        mix = self.mix or (0.5 if self.divergence == "jsd" else 0.1)
        return Divergence(self.divergence, mix=mix, temperature=self.temperature)

    def asks(self, student: PreTrainedModel) -> frozenset[Wanted]:
        """The teacher's predictions, unless labels are all that counts."""
        return frozenset() if self.alpha == 1 else frozenset(self.needs)

    def check(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        """Refuse models without logits, heads whose outputs are no distribution, and labels that there are not."""
        if not has_head(student) or not has_head(teacher):
            raise CompressKitError(
                f"loss kl compares logits, and {type(student).__name__} has no head",
                fix="use losses: [{kind: embedding}]",
            )
        other = _OTHER_ANSWERS.get(answer_kind(student))
        if other:
            raise CompressKitError(
                f"loss kl compares distributions over classes, and this head gives {other}",
                fix="use losses: [{kind: hidden}]",
            )
        if student.get_output_embeddings() is None and student.config.num_labels != teacher.config.num_labels:
            what = (
                f"the student tells {student.config.num_labels} classes apart, the teacher {teacher.config.num_labels}"
            )
            raise CompressKitError(what, where="kl", fix="use a teacher of the same classes")
        if self.alpha and not student.can_generate():
            raise CompressKitError(
                f"alpha {self.alpha:g} mixes in labels, and only a language model's text holds them",
                where="kl.alpha",
                fix="leave alpha out",
            )

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch, weights: StepWeights) -> Tensor:
        """(1 − α) D + α cross-entropy."""
        ours = student.get("predictions")
        assert isinstance(ours, Tensor | Projection)
        if self.alpha == 1:
            if isinstance(ours, Projection):
                return self._labels_alone(ours, batch, weights)
            return next_token_cross_entropy(ours, batch["input_ids"], weights.next_token)
        theirs = teacher.get("predictions")
        assert isinstance(theirs, Tensor | Projection | TopK)
        if isinstance(ours, Projection):
            return self._fused(ours, theirs, batch, weights)
        if isinstance(theirs, TopK):
            what = "a teacher's top k is compared at heads that are one product, and this student's is more"
            raise CompressKitError(what, where="cache.keep", fix="use keep: hidden, or leave cache out")
        teacher_logits = logits_of(theirs).detach()  # a live head may still require grad
        weight = weights.token.flatten() if ours.ndim == 3 else weights.row
        divergence = divergence_loss(
            ours.flatten(0, -2),
            teacher_logits.flatten(0, -2),
            token_weight=weight,
            divergence=self._divergence(),
        )
        if not self.alpha:
            return divergence
        labels = next_token_cross_entropy(ours, batch["input_ids"], weights.next_token)
        return torch.lerp(divergence, labels, self.alpha)

    def _labels_alone(self, student: Projection, batch: Batch, weights: StepWeights) -> Tensor:
        """Cross-entropy with the next token: forward KL from a teacher that is sure of it."""
        labels, weight = _next_tokens(batch, weights)
        return linear_kl(
            student.hidden.flatten(0, 1),
            student.head,
            teacher_topk=TopK(torch.zeros_like(labels[:, None], dtype=torch.float32), labels[:, None]),
            token_weight=weight,
            memory_mb=self.memory_mb,
        )

    def _fused(
        self, student: Projection, teacher: Tensor | Projection | TopK, batch: Batch, weights: StepWeights
    ) -> Tensor:
        """The same from hidden states and head; a token's label is the token after it."""
        labels, label_weight = _next_tokens(batch, weights)
        return linear_kl(
            student.hidden.flatten(0, 1),
            student.head,
            teacher.hidden.flatten(0, 1) if isinstance(teacher, Projection) else None,
            _frozen(teacher.head) if isinstance(teacher, Projection) else None,
            teacher_logits=teacher.flatten(0, 1) if isinstance(teacher, Tensor) else None,
            teacher_topk=teacher if isinstance(teacher, TopK) else None,
            labels=labels if self.alpha else None,
            label_weight=self.alpha * label_weight if self.alpha else None,
            token_weight=(1 - self.alpha) * weights.token.flatten(),
            divergence=self._divergence(),
            memory_mb=self.memory_mb,
        )
