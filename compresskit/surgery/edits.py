"""Edits: the only way a pass changes the shape of a model, recorded as data and replayed on an empty model.

    student = replay(edits, original architecture on the meta device)   # the student's exact shapes, no weight read

An edit applied to a real model keeps what weights it can: slices copy the kept rows and columns, a low-rank or
quantised layer starts at zero and is filled by the pass that asked for it.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator
from torch import Tensor, nn

from compresskit.config import Config, Registry
from compresskit.errors import CompressKitError
from compresskit.layers.int8_linear import Int8Linear
from compresskit.layers.low_rank import LowRankLinear
from compresskit.layers.pivoted_linear import PivotedLinear, pivot_columns
from compresskit.layers.quant_embedding import QuantEmbedding
from compresskit.layers.quant_linear import QuantLinear

#: More neurons or heads than any layer has: the bound on indices where the layer is not at hand.
MAX_INDICES = 1 << 20
_RUN = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?")
_MODULE_PATH = re.compile(r"^[A-Za-z_]\w*(\.\w+)*$")


def write_ranges(indices: Iterable[int]) -> str:
    """Sorted indices as inclusive ranges, `[0, 1, 2, 7]` -> `"0-2,7"`: short enough for config.json."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def read_ranges(text: str, *, limit: int = MAX_INDICES) -> list[int]:
    """The indices of `write_ranges`' text, ascending.

    Args:
        text: may come from a downloaded config.json; looked at before it is expanded.
        limit: how many there are to choose from.

    Raises:
        ValueError: text that `write_ranges` does not write.
        CompressKitError: an index of `limit` or more.
    """
    return [index for first, last in _runs(text, limit) for index in range(first, last + 1)]


def _runs(text: str, limit: int) -> list[tuple[int, int]]:
    """First and last of each run; all below `limit`."""
    found: list[tuple[int, int]] = []
    for run in text.split(","):
        match = _RUN.fullmatch(run)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if first > last or (found and first <= found[-1][1]):
            raise ValueError(f"kept indices {text[:60]!r} are not ascending ranges such as '0-31,40'")
        found.append((first, last))
    if found[-1][1] >= limit:
        what = f"kept indices {text[:60]!r} reach {found[-1][1]}, and there are at most {limit} (counted from 0)"
        raise CompressKitError(what, where="edits", fix="use the model that these edits were made for")
    return found


