"""Low rank: linears that read the same input become one thin A followed by a B each, or a thin A and B of their own.

    before  y = W x + b        after  y = B (A x) + b'        A (k, in), B (out, k)

B and A are the exact minimisers of E (M x − B A x)ᵀ F (M x − B A x) over rank k (`layerwise.output_pca`). M is today's
weight, or the anchored target of `layerwise.objective`; means go into the bias. F is the Fisher information of the
model's answer (`metric: fisher`, one backward pass over calibration text) or the identity (`metric: output`: plain
output PCA, the optimum of SVD-LLM, arXiv:2403.07378). A holds an identity (`pivot`), so that factors of rank k have
k · (in + out − k) weights and save some at every rank (PIFA, arXiv:2501.19090).

How many ranks each site gets under one budget: `uniform`, the same share everywhere; `energy`, least sum of predicted
errors; `kl`, the same corrected by what trials on the model show.
Not for matrices that are already thin. Departures from the papers: the whole Fisher matrix of a layer's outputs and
not a number a row; linears of an input site share A where that is predicted to lose less at equal weights.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compresskit.errors import CompressKitError
from compresskit.layers.low_rank import LowRankLinear
from compresskit.layerwise.moments import SiteMoments
from compresskit.layerwise.objective import fit_weight
from compresskit.layerwise.output_pca import relative_error, solve_output_pca
from compresskit.layerwise.ranks import (
    Group,
    Ranks,
    SiteCurve,
    SiteOption,
    allocate_ranks,
    break_even_rank,
    even_ranks,
    factor_weights,
    rank_for,
    site_options,
)
from compresskit.layerwise.refine import refine_block
from compresskit.layerwise.survey import Survey, take_survey
from compresskit.layerwise.walk import BlockBatch, Walk
from compresskit.layerwise.weights import (
    layer_bias,
    require_finite,
    row_indices,
    set_bias,
    set_factors,
    stacked_weight,
)
from compresskit.passes.base import PASSES, Pass, TextPart, Trait
from compresskit.student import Student
from compresskit.surgery.edits import Edit, MakeLowRank
from compresskit.surgery.sites import Site, find_anatomy, select

LOG = logging.getLogger(__name__)


@PASSES.add
class LowRank(Pass):
    """Replace linears by two thin factors each, fitted to the activations of calibration text."""

    kind: Literal["low_rank"] = "low_rank"
    keep: float | None = Field(
        default=None, gt=0, le=1, description="share of the targeted weights that stays, in (0, 1]"
    )
    rank: int | None = Field(default=None, ge=1, description="one rank for every target, instead of keep")
    targets: str = Field(default="*", description="glob over the names of linears inside blocks")
    allocation: Literal["uniform", "energy", "kl"] = Field(
        default="energy",
        description="the same share at every site, or the least sum of predicted (energy) or tried (kl) losses",
    )
    floor: float = Field(
        default=0.25, ge=0, le=1, description="of energy and kl: no site goes below this share of its share of keep"
    )
    metric: Literal["fisher", "output"] = Field(
        default="fisher", description="which errors of a layer count: by what the model's answer feels, or all alike"
    )
    pivot: bool = Field(default=True, description="the first factor holds an identity, which is not stored")
    round_to: int | None = Field(
        default=None, ge=1, description="ranks are multiples of this; by default 32, or 8 where they are small"
    )
    share: Literal["auto"] | bool = Field(
        default="auto",
        description="linears that read the same input share their first factor; auto: where it is better at equal "
        "weights, and not at a given rank",
    )
    bias: bool = Field(default=True, description="give a bias to layers that have none, to fold the mean into")
    anchor: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="how far the target moves to the original's output (alpha); above 0 takes twice the time",
    )
    refine: Literal["none", "block"] = Field(
        default="none", description="block: train each block's factors together to give what the original's block does"
    )
    refine_rounds: int = Field(default=8, ge=1, description="of refine: passes over the calibration text in each block")
    on_misfit: Literal["error", "keep"] = Field(
        default="error",
        description="a layer that cannot be factorised, or that factors of its even share or of the given rank would "
        "not make smaller: an error, or it stays dense and is listed",
    )

    adds: ClassVar[frozenset[Trait]] = frozenset({"low_rank"})
    refuses: ClassVar[frozenset[Trait]] = frozenset({"quantized"})
    version: ClassVar[int] = 5
    needs: ClassVar[frozenset[TextPart]] = frozenset({"calibration"})

    @model_validator(mode="before")
    @classmethod
    def _one_rank_is_uniform(cls, said: Any) -> Any:
        if isinstance(said, dict) and said.get("rank") is not None:
            return {"allocation": "uniform"} | said
        return said

    @model_validator(mode="after")
    def _one_size(self) -> "LowRank":
        if (self.keep is None) == (self.rank is None):
            raise ValueError("give either keep or rank")
        if self.rank and self.allocation != "uniform":
            raise ValueError(f"allocation: {self.allocation} spreads a share of the weights; give keep instead of rank")
        if self.allocation == "uniform":
            self._refuse_idle("floor", "allocation: energy or kl")
        if self.refine == "none":
            self._refuse_idle("refine_rounds", "refine: block")
        return self

    @property
    def _allocates(self) -> bool:
        return self.keep is not None and self.allocation != "uniform"

    @property
    def _share(self) -> bool | None:
        return self.share if isinstance(self.share, bool) else False if self.rank else None

    def plan(self, model: nn.Module) -> list[Edit]:
        """The edits of an even spread, shared wherever sharing is left open: the data decide which ranks it will be.

        The weights add up to about the same; only `allocation: uniform` with `share: true` or `false` has these shapes.

        Raises:
            CompressKitError: layers that cannot be factorised; a budget that no ranks meet.
        """
        sites, _ = self._sites(model)
        self._check_budget(model, sites)
        even = (choice for site in sites for choice in self._even(model, site))
        return [self._edit(group, rank) for group, rank in even if rank <= self._break_even(model, group)]

    def keeps(self, model: nn.Module) -> tuple[str, ...]:
        """Layers that cannot be factorised, or whose factors would save nothing."""
        return tuple(self._sites(model)[1])

    def _edit(self, group: Group, rank: int) -> MakeLowRank:
        return MakeLowRank(targets=group, rank=rank, bias=self.bias, pivot=self.pivot)

    def _even(self, model: nn.Module, site: Site) -> Ranks:
        """The ranks of one site at its own share of the weights, as shapes alone tell."""
        groups = [(name,) for name in site.linears] if self._share is False else [site.linears]
        return tuple((group, self._rank(*_shape(model, group))) for group in groups)

    def _rank(self, rows: int, columns: int) -> int:
        return self.rank or rank_for(self.keep or 1, rows, columns, round_to=self.round_to, pivot=self.pivot)

    def _sites(self, model: nn.Module) -> tuple[list[Site], list[str]]:
        """The sites to factorise in order of execution, each with its targeted linears, and names that stay dense.

        Raises:
            CompressKitError: layers that cannot be factorised, all in one.
        """
        anatomy = find_anatomy(model)  # type: ignore[arg-type]
        chosen = set(select(anatomy.linears(), self.targets))
        found: list[Site] = []
        misfits: dict[str, str] = {}
        for site in anatomy.sites if self.keep != 1 else ():
            names = tuple(name for name in site.linears if name in chosen)
            done = {name: why for name in names if (why := _obstacle(model.get_submodule(name)))}
            misfits |= done
            part = Site(site.block, tuple(name for name in names if name not in done), site.writes_stream)
            if part.linears and not self._allocates:
                limits = self._beyond_break_even(model, part)
                misfits |= limits
                left = tuple(name for name in part.linears if name not in limits)
                part = Site(part.block, left, part.writes_stream)
            if part.linears:
                found.append(part)
        if misfits and self.on_misfit == "error":
            listed = "\n    ".join(f"{name} {why}" for name, why in misfits.items())
            fixes = ["lower keep or rank"] if any("saves nothing" in why for why in misfits.values()) else []
            raise CompressKitError(
                f"{len(misfits)} of the targeted layers cannot be factorised:\n    {listed}",
                where="targets",
                fix=", ".join([*fixes, "narrow targets, or say on_misfit: keep"]),
            )
        return found, list(misfits)

    def _beyond_break_even(self, model: nn.Module, site: Site) -> dict[str, str]:
        """The layers of a site whose factors would save nothing, and why."""
        found: dict[str, str] = {}
        for group, rank in self._even(model, site):
            limit = self._break_even(model, group)
            if rank > limit:
                rows, columns = _shape(model, group)
                shape = f"{rows}x{columns}" + (f", {len(group)} layers that share a factor" if len(group) > 1 else "")
                found |= dict.fromkeys(group, f"({shape}): rank {rank} saves nothing above {limit}")
        return found

    def _break_even(self, model: nn.Module, group: Group) -> int:
        return break_even_rank(*_shape(model, group), pivot=self.pivot)

    def apply(self, student: Student, *, generator: torch.Generator) -> dict[str, Any]:
        """Survey the sites where anything is left open, choose ranks, then walk the blocks and factorise each site."""
        sites, kept_dense = self._sites(student.model)
        if not sites:
            if kept_dense:
                LOG.warning("low_rank: nothing was factorised, all %d targeted layers stay dense", len(kept_dense))
            return {"layers": {}, "kept_dense": kept_dense}
        require_finite(student.model)
        self._check_budget(student.model, sites)
        survey = self._survey(student, sites, generator)
        ranks = self._choose(student.model, sites, survey)
        factorised = {name for choice in ranks for group, _ in choice for name in group}
        kept_dense += [name for site in sites for name in site.linears if name not in factorised]
        layers: dict[str, dict[str, Any]] = {}
        refined: dict[str, dict[str, Any]] = {}
        choices = {site: choice for site, choice in zip(sites, ranks, strict=True) if choice}
        summary = _summary(student.model, sites, ranks, pivot=self.pivot)
        _log_choice(sites, ranks, summary, kept_dense)

        def solve(site: Site, moments: SiteMoments) -> None:
            layers.update(self._factorise(student, site, choices[site], moments, survey))

        def finish(block: str, batches: list[BlockBatch]) -> None:
            metric = survey.fisher[block,].metric().matrix if survey.fisher else None
            module = student.model.get_submodule(block)
            done = refine_block(module, batches, rounds=self.refine_rounds, metric=metric, generator=generator)
            refined[block] = asdict(done)

        Walk(student, anchor=self.anchor, finish=finish if self.refine == "block" else None).run(
            choices, solve, label=self.kind
        )
        return {"layers": layers, "kept_dense": kept_dense, "allocation": summary, "refined": refined}

    def _survey(self, student: Student, sites: list[Site], generator: torch.Generator) -> Survey:
        if not self._allocates and self.metric == "output" and self._share is not None:
            return Survey({}, {})
        return take_survey(
            student,
            sites,
            weighted=self.metric == "fisher",
            measured=self._allocates and self.allocation == "kl",
            bias=self.bias,
            seed=generator.initial_seed(),
        )

    def _choose(self, model: nn.Module, sites: list[Site], survey: Survey) -> list[Ranks]:
        """The ranks of each site."""
        if not survey.curves or (not self._allocates and self._share is False):
            return [self._even(model, site) for site in sites]
        curves = [survey.curves[site.linears] for site in sites]
        if not self._allocates or self.keep is None:
            return [self._even_shared(curve) for curve in curves]
        return allocate_ranks(self._options(curves, self.keep), _budget(curves, self.keep))

    def _options(self, curves: Sequence[SiteCurve], keep: float) -> list[list[SiteOption]]:
        form: dict[str, Any] = {"share": self._share, "pivot": self.pivot, "round_to": self.round_to}
        return [site_options(curve, floor=self.floor * keep, **form) for curve in curves]

    def _check_budget(self, model: nn.Module, sites: Sequence[Site]) -> None:
        """Refuse a budget below what the cheapest choices of all sites weigh, which shapes alone tell.

        Raises:
            CompressKitError: it is; the fix names a share that can be met (the floor rises with it).
        """

        def least(keep: float) -> int:
            return sum(min(option.cost for option in site) for site in self._options(curves, keep))

        curves, keep = [_hollow_curve(model, site) for site in sites], self.keep or 1.0
        if not self._allocates or not curves or least(keep) <= _budget(curves, keep):
            return
        tried = (percent / 100 for percent in range(math.ceil(100 * keep), 101))
        enough = next(share for share in tried if least(share) <= _budget(curves, share))
        total = _budget(curves, 1.0)
        raise CompressKitError(
            f"keep {keep:g} of {total} weights cannot be met: the smallest factors hold {least(keep) / total:.3f} of "
            "them",
            where="keep",
            fix=f"use keep: {enough:g} or more, a smaller round_to, or a lower floor",
        )

    def _even_shared(self, curve: SiteCurve) -> Ranks:
        rank = self._rank(sum(curve.outputs), curve.inputs)
        return even_ranks(curve, rank, share=self._share, pivot=self.pivot, round_to=self.round_to)

    def _factorise(
        self, student: Student, site: Site, ranks: Ranks, moments: SiteMoments, survey: Survey
    ) -> dict[str, dict[str, Any]]:
        """Replace the layers of one site, and say what each group lost."""
        modules = [student.model.get_submodule(name) for name in site.linears]
        weight, bias = stacked_weight(modules)
        centred = self.bias or all(layer_bias(module) is not None for module in modules)
        if bias is not None and not centred:
            moments = moments.without_bias(bias)
        if self.anchor:
            target, mean, shrinkage = fit_weight(weight, moments.fit, moments.held_out, centred=centred)
        else:
            target, mean, shrinkage = weight.double(), moments.all.mean(centred=centred), float("inf")
        rows_of = row_indices(modules)
        notes: dict[str, dict[str, Any]] = {}
        for group, rank in ranks:
            rows = torch.cat([rows_of[site.linears.index(name)] for name in group])
            metric = survey.fisher[group].metric(weight[rows]) if survey.fisher else None
            pca = solve_output_pca(target[rows], moment=mean.C, metric=metric)
            B, A = pca.factors(rank)
            student.edit(self._edit(group, rank))
            new_bias = mean.nu[rows] - B @ (A @ mean.mu) if centred else bias
            _fill(student.model, group, B, A, new_bias if centred or bias is None else bias[rows])
            notes[" + ".join(group)] = {
                "rank": rank,
                "predicted_error": float(pca.tail[rank]),
                "relative_error": relative_error(target[rows], B @ A, mean.C),
                "shrinkage": None if shrinkage == float("inf") else shrinkage,
            }
        return notes


def _obstacle(layer: nn.Module) -> str | None:
    """Why a layer of any shape cannot be factorised."""
    if isinstance(layer, LowRankLinear):
        return "is low rank already"
    if isinstance(layer, Conv1D):
        return "is a Conv1D, which stores its weight transposed: only prune_width takes it"
    return None if isinstance(layer, nn.Linear) else f"is a {type(layer).__name__}: factorise before quantising"


def _shape(model: nn.Module, group: Group) -> tuple[int, int]:
    """Outputs of all layers of a group together, and their inputs."""
    layers = [model.get_submodule(name) for name in group]
    return sum(int(layer.out_features) for layer in layers), int(layers[0].in_features)  # type: ignore[arg-type]


def _hollow_curve(model: nn.Module, site: Site) -> SiteCurve:
    """A site's shapes with no errors: what its ranks weigh, and nothing of what they lose."""
    shapes = [_shape(model, (name,)) for name in site.linears]
    rows, columns = sum(outputs for outputs, _ in shapes), shapes[0][1]
    alone = tuple((0.0,) * (min(shape) + 1) for shape in shapes) if len(shapes) > 1 else ()
    return SiteCurve(site.linears, tuple(o for o, _ in shapes), columns, (0.0,) * (min(rows, columns) + 1), alone)


