"""What `bench_layerwise.py --pass prune_width` compares: every score × repair × allocation, and torch-pruning.

A method is called score-repair-allocation. `flap-bias-uniform` is FLAP's score and bias at even widths (FLAP itself
spreads them by standardised scores; `flap-bias-per_layer` does by trials): it adds biases where there are none, and
is not anchored at the original, as published. `ls0` is least squares without that anchor, to tell the two apart.
`depth` drops blocks by prune_depth's `kl`, as many as come next to the asked share, `mix` half as many, and `obs-ls-
uniform` takes the rest. `rank` cuts half as many weights as neurons, by `obs-ls-per_layer`, and the rest by
`low_rank` as it is by default, so that the best cut of neurons stands beside one that a chain of passes gives.
`torch-pruning` is that package on its own, in a child process under a time limit; the package is optional (`pip
install torch-pruning`), and grouped-query attention is not given to it. --parts says what is cut: of `ffn heads` as
many heads go as come next to the asked share, and neurons make up the rest.
"""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from compresskit.errors import CompressKitError
from compresskit.layers.linear import layer_widths
from compresskit.passes.low_rank import LowRank
from compresskit.passes.prune_depth import PruneDepth
from compresskit.passes.prune_width import PruneWidth
from compresskit.student import Student
from compresskit.surgery.parts import heads_of, neurons_of
from compresskit.surgery.sites import find_anatomy, find_blocks

SCORES = ("random", "magnitude", "wanda", "flap", "leverage", "taylor", "obs")
#: The name of a repair in a method's name, and the options that it stands for.
REPAIRS: dict[str, dict[str, Any]] = {
    "none": {"repair": "none"},
    "bias": {"repair": "bias", "bias": True, "anchor": 0.0},
    "ls0": {"repair": "least_squares", "anchor": 0.0},
    "ls": {"repair": "least_squares"},
}
ALLOCATIONS = ("uniform", "per_layer")
METHODS: dict[str, dict[str, Any]] = {
    f"{score}-{repair}-{allocation}": {"score": score, "allocation": allocation, **said}
    for score in SCORES
    for repair, said in REPAIRS.items()
    for allocation in ALLOCATIONS
} | {"depth": {}, "mix": {}, "rank": {}, "torch-pruning": {}}
#: How much of what goes is whole blocks; the method `_MIXED` takes the rest.
_BLOCKS_OF = {"depth": 1.0, "mix": 0.5}
_MIXED = "obs-ls-uniform"
#: How much of what goes is neurons, by which method; low_rank takes the rest.
_NEURONS_OF_RANK, _BEFORE_RANK = 0.5, "obs-ls-per_layer"
QUICK = ("random-none-uniform", "flap-bias-uniform", "obs-ls-uniform", "flap-ls-per_layer")
_CHILD_LIMIT_S = 900


def compress(
    student: Student, method: str, keep: float, seed: int, options: argparse.Namespace
) -> tuple[Student, dict[str, Any]]:
    """The student after one method that keeps `keep` of the block linears' weights, and the options that it had."""
    depth: dict[str, Any] = {}
    if method in _BLOCKS_OF:
        blocks = len(find_blocks(student.model))
        share = 1 - max(1, round(_BLOCKS_OF[method] * (1 - keep) * blocks)) / blocks
        depth = {"depth": {"keep": share}}
        PruneDepth(keep=share).apply(student, generator=torch.Generator().manual_seed(seed))
        if method == "depth" or share <= keep:
            return student, depth
        keep, method = keep / share, _MIXED
    if method == "rank":
        wider = 1 - _NEURONS_OF_RANK * (1 - keep)
        student, said = compress(student, _BEFORE_RANK, wider, seed, options)
        rank = LowRank(keep=keep / wider, on_misfit="keep")
        rank.apply(student, generator=torch.Generator().manual_seed(seed))
        return student, said | {"low_rank": {"keep": rank.keep}}
    shares = kept_shares(student, keep, options.parts)
    if method == "torch-pruning":
        if options.blocks:
            raise CompressKitError("torch-pruning is given whole models only", where="--blocks", fix="leave it out")
        return torch_pruned(student, shares, options), shares
    said = {"keep": shares, "round_to": 8, **METHODS[method]}
    PruneWidth.model_validate(said).apply(student, generator=torch.Generator().manual_seed(seed))
    return student, said | depth


def kept_shares(student: Student, keep: float, parts: list[str]) -> dict[str, float]:
    """The shares of neurons and heads that leave `keep` of the weights of the block linears.

    Raises:
        CompressKitError: the parts named do not hold as many weights as are to go.
    """
    model = student.model
    anatomy = find_anatomy(model)
    widths = [layer_widths(model.get_submodule(name)) for name in anatomy.linears()]
    excess = (1 - keep) * sum(outputs * inputs for outputs, inputs in widths)
    shares: dict[str, float] = {}
    if "heads" in parts:
        heads = [heads_of(attention, model) for attention in anatomy.attentions]
        groups = len(heads[0].groups)
        kept = max(1, round(keep * groups))
        if kept < groups:
            shares["heads"] = kept / groups
            excess -= sum((groups - kept) * part.group_weights for part in heads)
    if "ffn" in parts:
        neurons = [neurons_of(ffn, model) for ffn in anatomy.feed_forwards]
        shares["ffn"] = 1 - excess / sum(len(part.groups) * part.group_weights for part in neurons)
    if not shares or not 0 < shares.get("ffn", 1) <= 1:
        what = f"{keep} of the block linears cannot be kept by cutting {' and '.join(parts)}"
        raise CompressKitError(what, where="--keeps", fix="use a keep nearer to 1, or other --parts")
    return shares


def torch_pruned(student: Student, shares: dict[str, float], options: argparse.Namespace) -> Student:
    """The original as torch-pruning prunes it.

    Raises:
        CompressKitError: it is not installed, the model is not for it, or it does not end.
    """
    if importlib.util.find_spec("torch_pruning") is None:
        raise CompressKitError(
            "torch-pruning is not installed", where="--methods", fix="pip install torch-pruning, or leave it out"
        )
    if any(attention.heads != attention.kv_heads for attention in find_anatomy(student.model).attentions):
        what = "torch-pruning does not end on grouped-query attention"
        raise CompressKitError(what, where="--methods", fix="leave it out for this model")
    script = Path(__file__).with_name("prune_with_torch_pruning.py")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "pruned.pt"
        command = [sys.executable, str(script), options.model, options.task, str(output)]
        command += [word for name, share in shares.items() for word in (f"--{name}", str(share))]
        try:
            done = subprocess.run(command, timeout=_CHILD_LIMIT_S, capture_output=True, text=True, check=False)
        except subprocess.TimeoutExpired as error:
            what = f"torch-pruning did not end within {_CHILD_LIMIT_S} s"
            raise CompressKitError(what, where="--methods", fix="leave it out for this model") from error
        if done.returncode:
            what = f"torch-pruning failed: {done.stderr.strip().splitlines()[-1:]}"
            raise CompressKitError(what, where="--methods", fix="leave it out for this model")
        # Our own child wrote it a moment ago.
        model = torch.load(output, weights_only=False)
    return replace(student, model=model.eval())