def get_module(model: nn.Module, name: str) -> nn.Module:
    """The submodule called `name`.

    Raises:
        CompressKitError: a name that is no dotted path of this model (an edits list may come from anywhere).
    """
    if not _MODULE_PATH.match(name) or "__" in name:
        raise CompressKitError(f"{name!r} is not a module name", where="edits", fix="restore the folder's config.json")
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise CompressKitError(
            f"the model has no module {name!r}", where="edits", fix="use the model that these edits were made for"
        ) from error


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place called `name`."""
    parent, _, child = name.rpartition(".")
    holder = get_module(model, parent) if parent else model
    setattr(holder, child, module)


class Edit(Config, ABC):
    """One change of shape. `apply` works on meta tensors and on real ones."""

    kind: str

    @abstractmethod
    def apply(self, model: nn.Module) -> None:
        """Change `model` in place."""


EDITS: Registry[Edit] = Registry("edit")
AnyEdit = Annotated[SerializeAsAny[Edit], BeforeValidator(EDITS.parse)]


class _Replacing(Edit):
    """Edits that put a new layer where a float linear was."""

    def _linear(self, model: nn.Module, name: str) -> nn.Linear:
        module = get_module(model, name)
        if not isinstance(module, nn.Linear):
            raise CompressKitError(f"{name} is a {type(module).__name__}, not a Linear", where=self.kind)
        return module


@EDITS.add
class MakeLowRank(_Replacing):
    """Replace linears that read the same input by factors that share one A."""

    kind: Literal["low_rank"] = "low_rank"
    targets: tuple[str, ...]
    rank: int
    #: whether each layer has a bias afterwards (a centred fit adds one)
    bias: bool
    #: whether A holds an identity among its columns
    pivot: bool = False

    def apply(self, model: nn.Module) -> None:
        """Insert zero factors; the pass fills them."""
        owner: LowRankLinear | None = None
        for name in self.targets:
            old = self._linear(model, name)
            new = LowRankLinear(
                old.in_features,
                old.out_features,
                self.rank,
                bias=self.bias or old.bias is not None,
                pivot=self.pivot,
                shares=owner,
                device=old.weight.device,
                dtype=old.weight.dtype,
            )
            owner = owner or new
            set_module(model, name, new)


def keep_outputs(module: nn.Module, keep: Tensor) -> None:
    """Cut a linear (or the last factor of a low-rank one) to the outputs `keep`, in place."""
    linear = module.expand if isinstance(module, LowRankLinear) else module
    if not isinstance(linear, nn.Linear):
        raise CompressKitError(f"cannot cut the outputs of a {type(module).__name__}", fix="prune before quantising")
    index = keep.to(linear.weight.device)
    linear.weight = nn.Parameter(linear.weight.detach().index_select(0, index), linear.weight.requires_grad)
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach().index_select(0, index), linear.bias.requires_grad)
    for part in (module, linear):
        setattr(part, "out_features", len(keep))  # noqa: B010


def keep_inputs(model: nn.Module, name: str, keep: Tensor) -> None:
    """Cut the linear `name` (or the first factor of a low-rank one) to the inputs `keep`, in place."""
    module = get_module(model, name)
    linear = module.factor_in if isinstance(module, LowRankLinear) else module
    if isinstance(module, LowRankLinear) and isinstance(linear, PivotedLinear):
        set_module(model, name, _cut_pivoted(module, linear, keep))
        return
    if not isinstance(linear, nn.Linear):
        raise CompressKitError(f"cannot cut the inputs of a {type(module).__name__}", fix="prune before quantising")
    index = keep.to(linear.weight.device)
    linear.weight = nn.Parameter(linear.weight.detach().index_select(1, index), linear.weight.requires_grad)
    for part in (module, linear):
        setattr(part, "in_features", len(keep))  # noqa: B010


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


class _Cutting(Edit):
    @field_validator("keep", "keep_kv", check_fields=False)
    @classmethod
    def _is_ranges(cls, text: str) -> str:
        _runs(text, MAX_INDICES)
        return text


def _narrowest(model: nn.Module, inputs: Iterable[str], output: str | None = None) -> int:
    """The least of what the layers `inputs` give and `output` takes; other kinds of layers are refused when cut."""
    widths: list[Any] = [getattr(get_module(model, name), "out_features", MAX_INDICES) for name in inputs]
    widths += [getattr(get_module(model, output), "in_features", MAX_INDICES)] if output else []
    return int(min(widths, default=MAX_INDICES))


@EDITS.add
class PruneNeurons(_Cutting):
    """Keep some of an FFN's neurons: outputs of its first linears (up, or gate and up), inputs of its last."""

    kind: Literal["prune_neurons"] = "prune_neurons"
    inputs: tuple[str, ...]
    output: str
    keep: str

    def apply(self, model: nn.Module) -> None:
        """Slice the weights; real ones keep their values."""
        width = _narrowest(model, self.inputs, self.output)
        keep = torch.tensor(read_ranges(self.keep, limit=width))
        for name in self.inputs:
            keep_outputs(get_module(model, name), keep)
        keep_inputs(model, self.output, keep)


