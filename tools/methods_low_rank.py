"""What `bench_layerwise.py --pass low_rank` compares: methods people cite and what this library adds to them.

`svd` and `asvd` truncate W and W diag(√mean|x|); `pca` is output PCA on W, the optimum of SVD-LLM, `pca-0.5` and
`pca-1` the same on the anchored target M (at anchor 0, M is W). All of these give every linear the same share. To `pca`
`pivot` adds A's identity, `fisher` the metric and sharing where that is better, `fisher-pivot` both. `energy` and `kl`
allocate ranks on top of `fisher-pivot`, in multiples of 32 and 8 as users get them; `energy-output` is without the
metric; `refine` trains the blocks of `energy`.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compresskit.layers.low_rank import LowRankLinear
from compresskit.layerwise.ranks import rank_for
from compresskit.layerwise.weights import set_factors
from compresskit.passes.low_rank import LowRank
from compresskit.student import Student
from compresskit.surgery.edits import MakeLowRank
from compresskit.surgery.sites import find_anatomy

# Ranks are not rounded, so that every layer holds its whole share.
_UNIFORM = {"allocation": "uniform", "round_to": 1}
_CITED = {**_UNIFORM, "metric": "output", "pivot": False, "share": False}
METHODS: dict[str, dict[str, Any] | None] = {
    "svd": None,
    "asvd": None,
    "pca": {**_CITED, "anchor": 0.0},
    "pca-0.5": {**_CITED, "anchor": 0.5},
    "pca-1": {**_CITED, "anchor": 1.0},
    "pivot": {**_CITED, "anchor": 0.0, "pivot": True},
    "fisher": {**_UNIFORM, "anchor": 0.0, "pivot": False},
    "fisher-pivot": {**_UNIFORM, "anchor": 0.0},
    "energy-output": {"allocation": "energy", "anchor": 0.0, "metric": "output"},
    "energy": {"allocation": "energy", "anchor": 0.0},
    "energy-0.5": {"allocation": "energy", "anchor": 0.5},
    "energy-1": {"allocation": "energy", "anchor": 1.0},
    "kl": {"allocation": "kl", "anchor": 0.0},
    "kl-0.5": {"allocation": "kl", "anchor": 0.5},
    "kl-1": {"allocation": "kl", "anchor": 1.0},
    "refine": {"allocation": "energy", "anchor": 0.0, "refine": "block"},
}
_ASVD_POWER = 0.5
QUICK = ("svd", "pca", "kl", "refine")


def truncate(student: Student, keep: float, scales: dict[str, Tensor]) -> None:
    """Each block linear W becomes the best rank-k factors of W S, times S⁻¹ (S diagonal, (in,); ones where absent)."""
    for name in find_anatomy(student.model).linears():
        layer = student.model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        weight, bias = layer.weight.detach().double(), layer.bias
        scale = scales.get(name, torch.ones(layer.in_features)).double()
        rank = rank_for(keep, layer.out_features, layer.in_features, round_to=1)
        U, S, V = torch.linalg.svd(weight * scale, full_matrices=False)
        student.edit(MakeLowRank(targets=(name,), rank=rank, bias=bias is not None))
        new = student.model.get_submodule(name)
        assert isinstance(new, LowRankLinear)
        roots = S[:rank].sqrt()
        with torch.no_grad():
            set_factors([new], U[:, :rank] * roots, roots[:, None] * V[:rank] / scale)
            if bias is not None:
                new.expand.bias.copy_(bias)


@torch.no_grad()
def activation_scales(student: Student) -> dict[str, Tensor]:
    """√mean|x| of each input of each block linear, over the calibration text."""
    sums: dict[str, Tensor] = {}
    mask: list[Tensor] = []

    def hook(name: str) -> Callable[..., None]:
        def add(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            sums[name] = sums.get(name, torch.zeros(())) + args[0][mask[-1]].abs().double().sum(0)

        return add

    names = find_anatomy(student.model).linears()
    handles = [student.model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    for batch in student.corpus.calibration.batches(4):
        mask.append(batch["attention_mask"].bool())
        student.model(**batch)  # pyright: ignore[reportCallIssue]
    for handle in handles:
        handle.remove()
    tokens = sum(int(real.sum()) for real in mask)
    return {name: (total / tokens).pow(_ASVD_POWER).clamp_min(1e-8) for name, total in sums.items()}


def compress(
    student: Student, method: str, keep: float, seed: int, options: argparse.Namespace
) -> tuple[Student, dict[str, Any]]:
    """The student after one method, and the options that it had."""
    del options
    said = METHODS[method]
    if said is None:
        truncate(student, keep, activation_scales(student) if method == "asvd" else {})
        return student, {}
    LowRank(keep=keep, on_misfit="keep", **said).apply(student, generator=torch.Generator().manual_seed(seed))
    return student, said
