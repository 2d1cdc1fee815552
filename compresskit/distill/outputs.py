"""What losses compare: the outputs of a model for one batch, only those that are needed."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresskit.data import Batch
from compresskit.distill.heads import find_head, head_skipped
from compresskit.errors import CompressKitError
from compresskit.kernels.linear_kl import Head, TopK
from compresskit.models import answer_kind
from compresskit.sentence import MEAN_POOLED, SentenceEmbedding
from compresskit.surgery.depth_edits import get_stack
from compresskit.surgery.modes import attention_by, without_cache

# B sequences, L tokens (padded), H hidden size, V classes or vocabulary

Need = Literal["predictions", "hidden", "sentence"]


@dataclass(frozen=True)
class Inner:
    """What one of the student's layers gives, (B, L, width).

    Attributes:
        module: its name.
        role: how the loss that asks for it finds it again.
    """

    module: str
    role: str


@dataclass(frozen=True)
class Maps:
    """Attention probabilities of one of the student's blocks, (B, heads, L, L).

    Attributes:
        block: its number.
        query: the layer that gives its queries; the record of edits knows by it which heads are left.
        head_dim: channels of one head.
    """

    block: int
    query: str
    head_dim: int


@dataclass(frozen=True)
class Stream:
    """What runs between two of the student's blocks, (B, L, H), before any norm that follows the last.

    Attributes:
        stack: the name of the list of blocks.
        place: the block that reads it; past the last block, what that one gives.
    """

    stack: str
    place: int


Wanted = Need | Inner | Maps | Stream


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
            exposes its head, what makes them; of a cached teacher perhaps the largest alone, at the loss's temperature.
        hidden: the embeddings' output and each block's, (B, L, H) each; the last as the model's head sees it.
        sentence: (B, H), the last hidden states pooled as the model's folder says.
        counts: (B, L) ≥ 0, of a teacher that leaves items out: what it says of these tokens counts.
        inner: layers, attention maps and what runs between blocks, by what the student calls them.
    """

    predictions: Tensor | Projection | TopK | None = None
    hidden: tuple[Tensor, ...] | None = None
    sentence: Tensor | None = None
    counts: Tensor | None = None
    inner: Mapping[Inner | Maps | Stream, Tensor] = field(default_factory=dict)

    def get(self, name: Need) -> Tensor | Projection | TopK | tuple[Tensor, ...]:
        """The output `name`.

        Raises:
            ValueError: it was not asked for when these outputs were made.
        """
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"{name!r} was not computed; a loss lists what it reads in `needs`")
        return value

    def role(self, role: str) -> dict[str, Tensor]:
        """The layers asked for under this role, by their names in the student."""
        return {key.module: value for key, value in self.inner.items() if isinstance(key, Inner) and key.role == role}


@dataclass(frozen=True)
class StepWeights:
    """What each place of a batch counts; each vector sums to 1 over all batches of one optimiser step.

    Attributes:
        token: (B, L), equal over real tokens unless said otherwise, 0 at padding.
        row: (B,), equal over sequences that hold a token which counts.
        next_token: (B, L − 1), as `token` over tokens that a real token follows; 0 everywhere where there is none.
    """

    token: Tensor
    row: Tensor
    next_token: Tensor


def _as_it_is(sums: Tensor) -> Tensor:
    return sums


def step_weights(
    masks: Sequence[Tensor],
    counts: Sequence[Tensor] | None = None,
    *,
    add_up: Callable[[Tensor], Tensor] = _as_it_is,
) -> list[StepWeights]:
    """The weights of each batch of an optimiser step from their attention masks (B, L).

    Normalised over the whole step, so that accumulating k batches, on however many processes, gives the gradient of one
    k times as large, however the tokens fall. Where nothing counts, all are 0.

    Args:
        masks: of this process's batches of the step.
        counts: (B, L) ≥ 0 each, what the tokens count before normalisation; by default all the same.
        add_up: sums a tensor over all processes.
    """
    tokens = [mask.float() for mask in masks]
    if counts is not None:
        tokens = [mask * count for mask, count in zip(tokens, counts, strict=True)]
    rows = [(token.amax(1) > 0).float() for token in tokens]
    follows = [token[:, :-1] * mask[:, 1:] for token, mask in zip(tokens, masks, strict=True)]
    parts = (tokens, rows, follows)
    sums = [sum(float(one.cpu().double().sum()) for one in part) for part in parts]  # Apple GPUs have no float64
    totals = [total if total > 0 else 1.0 for total in add_up(torch.tensor(sums, dtype=torch.float64)).tolist()]
    return [
        StepWeights(*(one / total for one, total in zip(three, totals, strict=True)))
        for three in zip(*parts, strict=True)
    ]


