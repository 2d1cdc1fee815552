"""Teachers: whatever gives the outputs that a student should give."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresskit.data import Batch, Sequences
from compresskit.distill.batching import collate
from compresskit.distill.outputs import Need, Outputs, Projection, observe
from compresskit.sentence import MEAN_POOLED, SentenceEmbedding


class Teacher(Protocol):
    """Gives a batch's target outputs, without gradients."""

    def __call__(self, batch: Batch, rows: list[int], needs: frozenset[Need]) -> Outputs:
        """The outputs for `batch`, whose sequences have the numbers `rows` in the training part."""
        ...


class LiveTeacher:
    """Runs the original beside the student, and remembers its sentence embeddings.

    A sentence embedding is a few hundred numbers, so a sequence that is seen again costs no forward pass; logits and
    hidden states are too large to keep and are computed each time.

    Args:
        model: in eval mode on the device of the batches; never modified.
        pooling: how hidden states become sentence embeddings.
        layers: which of its hidden states (0 the embeddings) stand for the student's, in order; by default all.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        pooling: SentenceEmbedding = MEAN_POOLED,
        *,
        layers: Sequence[int] | None = None,
    ) -> None:
        self.model, self.pooling, self.layers = model, pooling, layers
        self._sentences: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(self, batch: Batch, rows: list[int], needs: frozenset[Need]) -> Outputs:
        """The original's outputs for this batch."""
        if needs != {"sentence"}:
            outputs = observe(self.model, batch, needs, self.pooling)
            if self.layers is None or outputs.hidden is None:
                return outputs
            return replace(outputs, hidden=tuple(outputs.hidden[layer] for layer in self.layers))
        new = [i for i, row in enumerate(rows) if row not in self._sentences]
        if new:
            part = {name: values[new] for name, values in batch.items()}
            fresh = observe(self.model, part, needs, self.pooling).sentence
            assert fresh is not None
            self._sentences.update(zip([rows[i] for i in new], fresh, strict=True))
        return Outputs(sentence=torch.stack([self._sentences[row] for row in rows]))


class TwoVocabularies:
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

    def __call__(self, batch: Batch, rows: list[int], needs: frozenset[Need]) -> Outputs:
        """The outputs for these sequences, each from the one that reads the right tokens."""
        found: dict[Need, Tensor | Projection | tuple[Tensor, ...]] = {}
        if needs & self.of_texts:
            own = collate(self.training, rows, max_length=self.max_length).batch
            own = {name: values.to(batch["input_ids"].device) for name, values in own.items()}
            told = self.whole(own, rows, needs & self.of_texts)
            found |= {name: told.get(name) for name in needs & self.of_texts}
        if needs - self.of_texts:
            told = self.narrowed(batch, rows, needs - self.of_texts)
            found |= {name: told.get(name) for name in needs - self.of_texts}
        return Outputs(**found)  # type: ignore[arg-type]