@EDITS.add
class PruneHeads(_Cutting):
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

    def apply(self, model: nn.Module) -> None:
        """Slice the four projections and correct the attention module's head counts."""
        old = _narrowest(model, (self.query,), self.output) // self.head_dim
        rows, rows_kv = self.rows(old, _narrowest(model, (self.key, self.value)) // self.head_dim)
        keep_outputs(get_module(model, self.query), rows)
        keep_outputs(get_module(model, self.key), rows_kv)
        keep_outputs(get_module(model, self.value), rows_kv)
        keep_inputs(model, self.output, rows)
        self._correct_counts(get_module(model, self.module), old)

    def rows(self, heads: int = MAX_INDICES, kv_heads: int = MAX_INDICES) -> tuple[Tensor, Tensor]:
        """The kept outputs of the query projection, and of the key and value projections.

        Args:
            heads: how many the query projection has, where that is known; more kept ones are refused.
            kv_heads: how many the key and value projections have.
        """
        kept = torch.tensor(read_ranges(self.keep, limit=heads))
        kept_kv = torch.tensor(read_ranges(self.keep_kv, limit=kv_heads))
        offsets = torch.arange(self.head_dim)
        return (
            (kept[:, None] * self.head_dim + offsets).flatten(),
            (kept_kv[:, None] * self.head_dim + offsets).flatten(),
        )

    def _correct_counts(self, module: nn.Module, old_heads: int) -> None:
        """Set each integer attribute that counts heads, as transformers' modules name them."""
        heads, kv_heads = len(read_ranges(self.keep)), len(read_ranges(self.keep_kv))
        for name, value in list(vars(module).items()):
            is_count = "head" in name or "key_value" in name
            if not is_count or not isinstance(value, int) or isinstance(value, bool):
                continue
            if "groups" in name:
                setattr(module, name, heads // kv_heads)
            elif "key_value" in name or "kv" in name:
                setattr(module, name, kv_heads)
            elif value == old_heads * self.head_dim:
                setattr(module, name, heads * self.head_dim)
            elif value == old_heads and not name.endswith(("head_dim", "head_size")):
                setattr(module, name, heads)


@EDITS.add
class QuantizeLinears(_Replacing):
    """Hold linears as integers: weight-only in groups, or int8 weights with dynamic int8 activations."""

    kind: Literal["quantize_linears"] = "quantize_linears"
    targets: tuple[str, ...]
    bits: Literal[3, 4, 8]
    #: columns that share a scale; 0 is the whole row
    group_size: int
    #: whether the middle code stands for zero; None: for 8 bits
    symmetric: bool | None = None
    act: Literal["none", "int8"] = "none"
    #: of int8 activations: each input is multiplied by a factor of its own before it is rounded
    smooth: bool = False

    def apply(self, model: nn.Module) -> None:
        """Insert layers of zero codes; the pass fills them."""
        for name in self.targets:
            old = self._linear(model, name)
            shape: dict[str, Any] = {"bias": old.bias is not None, "device": old.weight.device}
            if self.act == "int8":
                new: nn.Module = Int8Linear(old.in_features, old.out_features, smooth=self.smooth, **shape)
            else:
                grid: dict[str, Any] = {
                    "bits": self.bits,
                    "group_size": self.group_size,
                    "symmetric": self.symmetric,
                }
                new = QuantLinear(old.in_features, old.out_features, **grid, **shape)
            set_module(model, name, new)


@EDITS.add
class QuantizeEmbedding(Edit):
    """Hold an embedding table as integers; an output head tied to it uses the same integers."""

    kind: Literal["quantize_embedding"] = "quantize_embedding"
    target: str
    head: str | None = None
    bits: Literal[4, 8]
    group_size: int
    symmetric: bool | None = None

    def apply(self, model: nn.Module) -> None:
        """Insert a table of zero codes; the pass fills it."""
        old = get_module(model, self.target)
        if not isinstance(old, nn.Embedding):
            raise CompressKitError(f"{self.target} is a {type(old).__name__}, not an Embedding", where=self.kind)
        table = QuantEmbedding(
            old.num_embeddings,
            old.embedding_dim,
            bits=self.bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            padding_idx=old.padding_idx,
            multiplier=table_multiplier(old) or 1.0,
            device=old.weight.device,
        )
        set_module(model, self.target, table)
        if self.head:
            head = get_module(model, self.head)
            bias = isinstance(head, nn.Linear) and head.bias is not None
            set_module(model, self.head, QuantLinear.tied_to(table, bias=bias))
        untie(model)


def table_multiplier(table: nn.Embedding) -> float | None:
    """What a table multiplies its rows by, 1 for a plain one; None for one that does more than that."""
    if type(table).forward is nn.Embedding.forward:
        return 1.0
    scale = getattr(table, "scalar_embed_scale", getattr(table, "embed_scale", None))
    return float(scale) if isinstance(scale, int | float) else None


def untie(model: nn.Module) -> None:
    """Forget tied names whose parameters an edit has replaced, so that transformers does not tie them again."""
    tied: dict[str, str] | None = getattr(model, "all_tied_weights_keys", None)
    if tied is None:
        return
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for target, source in list(tied.items()):
        if target not in names or source not in names:
            del tied[target]


def replay(edits: Iterable[Edit], model: nn.Module) -> None:
    """Apply `edits` in order to `model`, in place: on an empty original this gives the student's exact shapes."""
    for edit in edits:
        edit.apply(model)
