"""Low-rank correction: after `quantize`, a thin float path beside each integer layer repairs what rounding lost.

    before  y = Q x + b        after  y = Q x + b' + B (A x)        A (k, in), B (out, k)

M is what the layer should give (`layerwise.objective`), fitted with Q as what it gives today: so it holds what rounding
took from this layer, and what the layers before it lost. B and A are the output PCA of M − Q over the calibration text
(`layerwise.output_pca`): no other path of that rank comes nearer. Sources: LQER (arXiv:2402.02446) scales the error by
the inputs' mean magnitudes, where this takes their whole second moment; the anchored target is ours.

Where the walk names no target (a writer whose output is normalised or scaled before it joins the stream: Gemma 3,
OLMo 2, Granite), M is the original layer's weight, if it has one of that shape, on the student's own inputs: there a
student that was trained before is pulled back to its original. Other layers stay as they are, so `plan` tells the most.

Not at 8 bits, where rounding loses next to nothing, and not in place of smaller groups before both were compared at
equal bytes: a float path of rank k costs 32 k (in + out) bits. First factors of low-rank layers have no counterpart in
the original and stay as they are; so do layers with integer activations.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compresskit.errors import CompressKitError
from compresskit.layers.corrected_linear import CorrectedLinear
from compresskit.layers.quant_linear import QuantLinear
from compresskit.layerwise.moments import SiteMoments
from compresskit.layerwise.objective import fit_weight
from compresskit.layerwise.output_pca import solve_output_pca, squared_error
from compresskit.layerwise.walk import Walk
from compresskit.layerwise.weights import layer_bias, row_indices, stacked_weight
from compresskit.passes.base import PASSES, Pass, TextPart
from compresskit.student import Student
from compresskit.surgery.correction_edits import AddCorrection
from compresskit.surgery.edits import Edit
from compresskit.surgery.provenance import Provenance
from compresskit.surgery.sites import Site, find_anatomy, select

#: Of a layer's power: less than this is no error to correct.
_NOTHING = 1e-12


@PASSES.add
class LowRankCorrection(Pass):
    """Add to each integer layer the low-rank path that repairs most of what rounding lost."""

    kind: Literal["low_rank_correction"] = "low_rank_correction"
    rank: int = Field(default=8, ge=1, description="width of the path beside each layer")
    targets: str = Field(default="*", description="glob over the names of integer layers inside blocks")
    anchor: float = Field(
        default=1.0, gt=0, le=1, description="how far the target moves to the original's output (alpha)"
    )

    needs: ClassVar[frozenset[TextPart]] = frozenset({"calibration"})
    version: ClassVar[int] = 2
    plans_at_most: ClassVar[bool] = True

    def plan(self, model: nn.Module) -> list[Edit]:
        """One edit for each input site."""
        return [self._edit(site.linears) for site in self._sites(model)]

    def _edit(self, names: Sequence[str]) -> AddCorrection:
        return AddCorrection(targets=tuple(names), rank=self.rank)

    def _sites(self, model: nn.Module) -> list[Site]:
        """The integer layers by input site, in order of execution.

        Raises:
            CompressKitError: none; layers that have a path already; layers with fewer rows or columns than the rank.
        """
        if any(isinstance(module, CorrectedLinear) for module in model.modules()):
            raise CompressKitError("the layers have been corrected already", fix="ask for a higher rank at once")
        anatomy = find_anatomy(model, factors=True)  # type: ignore[arg-type]
        first_factors = (".reduce", ".reduce.rest")
        integers = [
            name
            for name in anatomy.linears()
            if isinstance(model.get_submodule(name), QuantLinear) and not name.endswith(first_factors)
        ]
        if not integers:
            raise CompressKitError(
                "no layer inside a block holds integers and reads float: there is nothing to correct",
                fix="put low_rank_correction after a quantize with act: none",
            )
        chosen = set(select(integers, self.targets))
        self._check_rank(model, chosen)
        sites = (
            Site(site.block, tuple(name for name in site.linears if name in chosen), site.writes_stream)
            for site in anatomy.sites
        )
        return [site for site in sites if site.linears]

    def _check_rank(self, model: nn.Module, names: set[str]) -> None:
        narrow = {}
        for name in names:
            layer = model.get_submodule(name)
            assert isinstance(layer, QuantLinear)
            if self.rank > min(layer.in_features, layer.out_features):
                narrow[name] = min(layer.in_features, layer.out_features)
        if narrow:
            listed = "".join(f"\n    {name}: at most {limit}" for name, limit in sorted(narrow.items()))
            raise CompressKitError(
                f"rank {self.rank} is more than {len(narrow)} layers have:{listed}",
                where="rank",
                fix=f"use rank: {min(narrow.values())} or less, or narrow targets",
            )

    def apply(self, student: Student, *, generator: torch.Generator) -> dict[str, Any]:
        """Walk the blocks on the integers as they are, and repair each site before the next is seen."""
        layers: dict[str, dict[str, Any]] = {}
        uncorrected: list[str] = []
        provenance = Provenance(student.edits)

        def solve(site: Site, moments: SiteMoments) -> None:
            originals = [provenance.original_name(name) for name in site.linears]
            found = self._correct(student, site, moments, _original_weight(student, originals))
            layers.update(found)
            uncorrected.extend(name for name in site.linears if name not in found)

        Walk(student, anchor=self.anchor).run(self._sites(student.model), solve, label=self.kind)
        return {"layers": layers, "uncorrected": uncorrected}

    @torch.no_grad()
    def _correct(
        self, student: Student, site: Site, moments: SiteMoments, original: Tensor | None
    ) -> dict[str, dict[str, Any]]:
        """Add and fill the paths of one site; nothing where neither the walk nor `original` says what it should give.

        Args:
            original: the stacked weight (O, I) of the original's layers.
        """
        modules = [student.model.get_submodule(name) for name in site.linears]
        Q, bias = stacked_weight(modules)
        centred = all(layer_bias(module) is not None for module in modules)
        if bias is not None and not centred:
            moments = moments.without_bias(bias)
        M, mean, _ = fit_weight(Q, moments.fit, moments.held_out, centred=centred)
        if _alike(M, Q, mean.C) and original is not None and original.shape == Q.shape:
            M = original.double()
        if _alike(M, Q, mean.C):
            return {}
        student.edit(self._edit(site.linears))
        notes: dict[str, dict[str, Any]] = {}
        for name, rows in zip(site.linears, row_indices(modules), strict=True):
            new = student.model.get_submodule(name)
            assert isinstance(new, CorrectedLinear)
            pca = solve_output_pca(M[rows] - Q[rows].double(), moment=mean.C)
            B, A = pca.factors(self.rank)
            new.expand.weight.copy_(B)
            new.reduce.weight.copy_(A)
            if centred and new.bias is not None:
                new.bias.copy_(mean.nu[rows] - (Q[rows].double() + B @ A) @ mean.mu)
            own = max(squared_error(M[rows], torch.zeros_like(M[rows]), mean.C), torch.finfo(torch.float64).tiny)
            before, after = ((float(pca.tail[rank]) / own) ** 0.5 for rank in (0, self.rank))
            notes[name] = {"rank": self.rank, "relative_error": after, "error_before": before}
        return notes


def _alike(M: Tensor, Q: Tensor, C: Tensor) -> bool:
    return squared_error(M, Q, C) <= _NOTHING * squared_error(M, torch.zeros_like(M), C)


def _original_weight(student: Student, names: Sequence[str]) -> Tensor | None:
    """The stacked weight of the original's layers, (O, I); None where it lacks one."""
    modules = dict(student.reference.named_modules())
    return stacked_weight([modules[name] for name in names])[0] if all(name in modules for name in names) else None
