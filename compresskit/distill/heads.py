"""A model's output head, taken apart, so that a loss can apply it without the (tokens × vocabulary) logits.

    logits = cap · tanh(scale · (W x + b) / cap)          x: what reaches the head, W and b: the output embedding's

Which of scale and cap a model applies is written in its config; that nothing else happens after the head is not, so it
is tried on one short input before it is relied on. A model that fails, or has no output embedding, gives logits.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresskit.kernels.linear_kl import Head, TiledWeight
from compresskit.layers.low_rank import LowRankLinear
from compresskit.layers.quant_linear import QuantLinear

log = logging.getLogger(__name__)

_TOLERANCE = 1e-3
_exposed: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()


def find_head(model: PreTrainedModel) -> Head | None:
    """The head that makes `model`'s logits from what reaches its output embedding; None where it is not only that."""
    module, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    head = _take_apart(module, scale=float(scale), softcap=getattr(config, "final_logit_softcapping", None))
    if head is None:
        return None
    if model not in _exposed:
        _exposed[model] = _explains_logits(model, head)
        log.debug("%s: the head is %s", type(model).__name__, "fused" if _exposed[model] else "more than a product")
    return head if _exposed[model] else None


def _take_apart(module: nn.Module | None, *, scale: float, softcap: float | None) -> Head | None:
    if type(module) is nn.Linear:
        return Head(module.weight, module.bias, scale=scale, softcap=softcap)
    if isinstance(module, QuantLinear):
        weight = TiledWeight((module.out_features, module.in_features), module.dequantize_rows)
        return Head(weight, module.bias, scale=scale, softcap=softcap)
    if isinstance(module, LowRankLinear) and type(module.factor_in) is nn.Linear and type(module.expand) is nn.Linear:
        thin, wide = module.factor_in, module.expand
        return Head(wide.weight, wide.bias, thin.weight, scale=scale, softcap=softcap)
    return None


def cut_head(head: Head, tokens: int) -> Head:
    """The head over the first `tokens` of its vocabulary; itself where it has no more."""
    weight, bias = head.weight, head.bias
    if weight.shape[0] <= tokens:
        return head
    if isinstance(weight, TiledWeight):
        weight = TiledWeight((tokens, weight.shape[1]), weight.rows, weight.dtype)
    else:
        weight = weight[:tokens]
    return replace(head, weight=weight, bias=None if bias is None else bias[:tokens])


@torch.no_grad()
def _explains_logits(model: PreTrainedModel, head: Head) -> bool:
    """Whether `head` gives the model's own logits on a short input."""
    reached: list[Tensor] = []
    module = model.get_output_embeddings()
    assert isinstance(module, nn.Module)
    hook = module.register_forward_pre_hook(lambda _, inputs: reached.append(inputs[0]))
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            logits = model(input_ids=torch.tensor([[0, 1]], device=model.device), return_dict=True).logits
    finally:
        hook.remove()
    if len(reached) != 1 or reached[0].ndim != 3:
        return False
    ours = head.logits_of_reduced(head.reduced(reached[0].flatten(0, 1)))
    if ours.shape != logits.flatten(0, 1).shape:
        return False
    return bool((ours - logits.flatten(0, 1)).abs().max() <= _TOLERANCE * logits.abs().max())


@contextmanager
def head_skipped(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Within it the model's output embedding is not applied; what reaches it, (B, L, H), is put into the list."""
    module, reached = model.get_output_embeddings(), []
    assert isinstance(module, nn.Module)
    own = module.__dict__.get("forward")

    def note(hidden: Tensor) -> Tensor:
        reached.append(hidden)
        return hidden[..., :1]  # stands for logits that nobody reads

    module.forward = note
    try:
        yield reached
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
