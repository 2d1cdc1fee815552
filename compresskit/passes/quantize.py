"""Quantisation: weights, and on request activations, as integers that reach the ONNX file unchanged.

    before  y = W x + b
    after   y = S∘(Q − Z) x + b'          weight-only: 3, 4 or 8 bit codes Q, a scale (and zero) per group of columns
            y = s S (q(m x) − z) Q + b'   act: int8, int8_static: one scale per output channel, activations rounded
                                          too; of 4 bits (Q − Z) F, with whole factors F of groups of columns

What is rounded is M, today's weight or the anchored target of `layerwise.objective`; the bias makes the layer exact in
the mean. Ranges are found by a clip search that weighs each column's error by how strongly the calibration text
uses it. `method: rtn` then rounds to nearest; `gptq` (arXiv:2210.17323, `layerwise.gptq`) lets the columns that are
still to come make good what each rounding lost, which pays at 4 bits and below. `bits: auto` gives each input site the
width at which it loses least under one budget for all (`passes.quantize_bits`). Linears outside the blocks (poolers,
heads) and tables are rounded to nearest, weight-only; a head tied to a table reads the same integers.

Weight-only files are small, faster where a decoder writes token by token, and hardly in encoders; integer activations
are fast, and pay with one shared scale per tensor; the factors m, moved into the weights, even out the channels before
that (SmoothQuant, arXiv:2211.10438). With 4 bits the weights take half the bytes and the product is the same: each
group's scale is a whole multiple of its row's (`layers.grid.whole_factors`), so that codes widen to 8 bits exactly,
once, when ONNX Runtime loads the file. Departure: factors follow the activations alone; divided by the weights' peaks
too, as in the paper, they gained nothing on all-MiniLM-L6-v2. An attention's output projection is left without factors:
it reads averages, whose channels are even enough. `int8` takes s and z from each call's input, `int8_static` from the
least and greatest value of the calibration text: a percentile of 1e-5 was no better on all-MiniLM-L6-v2, and 1e-4, or
the range of least squared error, were worse. Not before training: integers have no gradient, so distil first. 3 bits
save bytes in the checkpoint only: ONNX Runtime has no 3 bits, and gets these integers in 4.
"""

import copy
import logging
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from compresskit.errors import CompressKitError
from compresskit.evaluate import state_dict_bytes
from compresskit.float_types import FloatTypes, float_types
from compresskit.layers.operators import BLOCK_SIZES
from compresskit.layerwise.moments import SiteMoments
from compresskit.layerwise.objective import fit_weight
from compresskit.layerwise.walk import Walk
from compresskit.layerwise.weights import layer_bias, require_finite, stacked_weight
from compresskit.passes.base import PASSES, Pass, TextPart, Trait
from compresskit.passes.quantize_bits import Budget, choose_bits, choose_by_shape, held_bytes
from compresskit.passes.quantize_grids import Plan, plan_grids
from compresskit.passes.quantize_rounding import (
    RoundingProblem,
    round_outside,
    round_site,
    round_table,
)
from compresskit.passes.quantize_wanted import GroupSize, Override, Wanted
from compresskit.progress import working
from compresskit.student import Student
from compresskit.surgery.edits import Edit, QuantizeLinears, replay
from compresskit.surgery.sites import Site

LOG = logging.getLogger(__name__)


