"""Is a model a plain chain of blocks, so that walking from block to block is what the model itself does?"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresskit.data import Batch
from compresskit.errors import CompressKitError
from compresskit.layerwise.weights import require_finite
from compresskit.surgery.sites import find_blocks

_NO_WALK = "all passes but tensor and distill need a plain chain of blocks; distil it into one, or use another model"


def hidden_of(output: Any) -> Tensor:
    """The hidden states that a block gives, alone or before its other outputs."""
    return output if isinstance(output, Tensor) else output[0]


def real_tokens(batch: Batch, tokens: torch.Size) -> Tensor:
    """Which of (batch, length) tokens are no padding, bool: all of them where the batch has no mask, as of images."""
    mask = batch.get("attention_mask")
    return torch.ones(tokens, dtype=torch.bool) if mask is None else mask.bool()


@torch.no_grad()
def check_chain(model: PreTrainedModel, batch: Batch, blocks: Sequence[str] | None = None) -> None:
    """Make sure that walking from block to block is what the model itself does.

    Args:
        batch: two sequences, say; the model is run on them once.
        blocks: their names; by default those of `find_blocks`.

    Raises:
        CompressKitError: blocks that run in another order than they are listed, more than once, or on anything but
            the (batch, length, width) output of the block before; blocks that change its shape; numbers that are not
            finite.
    """
    require_finite(model)
    blocks = find_blocks(model) if blocks is None else blocks
    calls: list[tuple[str, Any, Any]] = []

    def record(name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = kwargs.get("hidden_states", args[0] if args else None)
        calls.append((name, given, hidden_of(output)))

    handles = [
        model.get_submodule(name).register_forward_hook(partial(record, name), with_kwargs=True) for name in blocks
    ]
    try:
        model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    what = _broken_link(blocks, calls, _token_shape(batch, calls))
    if what:
        raise CompressKitError(
            f"this architecture cannot be walked block by block: {what}", where=type(model).__name__, fix=_NO_WALK
        )


def _token_shape(batch: Batch, calls: Sequence[tuple[str, Any, Any]]) -> torch.Size:
    """(batch, length) of the tokens of a text, or of what the first block makes of images."""
    if "input_ids" in batch:
        return batch["input_ids"].shape
    given = calls[0][1] if calls else None
    return given.shape[:2] if isinstance(given, Tensor) else torch.Size()


def _broken_link(blocks: Sequence[str], calls: Sequence[tuple[str, Any, Any]], shape: torch.Size) -> str | None:
    """What keeps `calls` (name, input, output) from being a plain chain of `blocks` over (batch, length) tokens."""
    if tuple(name for name, _, _ in calls) != tuple(blocks):
        return "its blocks do not run once each, in the order in which they are listed"
    for index, (name, given, output) in enumerate(calls):
        if not isinstance(given, Tensor) or given.dim() != 3 or given.shape[:2] != shape:
            return f"{name} does not read hidden states of shape (batch, length, width)"
        if index and not torch.equal(given, calls[index - 1][2]):
            return f"{name} does not read what the block before it gives"
        if output.shape != given.shape:
            return f"{name} gives another shape than it reads"
    return None
