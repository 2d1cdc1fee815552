"""Structured width pruning: fewer FFN neurons and fewer attention heads, by default the same in every block.

    before  y = W₂ f(W₁ x)          W₁ (n, d), W₂ (d, n)
    after   y = W₂' f(W₁[K] x)      only the neurons (or heads) K; W₂' fitted to what the layer should give

Which ones stay is for a `score` to say (`layerwise.scores`: FLAP, arXiv:2312.11983, and its rivals); heads are scored
over their dimensions, and with grouped queries a key/value head stays or goes together with its queries. The layer that
reads the kept columns is refitted by least squares on the target of `layerwise.objective`, which repairs more than
FLAP's mean bias alone (MoDeGPT, arXiv:2408.09632); `repair` offers both, and neither. A student that is equally wide
everywhere is a stock checkpoint wherever its config can say the widths; `allocation: per_layer` spends the same weights
where trials on the model say that they buy most, and `bias: true` adds biases: such students need compresskit to load.
Not for attentions with fused projections other than GPT-2's: they are not seen as heads and stay as they are.
Departures: least squares pulled towards the old weight by a shrinkage chosen on held-out tokens.
"""

from collections.abc import Mapping, Sequence
from math import gcd
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from compresskit.config import Config
from compresskit.errors import CompressKitError, ManyErrors
from compresskit.layers.empty_linear import EmptyLinear
from compresskit.layers.int8_linear import Int8Linear
from compresskit.layers.quant_linear import QuantLinear
from compresskit.layerwise.moments import SiteMoments
from compresskit.layerwise.repair import Repair, Repaired, relative_error, repair_columns
from compresskit.layerwise.scores import Score, choose_groups, needs_metric
from compresskit.layerwise.sensitivity import Fisher
from compresskit.layerwise.walk import Walk
from compresskit.layerwise.weights import dense_weight, layer_bias, require_finite, set_bias, set_weight
from compresskit.layerwise.width_survey import take_fisher, take_trials
from compresskit.layerwise.widths import WidthCurve, allocate_widths
from compresskit.passes.base import PASSES, Pass, TextPart, Trait
from compresskit.student import Student
from compresskit.surgery.cuts import AddBias
from compresskit.surgery.edits import Edit
from compresskit.surgery.parts import Part, heads_of, neurons_of
from compresskit.surgery.sites import Anatomy, Site, find_anatomy


class Widths(Config):
    """What stays of each kind of width."""

    ffn: float = Field(default=1.0, gt=0, le=1, description="share of FFN neurons that stays")
    heads: float = Field(default=1.0, gt=0, le=1, description="share of attention heads (key/value groups) that stays")


