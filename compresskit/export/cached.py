"""Decoders whose keys and values are inputs and outputs: one graph, one copy of the weights, for prompt and next token.

    input_ids (batch, sequence)                                          logits (batch, sequence, vocabulary)
    attention_mask (batch, total)     total = past + sequence       →    present.N.key    (batch, heads, total, width)
    position_ids (batch, sequence)    where the model takes them         present.N.value
    past_key_values.N.key, .value     (batch, heads, past, width)

A prompt is the case past = 0. The heads are those of keys and values, and may differ from layer to layer. The names
are those that Optimum, transformers.js and ONNX Runtime GenAI read.

Attention becomes one node that appends to the past by itself and does not repeat the heads that queries share:
ONNX Runtime's `GroupQueryAttention`, or ONNX's own `Attention`. Its mask is spelt out, so that padding may stand on
either side and sliding windows need nothing more. It is made of the length of attention_mask, never of the past's, so a
runtime may keep past and present in one longer buffer (GroupQueryAttention then writes in place).

GroupQueryAttention takes several texts only as whole prompts or token by token: several tokens after a past are for
one text (its contract). `Attention` has no such limit.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal

import onnx_ir as ir
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import sdpa_mask

from compresskit.data import Batch
from compresskit.errors import CompressKitError
from compresskit.export.sizes import Sizes

#: How attention is written: as ONNX Runtime's operator, or as ONNX's own.
Form = Literal["group_query", "attention"]

#: The attention implementation to set on a model while it is traced.
ATTENTION: Mapping[Form, str] = {"group_query": "compresskit_group_query", "attention": "compresskit_appending"}
_MASKED = torch.finfo(torch.float32).min
#: The operator set that brought `Attention`.
ATTENTION_OPSET = 23


class _Layer(CacheLayerMixin):
    """One layer's keys and values; `present` is what they are after this step."""

    is_sliding = False  # windows are told by the mask

    def __init__(self, past: tuple[Tensor, Tensor], *, total: int, new: int) -> None:
        super().__init__()
        self.past, self.total, self.new = past, total, new
        self.present: tuple[Tensor, Tensor] | None = None
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the past is there from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """The new states alone: the attention's node appends them itself."""
        self.keys, self.values = key_states, value_states
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys a mask covers, and the first of them."""
        return self.total, 0

    def get_seq_length(self) -> int:
        """Tokens of the past."""
        return self.total - self.new

    def get_max_length(self) -> int:
        """No end."""
        return -1


class _Growing(Cache):
    """The cache of one traced step."""

    def __init__(self, past: Mapping[str, Mapping[str, Tensor]], *, batch: int, total: int, new: int) -> None:
        super().__init__(layers=[_Layer((one["key"], one["value"]), total=total, new=new) for one in past.values()])
        # What GroupQueryAttention wants to know: the last key of each text, and how many there are.
        self.last = torch.full((batch,), total - 1, dtype=torch.int32)
        self.total = torch.full((), total, dtype=torch.int32)

    def layer_of(self, key: Tensor) -> _Layer:
        """The layer whose newest keys these are."""
        return next(layer for layer in self.layers if isinstance(layer, _Layer) and layer.keys is key)

    def present(self) -> dict[str, dict[str, Tensor]]:
        """What the next step takes as its past."""
        found: dict[str, dict[str, Tensor]] = {}
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, _Layer)
            assert layer.present is not None
            found[str(index)] = dict(zip(("key", "value"), layer.present, strict=True))
        return found


_CACHE: ContextVar[_Growing] = ContextVar("cache")


def merged_heads(states: Tensor) -> Tensor:
    """(batch, heads, length, width) → (batch, length, heads · width), as attention operators read states."""
    batch, heads, length, width = states.shape
    return states.transpose(1, 2).reshape(batch, length, heads * width)


def attention_attributes(query: Tensor, scaling: float | None, softcap: float | None = None) -> dict[str, Any]:
    """What an attention operator has to be told beside its heads: what differs from its defaults."""
    found: dict[str, Any] = {}
    if scaling is not None and scaling != query.shape[3] ** -0.5:
        found["scale"] = float(scaling)
    if softcap is not None:
        found["softcap"] = float(softcap)
    return found


def _attend(
    operator: str, inputs: list[Tensor | None], query: Tensor, layer: _Layer, attributes: dict[str, Any], version: int
) -> tuple[Tensor, None]:
    """Emit the node; its output as (batch, length, heads, width). The layer's present states are two more outputs."""
    batch, heads, length, width = query.shape
    key, value = layer.past
    shapes = [(batch, length, heads * width)]
    shapes += [(batch, past.shape[1], layer.total, past.shape[3]) for past in (key, value)]
    output, *present = torch.onnx.ops.symbolic_multi_out(
        operator, inputs, attributes, dtypes=(torch.float32,) * 3, shapes=shapes, version=version
    )
    layer.present = (present[0], present[1])
    return output.view(batch, length, heads, width), None


