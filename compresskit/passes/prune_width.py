"""Structured width pruning: fewer FFN neurons and fewer attention heads, the same in every block.

    before  y = W₂ f(W₁ x)          W₁ (n, d), W₂ (d, n)
    after   y = W₂' f(W₁[K] x)      only the neurons (or heads) K; W₂' fitted to what the layer should give

Neurons are scored by FLAP's fluctuation metric, Var(h_j)·‖W₂[:, j]‖² (arXiv:2312.11983), heads by its sum over their
dimensions; with grouped queries a key/value head stays or goes together with its queries. The layer that reads the kept
columns is refitted by least squares on the target of `layerwise.objective`, which repairs far more than FLAP's mean
bias alone (MoDeGPT, arXiv:2408.09632). A student that is equally wide everywhere is a stock checkpoint wherever its
config can say the widths. Not for attentions with fused projections: they are not seen as heads and stay as they are.
Departures: least squares pulled towards the old weight by a shrinkage chosen on held-out tokens.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from compresskit.config import Config
from compresskit.errors import CompressKitError
from compresskit.layerwise.moments import MeanMoments
from compresskit.layerwise.objective import fit_weight, folded_bias
from compresskit.layerwise.walk import SiteMoments, Walk
from compresskit.layerwise.weights import dense_weight, layer_bias, set_bias, set_weight
from compresskit.passes.base import PASSES, Part, Pass, Trait
from compresskit.student import Student
from compresskit.surgery.edits import Edit, PruneHeads, PruneNeurons, write_ranges
from compresskit.surgery.sites import Anatomy, Attention, FeedForward, Site, find_anatomy


def fluctuation_scores(weight: Tensor, moments: MeanMoments) -> Tensor:
    """Var(x_j)·‖W[:, j]‖² for each input j of W (out, in): (in,) float64, from centred moments.

    Source: FLAP's weighted input feature variance (arXiv:2312.11983).
    """
    return moments.C.diagonal() * weight.double().square().sum(0)


def top_indices(scores: Tensor, count: int) -> Tensor:
    """The `count` highest-scored indices in ascending order; ties go to the lower index."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:count].sort().values


class Widths(Config):
    """What stays of each kind of width."""

    ffn: float = Field(default=1.0, gt=0, le=1, description="share of FFN neurons that stays")
    heads: float = Field(default=1.0, gt=0, le=1, description="share of attention heads (key/value groups) that stays")


@PASSES.add
class PruneWidth(Pass):
    """Remove FFN neurons and whole attention heads, and refit the layers that read them."""

    kind: Literal["prune_width"] = "prune_width"
    keep: Widths = Field(description="a fraction of the FFN neurons, or {ffn: …, heads: …}")
    round_to: int = Field(
        default=8, ge=1, description="kept neurons are a multiple of this; 32 suits a group size of 32"
    )
    anchor: float = Field(
        default=1.0, ge=0, le=1, description="how far the target moves to the original's stream (alpha)"
    )

    adds: ClassVar[frozenset[Trait]] = frozenset({"pruned"})
    refuses: ClassVar[frozenset[Trait]] = frozenset({"quantized"})
    version: ClassVar[int] = 2
    needs: ClassVar[frozenset[Part]] = frozenset({"calibration"})

    @field_validator("keep", mode="before", json_schema_input_type=float | Widths)
    @classmethod
    def _number_is_ffn(cls, keep: Any) -> Any:
        return {"ffn": keep} if isinstance(keep, int | float) and not isinstance(keep, bool) else keep

    def plan(self, model: nn.Module) -> list[Edit]:
        """The edits with the first neurons and heads kept: which ones really stay is for the data to say."""
        anatomy = find_anatomy(model)  # type: ignore[arg-type]
        self._check(anatomy)
        edits: list[Edit] = []
        for attention in anatomy.attentions:
            groups = self._kept_groups(attention)
            if groups < attention.kv_heads:
                edits.append(_head_edit(attention, torch.arange(groups)))
        for ffn in anatomy.feed_forwards:
            neurons = self._kept_neurons(ffn)
            if neurons < ffn.neurons:
                edits.append(_neuron_edit(ffn, torch.arange(neurons)))
        return edits

    def _check(self, anatomy: Anatomy) -> None:
        for share, found, what in (
            (self.keep.ffn, anatomy.feed_forwards, "ffn"),
            (self.keep.heads, anatomy.attentions, "heads"),
        ):
            if share < 1 and len(found) != len(anatomy.blocks):
                part = "an FFN" if what == "ffn" else "attention with heads"
                raise CompressKitError(
                    f"{part} is seen in {len(found)} of {len(anatomy.blocks)} blocks",
                    where=f"keep.{what}",
                    fix=f"leave {what} out; `compresskit modules MODEL` shows what is seen",
                )

    def _kept_neurons(self, ffn: FeedForward) -> int:
        if self.keep.ffn == 1:
            return ffn.neurons
        kept = round(self.keep.ffn * ffn.neurons / self.round_to) * self.round_to
        if not 0 < kept < ffn.neurons:
            left = "cuts none" if kept >= ffn.neurons else "leaves none"
            what = f"{self.keep.ffn} of {ffn.neurons} neurons, in multiples of {self.round_to}, {left}"
            fix = f"use a {'smaller' if kept else 'larger'} keep or a smaller round_to"
            raise CompressKitError(what, where="keep.ffn", fix=fix)
        return kept

    def _kept_groups(self, attention: Attention) -> int:
        kept = round(self.keep.heads * attention.kv_heads)
        if kept == attention.kv_heads and self.keep.heads < 1:
            what = f"{self.keep.heads} of {attention.kv_heads} heads (key/value groups) cuts none"
            raise CompressKitError(what, where="keep.heads", fix=f"keep at most {1 - 1 / attention.kv_heads:.3f}")
        if kept == 0:
            what = f"{self.keep.heads} of {attention.kv_heads} heads (key/value groups) leaves none"
            raise CompressKitError(what, where="keep.heads", fix=f"keep at least {1 / attention.kv_heads:.3f}")
        return kept

    def apply(self, student: Student, *, generator: torch.Generator) -> dict[str, Any]:
        """Walk the blocks: attention heads, then neurons, each block on what the ones before it became."""
        anatomy = find_anatomy(student.model)
        self._check(anatomy)
        cuts: dict[str, Callable[[SiteMoments], dict[str, Any]]] = {}
        for attention in anatomy.attentions:
            groups = self._kept_groups(attention)
            if groups < attention.kv_heads:
                cuts[attention.output] = _head_cut(student, attention, groups)
        for ffn in anatomy.feed_forwards:
            neurons = self._kept_neurons(ffn)
            if neurons < ffn.neurons:
                cuts[ffn.output] = _neuron_cut(student, ffn, neurons)
        layers: dict[str, dict[str, Any]] = {}

        def solve(site: Site, moments: SiteMoments) -> None:
            layers[site.linears[0]] = cuts[site.linears[0]](moments)

        sites = [site for site in anatomy.sites if site.linears[0] in cuts]
        if sites:
            Walk(student, anchor=self.anchor).run(sites, solve, label=self.kind)
        return {"layers": layers}