@PASSES.add
class Quantize(Pass):
    """Hold weights as 3, 4 or 8 bit integers; optionally compute with 8-bit activations."""

    kind: Literal["quantize"] = "quantize"
    bits: Literal[3, 4, 8, "auto"] = Field(
        default=8, description="bits of a weight; auto: of widths, as trials on the model and one budget tell"
    )
    widths: tuple[Literal[3, 4, 8], ...] = Field(
        default=(4, 8), min_length=1, description="of bits: auto: what each input site may get"
    )
    mean_bits: float | None = Field(
        default=None, ge=3, le=8, description="of bits: auto: bits of a code on average over the linears in blocks"
    )
    budget_bytes: int | None = Field(
        default=None, ge=1, description="of bits: auto: bytes of the whole student, instead of mean_bits"
    )
    symmetric: bool | None = Field(
        default=None, description="no zero points; by default 8 bits have none, 4 and 3 bits have them"
    )
    method: Literal["rtn", "gptq"] = Field(
        default="rtn", description="round to nearest after a clip search, or let later columns make good each error"
    )
    group_size: GroupSize = Field(
        default=32,
        examples=[32],
        description="columns that share a scale; channel: a whole row, as 8 bits under integer activations have always",
    )
    overrides: dict[str, Override] = Field(
        default_factory=dict,
        examples=[{"*": {"bits": 4}}],
        description="other bits (or float) and group_size by glob over names, tables' too; the last match "
        "alone counts: what it leaves out is the pass's own, not an earlier match's; act: none leaves what a layer "
        "multiplies in float",
    )
    act: Literal["none", "int8", "int8_static"] = Field(
        default="none",
        description="round activations too (ONNX Runtime's fast path), over weights of 8 or 4 bits: int8 in the range "
        "of each batch, int8_static in the calibration text's",
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
    on_misfit: Literal["error", "keep", "pad"] = Field(
        default="error",
        description="columns that no group divides: an error; or the layer stays float and is listed; or zeros fill up "
        "the last group",
    )

    adds: ClassVar[frozenset[Trait]] = frozenset({"quantized"})
    refuses: ClassVar[frozenset[Trait]] = frozenset({"quantized"})
    version: ClassVar[int] = 6
    needs: ClassVar[frozenset[TextPart]] = frozenset({"calibration"})

    @field_validator("widths")
    @classmethod
    def _without_repeats(cls, widths: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(dict.fromkeys(widths))

    @model_validator(mode="after")
    def _consistent(self) -> "Quantize":
        for size in (self.group_size, *(said.group_size for said in self.overrides.values())):
            if isinstance(size, int) and size not in BLOCK_SIZES:
                raise ValueError(f"group_size {size} is not a power of two in 16…256; use 32, 64 or 128")
        budgets = [name for name in ("mean_bits", "budget_bytes") if getattr(self, name) is not None]
        if self.bits != "auto":
            for name in ("widths", *budgets):
                self._refuse_idle(name, "bits: auto")
        elif not budgets:
            raise ValueError("bits: auto has no budget; say mean_bits: 5, or budget_bytes")
        elif len(budgets) == 2:
            raise ValueError("mean_bits and budget_bytes are two budgets; leave one of them out")
        elif self.mean_bits is not None and self.mean_bits < (least := min(self.widths)):
            raise ValueError(
                f"mean_bits {self.mean_bits:g} is below the least of widths; say mean_bits: {least} or more"
            )
        if self.act != "none":
            return self._consistent_act()
        self._refuse_idle("smooth", "act: int8 or int8_static")
        idle = next((glob for glob, said in self.overrides.items() if said.act), None)
        if idle is not None:
            raise ValueError(f"overrides.{idle}.act: no activation is rounded where act is none; leave it out")
        return self

    def _consistent_act(self) -> "Quantize":
        widths = self.widths if self.bits == "auto" else (self.bits,)
        if 3 in widths:
            fix = "leave 3 out of widths" if self.bits == "auto" else "say bits: 4 or 8"
            raise ValueError(f"act: {self.act} has integer products of 8 and 4 bits, not 3; {fix}")
        if widths == (8,) and self.group_size != "channel":
            one = "one scale per output channel"
            raise ValueError(f"act: {self.act} needs group_size: channel for 8 bits ({one}), or bits: 4 in groups")
        if widths == (8,) and self.symmetric is False:
            raise ValueError(f"act: {self.act} has symmetric weights of 8 bits; leave symmetric out")
        return self

    def _wanted(self) -> Wanted:
        return Wanted(
            bits=min(self.widths) if self.bits == "auto" else self.bits,
            group_size=self.group_size if isinstance(self.group_size, int) else 0,
            symmetric=self.symmetric,
            targets=self.targets,
            tables=self.embeddings,
            overrides=self.overrides,
            act=self.act,
            smooth=self.act != "none" and self.smooth > 0,
            on_misfit=self.on_misfit,
        )

    def plan(self, model: nn.Module) -> list[Edit]:
        """One edit for each embedding table, for the linears of each input site, and for each outside the blocks.

        With `bits: auto` as many sites are wide as the budget pays for; which of them is for the data to say.
        """
        plan = plan_grids(model, self._wanted())  # type: ignore[arg-type]
        if self.bits != "auto":
            return plan.edits()
        budget = self._budget(model, plan, float_types(model))
        chosen = choose_by_shape(model, self._open_sites(plan), self.widths, budget)
        return plan_grids(model, replace(self._wanted(), chosen=chosen)).edits()  # type: ignore[arg-type]

    def keeps(self, model: nn.Module) -> tuple[str, ...]:
        """Columns that no group divides, and matrices that belong to no linear layer."""
        return plan_grids(model, self._wanted()).kept  # type: ignore[arg-type]

    def _open_sites(self, plan: Plan) -> dict[Site, tuple[QuantizeLinears, ...]]:
        """The sites whose bits are to be chosen, less the linears that an override gives some.

        Raises:
            CompressKitError: none is left.
        """
        found: dict[Site, tuple[QuantizeLinears, ...]] = {}
        wanted = self._wanted()
        for site, edits in plan.sites.items():
            names = tuple(n for n in site.linears if wanted.override(n).bits is None)
            parts = (tuple(name for name in edit.targets if name in names) for edit in edits)
            left = [edit.model_copy(update={"targets": t}) for edit, t in zip(edits, parts, strict=True) if t]
            if left:
                found[replace(site, linears=names)] = tuple(left)
        if not found:
            what = "auto has nothing to choose: overrides give every linear in the blocks its bits, or it is kept"
            raise CompressKitError(what, where="bits", fix="say bits: 4 or 8 and leave the budget out")
        return found

    def _budget(self, model: nn.Module, plan: Plan, types: FloatTypes) -> Budget:
        """What is left of the student's bytes for the open sites, once all else is held; or the mean bits."""
        if self.budget_bytes is None:
            return Budget(mean_bits=self.mean_bits)
        # File headers differ with the width (4 bits have zero points to name): the longest counts.
        rest = max(self._rest_bytes(model, plan, bits, types) for bits in self.widths)
        return Budget(size_bytes=self.budget_bytes - rest, rest_bytes=rest)

    def _rest_bytes(self, model: nn.Module, plan: Plan, bits: int, types: FloatTypes) -> int:
        """Bytes of the student but for the linears of the open sites, which hold `bits`."""
        # The very tensors and no copies: edits put other modules in their place and change none.
        tensors: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        sites, student = self._open_sites(plan), copy.deepcopy(model, tensors)
        chosen = {name: bits for site in sites for name in site.linears}
        replay(plan_grids(model, replace(self._wanted(), chosen=chosen)).edits(), student)  # type: ignore[arg-type]
        held = sum(held_bytes(model, e, bits) for edits in sites.values() for e in edits)
        return state_dict_bytes(student, types.stored) - held

    def apply(self, student: Student, *, generator: torch.Generator) -> dict[str, Any]:
        """Round tables, then walk the blocks on what the tables became, then round what stands outside."""
        plan = plan_grids(student.model, self._wanted())
        require_finite(student.model)
        table: dict[str, dict[str, float | int]] = {}
        if self.bits == "auto":
            budget = self._budget(student.model, plan, student.float_types)
            chosen, table = choose_bits(student, self._open_sites(plan), self.widths, budget)
            plan = plan_grids(student.model, replace(self._wanted(), chosen=chosen))
        layers: dict[str, dict[str, Any]] = {}
        for edit in plan.tables:
            with working(f"rounding {edit.target}"):
                layers[edit.target] = round_table(student, edit)

        def solve(site: Site, moments: SiteMoments) -> None:
            problem = self._problem(student, site, any(edit.smooth for edit in plan.sites[site]), moments)
            layers.update(round_site(student, plan.sites[site], problem, self.method))

        if plan.sites:
            Walk(student, anchor=self.anchor).run(plan.sites, solve, label=self.kind)
        for edit in plan.outside:
            layers.update(round_outside(student, edit))
        notes: dict[str, Any] = {"layers": layers, "kept_float": list(plan.kept)}
        return notes | self._summary(layers) | ({"bits": table} if table else {})

    def _problem(self, student: Student, site: Site, smooth: bool, moments: SiteMoments) -> RoundingProblem:
        """What the layers of a site should become."""
        modules = [student.model.get_submodule(name) for name in site.linears]
        weight, bias = stacked_weight(modules)
        centred = all(layer_bias(module) is not None for module in modules)
        if bias is not None and not centred:
            moments = moments.without_bias(bias)
        if self.anchor:
            target, mean, _ = fit_weight(weight, moments.fit, moments.held_out, centred=centred)
        else:
            target, mean = weight.double(), moments.all.mean(centred=centred)
        factors = smoothing_factors(moments.peak, self.smooth) if smooth else None
        return RoundingProblem(site.linears, target, mean, factors, moments.span, exact_mean=centred)

    def _summary(self, layers: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Of another method than rounding to nearest: its mean error, that floor's, and what fell back to it.

        Errors are those on the calibration text, which the method was fitted to.
        """
        own = [note for note in layers.values() if "rtn_error" in note]
        if not own:
            return {}
        fallen = [name for name, note in layers.items() if "rtn_error" not in note]
        ours, floor = (sum(note[key] for note in own) / len(own) for key in ("relative_error", "rtn_error"))
        LOG.info(
            "%s: mean error %.4f of a layer's output on the calibration text, rounding to nearest %.4f",
            self.method,
            ours,
            floor,
        )
        LOG.info("rounded to nearest, not inside a block: %s", ", ".join(fallen) or "none")
        return {"mean_error": {self.method: ours, "rtn": floor}, "rounded_to_nearest": fallen}


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
