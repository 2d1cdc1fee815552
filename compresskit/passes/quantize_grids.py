"""Which matrix gets which integers: the default, what overrides say, and what no group divides.

    linears in blocks     the wanted grid           by input site
    linears outside       8 bit in groups           poolers, untied heads
    tables                8 bit a row, or groups    a tied head reads the table's integers

All from names and shapes; the answer is edits, and the names of what stays float.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compresskit.errors import CompressKitError
from compresskit.layers.bitsandbytes_linear import Bnb4Linear, Bnb8Linear
from compresskit.layers.int8_linear import Int8Linear
from compresskit.layers.operators import BLOCK_SIZES
from compresskit.layers.quant_embedding import QuantEmbedding
from compresskit.layers.quant_linear import QuantLinear
from compresskit.passes.quantize_wanted import GroupSize, Wanted, require_products
from compresskit.surgery.edits import Edit, QuantizeEmbedding, QuantizeLinears, table_multiplier
from compresskit.surgery.sites import Anatomy, Site, find_anatomy, select, tied_heads, tied_modules

# Tables with fewer rows, or less than this share of the largest one's (positions, token types), stay float: they hold
# few bytes, and ONNX Runtime takes five times as long to look up integers.
_SMALLEST_TABLE = 64
_SMALLEST_MATRIX = 4096
_SMALLEST_SHARE = 0.05
# Of linears outside the blocks; the first that divides their columns.
_OUTSIDE_GROUPS = (32, 16)
#: The group size that fits every linear.
_WHOLE_ROW = "channel"


@dataclass(frozen=True)
class Plan:
    """The edits of one quantisation.

    Attributes:
        sites: input sites in order of execution, each with an edit for the linears of one grid.
        outside: an edit for each linear outside the blocks. tables: one for each table.
        kept: names of what stays float although it was asked for.
    """

    sites: dict[Site, tuple[QuantizeLinears, ...]]
    outside: tuple[QuantizeLinears, ...]
    tables: tuple[QuantizeEmbedding, ...]
    kept: tuple[str, ...]

    def edits(self) -> list[Edit]:
        """All of them, as `apply` makes them: tables, blocks, the rest."""
        return [*self.tables, *(edit for edits in self.sites.values() for edit in edits), *self.outside]


def plan_grids(model: PreTrainedModel, wanted: Wanted) -> Plan:
    """The edits that give a model of float layers what is wanted.

    Raises:
        CompressKitError: a quantised model, globs that match nothing, and misfits, all in one message.
    """
    refuse_integers(model)
    anatomy = find_anatomy(model, factors=True)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for _, head in tied_heads(model):
        linears.pop(head, None)
    if not linears or wanted.on_misfit != "keep":
        refuse_transposed(model, anatomy.blocks, can_keep=bool(linears))
    tables = _large_tables(model) if wanted.tables else {}
    targeted = select(list(linears), wanted.targets)
    for glob in wanted.overrides:
        _require_targeted(glob, select([*linears, *tables], glob, where="overrides"), [*targeted, *tables], wanted)
    chosen = [name for name in targeted if wanted.override(name).bits != "float"]
    within = set(anatomy.linears())
    require_products([name for name in chosen if name in within], wanted)
    misfits = _Misfits(wanted)
    inside = [
        name
        for name in chosen
        if name in within and misfits.accepts_linear(name, linears[name].in_features, _form(name, wanted)["group_size"])
    ]
    columns = {name: linears[name].in_features for name in chosen if name not in within}
    groups = {name: _outside_group(name, width, wanted) for name, width in columns.items()}
    misfits.beyond |= {name: columns[name] for name, size in groups.items() if size is None}
    misfits.hidden += other_matrices(model, anatomy.blocks) if wanted.targets == "*" else []
    table_edits = _table_edits(model, tables, wanted, misfits)
    misfits.raise_unless_kept()
    return Plan(
        _site_edits(anatomy, inside, wanted),
        tuple(_outside_edit(name, size, wanted) for name, size in groups.items() if size is not None),
        tuple(table_edits),
        tuple(misfits.names()),
    )


def _require_targeted(glob: str, matched: Sequence[str], reached: Sequence[str], wanted: Wanted) -> None:
    """Refuse an override that would be read by no matrix.

    Raises:
        CompressKitError: `targets` choose nothing that it matches.
    """
    if not set(matched) & set(reached):
        what = f"{glob!r} matches {len(matched)} layers, {matched[0]!r} first, and targets {wanted.targets!r} choose "
        raise CompressKitError(f"{what}none of them", where="overrides", fix="widen targets, or leave the override out")


def refuse_integers(model: nn.Module) -> None:
    """Refuse a model of which any layer holds integers already.

    Raises:
        CompressKitError: it names the first.
    """
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear | Int8Linear | QuantEmbedding | Bnb4Linear | Bnb8Linear):
            raise CompressKitError(
                f"{name} holds integers already: rounding what was rounded only adds errors",
                fix="quantise the float model, with overrides where layers want other grids",
            )


def refuse_transposed(model: nn.Module, blocks: Sequence[str], *, can_keep: bool = False) -> None:
    """Refuse a model of which all layers in the blocks are Conv1D, as GPT-2's are.

    Args:
        model: on the meta device or with weights.
        blocks: their names.
        can_keep: whether the pass has something left to do where they stay float.

    Raises:
        CompressKitError: it names the first.
    """
    inside = tuple(f"{block}." for block in blocks)
    parts = {name: part for name, part in model.named_modules() if name.startswith(inside)}
    transposed = [name for name, part in parts.items() if isinstance(part, Conv1D)]
    if transposed and not any(isinstance(part, nn.Linear) for part in parts.values()):
        what = f"{transposed[0]} is a Conv1D, which stores its weight transposed, and so are all layers in blocks"
        keep = ", or say on_misfit: keep to leave them in float" if can_keep else ""
        raise CompressKitError(what, where="targets", fix=f"use a model made of nn.Linear{keep}")


def _form(name: str, wanted: Wanted) -> dict[str, Any]:
    """How a linear in the blocks is held."""
    said = wanted.override(name)
    bits = said.bits if isinstance(said.bits, int) else wanted.chosen.get(name, wanted.bits)
    act = said.act or wanted.act
    form: dict[str, Any] = {
        "bits": bits,
        "group_size": _columns(said.group_size, wanted.group_size),
        "symmetric": wanted.symmetric,
        "act": act,
        "smooth": wanted.smooth and act != "none",
    }
    return QuantizeLinears(targets=(name,), **form).at(bits).model_dump(include=set(form))


def _columns(said: GroupSize | None, otherwise: int) -> int:
    return otherwise if said is None else 0 if said == "channel" else said


def _site_edits(anatomy: Anatomy, inside: Sequence[str], wanted: Wanted) -> dict[Site, tuple[QuantizeLinears, ...]]:
    """The sites of `inside` in order of execution, each with its edits."""
    last = ("", ".reduce", ".reduce.rest")
    averages = {f"{part.output}{factor}" for part in anatomy.attentions for factor in last}
    found: dict[Site, tuple[QuantizeLinears, ...]] = {}
    for site in anatomy.sites:
        names = tuple(name for name in site.linears if name in inside)
        edits: list[QuantizeLinears] = []
        for name in names:
            form = _form(name, wanted)
            form["smooth"] = form["smooth"] and names[0] not in averages
            alike = next((i for i, edit in enumerate(edits) if form == edit.model_dump(include=set(form))), len(edits))
            targets = (*edits[alike].targets, name) if alike < len(edits) else (name,)
            edits[alike : alike + 1] = [QuantizeLinears.model_validate({"targets": targets, **form})]
        if names:
            found[replace(site, linears=names)] = tuple(edits)
    return found


def _outside_group(name: str, columns: int, wanted: Wanted) -> int | None:
    """The columns that share a scale in a linear outside the blocks, 0 for the row; None where no group fits."""
    said = wanted.override(name).group_size
    sizes = _OUTSIDE_GROUPS if said is None else (_columns(said, 0),)
    fitting = (size for size in sizes if not size or columns % size == 0)
    return next(fitting, sizes[0] if wanted.on_misfit == "pad" else None)


def _outside_edit(name: str, size: int, wanted: Wanted) -> QuantizeLinears:
    """8 bits, unless overridden."""
    bits = wanted.override(name).bits or 8
    return QuantizeLinears.model_validate(
        {"targets": (name,), "bits": bits, "group_size": size, "symmetric": wanted.symmetric}
    )


def _large_tables(model: nn.Module) -> dict[str, nn.Embedding]:
    tables = {name: table for name, table in model.named_modules() if isinstance(table, nn.Embedding)}
    largest = max((table.num_embeddings for table in tables.values()), default=0)
    least = max(_SMALLEST_TABLE, _SMALLEST_SHARE * largest)
    return {name: table for name, table in tables.items() if table.num_embeddings >= least}


def _table_edits(
    model: PreTrainedModel, tables: Mapping[str, nn.Embedding], wanted: Wanted, misfits: "_Misfits"
) -> list[QuantizeEmbedding]:
    heads = dict(tied_heads(model))
    edits: list[QuantizeEmbedding] = []
    for name, table in tables.items():
        if any(name in edit.tables for edit in edits):
            continue
        said = wanted.override(name)
        bits = said.bits or wanted.tables
        if bits is None or bits == "float":
            continue
        if bits == 3:
            what = f"3 bits are asked for {name}, and ONNX Runtime looks up tables of 4 or 8 bits"
            raise CompressKitError(what, where="overrides", fix="say bits: 4 or 8 for tables")
        head = heads.get(name)
        size = _table_group(table, bits == 8 and head is None, said.group_size, wanted)
        if misfits.accepts_table(name, table, head, bits, size):
            same = tuple(other for other in tied_modules(model, name) if _looks_up_alike(tables.get(other), table))
            form = {"bits": bits, "group_size": size, "symmetric": wanted.symmetric}
            edits.append(QuantizeEmbedding.model_validate({"target": name, "head": head, "tables": same, **form}))
    return edits


def _looks_up_alike(other: nn.Embedding | None, table: nn.Embedding) -> bool:
    """Whether a table with the same weight also gives the same rows."""
    return other is not None and table_multiplier(other) == table_multiplier(table)


def _table_group(table: nn.Embedding, whole_rows: bool, said: GroupSize | None, wanted: Wanted) -> int:
    """A whole row for 8-bit tables, or where no group divides it; groups for 4 bit and for a tied head."""
    if said is not None:
        return _columns(said, 0)
    if whole_rows:
        return 0
    sizes = [size for size in (wanted.group_size, *_OUTSIDE_GROUPS) if size]
    return next((size for size in sizes if table.embedding_dim % size == 0), 0)


def other_matrices(model: nn.Module, blocks: Sequence[str]) -> list[str]:
    """Matrices inside the blocks that belong to no linear, table or norm: the experts of a mixture, say."""
    inside = tuple(f"{block}." for block in blocks)
    names: list[str] = []
    for name, module in model.named_modules():
        if name.startswith(inside) and not isinstance(module, nn.Linear | nn.Embedding):
            own = module.named_parameters(prefix=name, recurse=False)
            names += [inner for inner, weight in own if weight.dim() >= 2 and weight.numel() >= _SMALLEST_MATRIX]
    return names


def say_others(names: Sequence[str]) -> str:
    """What is said of `other_matrices`."""
    listed = "\n    ".join(names)
    return f"{len(names)} matrices belong to no linear layer and cannot be rounded:\n    {listed}"


class _Misfits:
    """What would stay float, and why; one error for all of it."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._by_size: dict[int, dict[str, int]] = {}
        self._tables: dict[str, tuple[str, str]] = {}
        self.beyond: dict[str, int] = {}
        self.hidden: list[str] = []

    def accepts_linear(self, name: str, columns: int, size: int) -> bool:
        """Whether a linear in the blocks can have groups of `size`."""
        if size and columns % size and self._wanted.on_misfit != "pad":
            self._by_size.setdefault(size, {})[name] = columns
            return False
        return True

    def accepts_table(self, name: str, table: nn.Embedding, head: str | None, bits: int, size: int) -> bool:
        """Whether a table can have such codes in groups of `size`; a tied head reads no padding nor rows of a scale."""
        columns = table.embedding_dim
        sizes = " nor ".join(map(str, _OUTSIDE_GROUPS))
        if table_multiplier(table) is None:
            what = (f"{name} is a {type(table).__name__}, which does more than look up", "such tables")
        elif size and columns % size:
            what = (f"group size {size} does not divide the {columns} columns of {name}", "it")
        elif head and not size and columns % _OUTSIDE_GROUPS[-1]:
            what = (f"neither {sizes} divides the {columns} columns of {name}, whose integers {head} reads too", "it")
        elif bits == 4 and columns % 2:
            what = (f"tables of 4 bits have an even number of columns, and {name} has {columns}", "it")
        else:
            return True
        self._tables[name] = what
        return False

    def names(self) -> list[str]:
        """All of them."""
        return [*(n for group in self._by_size.values() for n in group), *self.beyond, *self.hidden, *self._tables]

    def raise_unless_kept(self) -> None:
        """Raise one error that lists all, unless they are to be kept."""
        if self._wanted.on_misfit == "keep" or not self.names():
            return
        parts, fixes = [], []
        for size, columns in self._by_size.items():
            parts.append(f"group size {size} does not divide the columns of {len(columns)} layers:{_listed(columns)}")
        if self._by_size:
            widths = [columns for group in self._by_size.values() for columns in group.values()]
            fitting = [one for one in BLOCK_SIZES if all(columns % one == 0 for columns in widths)]
            fixes.append(f"use group_size {' or '.join([*map(str, fitting), _WHOLE_ROW])}")
            fixes += ["set round_to in the passes that cut these widths", "say on_misfit: pad"]
        if self.beyond:
            sizes = " nor ".join(map(str, _OUTSIDE_GROUPS))
            what = f"neither {sizes} divides the columns of {len(self.beyond)} layers outside the blocks"
            parts.append(f"{what}:{_listed(self.beyond)}")
        if self.hidden:
            parts.append(say_others(self.hidden))
        parts += [what for what, _ in self._tables.values()]
        if self._tables:
            fixes.append("say embeddings: null")
        fixes.append("say on_misfit: keep to leave them in float")
        where = "group_size" if self._by_size else "embeddings" if self._tables else "targets"
        raise CompressKitError("\n  ".join(parts), where=where, fix="; or ".join(fixes))


def _listed(columns: Mapping[str, int]) -> str:
    return "".join(f"\n    {name}: {count} columns{_that_fit(count)}" for name, count in columns.items())


def _that_fit(columns: int) -> str:
    sizes = [str(size) for size in BLOCK_SIZES if columns % size == 0]
    return f" (fit: {', '.join([*sizes, _WHOLE_ROW])})"
