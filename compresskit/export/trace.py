"""A model in torch becomes an ONNX graph, by `transformers.exporters`, with the integer operators of our layers.

Encoders with integer activations are traced with an attention that stands for one node, ONNX's own `Attention`, in
place of the dozen that spell it out. (ONNX Runtime 1.31 on one core, 64 tokens, 12 heads: 0.16 ms; its
MultiHeadAttention 0.28 ms, the same dozen nodes 0.25 ms, and QAttention 0.28 ms more than its projections alone.)
Decoders that keep their past are traced as `compresskit.export.cached` says. Everything else keeps the model's own
attention, and transformers' fusions for ONNX Runtime.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_onnx import OnnxExporter
from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

from compresskit.data import Batch
from compresskit.errors import CompressKitError
from compresskit.export.cached import (
    ATTENTION,
    ATTENTION_OPSET,
    Form,
    attention_attributes,
    cache_shapes,
    cached_inputs,
    free_axes,
    merged_heads,
    name_cached_axes,
    stepping,
)
from compresskit.export.fusion import (
    drop_reshape_pairs,
    fuse_encoder,
    join_integers,
    name_products,
    prefer_sums,
    share_tables,
)
from compresskit.export.sizes import FREE, Sizes
from compresskit.export.widening import least_opset, spell_out_codes
from compresskit.layers.forms import onnx_forms, swapped
from compresskit.layers.int8_linear import Int8Linear
from compresskit.layers.operators import emit_operators
from compresskit.progress import working
from compresskit.sentence import SentenceEmbedding
from compresskit.surgery.modes import attention_by

OUTPUTS = {
    "feature-extraction": "last_hidden_state",
    "text-generation": "logits",
    "text-classification": "logits",
    "token-classification": "logits",
    "image-classification": "logits",
}
#: The output of models that make one vector of a text.
EMBEDDING = "sentence_embedding"
_NODE_ATTENTION = "compresskit_onnx"
# What GroupQueryAttention asks of the width of a head.
_WIDTH_STEP = 8


def _node_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention of (batch, heads, length, width) states as one operator; result (batch, length, heads, width)."""
    batch, heads, length, width = query.shape
    if position_bias is not None:  # T5; the operator adds a float mask to its scores
        attention_mask = _biased(attention_mask, position_bias)
    mask = [] if attention_mask is None else [attention_mask]
    output = torch.onnx.ops.symbolic(
        "Attention",
        [*map(merged_heads, (query, key, value)), *mask],
        {"q_num_heads": heads, "kv_num_heads": key.shape[1]} | attention_attributes(query, scaling, softcap),
        dtype=torch.float32,
        shape=(batch, length, heads * width),
        version=ATTENTION_OPSET,
    )
    return output.view(batch, length, heads, width), None


def _biased(mask: Tensor | None, bias: Tensor) -> Tensor:
    """A mask, True where a token may be read or added to scores, and a bias (…, heads, length, length), in one."""
    if mask is None:
        return bias
    return bias + mask if mask.is_floating_point() else torch.where(mask, bias, torch.finfo(torch.float32).min)


def _node_mask(
    *, mask_function: Callable[..., Any], attention_mask: Tensor | None = None, **arguments: Any
) -> Tensor | None:
    """True where a token may be read: (batch, 1, length, length), since the operator broadcasts no queries."""
    if mask_function is not bidirectional_mask_function:  # sliding windows, say
        return sdpa_mask(mask_function=mask_function, attention_mask=attention_mask, **arguments)
    if attention_mask is None:
        return None
    length = attention_mask.shape[1]
    return attention_mask.bool()[:, None, None, :].expand(-1, 1, length, length)


AttentionInterface.register(_NODE_ATTENTION, _node_attention)
AttentionMaskInterface.register(_NODE_ATTENTION, _node_mask)


def computes_in_integers(model: nn.Module) -> bool:
    """Whether any layer rounds its activations to 8 bits."""
    return any(isinstance(module, Int8Linear) for module in model.modules())