def _budget(curves: Sequence[SiteCurve], keep: float) -> int:
    return int(keep * sum(curve.dense_weights for curve in curves))


def _fill(model: nn.Module, group: Group, B: Tensor, A: Tensor, bias: Tensor | None) -> None:
    """Write the factors of a group, and each layer's part of the stacked bias (O,)."""
    layers = [layer for name in group if isinstance(layer := model.get_submodule(name), LowRankLinear)]
    set_factors(layers, B, A)
    for layer, rows in zip(layers, row_indices(layers), strict=True):
        if bias is not None and layer_bias(layer) is not None:
            set_bias(layer, bias[rows])


def _summary(model: nn.Module, sites: Sequence[Site], ranks: Sequence[Ranks], *, pivot: bool) -> dict[str, int]:
    """How many weights the sites had and have."""
    before = after = 0
    for site, choice in zip(sites, ranks, strict=True):
        rows, columns = _shape(model, site.linears)
        before += rows * columns
        left = set(site.linears) - {name for group, _ in choice for name in group}
        after += sum(_shape(model, (name,))[0] * columns for name in left)
        after += sum(factor_weights(*_shape(model, group), rank, pivot=pivot) for group, rank in choice)
    return {"weights_before": before, "weights_after": after}


def _log_choice(sites: Sequence[Site], ranks: Sequence[Ranks], summary: dict[str, int], kept_dense: list[str]) -> None:
    """The allocation, a line a site."""
    LOG.info("low_rank: %d of %d weights stay", summary["weights_after"], summary["weights_before"])
    for site, choice in zip(sites, ranks, strict=True):
        said = ", ".join(f"rank {rank} for {' + '.join(group)}" for group, rank in choice)
        LOG.info("  %s", said or f"dense: {', '.join(site.linears)}")
    if kept_dense:
        LOG.info("low_rank: %d of the targeted layers stay dense: %s", len(kept_dense), ", ".join(kept_dense))
