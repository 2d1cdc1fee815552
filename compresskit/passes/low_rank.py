"""Low rank: linears that read the same input become one thin A followed by a B each.

    before  y = W x + b        after  y = B (A x) + b'        A (k, in), B (out, k)

B is the top-k eigenvectors of the output covariance M C Mᵀ and A = Bᵀ M (output PCA): the exact minimiser of
E‖M x − B A x‖² over rank k, equal to SVD-LLM's whitening (arXiv:2403.07378) without its Cholesky inverse, so a singular
moment is no problem (Swift-SVD, arXiv:2604.01609). M is today's weight, or the anchored target of
`layerwise.objective`. Means go into the bias. Not for matrices that are already thin: a rank at or above
out·in / (out + in) saves nothing.
Departure from the papers: one A for all linears of an input site (query, key, value), which lifts that break-even.
"""

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from compresskit.errors import CompressKitError
from compresskit.layers.low_rank import LowRankLinear
from compresskit.layerwise.objective import fit_weight, folded_bias
from compresskit.layerwise.walk import SiteMoments, Walk
from compresskit.layerwise.weights import layer_bias, stacked_weight
from compresskit.passes.base import PASSES, Part, Pass, Trait
from compresskit.student import Student
from compresskit.surgery.edits import Edit, MakeLowRank
from compresskit.surgery.sites import Site, find_anatomy, select

RANK_MULTIPLE = 8
#: Ranks of at least four of these are multiples of it, so that the usual group size of a later quantiser divides them.
_COARSE_MULTIPLE = 32


def break_even_rank(out_features: int, in_features: int) -> int:
    """The largest rank whose factors hold fewer weights than the dense matrix."""
    return (out_features * in_features - 1) // (out_features + in_features)


def rank_for(keep: float, out_features: int, in_features: int, *, round_to: int | None = None) -> int:
    """The rank whose factors hold about `keep` of the dense matrix's weights.

    Args:
        keep: share that stays, in (0, 1].
        round_to: the rank is the nearest multiple of it that still saves weights, and at least one multiple; None
            takes 32 from rank 128 on and 8 below.
    """
    exact = keep * out_features * in_features / (out_features + in_features)
    step = round_to or (_COARSE_MULTIPLE if exact >= 4 * _COARSE_MULTIPLE else RANK_MULTIPLE)
    saving = break_even_rank(out_features, in_features) // step
    return max(1, min(round(exact / step), saving)) * step


def low_rank_factors(target: Tensor, rank: int, *, moment: Tensor) -> tuple[Tensor, Tensor, float]:
    """The rank-`rank` factors B, A that minimise E‖M x − B A x‖² over the calibration inputs x, and that error.

    Args:
        target: M, shape (out, in), any float dtype; computed in float64; not modified.
        rank: 1 ≤ rank ≤ min(out, in). Parameters fall only below out·in / (out + in).
        moment: C = E[x xᵀ], shape (in, in), symmetric, positive semi-definite.

    Returns:
        B (out, rank) with orthonormal columns, A (rank, in), both float64, and the error: the sum of the eigenvalues
        of M C Mᵀ that were cut.

    Raises:
        ValueError: rank out of range, or shapes that do not agree.

    Cost: one `eigh` of the smaller of (out, out) and (in, in) in float64; a QR of M where out is the larger.
    Source: output PCA, equal to SVD-LLM's whitening (arXiv:2403.07378) without its Cholesky inverse.
    """
    out_features, in_features = target.shape
    if moment.shape != (in_features, in_features):
        raise ValueError(f"moment is {tuple(moment.shape)}, the target has {in_features} inputs")
    if not 1 <= rank <= min(out_features, in_features):
        raise ValueError(f"rank {rank} is not in 1…{min(out_features, in_features)}")
    M, C = target.double(), moment.double()
    # M = Q R with orthonormal Q: the eigenvectors of M C Mᵀ are Q times those of the small R C Rᵀ.
    Q, R = torch.linalg.qr(M) if out_features > in_features else (None, M)
    eigenvalues, vectors = torch.linalg.eigh(R @ C @ R.T)
    B = vectors[:, -rank:].flip(1)
    B = B if Q is None else Q @ B
    return B, B.T @ M, float(eigenvalues[:-rank].clamp_min(0).sum())