def _attention(
    form: Form,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention over past and new states, (batch, heads, length, width), as ONNX Runtime's operator or ONNX's own."""
    if s_aux is not None and form == "attention":
        raise CompressKitError("ONNX's Attention has no place for attention sinks", where="export", fix="target: ort")
    cache = _CACHE.get()
    layer = cache.layer_of(key)
    inputs: list[Tensor | None] = [merged_heads(states) for states in (query, key, value)]
    attributes = attention_attributes(query, scaling, softcap)
    if form == "attention":
        inputs += [attention_mask, *layer.past]
        attributes |= {"q_num_heads": query.shape[1], "kv_num_heads": key.shape[1]}
        return _attend("Attention", inputs, query, layer, attributes, ATTENTION_OPSET)
    inputs += [*layer.past, cache.last, cache.total, None, None, None, attention_mask]
    if s_aux is not None:
        inputs.append(s_aux)
    attributes |= {"num_heads": query.shape[1], "kv_num_heads": key.shape[1]}
    return _attend("com.microsoft::GroupQueryAttention", inputs, query, layer, attributes, 1)


def _bias(*, allow_is_causal_skip: bool = False, **arguments: Any) -> Tensor:
    """What to add to the scores, (batch, 1, length, total): 0 where a token may be read."""
    mask = sdpa_mask(allow_is_causal_skip=False, **arguments)
    assert mask is not None
    return (~mask).to(torch.float32) * _MASKED


def _mask(*, allow_is_causal_skip: bool = False, **arguments: Any) -> Tensor | None:
    """True where a token may be read, (batch, 1, length, total)."""
    return sdpa_mask(allow_is_causal_skip=False, **arguments)


AttentionInterface.register(ATTENTION["group_query"], partial(_attention, "group_query"))
AttentionMaskInterface.register(ATTENTION["group_query"], _bias)
AttentionInterface.register(ATTENTION["attention"], partial(_attention, "attention"))
AttentionMaskInterface.register(ATTENTION["attention"], _mask)


def cache_shapes(model: PreTrainedModel) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """For each layer the (heads, width) of its keys and of its values, read off one step of the model.

    Raises:
        CompressKitError: a model that keeps something else between tokens.
    """
    device = next(model.parameters()).device
    ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
    with torch.no_grad():
        cache = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True).past_key_values
    pairs = [(getattr(one, "keys", None), getattr(one, "values", None)) for one in getattr(cache, "layers", ())]
    found = [
        ((key.shape[1], key.shape[3]), (value.shape[1], value.shape[3]))
        for key, value in pairs
        if isinstance(key, Tensor) and isinstance(value, Tensor) and key.ndim == value.ndim == 4
    ]
    if not found or len(found) < len(pairs):
        raise CompressKitError(
            f"{type(model).__name__} does not keep keys and values of every layer between tokens",
            where="export",
            fix="set 'cache: false': one graph that reads the whole text at every token",
        )
    return found


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether the model places tokens by `position_ids`."""
    return "position_ids" in inspect.signature(model.forward).parameters


def first_step(model: PreTrainedModel, batch: Batch, *, last_only: bool) -> Batch:
    """`batch` as model and file both read it: tokens placed from 0 on, padding too, and the logits that are wanted."""
    found = dict(batch)
    if takes_positions(model):
        texts, length = batch["input_ids"].shape
        found["position_ids"] = torch.arange(length).expand(texts, length)
    return found | {"logits_to_keep": torch.tensor([-1])} if last_only else found


def cached_inputs(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """`batch` as a second step: its tokens after three others, one of them padding on the left.

    Args:
        batch: input_ids and attention_mask, (batch, length); at least two of each that is free (a size of 1 would
            become fixed).
    """
    texts, length = batch["input_ids"].shape
    past = torch.ones(texts, 3, dtype=torch.int64)
    past[0, 0] = 0
    draw = torch.Generator().manual_seed(0)
    inputs: dict[str, Any] = {name: batch[name] for name in ("input_ids", "attention_mask")}
    inputs["attention_mask"] = torch.cat([past, inputs["attention_mask"]], dim=1)
    if takes_positions(model):
        inputs["position_ids"] = torch.arange(3, 3 + length).expand(texts, length)
    inputs["past_key_values"] = {
        str(index): {
            name: torch.randn(texts, heads, 3, width, generator=draw)
            for name, (heads, width) in zip(("key", "value"), pair, strict=True)
        }
        for index, pair in enumerate(cache_shapes(model))
    }
    return inputs


def free_axes(inputs: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """Which axes of `cached_inputs` are free."""
    free = torch.export.Dim.AUTO
    batch = {0: free} if sizes.batch is None else {}
    states = {layer: {name: batch | {2: free} for name in pair} for layer, pair in inputs["past_key_values"].items()}
    return {name: batch | {1: free} for name in inputs if name != "past_key_values"} | {"past_key_values": states}


def name_cached_axes(model: ir.Model, sizes: Sizes) -> None:
    """Call the free axes of inputs and outputs by their names above, and put them in the order above."""
    graph, batch = model.graph, sizes.batch or "batch"
    tokens = [batch, "sequence"]
    by_name = {str(value.name): value for value in graph.inputs}
    heads = [name for name in by_name if name.startswith("past_key_values.")]
    order = [name for name in ("input_ids", "attention_mask", "position_ids") if name in by_name]
    for name in order:
        by_name[name].shape = ir.Shape([batch, "total"] if name == "attention_mask" else tokens)
    for values, length in ((graph.inputs, "past"), (graph.outputs, "total")):
        for value in values:
            if value.shape is not None and value.shape.rank() == 4:
                value.shape = ir.Shape([batch, value.shape[1], length, value.shape[3]])
    logits = graph.outputs[0]
    if logits.shape is not None:
        last = logits.shape[1] if isinstance(logits.shape[1], int) else "sequence"
        logits.shape = ir.Shape([batch, last, logits.shape[2]])
    graph.inputs[:] = [by_name[name] for name in [*order, *heads]]


@contextmanager
def stepping(model: PreTrainedModel, *, last_only: bool) -> Iterator[None]:
    """Inside, the model's forward takes `cached_inputs` and returns `logits` and `present`.

    Args:
        model: with an attention of `ATTENTION`.
        last_only: logits of the last token alone, (batch, 1, vocabulary).
    """
    forward = model.forward

    def step(*, past_key_values: dict[str, dict[str, Tensor]], **inputs: Tensor) -> dict[str, Any]:
        batch, new = inputs["input_ids"].shape
        total = inputs["attention_mask"].shape[1]
        cache = _Growing(past_key_values, batch=batch, total=total, new=new)
        token = _CACHE.set(cache)
        try:
            only = {"logits_to_keep": 1} if last_only else {}
            output = forward(**inputs, **only, past_key_values=cache, use_cache=True, return_dict=True)
        finally:
            _CACHE.reset(token)
        return {"logits": output.logits, "present": cache.present()}

    model.forward = step  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        model.forward = forward
