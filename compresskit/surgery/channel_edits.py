"""An edit that keeps some channels of a convolutional network: what one layer gives less, others read less."""

from typing import Any, Literal

import torch
from pydantic import field_validator
from torch import nn

from compresskit.config import Config
from compresskit.errors import CompressKitError
from compresskit.surgery.edits import EDITS, Edit, check_ranges, get_module, keep_slices, read_ranges

_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
_BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


class ChannelCut(Config):
    """The channels that one layer keeps of what it gives and of what it reads; None: all."""

    module: str
    outputs: str | None = None
    inputs: str | None = None

    @field_validator("outputs", "inputs")
    @classmethod
    def _is_ranges(cls, text: str | None) -> str | None:
        return text if text is None else check_ranges(text)


@EDITS.add
class PruneChannels(Edit):
    """Keep some channels of layers that depend on each other."""

    kind: Literal["prune_channels"] = "prune_channels"
    cuts: tuple[ChannelCut, ...]

    def apply(self, model: nn.Module) -> None:
        """Slice the weights; real ones keep their values."""
        for cut in self.cuts:
            layer = get_module(model, cut.module)
            why = misfit(layer)
            if why:
                raise CompressKitError(f"cannot cut channels of {cut.module}: {why}", where=self.kind)
            if cut.outputs is not None:
                _keep_outputs(layer, cut.outputs)
            if cut.inputs is not None:
                _keep_inputs(layer, cut.inputs)


def misfit(layer: nn.Module) -> str | None:
    """Why a layer's channels cannot be cut; None where they can."""
    if isinstance(layer, _Conv):
        plain = layer.groups == 1 or is_depthwise(layer)
        return None if plain else f"a convolution in {layer.groups} groups"
    if isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) != 1:
        return "a LayerNorm over several axes"
    known = isinstance(layer, _BatchNorm | nn.LayerNorm | nn.Linear)
    return None if known else f"a {type(layer).__name__} is no convolution, linear layer or norm that is known"


def is_depthwise(layer: _Conv) -> bool:
    """Whether each channel is convolved alone."""
    return layer.groups == layer.in_channels == layer.out_channels > 1


def _keep_outputs(layer: nn.Module, text: str) -> None:
    """Cut a layer to the channels that it still gives; a norm and a depthwise convolution read as many."""
    names: tuple[str, ...] = ("weight", "bias")
    if isinstance(layer, _Conv):
        count = layer.out_channels
        sizes = ("groups", "in_channels", "out_channels") if is_depthwise(layer) else ("out_channels",)
    elif isinstance(layer, nn.Linear):
        count, sizes = layer.out_features, ("out_features",)
    elif isinstance(layer, nn.LayerNorm):
        count, sizes = layer.normalized_shape[0], ()
    else:
        count, sizes = int(layer.num_features), ("num_features",)  # type: ignore[arg-type]
        names = ("weight", "bias", "running_mean", "running_var")
    keep = torch.tensor(read_ranges(text, limit=count))
    for name in names:
        keep_slices(layer, name, keep, dim=0)
    for name in sizes:
        setattr(layer, name, len(keep))
    if isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = (len(keep),)


def _keep_inputs(layer: nn.Module, text: str) -> None:
    size = "in_channels" if isinstance(layer, _Conv) else "in_features"
    count: Any = getattr(layer, size, None)
    if count is None or (isinstance(layer, _Conv) and layer.groups > 1):
        raise CompressKitError(f"a {type(layer).__name__} has no inputs of their own to cut", where="prune_channels")
    keep = torch.tensor(read_ranges(text, limit=count))
    keep_slices(layer, "weight", keep, dim=1)
    setattr(layer, size, len(keep))
