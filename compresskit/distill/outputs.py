"""What losses compare: the outputs of a model for one batch, only those that are needed."""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from compresskit.data import Batch
from compresskit.distill.heads import find_head, head_skipped
from compresskit.kernels.linear_kl import Head
from compresskit.models import answer_kind
from compresskit.sentence import MEAN_POOLED, SentenceEmbedding

# B sequences, L tokens (padded), H hidden size, V classes or vocabulary

Need = Literal["predictions", "hidden", "sentence"]


@dataclass(frozen=True)
class Projection:
    """Logits that were not made: what reaches the head, (B, L, H), and the head."""

    hidden: Tensor
    head: Head


@dataclass(frozen=True)
class Outputs:
    """A model's outputs for one batch.

    Attributes:
        predictions: logits, (B, L, V) for heads over tokens, (B, V) for heads over sequences; or, where the model
            exposes its head, what makes them.
        hidden: the embeddings' output and each block's, (B, L, H) each; the last as the model's head sees it.
        sentence: (B, H), the last hidden states pooled as the model's folder says.
    """

    predictions: Tensor | Projection | None = None
    hidden: tuple[Tensor, ...] | None = None
    sentence: Tensor | None = None

    def get(self, name: Need) -> Tensor | Projection | tuple[Tensor, ...]:
        """The output `name`.

        Raises:
            ValueError: it was not asked for when these outputs were made.
        """
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"{name!r} was not computed; a loss lists what it reads in `needs`")
        return value


@dataclass(frozen=True)
class StepWeights:
    """What each place of a batch counts; each vector sums to 1 over all batches of one optimiser step.

    Attributes:
        token: (B, L), equal over real tokens, 0 at padding.
        row: (B,), equal over sequences.
        next_token: (B, L − 1), equal over tokens that a real token follows; 0 everywhere where there is none.
    """

    token: Tensor
    row: Tensor
    next_token: Tensor


def step_weights(masks: Iterable[Tensor]) -> list[StepWeights]:
    """The weights of each batch of an optimiser step from their attention masks (B, L).

    Normalised over the whole step, so that accumulating k batches gives the gradient of one k times as large, however
    the tokens fall.
    """
    masks = [mask.float() for mask in masks]
    follows = [mask[:, :-1] * mask[:, 1:] for mask in masks]
    tokens = sum(float(mask.sum()) for mask in masks)
    pairs = sum(float(pair.sum()) for pair in follows)
    rows = sum(len(mask) for mask in masks)
    return [
        StepWeights(mask / max(tokens, 1), mask.new_full((len(mask),), 1 / rows), pair / max(pairs, 1))
        for mask, pair in zip(masks, follows, strict=True)
    ]


def has_head(model: nn.Module) -> bool:
    """Whether the model gives logits: a transformers model with a head is more than its `base_model`."""
    return answer_kind(model) != "states"


def observe(
    model: PreTrainedModel, batch: Batch, needs: frozenset[Need], pooling: SentenceEmbedding = MEAN_POOLED
) -> Outputs:
    """Run `model` on the batch and return what is needed, in its own grad mode; `pooling` makes sentence embeddings."""
    body_only = not needs - {"sentence"} and has_head(model)
    runner = model.base_model if body_only else model
    head = None if body_only or not has_head(model) else find_head(model)
    with nullcontext([]) if head is None else head_skipped(model) as reached:
        result = runner(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            output_hidden_states="hidden" in needs or ("sentence" in needs and runner is not runner.base_model),
            return_dict=True,
        )
    predictions = None
    if "predictions" in needs:
        predictions = result.logits if head is None else Projection(reached[0], head)
    hidden = tuple(result.hidden_states) if "hidden" in needs else None
    sentence = None
    if "sentence" in needs:
        last = result.hidden_states[-1] if result.get("hidden_states") is not None else result.last_hidden_state
        sentence = pooling.pool(last, batch["attention_mask"])
    return Outputs(predictions, hidden, sentence)
