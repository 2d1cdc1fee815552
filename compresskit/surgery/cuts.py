"""Edits that cut widths: neurons, heads, and a bias where the mean of what was cut can go.

W₁ (n, d), W₂ (d, n)   ->   W₁[K], W₂[:, K]        the kept rows and columns keep their values
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compresskit.errors import CompressKitError
from compresskit.layers.linear import LinearLike, layer_widths
from compresskit.layers.low_rank import LowRankLinear
from compresskit.layers.pivoted_linear import PivotedLinear, pivot_columns
from compresskit.surgery.edits import (
    EDITS,
    MAX_INDICES,
    Cutting,
    Edit,
    get_module,
    keep_slices,
    read_ranges,
    set_module,
)


def keep_outputs(module: nn.Module, keep: Tensor) -> None:
    """Cut a linear (or the last factor of a low-rank one) to the outputs `keep`, in place."""
    linear = module.expand if isinstance(module, LowRankLinear) else module
    if not isinstance(linear, nn.Linear | Conv1D):
        raise CompressKitError(f"cannot cut the outputs of a {type(module).__name__}", fix="prune before quantising")
    keep_slices(linear, "weight", keep, dim=1 if isinstance(linear, Conv1D) else 0)
    keep_slices(linear, "bias", keep, dim=0)
    for part in (module, linear):
        setattr(part, "nf" if isinstance(part, Conv1D) else "out_features", len(keep))


def keep_inputs(model: nn.Module, name: str, keep: Tensor) -> None:
    """Cut the linear `name` (or the first factor of a low-rank one) to the inputs `keep`, in place."""
    module = get_module(model, name)
    linear = module.factor_in if isinstance(module, LowRankLinear) else module
    if isinstance(module, LowRankLinear) and isinstance(linear, PivotedLinear):
        set_module(model, name, _cut_pivoted(module, linear, keep))
        return
    if not isinstance(linear, nn.Linear | Conv1D):
        raise CompressKitError(f"cannot cut the inputs of a {type(module).__name__}", fix="prune before quantising")
    keep_slices(linear, "weight", keep, dim=0 if isinstance(linear, Conv1D) else 1)
    for part in (module, linear):
        setattr(part, "nx" if isinstance(part, Conv1D) else "in_features", len(keep))


def _cut_pivoted(module: LowRankLinear, old: PivotedLinear, keep: Tensor) -> nn.Module:
    """A low-rank layer of the inputs `keep`, with other pivots; a dense one where the rank is no longer below them."""
    if not isinstance(old.rest, nn.Linear) or not isinstance(module.expand, nn.Linear):
        raise CompressKitError("cannot cut the inputs of quantised factors", fix="prune before quantising")
    inputs, outputs, weight = len(keep), module.out_features, old.rest.weight
    bias = module.expand.bias is not None
    like: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    if inputs > module.rank:
        new: nn.Module = LowRankLinear(inputs, outputs, module.rank, bias=bias, pivot=True, **like)
    else:
        new = nn.Linear(inputs, outputs, bias=bias, **like)
    last = new.expand if isinstance(new, LowRankLinear) else new
    if weight.device.type != "meta":
        A, B = old.weight_from(weight.detach().double())[:, keep], module.expand.weight.detach().double()
        if isinstance(new, LowRankLinear) and isinstance(new.reduce, PivotedLinear):
            order, rest, A = pivot_columns(A)
            new.reduce.set_columns(order, rest)
        last.weight = nn.Parameter((B @ A).to(weight.dtype))
    if bias:
        last.bias = module.expand.bias
    return new.requires_grad_(weight.requires_grad)


def _narrowest(model: nn.Module, inputs: Iterable[str], output: str | None = None) -> int:
    """The least of what the layers `inputs` give and `output` takes; other kinds of layers are refused when cut."""
    given = [get_module(model, name) for name in inputs]
    widths = [layer_widths(layer)[0] for layer in given if isinstance(layer, LinearLike)]
    taker = get_module(model, output) if output else None
    widths += [layer_widths(taker)[1]] if isinstance(taker, LinearLike) else []
    return min(widths, default=MAX_INDICES)


def _refuse_twice(names: Iterable[str]) -> None:
    """Refuse an edit that names a layer twice: it would be cut twice."""
    counted = Counter(names)
    twice = [name for name, times in counted.items() if times > 1]
    if twice:
        raise ValueError(f"{twice[0]} is listed twice")


@EDITS.add
class PruneNeurons(Cutting):
    """Keep some of an FFN's neurons: outputs of its first linears (up, or gate and up), inputs of its last."""

    kind: Literal["prune_neurons"] = "prune_neurons"
    inputs: tuple[str, ...]
    output: str
    keep: str

    @model_validator(mode="after")
    def _is_listed_once(self) -> "PruneNeurons":
        _refuse_twice((*self.inputs, self.output))
        return self

    def apply(self, model: nn.Module) -> None:
        """Slice the weights; real ones keep their values."""
        width = _narrowest(model, self.inputs, self.output)
        keep = torch.tensor(read_ranges(self.keep, limit=width))
        for name in self.inputs:
            keep_outputs(get_module(model, name), keep)
        keep_inputs(model, self.output, keep)


