"""What can be cut of a block's widths: the neurons of an FFN, the heads of an attention.

Both are groups of columns of one layer, the one that writes into the stream: a neuron is one column, a key/value group
the dimensions of all its queries' heads. With a group go the outputs of the layers before it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from compresskit.errors import CompressKitError
from compresskit.layers.linear import layer_widths
from compresskit.layers.low_rank import LowRankLinear
from compresskit.surgery.cuts import PruneFusedHeads, PruneHeads, PruneNeurons
from compresskit.surgery.edits import Edit, write_ranges
from compresskit.surgery.sites import Attention, FeedForward


@dataclass(frozen=True)
class Part:
    """Neurons or heads of one block, from which some are to be kept.

    Attributes:
        width: what is cut.
        block: counted from 0.
        output: the layer that reads the columns and writes into the stream.
        groups: its columns (G, g) by what is kept or cut together.
        head_dim: columns of one head; 1 for neurons.
        edit: the edit that keeps these groups, given their indices in ascending order.
        group_weights: weights that go with each group, in all layers that it touches; biases are not counted.
    """

    width: Literal["ffn", "heads"]
    block: int
    output: str
    groups: Tensor
    head_dim: int
    edit: Callable[[Tensor], Edit]
    group_weights: int


def neurons_of(ffn: FeedForward, model: nn.Module) -> Part:
    """The neurons of an FFN, each alone."""

    def edit(keep: Tensor) -> PruneNeurons:
        return PruneNeurons(inputs=ffn.inputs, output=ffn.output, keep=write_ranges(keep.tolist()))

    weights = _weights_of_outputs(model, ffn.inputs) + _weights_of_inputs(model, ffn.output)
    return Part("ffn", ffn.block, ffn.output, torch.arange(ffn.neurons)[:, None], 1, edit, weights)


def heads_of(attention: Attention, model: nn.Module) -> Part:
    """The heads of an attention, by key/value group.

    Raises:
        CompressKitError: heads that the key/value heads do not divide.
    """
    if attention.heads % attention.kv_heads:
        raise CompressKitError(
            f"{attention.heads} heads cannot share {attention.kv_heads} key/value heads evenly",
            where=attention.module,
            fix="leave heads out of keep",
        )
    per_group = attention.heads // attention.kv_heads
    query, key, value, output = attention.query, attention.key, attention.value, attention.output
    size = attention.head_dim
    shape = {"module": attention.module, "output": output, "head_dim": size}

    def edit(groups: Tensor) -> Edit:
        heads = (groups[:, None] * per_group + torch.arange(per_group)).flatten()
        keep = write_ranges(heads.tolist())
        if attention.fused:
            return PruneFusedHeads(projection=query, heads=attention.heads, keep=keep, **shape)
        return PruneHeads(query=query, key=key, value=value, keep=keep, keep_kv=write_ranges(groups.tolist()), **shape)

    rows = _weights_of_outputs(model, (query,)) * (3 if attention.fused else 1) + _weights_of_inputs(model, output)
    rows_kv = 0 if attention.fused else _weights_of_outputs(model, (key, value))
    weights = size * (per_group * rows + rows_kv)
    columns = torch.arange(attention.heads * size).view(attention.kv_heads, -1)
    return Part("heads", attention.block, output, columns, size, edit, weights)


def _weights_of_outputs(model: nn.Module, names: Sequence[str]) -> int:
    """Weights that one output of each of these layers has."""
    layers = [model.get_submodule(name) for name in names]
    return sum(layer.rank if isinstance(layer, LowRankLinear) else layer_widths(layer)[1] for layer in layers)


def _weights_of_inputs(model: nn.Module, name: str) -> int:
    """Weights that one input of this layer has."""
    layer = model.get_submodule(name)
    return layer.rank if isinstance(layer, LowRankLinear) else layer_widths(layer)[0]