@PASSES.add
class LowRank(Pass):
    """Replace linears by two thin factors each, fitted to the activations of calibration text."""

    kind: Literal["low_rank"] = "low_rank"
    keep: float | None = Field(
        default=None, gt=0, le=1, description="share of the targeted weights that stays, in (0, 1]"
    )
    rank: int | None = Field(default=None, ge=1, description="one rank for every target, instead of keep")
    targets: str = Field(default="*", description="glob over the names of linears inside blocks")
    round_to: int | None = Field(
        default=None, ge=1, description="ranks are multiples of this; by default 32, or 8 below 128"
    )
    share: bool = Field(default=True, description="linears that read the same input share their first factor")
    bias: bool = Field(default=True, description="give a bias to layers that have none, to fold the mean into")
    anchor: float = Field(
        default=1.0, ge=0, le=1, description="how far the target moves to the original's output (alpha)"
    )
    on_misfit: Literal["error", "keep"] = Field(
        default="error",
        description="a layer whose factors would save nothing: an error, or it stays dense and is listed",
    )

    adds: ClassVar[frozenset[Trait]] = frozenset({"low_rank"})
    refuses: ClassVar[frozenset[Trait]] = frozenset({"quantized"})
    needs: ClassVar[frozenset[Part]] = frozenset({"calibration"})

    @model_validator(mode="after")
    def _one_size(self) -> "LowRank":
        if (self.keep is None) == (self.rank is None):
            raise ValueError("give either keep or rank")
        return self

    def plan(self, model: nn.Module) -> list[Edit]:
        """One edit per site whose factors save weights."""
        return [edit for _, edit in self._planned(model)[0]]

    def _planned(self, model: nn.Module) -> tuple[list[tuple[Site, MakeLowRank]], list[str]]:
        """Sites with their edits in order of execution, and the names that stay dense."""
        anatomy = find_anatomy(model)  # type: ignore[arg-type]
        chosen = set(select(anatomy.linears(), self.targets))
        planned: list[tuple[Site, MakeLowRank]] = []
        misfits: dict[str, str] = {}
        for site in anatomy.sites:
            names = tuple(name for name in site.linears if name in chosen)
            for group in [names] if self.share else [(name,) for name in names]:
                if not group or self.keep == 1:
                    continue
                layers = [model.get_submodule(name) for name in group]
                if any(isinstance(layer, LowRankLinear) for layer in layers):
                    misfits[", ".join(group)] = "is low rank already"
                    continue
                rows = sum(int(layer.out_features) for layer in layers)  # type: ignore[arg-type]
                columns = int(layers[0].in_features)  # type: ignore[arg-type]
                rank = self.rank or rank_for(self.keep or 1, rows, columns, round_to=self.round_to)
                if rank > break_even_rank(rows, columns):
                    limit = break_even_rank(rows, columns)
                    misfits[", ".join(group)] = f"({rows}x{columns}): rank {rank} saves nothing above {limit}"
                    continue
                part = Site(site.block, group, site.writes_stream)
                planned.append((part, MakeLowRank(targets=group, rank=rank, bias=self.bias)))
        if misfits and self.on_misfit == "error":
            listed = "\n    ".join(f"{names} {why}" for names, why in misfits.items())
            raise CompressKitError(
                f"{len(misfits)} of the targeted layers cannot be factorised:\n    {listed}",
                where="targets",
                fix="lower keep or rank, narrow targets, or say on_misfit: keep",
            )
        return planned, [name for names in misfits for name in names.split(", ")]

    def apply(self, student: Student, *, generator: torch.Generator) -> dict[str, Any]:
        """Walk the blocks and factorise each site on the moments it sees."""
        planned, kept_dense = self._planned(student.model)
        edits = dict(planned)
        layers: dict[str, dict[str, Any]] = {}

        def solve(site: Site, moments: SiteMoments) -> None:
            layers[" + ".join(site.linears)] = self._factorise(student, edits[site], moments)

        if planned:
            Walk(student, anchor=self.anchor).run(edits, solve, label=self.kind)
        return {"layers": layers, "kept_dense": kept_dense}

    def _factorise(self, student: Student, edit: MakeLowRank, moments: SiteMoments) -> dict[str, Any]:
        modules = [student.model.get_submodule(name) for name in edit.targets]
        weight, bias = stacked_weight(modules)
        centred = self.bias or all(layer_bias(module) is not None for module in modules)
        if bias is not None and not centred:
            moments = moments.without_bias(bias)
        if self.anchor:
            target, mean, shrinkage = fit_weight(weight, moments.fit, moments.held_out, centred=centred)
        else:
            target, mean, shrinkage = weight.double(), moments.all.mean(centred=centred), float("inf")
        B, A, tail = low_rank_factors(target, edit.rank, moment=mean.C)
        new_bias = folded_bias(B @ A, mean) if centred else bias
        student.edit(edit)
        _fill(student.model, edit, B, A, new_bias)
        power = float(((target @ mean.C) * target).sum())
        return {
            "rank": edit.rank,
            "relative_error": (tail / power) ** 0.5 if power > 0 else 0.0,
            "shrinkage": None if shrinkage == float("inf") else shrinkage,
        }


@torch.no_grad()
def _fill(model: nn.Module, edit: MakeLowRank, B: Tensor, A: Tensor, bias: Tensor | None) -> None:
    """Write the shared A and each layer's rows of B and bias."""
    row = 0
    for name in edit.targets:
        layer = model.get_submodule(name)
        assert isinstance(layer, LowRankLinear)
        if layer.reduce is not None:
            layer.reduce.weight.copy_(A)
        rows = slice(row, row + layer.out_features)
        layer.expand.weight.copy_(B[rows])
        if layer.expand.bias is not None and bias is not None:
            layer.expand.bias.copy_(bias[rows])
        row = rows.stop