def _looks_both_ways(model: nn.Module) -> bool:
    return not any(getattr(module, "is_causal", False) for module in model.modules())


@contextlib.contextmanager
def quiet_exporters() -> Iterator[None]:
    """Keep the exporters' progress prints and version notes to themselves; their errors still arrive."""
    loggers = [logging.getLogger(name) for name in ("transformers", "torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def trace(
    model: PreTrainedModel,
    batch: Batch,
    *,
    output: str,
    fuse: bool,
    opset: int | None = None,
    sentence: SentenceEmbedding | None = None,
    sizes: Sizes = FREE,
) -> ir.Model:
    """The ONNX graph of `model`, batch and (of text) length free unless `sizes` fix them, with the output `output`.

    Args:
        model: in eval mode; left as it was.
        batch: sample inputs with at least two rows, of text of at least two tokens (a size of 1 would become fixed).
        output: the name of the wanted output; what only others need is dropped.
        fuse: use ONNX Runtime's fused operators, which compute the same in fewer steps.
        opset: ONNX operator set; None takes the exporter's default, or 23 where attention becomes one node.
        sentence: gives the output `sentence_embedding` too, made of `last_hidden_state`.
        sizes: what the file takes at once; inside, what follows from it is a constant.
    """
    batch = sizes.fit(batch)[0]
    as_node = (
        fuse
        and computes_in_integers(model)
        and _looks_both_ways(model)
        and (opset or ATTENTION_OPSET) >= ATTENTION_OPSET
    )
    with _embedding(model, sentence) if sentence else contextlib.nullcontext():
        usual = opset or least_opset(model)
        graph = _export(model, batch, sizes, as_node=as_node, opset=opset or ATTENTION_OPSET if as_node else usual)
        if as_node and any(node.op_type == "RotaryEmbedding" for node in graph.graph):
            # That operator set brings this operator too, and ONNX Runtime's does not broadcast its tables over a batch.
            as_node, graph = False, _export(model, batch, sizes, as_node=False, opset=usual)
    _keep_outputs(graph, [output, EMBEDDING] if sentence else [output])
    name_products(graph)
    if as_node:
        fuse_encoder(graph)
    elif fuse:
        fuse_float(graph)
        prefer_sums(graph)
        join_integers(graph)
    share_tables(graph)
    spell_out_codes(graph)
    _name_axes(graph, list(batch), sizes)
    # Each node came with the stack trace of the machine it was traced on.
    ClearMetadataAndDocStringPass()(graph)
    return graph


def trace_cached(
    model: PreTrainedModel,
    batch: Batch,
    *,
    form: Form,
    fuse: bool,
    opset: int | None = None,
    last_only: bool = False,
    sizes: Sizes = FREE,
) -> ir.Model:
    """The ONNX graph of a decoder that takes its past and gives its present (`compresskit.export.cached`).

    Args:
        model: in eval mode; left as it was.
        batch: sample input_ids and attention_mask, two rows and two tokens or more.
        form: how attention is written; `attention` needs operator set 23.
        fuse: ONNX Runtime's fused operators around it; beside `group_query` only.
        opset: ONNX operator set; None is the exporter's default, or 23 for `attention`.
        last_only: logits of the last token alone.
        sizes: the texts that the file takes at once; the tokens stay free.
    """
    inputs = cached_inputs(model, sizes.fit(batch)[0])
    opset = opset or (ATTENTION_OPSET if form == "attention" else least_opset(model))
    config = OnnxConfig(opset_version=opset, dynamic_shapes=free_axes(inputs, sizes))
    with _tracing(model, ATTENTION[form]), stepping(model, last_only=last_only):
        graph: ir.Model = OnnxExporter().export(model, inputs, config=config).program
    name_products(graph)
    if fuse and form == "group_query":
        fuse_float(graph)
        prefer_sums(graph)
        join_integers(graph)
    share_tables(graph)
    spell_out_codes(graph)
    name_cached_axes(graph, sizes)
    ClearMetadataAndDocStringPass()(graph)
    return graph


def cached_form(model: PreTrainedModel) -> Form:
    """How ONNX Runtime attends to the past of this model fastest, among what its heads allow.

    SmolLM2-135M in float32, one thread: a prompt of 256 tokens takes 1.1 s and the next token 63 ms with
    GroupQueryAttention and the fusions that go with it; 1.8 s and 93 ms with Attention, which goes without.
    """
    fits = all(key == value and key[1] % _WIDTH_STEP == 0 for key, value in cache_shapes(model))
    return "group_query" if fits else "attention"


@contextlib.contextmanager
def _tracing(model: PreTrainedModel, attention: str) -> Iterator[None]:
    """Inside, the exporter sees the model with this attention and with layers that emit operators."""
    with (
        working("tracing the graph"),
        quiet_exporters(),
        attention_by(model, attention),
        swapped(model, onnx_forms(model)),
        emit_operators(),
    ):
        yield


def _export(model: PreTrainedModel, batch: Batch, sizes: Sizes, *, as_node: bool, opset: int | None) -> ir.Model:
    """The graph as the exporter makes it."""
    # Spelt-out attention is what the float fusions recognise best in an encoder; decoders keep their own.
    own = model.config._attn_implementation or "eager"
    attention = _NODE_ATTENTION if as_node else "eager" if _looks_both_ways(model) else own
    # Of text the length is free too; images and audio features keep theirs.
    fixed = (sizes.batch, sizes.length) if "input_ids" in batch else (sizes.batch,)
    free = {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(fixed) if size is None}
    config = OnnxConfig(opset_version=opset, dynamic_shapes=dict.fromkeys(batch, free))
    inputs: dict[str, Any] = dict(batch)
    if hasattr(model.config, "use_cache"):
        inputs["use_cache"] = False
    with _tracing(model, attention):
        return OnnxExporter().export(model, inputs, config=config).program


def fuse_float(model: ir.Model) -> None:
    """transformers' own fusions for ONNX Runtime on a CPU, in place; reshapes that lead nowhere after them go."""
    with quiet_exporters():
        fuse_for_onnxruntime(model, "cpu")
    drop_reshape_pairs(model)


def _keep_outputs(model: ir.Model, wanted: list[str]) -> None:
    by_name = {value.name: value for value in model.graph.outputs}
    missing = [name for name in wanted if name not in by_name]
    if missing:
        names = ", ".join(map(str, by_name))
        raise CompressKitError(f"the model has no output {missing[0]!r}; it has: {names}", where="export")
    model.graph.outputs[:] = [by_name[name] for name in wanted]
    RemoveUnusedNodesPass()(model)


@contextlib.contextmanager
def _embedding(model: PreTrainedModel, sentence: SentenceEmbedding) -> Iterator[None]:
    """Inside, the model's forward returns `last_hidden_state` and `sentence_embedding`."""
    forward = model.forward

    def embed(**inputs: Tensor) -> dict[str, Tensor]:
        hidden = forward(**inputs).last_hidden_state
        return {"last_hidden_state": hidden, EMBEDDING: sentence.embed(hidden, inputs["attention_mask"])}

    model.forward = embed  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        model.forward = forward


def _name_axes(model: ir.Model, names: list[str], sizes: Sizes) -> None:
    """Call the free axes `batch` and, of text, `sequence`; keep the order of `names`."""
    by_name = {value.name: value for value in model.graph.inputs}
    called: dict[str, str | int] = {}
    for value in by_name.values():
        traced = list(value.shape or ())
        own = [sizes.batch or "batch", *(traced[1:] if "input_ids" not in by_name else [sizes.length or "sequence"])]
        called |= {str(old): new for old, new in zip(traced, own, strict=True) if isinstance(new, str | int)}
        value.shape = ir.Shape(own)
    for value in model.graph.outputs:
        value.shape = ir.Shape([called.get(str(size), size) for size in value.shape or ()])
    model.graph.inputs[:] = [by_name[name] for name in names if name in by_name]
