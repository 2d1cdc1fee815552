"""A model in torch becomes an ONNX graph, by `transformers.exporters`, with the integer operators of our layers.

Encoders with integer activations are traced with an attention that stands for one node, ONNX's own `Attention`, in
place of the dozen that spell it out. (ONNX Runtime 1.31 on one core, 64 tokens, 12 heads: 0.16 ms; its
MultiHeadAttention 0.28 ms, the same dozen nodes 0.25 ms, and QAttention 0.28 ms more than its projections alone.)
Everything else keeps the model's own attention, and transformers' fusions for ONNX Runtime.
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
from compresskit.export.fusion import fuse_encoder, prefer_sums, share_tables
from compresskit.layers.forms import onnx_forms, swapped
from compresskit.layers.int8_linear import Int8Linear
from compresskit.layers.operators import emit_operators
from compresskit.progress import working

OUTPUTS = {
    "feature-extraction": "last_hidden_state",
    "text-generation": "logits",
    "text-classification": "logits",
    "token-classification": "logits",
    "image-classification": "logits",
}
_NODE_ATTENTION = "compresskit_onnx"
# The operator set that brought `Attention`.
_ATTENTION_OPSET = 23


def _node_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention of (batch, heads, length, width) states as one operator; result (batch, length, heads, width)."""
    batch, heads, length, width = query.shape

    def merged(states: Tensor) -> Tensor:
        return states.transpose(1, 2).reshape(batch, states.shape[2], states.shape[1] * width)

    attributes: dict[str, Any] = {"q_num_heads": heads, "kv_num_heads": key.shape[1]}
    if scaling is not None and scaling != width**-0.5:
        attributes["scale"] = scaling
    mask = [] if attention_mask is None else [attention_mask]
    merged_output = torch.onnx.ops.symbolic(
        "Attention",
        [merged(query), merged(key), merged(value), *mask],
        attributes,
        dtype=torch.float32,
        shape=(batch, length, heads * width),
        version=_ATTENTION_OPSET,
    )
    return merged_output.view(batch, length, heads, width), None


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
def _attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    before = model.config._attn_implementation or "eager"
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


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
) -> ir.Model:
    """The ONNX graph of `model`, batch and (of text) length free, with the one output `output`.

    Args:
        model: in eval mode; left as it was.
        batch: sample inputs with at least two rows, of text of at least two tokens (a size of 1 would become fixed).
        output: the name of the wanted output; what only others need is dropped.
        fuse: use ONNX Runtime's fused operators, which compute the same in fewer steps.
        opset: ONNX operator set; None takes the exporter's default, or 23 where attention becomes one node.
    """
    as_node = (
        fuse
        and computes_in_integers(model)
        and _looks_both_ways(model)
        and (opset or _ATTENTION_OPSET) >= _ATTENTION_OPSET
    )
    graph = _export(model, batch, as_node=as_node, opset=opset or _ATTENTION_OPSET if as_node else opset)
    if as_node and any(node.op_type == "RotaryEmbedding" for node in graph.graph):
        # That operator set brings this operator too, and ONNX Runtime's does not broadcast its tables over a batch.
        as_node, graph = False, _export(model, batch, as_node=False, opset=opset)
    _keep_output(graph, output)
    if as_node:
        fuse_encoder(graph)
    elif fuse:
        fuse_float(graph)
        prefer_sums(graph)
    share_tables(graph)
    _name_axes(graph, list(batch))
    # Each node came with the stack trace of the machine it was traced on.
    ClearMetadataAndDocStringPass()(graph)
    return graph


def _export(model: PreTrainedModel, batch: Batch, *, as_node: bool, opset: int | None) -> ir.Model:
    """The graph as the exporter makes it."""
    # Spelt-out attention is what the float fusions recognise best in an encoder; decoders keep their own.
    own = model.config._attn_implementation or "eager"
    attention = _NODE_ATTENTION if as_node else "eager" if _looks_both_ways(model) else own
    free = torch.export.Dim.DYNAMIC
    # Of text the length is free too; images and audio features keep theirs.
    shapes = {name: {0: free, 1: free} if "input_ids" in batch else {0: free} for name in batch}
    config = OnnxConfig(opset_version=opset, dynamic_shapes=shapes)
    inputs: dict[str, Any] = dict(batch)
    if hasattr(model.config, "use_cache"):
        inputs["use_cache"] = False
    with (
        working("tracing the graph"),
        quiet_exporters(),
        _attention(model, attention),
        swapped(model, onnx_forms(model)),
        emit_operators(),
    ):
        return OnnxExporter().export(model, inputs, config=config).program


def fuse_float(model: ir.Model) -> None:
    """transformers' own fusions for ONNX Runtime on a CPU, in place."""
    with quiet_exporters():
        fuse_for_onnxruntime(model, "cpu")


def _keep_output(model: ir.Model, output: str) -> None:
    kept = [value for value in model.graph.outputs if value.name == output]
    if not kept:
        names = ", ".join(str(value.name) for value in model.graph.outputs)
        raise CompressKitError(f"the model has no output {output!r}; it has: {names}", where="export")
    model.graph.outputs[:] = kept
    RemoveUnusedNodesPass()(model)


def _name_axes(model: ir.Model, names: list[str]) -> None:
    """Call the free axes of the inputs `batch` and, of text, `sequence`; keep the order of `names`."""
    by_name = {value.name: value for value in model.graph.inputs}
    for value in by_name.values():
        fixed = list(value.shape or ())[1:]
        value.shape = ir.Shape(["batch", "sequence"] if "input_ids" in by_name else ["batch", *fixed])
    model.graph.inputs[:] = [by_name[name] for name in names if name in by_name]
