"""Which of a model's parameters learn, and how its blocks are run meanwhile."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from compresskit.config import did_you_mean
from compresskit.errors import CompressKitError
from compresskit.layers.low_rank import LowRankLinear
from compresskit.surgery.modes import attention_by
from compresskit.surgery.sites import find_blocks


def choose_parameters(
    model: PreTrainedModel, train: tuple[str, ...], freeze: tuple[str, ...] | None
) -> dict[str, nn.Parameter]:
    """The float parameters whose names match `train` and not `freeze`; shared ones once.

    Where neither is said, a head over the vocabulary rests, with the table that it is tied to, unless a pass made it
    factors. Each of its rows has a gradient at each step, and AdamW moves all by about the same: those of tokens that
    the text does not hold, too.

    Raises:
        CompressKitError: a pattern that matches nothing, or nothing left to train.
    """
    named = {name: value for name, value in model.named_parameters() if value.is_floating_point()}
    if not named:
        raise CompressKitError("the model has no float weight left to train", fix="move distill before quantize")
    head = model.get_output_embeddings()
    rests = head.weight if freeze is None and train == ("*",) and type(head) is nn.Linear else None
    freeze = freeze or ()
    for field, patterns in (("train", train), ("freeze", freeze)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in named):
                near = did_you_mean(pattern, named)
                fix = f"did you mean {near!r}?" if near else f"names look like {next(iter(named))!r}"
                raise CompressKitError(f"{pattern!r} matches no parameter", where=field, fix=fix)
    chosen = {
        name: value
        for name, value in named.items()
        if value is not rests
        and any(fnmatchcase(name, pattern) for pattern in train)
        and not any(fnmatchcase(name, pattern) for pattern in freeze)
    }
    if not chosen:
        raise CompressKitError("every parameter is frozen", where="freeze", fix="freeze fewer names")
    return chosen


def find_factors(model: nn.Module, chosen: Collection[str]) -> tuple[frozenset[str], frozenset[str]]:
    """The weights of B and of A among the parameters `chosen`, of all low-rank layers y = B (A x) + b.

    Raises:
        CompressKitError: there are none of the one or the other.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    wide = frozenset(f"{name}.expand.weight" for name in layers) & frozenset(chosen)
    thin = frozenset(one for one in chosen if any(one.startswith(f"{name}.reduce.") for name in layers))
    if not wide or not thin:
        what = (
            "the model has no low-rank layer" if not layers else f"no {'A' if wide else 'B'} of a low-rank layer learns"
        )
        raise CompressKitError(
            what, where="turns", fix="leave turns out, or put it after low_rank with both factors free"
        )
    return wide, thin


@contextmanager
def only_these_learn(model: nn.Module, chosen: Mapping[str, nn.Parameter], *, dropout: bool) -> Iterator[None]:
    """Gradients for `chosen` alone; afterwards none, no requires_grad and eval mode."""
    model.requires_grad_(False).train(dropout)
    for value in chosen.values():
        value.requires_grad_(True)
    try:
        yield
    finally:
        model.eval().requires_grad_(False).zero_grad(set_to_none=True)


def _forward_again(model: PreTrainedModel, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # In the backward pass, which runs the block again, the choice of this forward pass is over.
    again = partial(attention_by, model, model.config._attn_implementation or "eager")
    return checkpoint(forward, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again()), **kwargs)


@contextmanager
def recomputed_blocks(model: PreTrainedModel) -> Iterator[None]:
    """Within it blocks keep only what they read for the backward pass, and are run again there."""
    blocks = [model.get_submodule(name) for name in find_blocks(model)]
    for block in blocks:
        block.forward = partial(_forward_again, model, block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
