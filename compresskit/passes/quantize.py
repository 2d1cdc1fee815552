"""Quantisation: weights, and on request activations, as integers that reach the ONNX file unchanged.

    before  y = W x + b
    after   y = S∘(Q − Z) x + b'          weight-only: 4 or 8 bit codes Q, a scale (and zero) per group of columns
            y = s S (q(m x) − z) Q + b'   act: int8: one scale per output channel, activations rounded as they come

Codes are rounded to nearest after a clip search that weighs each column's error by how strongly the calibration text
uses it (the diagonal of C); what is rounded is M, today's weight or the anchored target of `layerwise.objective`, and
the bias makes the layer exact in the mean. Weight-only files are small but, on most CPUs, hardly faster; integer
activations are fast, and pay with one shared scale per tensor; the factors m, moved into the weights, even out the
channels before that (SmoothQuant, arXiv:2211.10438). Departure: factors follow the activations alone; divided by the
weights' peaks too, as in the paper, they gained nothing on all-MiniLM-L6-v2. An attention's output projection is left
without factors: it reads averages, whose channels are even enough. Large embedding tables are held as integers too, and
a head tied to one reads the same integers. Linears outside the blocks (poolers, heads) are rounded weight-only. Not
before training: integers have no gradient, so distil first.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresskit.errors import CompressKitError
from compresskit.layers.grid import quantize_weight
from compresskit.layers.int8_linear import Int8Linear
from compresskit.layers.operators import BLOCK_SIZES
from compresskit.layers.quant_embedding import QuantEmbedding
from compresskit.layers.quant_linear import QuantLinear
from compresskit.layerwise.moments import MeanMoments
from compresskit.layerwise.objective import fit_weight, folded_bias
from compresskit.layerwise.walk import SiteMoments, Walk
from compresskit.layerwise.weights import layer_bias, stacked_weight
from compresskit.passes.base import PASSES, Part, Pass, Trait
from compresskit.progress import working
from compresskit.student import Student
from compresskit.surgery.edits import Edit, QuantizeEmbedding, QuantizeLinears, table_multiplier
from compresskit.surgery.sites import Anatomy, Site, find_anatomy, select, tied_heads

# Tables with fewer rows, or less than this share of the largest one's (positions, token types), stay float: they hold
# few bytes, and ONNX Runtime takes five times as long to look up integers.
_SMALLEST_TABLE = 64
_SMALLEST_MATRIX = 4096
_SMALLEST_SHARE = 0.05
# Of linears outside the blocks; the first that divides their columns.
_OUTSIDE_GROUPS = (32, 16)


@PASSES.add
class Quantize(Pass):
    """Hold weights as 4 or 8 bit integers; optionally compute with 8-bit activations."""

    kind: Literal["quantize"] = "quantize"
    bits: Literal[4, 8] = Field(default=8, description="bits of a weight")
    method: Literal["rtn"] = Field(default="rtn", description="round to nearest, after a clip search")
    group_size: int | Literal["channel"] = Field(
        default=32, description="columns that share a scale; channel: a whole row"
    )
    act: Literal["none", "int8"] = Field(
        default="none", description="int8: round activations too (ONNX Runtime's fast path)"
    )
    smooth: float = Field(
        default=0.5, ge=0, lt=1, description="of int8 activations: the power of their peaks that moves into the weights"
    )
    targets: str = Field(default="*", description="glob over the names of linears")
    embeddings: Literal[4, 8] | None = Field(
        default=8, description="bits of embedding tables; null leaves them in float"
    )
    anchor: float = Field(
        default=1.0, ge=0, le=1, description="how far the target moves to the original's output (alpha)"
    )
    on_misfit: Literal["error", "keep"] = Field(
        default="error", description="a layer whose columns no group divides: an error, or it stays float and is listed"
    )

    adds: ClassVar[frozenset[Trait]] = frozenset({"quantized"})
    refuses: ClassVar[frozenset[Trait]] = frozenset({"quantized"})
    version: ClassVar[int] = 2
    needs: ClassVar[frozenset[Part]] = frozenset({"calibration"})

    @model_validator(mode="after")
    def _consistent(self) -> "Quantize":
        if isinstance(self.group_size, int) and self.group_size not in BLOCK_SIZES:
            raise ValueError(f"group_size {self.group_size} is not a power of two in 16…256; use 32, 64 or 128")
        if self.act == "int8" and (self.bits != 8 or self.group_size != "channel"):
            raise ValueError("act: int8 needs bits: 8 and group_size: channel (one scale per output channel)")
        if self.act == "none" and self.group_size == "channel":
            raise ValueError("weight-only layers ship in groups; use group_size 32, 64 or 128, or act: int8")
        return self

    def plan(self, model: nn.Module) -> list[Edit]:
        """One edit for the linears of each input site, one for those outside blocks, one for each embedding table."""
        anatomy = find_anatomy(model, factors=True)  # type: ignore[arg-type]
        inside, outside, _ = self._targets(model, anatomy)
        edits: list[Edit] = [edit for _, edit in self._site_edits(anatomy, inside)]
        edits += [_outside_edit(model, name) for name in outside]
        return edits + self._table_edits(model)[0]  # type: ignore[arg-type]

    def _site_edits(self, anatomy: Anatomy, inside: Sequence[str]) -> list[tuple[Site, QuantizeLinears]]:
        """The sites of `inside` in order of execution, each with its edit."""
        last = ("", ".reduce", ".reduce.rest")
        averages = {f"{part.output}{factor}" for part in anatomy.attentions for factor in last}
        size = self.group_size if isinstance(self.group_size, int) else 0
        edits: list[tuple[Site, QuantizeLinears]] = []
        for site in anatomy.sites:
            if names := tuple(name for name in site.linears if name in inside):
                smooth = self.act == "int8" and self.smooth > 0 and names[0] not in averages
                edit = QuantizeLinears(targets=names, bits=self.bits, group_size=size, act=self.act, smooth=smooth)
                edits.append((Site(site.block, names, site.writes_stream), edit))
        return edits

    def _targets(self, model: nn.Module, anatomy: Anatomy) -> tuple[list[str], list[str], list[str]]:
        """Linears inside blocks, outside them, and those that stay float because nothing divides their columns."""
        inside_names = set(anatomy.linears())
        linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        tied = {name for _, name in tied_heads(model)}  # type: ignore[arg-type]
        names = [name for name in linears if name not in tied]
        chosen = set(select(names, self.targets))
        inside = [name for name in names if name in chosen and name in inside_names]
        outside = [name for name in names if name in chosen and name not in inside_names]
        size = self.group_size if isinstance(self.group_size, int) else 1
        misfits = {name: linears[name].in_features for name in inside if linears[name].in_features % size}
        beyond = {name: linears[name].in_features for name in outside}
        beyond = {
            name: columns for name, columns in beyond.items() if not _first_that_divides(columns, _OUTSIDE_GROUPS)
        }
        hidden = _other_matrices(model, anatomy.blocks) if self.targets == "*" else []
        if self.on_misfit == "error" and (misfits or beyond or hidden):
            raise _misfit_error(misfits, beyond, hidden, size)
        kept = [*misfits, *beyond, *hidden]
        return [n for n in inside if n not in kept], [n for n in outside if n not in kept], kept

    def _table_edits(self, model: PreTrainedModel) -> tuple[list[Edit], list[str]]:
        """One edit a table, and the names of the misfits that stay float."""
        if self.embeddings is None:
            return [], []
        heads = dict(tied_heads(model))
        edits: list[Edit] = []
        special: list[str] = []
        tables = {name: table for name, table in model.named_modules() if isinstance(table, nn.Embedding)}
        largest = max((table.num_embeddings for table in tables.values()), default=0)
        for name, table in tables.items():
            if table.num_embeddings < max(_SMALLEST_TABLE, _SMALLEST_SHARE * largest):
                continue
            if table_multiplier(table) is None:
                if self.on_misfit == "error":
                    raise CompressKitError(
                        f"{name} is a {type(table).__name__}, which does more than look up",
                        where="embeddings",
                        fix="say embeddings: null, or on_misfit: keep to leave such tables float",
                    )
                special.append(name)
                continue
            size = self._table_group(table, tied=name in heads)
            if name in heads and not size:
                if self.on_misfit == "error":
                    raise _odd_table_error(name, heads[name], table.embedding_dim)
                special.append(name)
                continue
            edits.append(QuantizeEmbedding(target=name, head=heads.get(name), bits=self.embeddings, group_size=size))
        return edits, special

    def _table_group(self, table: nn.Embedding, *, tied: bool) -> int:
        """A whole row for 8-bit tables, or where no group divides it; groups for 4 bit and for a tied head."""
        if self.embeddings == 8 and not tied:
            return 0
        sizes = [self.group_size] if isinstance(self.group_size, int) else []
        return _first_that_divides(table.embedding_dim, [*sizes, *_OUTSIDE_GROUPS])

    def apply(self, student: Student, *, generator: torch.Generator) -> dict[str, Any]:
        """Round tables, then walk the blocks on what the tables became, then round what stands outside."""
        anatomy = find_anatomy(student.model, factors=True)
        inside, outside, misfits = self._targets(student.model, anatomy)
        layers: dict[str, dict[str, Any]] = {}
        tables, special = self._table_edits(student.model)
        for edit in tables:
            assert isinstance(edit, QuantizeEmbedding)
            with working(f"rounding {edit.target}"):
                layers[edit.target] = _quantize_table(student, edit)
        edits = dict(self._site_edits(anatomy, inside))

        def solve(site: Site, moments: SiteMoments) -> None:
            layers.update(self._quantize_site(student, edits[site], moments))

        if edits:
            Walk(student, anchor=self.anchor).run(edits, solve, label=self.kind)
        for name in outside:
            layers.update(_quantize_linears(student, _outside_edit(student.model, name)))
        return {"layers": layers, "kept_float": [*misfits, *special]}

    def _quantize_site(
        self, student: Student, edit: QuantizeLinears, moments: SiteMoments
    ) -> dict[str, dict[str, Any]]:
        modules = [student.model.get_submodule(name) for name in edit.targets]
        weight, bias = stacked_weight(modules)
        centred = all(layer_bias(module) is not None for module in modules)
        if bias is not None and not centred:
            moments = moments.without_bias(bias)
        if self.anchor:
            target, mean, _ = fit_weight(weight, moments.fit, moments.held_out, centred=centred)
        else:
            target, mean = weight.double(), moments.all.mean(centred=centred)
        smooth = smoothing_factors(moments.peak, self.smooth) if edit.smooth else None
        return _quantize_linears(student, edit, target, mean, smooth, exact_mean=centred)


def smoothing_factors(peak: Tensor, power: float) -> Tensor:
    """m_j = peak_j^−power with a geometric mean of 1, (I,) float32: what each input is multiplied by before rounding.

    Args:
        peak: greatest |x_j| of each input, (I,), not negative. Inputs below 1e-4 of the greatest count as that much,
            so that one which calibration never saw move gets no huge factor.
        power: in [0, 1): 0 gives ones, 1 would make all channels equally large.
    """
    greatest = peak.max()
    if greatest <= 0:
        return torch.ones_like(peak, dtype=torch.float32)
    logs = -power * (peak.double() / greatest).clamp_min(1e-4).log()
    return (logs - logs.mean()).exp().float()


def _first_that_divides(columns: int, sizes: Sequence[int]) -> int:
    """The first group size that divides the columns; 0 where none does."""
    return next((size for size in sizes if columns % size == 0), 0)


def _outside_edit(model: nn.Module, name: str) -> QuantizeLinears:
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    size = _first_that_divides(linear.in_features, _OUTSIDE_GROUPS)
    return QuantizeLinears(targets=(name,), bits=8, group_size=size)


def _other_matrices(model: nn.Module, blocks: Sequence[str]) -> list[str]:
    """Matrices inside the blocks that belong to no linear, table or norm: the experts of a mixture, say."""
    inside = tuple(f"{block}." for block in blocks)
    names: list[str] = []
    for name, module in model.named_modules():
        if name.startswith(inside) and not isinstance(module, nn.Linear | nn.Embedding):
            own = module.named_parameters(prefix=name, recurse=False)
            names += [inner for inner, weight in own if weight.dim() >= 2 and weight.numel() >= _SMALLEST_MATRIX]
    return names


def _listed(columns: dict[str, int]) -> str:
    return "".join(f"\n    {name}: {count} columns" for name, count in columns.items())


def _misfit_error(
    inside: dict[str, int], outside: dict[str, int], hidden: Sequence[str], size: int
) -> CompressKitError:
    """One error that lists all that would stay float, and why."""
    parts, fixes = [], []
    if inside:
        parts.append(f"group size {size} does not divide the columns of {len(inside)} layers:{_listed(inside)}")
        fitting = [one for one in BLOCK_SIZES if all(columns % one == 0 for columns in inside.values())]
        fixes.append(
            f"use group_size {' or '.join(map(str, fitting))}" if fitting else "no group size fits all of these"
        )
        fixes.append("set round_to in the passes that cut these widths")
    if outside:
        sizes = " nor ".join(map(str, _OUTSIDE_GROUPS))
        what = f"neither {sizes} divides the columns of {len(outside)} layers outside the blocks"
        parts.append(f"{what}:{_listed(outside)}")
    if hidden:
        listed = "\n    ".join(hidden)
        parts.append(f"{len(hidden)} matrices belong to no linear layer and cannot be rounded:\n    {listed}")
    fixes.append("say on_misfit: keep to leave them in float")
    where = "group_size" if inside else "targets"
    return CompressKitError("\n  ".join(parts), where=where, fix="; or ".join(fixes))


def _odd_table_error(table: str, head: str, width: int) -> CompressKitError:
    sizes = " nor ".join(map(str, _OUTSIDE_GROUPS))
    return CompressKitError(
        f"neither {sizes} divides the {width} columns of {table}, whose integers {head} reads too",
        where="embeddings",
        fix="say embeddings: null, or on_misfit: keep, to leave it in float",
    )


@torch.no_grad()
def _quantize_table(student: Student, edit: QuantizeEmbedding) -> dict[str, Any]:
    old = student.model.get_submodule(edit.target)
    assert isinstance(old, nn.Embedding)
    weight = old.weight.detach()
    head = student.model.get_submodule(edit.head) if edit.head else None
    codes = quantize_weight(weight, bits=edit.bits, group_size=edit.group_size)
    student.edit(edit)
    table = student.model.get_submodule(edit.target)
    assert isinstance(table, QuantEmbedding)
    table.set_codes(codes)
    if isinstance(head, nn.Linear) and head.bias is not None and edit.head:
        _write_bias(student.model.get_submodule(edit.head), head.bias.detach())
    return {"bits": edit.bits, "relative_error": _relative_error(weight, table.dequantize())}


@torch.no_grad()
def _quantize_linears(
    student: Student,
    edit: QuantizeLinears,
    target: Tensor | None = None,
    mean: MeanMoments | None = None,
    smooth: Tensor | None = None,
    *,
    exact_mean: bool = False,
) -> dict[str, dict[str, Any]]:
    """Swap in integer layers for linears that read the same input.

    Args:
        target: their stacked M, (O, I); today's weights if None.
        mean: moments of the input, for the importance of its columns and the exact mean; None weighs all alike.
        smooth: (I,), what the layers multiply their input by.
        exact_mean: whether biases make the layers exact in the mean; else they stay.
    """
    olds = [student.model.get_submodule(name) for name in edit.targets]
    weights, _ = stacked_weight(olds)
    stacked = weights if target is None else target
    importance = None if mean is None else mean.C.diagonal().clamp_min(0)
    factors = torch.ones(stacked.shape[1]) if smooth is None else smooth
    rounded_weight = stacked.double() / factors.double()
    rounded_importance = None if importance is None else importance * factors.double().square()
    student.edit(edit)
    notes: dict[str, dict[str, Any]] = {}
    row = 0
    for name, old in zip(edit.targets, olds, strict=True):
        assert isinstance(old, nn.Linear)
        rows = slice(row, row + old.out_features)
        row = rows.stop
        new = student.model.get_submodule(name)
        assert isinstance(new, QuantLinear | Int8Linear)
        if isinstance(new, Int8Linear) and new.smooth is not None:
            new.smooth.copy_(factors)
        new.set_codes(
            quantize_weight(
                rounded_weight[rows], bits=edit.bits, group_size=edit.group_size, column_weight=rounded_importance
            )
        )
        rounded = new.dequantize()
        if old.bias is not None:
            folded = folded_bias(rounded, _rows_of(mean, rows)) if exact_mean and mean is not None else None
            _write_bias(new, old.bias.detach() if folded is None else folded)
        notes[name] = {"bits": edit.bits, "relative_error": _relative_error(stacked[rows], rounded, importance)}
    return notes


def _rows_of(mean: MeanMoments, rows: slice) -> MeanMoments:
    return MeanMoments(C=mean.C, T=mean.T[rows], mu=mean.mu, nu=mean.nu[rows], target_power=mean.target_power)


def _write_bias(layer: nn.Module, bias: Tensor) -> None:
    assert isinstance(layer.bias, Tensor)
    layer.bias.copy_(bias)


def _relative_error(weight: Tensor, rounded: Tensor, importance: Tensor | None = None) -> float:
    """‖W − Q‖ / ‖W‖, columns weighted by their importance where given."""
    scale = torch.ones(weight.shape[1], dtype=torch.float64) if importance is None else importance
    lost = ((weight.double() - rounded.double()).square() * scale).sum()
    power = (weight.double().square() * scale).sum()
    return math.sqrt(float(lost / power)) if power > 0 else 0.0
