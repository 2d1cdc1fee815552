"""What one layer of a model reads and gives; the rest of the forward is not computed."""

from contextlib import suppress

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresskit.data import Batch
from compresskit.errors import CompressKitError
from compresskit.surgery.modes import without_cache


class _SeenError(Exception):
    """Ends a forward as soon as the layer has run."""


@torch.no_grad()
def probe(model: PreTrainedModel, name: str, batch: Batch) -> tuple[Tensor, Tensor]:
    """The first positional input and the output of the layer `name`, when `model` runs on `batch`.

    Raises:
        CompressKitError: the model gives its answer without running the layer.
    """
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((args[0], output))
        raise _SeenError

    handle = model.get_submodule(name).register_forward_hook(keep)
    try:
        with without_cache(model), suppress(_SeenError):
            model(**batch)
    finally:
        handle.remove()
    if not seen:
        raise CompressKitError(f"{name} does not run on this data", where="targets", fix="narrow targets")
    return seen[0]