def has_head(model: nn.Module) -> bool:
    """Whether the model gives logits: a transformers model with a head is more than its `base_model`."""
    return answer_kind(model) != "states"


def observe(
    model: PreTrainedModel, batch: Batch, needs: frozenset[Wanted], pooling: SentenceEmbedding = MEAN_POOLED
) -> Outputs:
    """Run `model` on the batch and return what is needed, in its own grad mode; `pooling` makes sentence embeddings.

    Attention maps are made by the model's eager attention, which gives the same but for rounding.
    """
    streams = [one for one in needs if isinstance(one, Stream)]
    body_only = not needs - {"sentence", *streams} and has_head(model)
    runner = model.base_model if body_only else model
    head = None if body_only or not has_head(model) else find_head(model)
    layers = [one for one in needs if isinstance(one, Inner)]
    maps = [one for one in needs if isinstance(one, Maps)]
    with (
        without_cache(model),
        nullcontext([]) if head is None else head_skipped(model) as reached,
        attention_by(model, "eager") if maps else nullcontext(),
        _watched(model, layers) as inner,
        _between_blocks(model, streams) as between,
    ):
        result = runner(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            output_hidden_states="hidden" in needs or ("sentence" in needs and runner is not runner.base_model),
            output_attentions=bool(maps),
            return_dict=True,
        )
    predictions = None
    if "predictions" in needs:
        predictions = result.logits if head is None else Projection(reached[0], head)
    hidden = tuple(precise(state) for state in result.hidden_states) if "hidden" in needs else None
    sentence = None
    if "sentence" in needs:
        last = result.hidden_states[-1] if result.get("hidden_states") is not None else result.last_hidden_state
        sentence = pooling.pool(precise(last), batch["attention_mask"])
    inner |= _maps(model, result, maps) | between
    inner = {key: precise(value) for key, value in inner.items()}
    return Outputs(predictions, hidden, sentence, inner=inner)


def precise(values: Tensor) -> Tensor:
    """At least float32, in which losses are computed."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


@contextmanager
def _watched(model: nn.Module, layers: Iterable[Inner]) -> Iterator[dict[Inner | Maps | Stream, Tensor]]:
    """Within it, what these layers give is put into the mapping."""
    given: dict[Inner | Maps | Stream, Tensor] = {}

    def note(layer: Inner, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        given[layer] = output

    handles = [model.get_submodule(layer.module).register_forward_hook(partial(note, layer)) for layer in layers]
    try:
        yield given
    finally:
        for handle in handles:
            handle.remove()


def carried(output: Any) -> Tensor:
    """The hidden states among what a block gives."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def _between_blocks(model: nn.Module, streams: Iterable[Stream]) -> Iterator[dict[Inner | Maps | Stream, Tensor]]:
    """Within it, what these blocks read, or past the last what it gives, is put into the mapping."""
    given: dict[Inner | Maps | Stream, Tensor] = {}

    def note_read(stream: Stream, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given[stream] = args[0] if args else kwargs["hidden_states"]

    def note_given(stream: Stream, _block: nn.Module, _args: Any, output: Any) -> None:
        given[stream] = carried(output)

    handles = []
    for stream in streams:
        stack = get_stack(model, stream.stack)
        if stream.place < len(stack):
            hook = partial(note_read, stream)
            handles.append(stack[stream.place].register_forward_pre_hook(hook, with_kwargs=True))
        else:
            handles.append(stack[-1].register_forward_hook(partial(note_given, stream)))
    try:
        yield given
    finally:
        for handle in handles:
            handle.remove()


def _maps(model: PreTrainedModel, result: Any, maps: Iterable[Maps]) -> dict[Inner | Maps | Stream, Tensor]:
    found: dict[Inner | Maps | Stream, Tensor] = {}
    for one in maps:
        if one.block >= len(result.attentions) or result.attentions[one.block] is None:
            what = f"block {one.block} of {type(model).__name__} shows no attention map"
            raise CompressKitError(what, where="attention", fix="use losses: [{kind: relation}]")
        found[one] = result.attentions[one.block]
    return found