@EDITS.add
class PruneHeads(Cutting):
    """Keep some attention heads; under grouped queries whole key/value groups, with all their queries."""

    kind: Literal["prune_heads"] = "prune_heads"
    module: str
    query: str
    key: str
    value: str
    output: str
    head_dim: int = Field(ge=1)
    keep: str
    keep_kv: str

    @model_validator(mode="after")
    def _is_whole(self) -> "PruneHeads":
        _refuse_twice((self.query, self.key, self.value, self.output))
        heads, kv_heads = len(read_ranges(self.keep)), len(read_ranges(self.keep_kv))
        if heads % kv_heads:
            raise ValueError(f"{heads} kept heads cannot share {kv_heads} key/value heads evenly")
        return self

    def apply(self, model: nn.Module) -> None:
        """Slice the four projections and correct the attention module's head counts."""
        old = _narrowest(model, (self.query,), self.output) // self.head_dim
        rows, rows_kv = self.rows(old, _narrowest(model, (self.key, self.value)) // self.head_dim)
        keep_outputs(get_module(model, self.query), rows)
        keep_outputs(get_module(model, self.key), rows_kv)
        keep_outputs(get_module(model, self.value), rows_kv)
        keep_inputs(model, self.output, rows)
        kept = len(read_ranges(self.keep)), len(read_ranges(self.keep_kv))
        _correct_counts(get_module(model, self.module), self.head_dim, old, *kept)

    def rows(self, heads: int = MAX_INDICES, kv_heads: int = MAX_INDICES) -> tuple[Tensor, Tensor]:
        """The kept outputs of the query projection, and of the key and value projections.

        Args:
            heads: how many the query projection has, where that is known; more kept ones are refused.
            kv_heads: how many the key and value projections have.
        """
        return _head_rows(self.keep, heads, self.head_dim), _head_rows(self.keep_kv, kv_heads, self.head_dim)


def _head_rows(keep: str, limit: int, head_dim: int) -> Tensor:
    """The rows of the heads `keep`, of which there are `limit`."""
    kept = torch.tensor(read_ranges(keep, limit=limit))
    return (kept[:, None] * head_dim + torch.arange(head_dim)).flatten()


def _correct_counts(module: nn.Module, head_dim: int, old_heads: int, heads: int, kv_heads: int) -> None:
    """Set each integer attribute that counts heads, as transformers' modules name them."""
    for name, value in list(vars(module).items()):
        is_count = "head" in name or "key_value" in name or name == "split_size"
        if not is_count or name.endswith("proj_dim") or not isinstance(value, int) or isinstance(value, bool):
            continue
        if "groups" in name:
            setattr(module, name, heads // kv_heads)
        elif "key_value" in name or "kv" in name:
            setattr(module, name, kv_heads)
        elif value == old_heads * head_dim:
            setattr(module, name, heads * head_dim)
        elif value == old_heads and not name.endswith(("head_dim", "head_size")):
            setattr(module, name, heads)


@EDITS.add
class PruneFusedHeads(Cutting):
    """Keep some attention heads where one layer projects queries, keys and values, one after another."""

    kind: Literal["prune_fused_heads"] = "prune_fused_heads"
    module: str
    projection: str
    output: str
    heads: int = Field(ge=1, le=MAX_INDICES, description="how many there are before")
    head_dim: int = Field(ge=1)
    keep: str

    def apply(self, model: nn.Module) -> None:
        """Slice the two layers and correct the attention module's head counts."""
        width = min(_narrowest(model, (self.projection,)) // 3, _narrowest(model, (), self.output))
        if width != self.heads * self.head_dim:
            what = f"{self.projection} projects {width} wide, not {self.heads} heads of {self.head_dim}"
            raise CompressKitError(what, where="edits", fix="use the model that these edits were made for")
        keep_outputs(get_module(model, self.projection), self.projection_rows())
        keep_inputs(model, self.output, self.rows())
        kept = len(read_ranges(self.keep))
        _correct_counts(get_module(model, self.module), self.head_dim, self.heads, kept, kept)

    def rows(self) -> Tensor:
        """The kept inputs of the output layer."""
        return _head_rows(self.keep, self.heads, self.head_dim)

    def projection_rows(self) -> Tensor:
        """The kept outputs of the projection: the same of queries, keys and values."""
        return (torch.arange(3)[:, None] * self.heads * self.head_dim + self.rows()).flatten()


@EDITS.add
class AddBias(Edit):
    """Give linears that have none a bias, zero at first."""

    kind: Literal["add_bias"] = "add_bias"
    targets: tuple[str, ...]

    def apply(self, model: nn.Module) -> None:
        """Add the parameters; the pass fills them."""
        for name in self.targets:
            module = get_module(model, name)
            linear = module.expand if isinstance(module, LowRankLinear) else module
            if not isinstance(linear, nn.Linear):
                raise CompressKitError(f"cannot add a bias to a layer of type {type(module).__name__}", where=name)
            if linear.bias is None:
                weight = linear.weight
                linear.bias = nn.Parameter(weight.new_zeros(linear.out_features), weight.requires_grad)
