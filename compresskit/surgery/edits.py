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
from pydantic import BeforeValidator, SerializeAsAny, field_validator
from torch import Tensor, nn

from compresskit.config import Config, Registry
from compresskit.errors import CompressKitError
from compresskit.layers.int8_linear import Int8Linear
from compresskit.layers.low_rank import LowRankLinear
from compresskit.layers.quant_embedding import QuantEmbedding, SameTable
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


def check_ranges(text: str) -> str:
    """`text` itself, where `write_ranges` could have written it; same errors as `read_ranges`."""
    _runs(text, MAX_INDICES)
    return text


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


def keep_slices(module: nn.Module, name: str, keep: Tensor, *, dim: int) -> None:
    """Cut a parameter or buffer of a module to the slices `keep` (indices) along `dim`; one that is None stays None."""
    old = getattr(module, name)
    if old is not None:
        kept = old.detach().index_select(dim, keep.to(old.device))
        setattr(module, name, nn.Parameter(kept, old.requires_grad) if isinstance(old, nn.Parameter) else kept)


class Edit(Config, ABC):
    """One change of shape. `apply` works on meta tensors and on real ones."""

    kind: str

    @abstractmethod
    def apply(self, model: nn.Module) -> None:
        """Change `model` in place."""


EDITS: Registry[Edit] = Registry("edit")


class Cutting(Edit):
    """An edit whose fields `keep` and `keep_kv` hold ranges of what stays."""

    @field_validator("keep", "keep_kv", check_fields=False)
    @classmethod
    def _is_ranges(cls, text: str) -> str:
        return check_ranges(text)


AnyEdit = Annotated[SerializeAsAny[Edit], BeforeValidator(EDITS.parse)]


class Replacing(Edit):
    """Edits that put a new layer where a float linear was."""

    def _linear(self, model: nn.Module, name: str) -> nn.Linear:
        module = get_module(model, name)
        if not isinstance(module, nn.Linear):
            raise CompressKitError(f"{name} is a {type(module).__name__}, not a Linear", where=self.kind)
        return module


@EDITS.add
class MakeLowRank(Replacing):
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


@EDITS.add
class QuantizeLinears(Replacing):
    """Hold linears as integers: weight-only in groups, or 8- or 4-bit weights with int8 activations."""

    kind: Literal["quantize_linears"] = "quantize_linears"
    targets: tuple[str, ...]
    bits: Literal[3, 4, 8]
    #: columns that share a scale; 0 is the whole row
    group_size: int
    #: whether the middle code stands for zero; None: for 8 bits
    symmetric: bool | None = None
    #: int8: activations are rounded in the range of each call; int8_static: in one that is stored
    act: Literal["none", "int8", "int8_static"] = "none"
    #: of int8 activations: each input is multiplied by a factor of its own before it is rounded
    smooth: bool = False

    def apply(self, model: nn.Module) -> None:
        """Insert layers of zero codes; the pass fills them."""
        for name in self.targets:
            old = self._linear(model, name)
            bias, device = old.bias is not None, old.weight.device
            set_module(model, name, self.layer(old.in_features, old.out_features, bias=bias, device=device))

    def layer(
        self, in_features: int, out_features: int, *, bias: bool, device: torch.device | str
    ) -> QuantLinear | Int8Linear:
        """A layer of zero codes in this form."""
        form: dict[str, Any] = {
            "bits": self.bits,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "bias": bias,
            "device": device,
        }
        if self.act == "none":
            return QuantLinear(in_features, out_features, **form)
        return Int8Linear(in_features, out_features, smooth=self.smooth, static=self.act == "int8_static", **form)

    def at(self, bits: int) -> "QuantizeLinears":
        """The same at another width; 8 bits under integer activations have one scale a row."""
        rows = {"group_size": 0, "symmetric": None} if self.act != "none" and bits == 8 else {}
        return self.model_copy(update={"bits": bits, **rows})

    @property
    def whole(self) -> bool:
        """Whether the scales of a row are whole multiples of one, which integer products of narrow codes need."""
        return self.act != "none" and self.bits < 8


@EDITS.add
class QuantizeEmbedding(Edit):
    """Hold an embedding table as integers; an output head and tables tied to it use the same integers."""

    kind: Literal["quantize_embedding"] = "quantize_embedding"
    target: str
    head: str | None = None
    #: other names of the same table (T5 has one in its encoder): they look up in its integers
    tables: tuple[str, ...] = ()
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
        for other in self.tables:
            set_module(model, other, SameTable(table))
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