def _neuron_edit(ffn: FeedForward, keep: Tensor) -> PruneNeurons:
    return PruneNeurons(inputs=ffn.inputs, output=ffn.output, keep=write_ranges(keep.tolist()))


def _head_edit(attention: Attention, groups: Tensor) -> PruneHeads:
    per_group = attention.heads // attention.kv_heads
    heads = (groups[:, None] * per_group + torch.arange(per_group)).flatten()
    return PruneHeads(
        module=attention.module,
        query=attention.query,
        key=attention.key,
        value=attention.value,
        output=attention.output,
        head_dim=attention.head_dim,
        keep=write_ranges(heads.tolist()),
        keep_kv=write_ranges(groups.tolist()),
    )


def _neuron_cut(student: Student, ffn: FeedForward, count: int) -> Callable[[SiteMoments], dict[str, Any]]:
    def cut(moments: SiteMoments) -> dict[str, Any]:
        scores = fluctuation_scores(
            dense_weight(student.model.get_submodule(ffn.output)), moments.all.mean(centred=True)
        )
        keep = top_indices(scores, count)
        return _refit(student, ffn.output, _neuron_edit(ffn, keep), keep, moments)

    return cut


def _head_cut(student: Student, attention: Attention, count: int) -> Callable[[SiteMoments], dict[str, Any]]:
    def cut(moments: SiteMoments) -> dict[str, Any]:
        weight = dense_weight(student.model.get_submodule(attention.output))
        scores = fluctuation_scores(weight, moments.all.mean(centred=True))
        groups = top_indices(scores.view(attention.kv_heads, -1).sum(1), count)
        edit = _head_edit(attention, groups)
        return _refit(student, attention.output, edit, edit.rows()[0], moments)

    return cut


def _refit(student: Student, output: str, edit: Edit, columns: Tensor, moments: SiteMoments) -> dict[str, Any]:
    """Cut, then write the least-squares weight of the kept columns; the mean goes into a bias that is already there."""
    layer = student.model.get_submodule(output)
    centred = layer_bias(layer) is not None
    before = dense_weight(layer)
    weight, mean, shrinkage = fit_weight(before, moments.fit, moments.held_out, centred=centred, columns=columns)
    student.edit(edit)
    layer = student.model.get_submodule(output)  # a low-rank one may have become another
    set_weight(layer, weight)
    weight = dense_weight(layer).double()  # a low-rank layer comes only as near as its factors let it
    if centred:
        set_bias(layer, folded_bias(weight, mean))
    power = mean.target_power
    return {
        "kept": len(columns),
        "relative_error": math.sqrt(max(mean.error(weight), 0.0) / power) if power > 0 else 0.0,
        "relative_error_unrepaired": math.sqrt(max(mean.error(before[:, columns]), 0.0) / power) if power > 0 else 0.0,
        "shrinkage": None if math.isinf(shrinkage) else shrinkage,
    }
