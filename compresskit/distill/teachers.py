"""Teachers: whatever gives the outputs that a student should give."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresskit.data import Batch, Sequences
from compresskit.distill.batching import collate
from compresskit.distill.heads import cut_head
from compresskit.distill.lineage import Lineage
from compresskit.distill.outputs import Need, Outputs, Projection, Wanted, observe
from compresskit.kernels.linear_kl import TopK
from compresskit.sentence import MEAN_POOLED, SentenceEmbedding
from compresskit.surgery.provenance import Provenance


class Teacher(ABC):
    """Gives a batch's target outputs, without gradients."""

    #: Whether its outputs carry `counts`: items that it leaves out.
    leaves_out: bool = False

    @abstractmethod
    def __call__(self, batch: Batch, rows: list[int], needs: frozenset[Wanted]) -> Outputs:
        """The outputs for `batch`, whose sequences have the numbers `rows` in the training part.

        A negative number is that of a sequence of another text, at which nothing is remembered.
        """

    def memory(self) -> dict[str, Tensor]:
        """What it remembers, for a checkpoint."""
        return {}

    def remember(self, memory: Mapping[str, Tensor]) -> None:
        """Go on from what another one of its kind remembered."""
        return

    def follow(self, weights: Mapping[str, Tensor]) -> None:
        """A step is done, after which the student's weights are these."""
        return


class LiveTeacher(Teacher):
    """Runs the original beside the student, and remembers its sentence embeddings.

    A sentence embedding is a few hundred numbers, so a sequence that is seen again costs no forward pass; logits and
    hidden states are too large to keep and are computed each time.

    Args:
        model: in eval mode on the device of the batches; never modified.
        pooling: how hidden states become sentence embeddings.
        lineage: what of the model each part of the student stands for; by default the student has all of it.
        vocabulary: the first so many tokens are the student's too, and its head is cut to them (padded vocabularies).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        pooling: SentenceEmbedding = MEAN_POOLED,
        *,
        lineage: Lineage | None = None,
        vocabulary: int | None = None,
    ) -> None:
        self.model, self.pooling, self.lineage = model, pooling, lineage or Lineage(Provenance())
        self.vocabulary = vocabulary
        self._sentences: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(self, batch: Batch, rows: list[int], needs: frozenset[Wanted]) -> Outputs:
        """The original's outputs for this batch."""
        if needs != {"sentence"} or min(rows) < 0:
            outputs = observe(self.model, batch, self.lineage.asked(needs), self.pooling)
            return self.lineage.left_of(needs, replace(outputs, predictions=self._shared(outputs.predictions)))
        new = [i for i, row in enumerate(rows) if row not in self._sentences]
        if new:
            part = {name: values[new] for name, values in batch.items()}
            fresh = observe(self.model, part, needs, self.pooling).sentence
            assert fresh is not None
            self._sentences.update(zip([rows[i] for i in new], fresh, strict=True))
        return Outputs(sentence=torch.stack([self._sentences[row] for row in rows]))

    def _shared(self, predictions: Tensor | Projection | TopK | None) -> Tensor | Projection | TopK | None:
        """Predictions of the student's tokens alone."""
        if self.vocabulary is None:
            return predictions
        if isinstance(predictions, Projection):
            return replace(predictions, head=cut_head(predictions.head, self.vocabulary))
        return predictions[..., : self.vocabulary] if isinstance(predictions, Tensor) else predictions

    def memory(self) -> dict[str, Tensor]:
        """The rows whose embeddings are known, and these."""
        if not self._sentences:
            return {}
        rows = torch.tensor(list(self._sentences))
        return {"rows": rows, "sentences": torch.stack(list(self._sentences.values()))}

    def remember(self, memory: Mapping[str, Tensor]) -> None:
        """Take these embeddings for known."""
        if memory:
            sentences = memory["sentences"].to(self.model.device)
            self._sentences = dict(zip(memory["rows"].tolist(), sentences, strict=True))


class AverageTeacher(LiveTeacher):
    """The exponential moving average of the student: a ← decay · a + (1 − decay) · student, after each step.

    It begins as the student, and what agrees with itself has nothing to learn: use it beside labels (`alpha` of kl),
    dropout, the contrastive loss or other teachers. Held-out losses against it are against the average of their time.

    Args:
        student: copied, with all that its weights share.
        pooling: the student's.
        decay: in [0, 1); 1 / (1 − decay) steps are its memory.
    """

    def __init__(self, student: PreTrainedModel, pooling: SentenceEmbedding = MEAN_POOLED, *, decay: float) -> None:
        super().__init__(copy.deepcopy(student).eval().requires_grad_(False), pooling)
        self.decay = decay

    @torch.no_grad()
    def follow(self, weights: Mapping[str, Tensor]) -> None:
        """Take a step towards these weights; the others are the student's for ever."""
        own = dict(self.model.named_parameters())
        for name, value in weights.items():
            own[name].lerp_(value.to(own[name].dtype), 1 - self.decay)
        self._sentences.clear()

    def memory(self) -> dict[str, Tensor]:
        """Its weights."""
        return dict(self.model.named_parameters())

    @torch.no_grad()
    def remember(self, memory: Mapping[str, Tensor]) -> None:
        """Take these weights."""
        for name, value in self.model.named_parameters():
            value.copy_(memory[name])


class TwoVocabularies(Teacher):
    """Teaches a student with fewer tokens: what whole texts give is told by the original reading its own tokens.

    So the student learns to say with its pieces what the original says with words that were dropped. What is told token
    by token can only come from the original reading the student's tokens.

    Args:
        whole: reads the original's tokens.
        narrowed: reads the student's.
        training: the training part in the original's tokens, in the student's order.
        max_length: tokens of a sequence that are used; None is all.
        of_texts: which outputs are one for each text.
    """

    def __init__(
        self,
        whole: LiveTeacher,
        narrowed: LiveTeacher,
        training: Sequences,
        *,
        max_length: int | None,
        of_texts: frozenset[Need],
    ) -> None:
        self.whole, self.narrowed, self.training = whole, narrowed, training
        self.max_length, self.of_texts = max_length, of_texts

    def __call__(self, batch: Batch, rows: list[int], needs: frozenset[Wanted]) -> Outputs:
        """The outputs for these sequences, each from the one that reads the right tokens."""
        if min(rows) < 0:  # of another text only the student's tokens are there
            return self.narrowed(batch, rows, needs)
        by_token, by_text = needs - self.of_texts, self.of_texts & needs
        told = self.narrowed(batch, rows, by_token) if by_token else Outputs()
        if not by_text:
            return told
        own = collate(self.training, rows, max_length=self.max_length).batch
        own = {name: values.to(batch["input_ids"].device) for name, values in own.items()}
        whole = self.whole(own, rows, by_text)
        return replace(told, **{name: whole.get(name) for name in by_text})

    def memory(self) -> dict[str, Tensor]:
        """That of the one that reads whole texts."""
        return self.whole.memory()

    def remember(self, memory: Mapping[str, Tensor]) -> None:
        """Go on from it."""
        self.whole.remember(memory)