@PASSES.add
class PruneWidth(Pass):
    """Remove FFN neurons and whole attention heads, and refit the layers that read them."""

    kind: Literal["prune_width"] = "prune_width"
    keep: Widths = Field(description="a fraction of the FFN neurons, or {ffn: …, heads: …}")
    score: Score = Field(
        default="flap",
        description="which neurons and heads stay; taylor and obs take a backward pass, random is a control",
    )
    repair: Repair = Field(
        default="least_squares",
        description="the layer that reads what stays: as it is, with the mean of what is cut in its bias, or refitted",
    )
    bias: bool = Field(
        default=False,
        description="give a bias to output layers that have none, for the mean; the student then needs compresskit",
    )
    allocation: Literal["uniform", "per_layer"] = Field(
        default="uniform",
        description="the same widths in every block, or by what trials on the model lose, in as many weights",
    )
    floor: float = Field(
        default=0.25, ge=0, le=1, description="of per_layer: no block goes below this share of its share of keep"
    )
    round_to: int = Field(
        default=8, ge=1, description="kept neurons are a multiple of this; 32 suits a group size of 32"
    )
    anchor: float = Field(
        default=1.0, ge=0, le=1, description="how far the target moves to the original's stream (alpha)"
    )

    adds: ClassVar[frozenset[Trait]] = frozenset({"pruned"})
    refuses: ClassVar[frozenset[Trait]] = frozenset({"quantized"})
    version: ClassVar[int] = 3
    needs: ClassVar[frozenset[TextPart]] = frozenset({"calibration"})

    @field_validator("keep", mode="before", json_schema_input_type=float | Widths)
    @classmethod
    def _number_is_ffn(cls, keep: Any) -> Any:
        if isinstance(keep, int | float) and not isinstance(keep, bool):
            return {"ffn": keep}
        if not isinstance(keep, Widths | Mapping):
            raise ValueError(f"expected a number or a mapping, got {keep!r}; write 0.5, or {{ffn: 0.5, heads: 0.5}}")
        return keep

    @model_validator(mode="after")
    def _consistent(self) -> "PruneWidth":
        if self.bias and self.repair == "none":
            raise ValueError("bias: true adds biases that repair: none leaves at zero; say repair: bias")
        if self.allocation == "uniform":
            self._refuse_idle("floor", "allocation: per_layer")
        if not self._reads_target():
            self._refuse_idle("anchor", "a repair, or score: obs")
        return self

    def _reads_target(self) -> bool:
        """Whether what a layer should give decides anything."""
        return self.repair != "none" or self.score == "obs"

    def plans_shapes(self) -> bool:
        """Whether `plan` says the very shapes: not where trials decide."""
        return self.allocation == "uniform"

    def plan(self, model: nn.Module) -> list[Edit]:
        """The edits of an even spread with the first neurons and heads kept: which ones stay is for the data to say."""
        edits: list[Edit] = []
        for _, part, count in self._parts(model):
            edits += self._bias_edits(model, part)
            edits.append(part.edit(torch.arange(count)))
        return edits

    def _parts(self, model: nn.Module) -> list[tuple[Site, Part, int]]:
        """What is cut, in order of execution: the site, the part, and how many of its groups an even spread keeps.

        Raises:
            CompressKitError: blocks or layers that cannot be cut so.
        """
        if self.keep.ffn == 1 and self.keep.heads == 1:
            return []
        anatomy = find_anatomy(model)  # type: ignore[arg-type]
        self._check(model, anatomy)
        found: dict[str, tuple[Part, int]] = {}
        for attention in anatomy.attentions if self.keep.heads < 1 else ():
            part = heads_of(attention, model)
            found[part.output] = part, self._kept_groups(part)
        for ffn in anatomy.feed_forwards if self.keep.ffn < 1 else ():
            part = neurons_of(ffn, model)
            found[part.output] = part, self._kept_neurons(part)
        for name in found:
            self._check_output(name, model.get_submodule(name))
        return [(site, *found[site.linears[0]]) for site in anatomy.sites if site.linears[0] in found]

    def _check(self, model: nn.Module, anatomy: Anatomy) -> None:
        self._check_measurable(model)
        emptied = {index for index, name in enumerate(anatomy.blocks) if _lacks_branch(model.get_submodule(name))}
        ffn, heads = ({part.block for part in found} for found in (anatomy.feed_forwards, anatomy.attentions))
        unseen: list[CompressKitError] = []
        for share, seen, other, what in ((self.keep.ffn, ffn, heads, "ffn"), (self.keep.heads, heads, ffn, "heads")):
            excused = emptied & other  # the branch that prune_depth took is the one that is not seen
            if share < 1 and (not seen or len(seen | excused) != len(anatomy.blocks)):
                part = "an FFN" if what == "ffn" else "attention with heads"
                fact = f"{part} is seen in {len(seen)} of {len(anatomy.blocks)} blocks"
                fix = f"leave {what} out; `compresskit modules MODEL` shows what is seen"
                unseen.append(CompressKitError(fact, where=f"keep.{what}", fix=fix))
        if unseen:
            raise unseen[0] if len(unseen) == 1 else ManyErrors(unseen)

    def _check_measurable(self, model: nn.Module) -> None:
        """Refuse measurements of the answer to text where the model reads something else."""
        measures = needs_metric(self.score) or self.allocation == "per_layer"
        if measures and getattr(model, "main_input_name", "input_ids") != "input_ids":
            raise CompressKitError(
                f"what {type(model).__name__} loses is measured on text, and it reads {model.main_input_name!r}",
                where="allocation" if self.allocation == "per_layer" else "score",
                fix="use allocation: uniform, and a score other than taylor and obs",
            )

    def _check_output(self, name: str, layer: nn.Module) -> None:
        if isinstance(layer, QuantLinear | Int8Linear):
            what = f"its weight is held in integers ({type(layer).__name__}), which cannot be cut"
            raise CompressKitError(what, where=name, fix="prune before quantising")
        if self.repair == "bias" and not self.bias and layer_bias(layer) is None:
            raise CompressKitError(
                f"repair: bias needs a bias to change, and {name} has none",
                where="repair",
                fix="say bias: true (the student then needs compresskit to load), or repair: least_squares",
            )

    def _kept_neurons(self, part: Part) -> int:
        neurons = len(part.groups)
        kept = round(self.keep.ffn * neurons / self.round_to) * self.round_to
        if not 0 < kept < neurons:
            left = "cuts none" if kept >= neurons else "leaves none"
            what = f"{self.keep.ffn} of {neurons} neurons, in multiples of {self.round_to}, {left}"
            fix = f"use a {'smaller' if kept else 'larger'} keep or a smaller round_to"
            raise CompressKitError(what, where="keep.ffn", fix=fix)
        return kept

    def _kept_groups(self, part: Part) -> int:
        groups = len(part.groups)
        kept = round(self.keep.heads * groups)
        if kept == groups:
            what = f"{self.keep.heads} of {groups} heads (key/value groups) cuts none"
            fix = f"keep at most {1 - 1 / groups:.3f}" if groups > 1 else "leave heads out of keep"
            raise CompressKitError(what, where="keep.heads", fix=fix)
        if kept == 0:
            what = f"{self.keep.heads} of {groups} heads (key/value groups) leaves none"
            raise CompressKitError(what, where="keep.heads", fix=f"keep at least {1 / groups:.3f}")
        return kept

    def _bias_edits(self, model: nn.Module, part: Part) -> list[Edit]:
        lacks = self.bias and layer_bias(model.get_submodule(part.output)) is None
        return [AddBias(targets=(part.output,))] if lacks else []

    def apply(self, student: Student, *, generator: torch.Generator) -> dict[str, Any]:
        """Walk the blocks: attention heads, then neurons, each block on what the ones before it became."""
        parts = self._parts(student.model)
        layers: dict[str, dict[str, Any]] = {}
        notes: dict[str, Any] = {"layers": layers}
        if not parts:
            return notes
        require_finite(student.model)
        fisher = self._fisher(student, [part for _, part, _ in parts], generator)
        counts = {part.output: count for _, part, count in parts}
        if self.allocation == "per_layer":
            counts, notes["allocation"] = self._allocate(student, parts, fisher, generator)
        by_site = {site: part for site, part, _ in parts if counts[part.output] < len(part.groups)}

        def solve(site: Site, moments: SiteMoments) -> None:
            part = by_site[site]
            layer = student.model.get_submodule(part.output)
            keep, repaired = self._cut(layer, part, counts[part.output], moments, fisher, generator)
            layers[part.output] = self._edit(student, part, keep, repaired, moments)

        if by_site:
            Walk(student, anchor=self.anchor if self._reads_target() else 0.0).run(by_site, solve, label=self.kind)
        return notes

    def _fisher(self, student: Student, parts: Sequence[Part], generator: torch.Generator) -> dict[str, Fisher]:
        if not needs_metric(self.score):
            return {}
        return take_fisher(student, parts, seed=generator.initial_seed())

    def _allocate(
        self,
        student: Student,
        parts: Sequence[tuple[Site, Part, int]],
        fisher: dict[str, Fisher],
        generator: torch.Generator,
    ) -> tuple[dict[str, int], dict[str, Any]]:
        """How many groups each part keeps, by its output's name, and what the report says of that choice."""
        own = torch.Generator().manual_seed(generator.initial_seed())  # draws the same whether trials are cached or not

        def cut(part: Part, count: int, moments: SiteMoments) -> tuple[Tensor, Repaired]:
            return self._cut(student.model.get_submodule(part.output), part, count, moments, fisher, own)

        found = [part for _, part, _ in parts]
        options = f"{self.version} {self.score} {self.repair} {self.bias} {generator.initial_seed()}"
        trials = take_trials(student, found, cut, options=options)
        curves = [WidthCurve(len(p.groups), p.group_weights, trials[p.output]) for p in found]
        even = [count for _, _, count in parts]
        chosen = allocate_widths(curves, even, floor=self.floor, steps=[self._step(p, n) for _, p, n in parts])
        counts = {part.output: count for part, count in zip(found, chosen, strict=True)}
        summary = {
            "weights_even": sum(c.group_weights * count for c, count in zip(curves, even, strict=True)),
            "weights_kept": sum(c.group_weights * count for c, count in zip(curves, chosen, strict=True)),
            "predicted_loss_even": sum(c.loss(count) for c, count in zip(curves, even, strict=True)),
            "predicted_loss": sum(c.loss(count) for c, count in zip(curves, chosen, strict=True)),
            "kept": counts,
        }
        return counts, summary

    def _step(self, part: Part, even: int) -> int:
        """The number of groups whose multiples a part may keep: what divides `round_to` and the columns of an even cut
        (a later quantiser's groups) divides theirs too.
        """
        return gcd(even, self.round_to // gcd(self.round_to, part.groups.shape[1]))

    def _cut(
        self,
        layer: nn.Module,
        part: Part,
        count: int,
        moments: SiteMoments,
        fisher: dict[str, Fisher],
        generator: torch.Generator,
    ) -> tuple[Tensor, Repaired]:
        """The groups that stay, and the layer of their columns."""
        weight, bias = dense_weight(layer), layer_bias(layer)
        if bias is None and self.bias:
            bias = weight.new_zeros(len(weight))
        centred = bias is not None and self.repair != "none"
        metric = fisher[part.output].metric(weight) if fisher else None
        keep = choose_groups(
            self.score, weight, moments.all, part.groups, count, centred=centred, metric=metric, generator=generator
        )
        return keep, repair_columns(weight, bias, moments, part.groups[keep].flatten(), self.repair)

    def _edit(
        self, student: Student, part: Part, keep: Tensor, repaired: Repaired, moments: SiteMoments
    ) -> dict[str, Any]:
        """Cut the part, write the repaired layer, and say what it lost."""
        layer, columns = student.model.get_submodule(part.output), part.groups[keep].flatten()
        weight, bias = dense_weight(layer), layer_bias(layer)
        unrepaired = relative_error(weight[:, columns], bias, moments, columns)
        for edit in self._bias_edits(student.model, part):
            student.edit(edit)
        student.edit(part.edit(keep))
        layer = student.model.get_submodule(part.output)  # a low-rank one may have become another
        set_weight(layer, repaired.weight)
        if repaired.bias is not None:
            # A low-rank layer comes only as near to the weight as its factors let it; its bias makes up the mean.
            mean = moments.all.mean(centred=True)
            set_bias(layer, mean.nu - dense_weight(layer).double() @ mean.mu[columns])
        return {
            "kept": len(columns) // part.head_dim,
            "relative_error": relative_error(dense_weight(layer), layer_bias(layer), moments, columns),
            "relative_error_unrepaired": unrepaired,
            "shrinkage": repaired.shrinkage,
        }


def _lacks_branch(block: nn.Module) -> bool:
    """Whether prune_depth took the attention or the FFN out of a block."""
    return any(isinstance(module, EmptyLinear) for module in block.modules())
