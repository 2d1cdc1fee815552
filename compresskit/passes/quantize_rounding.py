"""Rounding the layers of one input site, or a table, and saying what that lost.

    codes of M, to nearest or by GPTQ   →   integer layer, with a bias that makes it exact in the mean

The loss is told as ‖(M − Q) x‖ / ‖M x‖ over the calibration text, beside what rounding to nearest would have lost.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compresskit.layers.grid import Codes, encode, find_scales
from compresskit.layers.int8_linear import Int8Linear
from compresskit.layers.quant_embedding import QuantEmbedding
from compresskit.layers.quant_linear import QuantLinear
from compresskit.layerwise.gptq import DAMPING, Compensation, improve, plan_compensation, round_with
from compresskit.layerwise.moments import MeanMoments, ridged
from compresskit.layerwise.objective import folded_bias
from compresskit.layerwise.output_pca import relative_error
from compresskit.layerwise.weights import row_indices, stacked_weight
from compresskit.student import Student
from compresskit.surgery.edits import QuantizeEmbedding, QuantizeLinears

Method = Literal["rtn", "gptq"]


@dataclass(frozen=True)
class RoundingProblem:
    """What linears that read the same input should become.

    Attributes:
        names: the linears, in the order in which their rows are stacked.
        target: M (O, I) float64, stacked.
        mean: moments of the input; None where nothing is known of it.
        smooth: (I,) factors by which integer layers multiply their input; None for none.
        span: (I,) least and greatest value of each input, before factors; None where nothing is known of them.
        exact_mean: whether biases make the layers exact in the mean; else they stay.
    """

    names: tuple[str, ...]
    target: Tensor
    mean: MeanMoments | None = None
    smooth: Tensor | None = None
    span: tuple[Tensor, Tensor] | None = None
    exact_mean: bool = False


@torch.no_grad()
def round_site(
    student: Student, edits: tuple[QuantizeLinears, ...], problem: RoundingProblem, method: Method
) -> dict[str, dict[str, Any]]:
    """Swap in integer layers by `edits`, which share the names of `problem` among them; what each layer lost."""
    layers = [student.model.get_submodule(name) for name in problem.names]
    rows = dict(zip(problem.names, row_indices(layers), strict=True))
    ready = {smooth: _prepare(problem, method, smooth=smooth) for smooth in {edit.smooth for edit in edits}}
    notes: dict[str, dict[str, Any]] = {}
    for edit in edits:
        olds = {name: student.model.get_submodule(name) for name in edit.targets}
        student.edit(edit)
        for name, old in olds.items():
            new = student.model.get_submodule(name)
            assert isinstance(new, QuantLinear | Int8Linear)
            if isinstance(new, Int8Linear) and new.smooth is not None and problem.smooth is not None:
                new.smooth.copy_(problem.smooth)
            if edit.act == "int8_static" and isinstance(new, Int8Linear) and problem.span is not None:
                new.set_input_range(*problem.span)
            notes[name] = _round_layer(new, edit, ready[edit.smooth], problem, rows[name])
            _keep_or_fold_bias(old, new, problem, rows[name])
    return notes


@dataclass(frozen=True)
class _Prepared:
    """What all layers of a site share: M, divided by the factors, and how its columns count and make good."""

    target: Tensor
    importance: Tensor | None
    compensation: Compensation | None


def _prepare(problem: RoundingProblem, method: Method, *, smooth: bool) -> _Prepared:
    target, moment = problem.target.double(), None if problem.mean is None else problem.mean.C
    if smooth and problem.smooth is not None:
        factors = problem.smooth.double()
        target = target / factors
        moment = None if moment is None else moment * factors * factors[:, None]
    if moment is None:
        return _Prepared(target, None, None)
    compensation = plan_compensation(moment) if method == "gptq" else None
    damped = ridged(moment, DAMPING) if compensation is None else compensation.moment
    return _Prepared(target, damped.diagonal().clone(), compensation)


def _round_layer(
    layer: QuantLinear | Int8Linear, edit: QuantizeLinears, ready: _Prepared, problem: RoundingProblem, rows: Tensor
) -> dict[str, Any]:
    """Fill a layer with the codes of its rows; what was done and lost."""
    weight, grid = ready.target[rows], {"bits": edit.bits, "group_size": edit.group_size}
    scales, zeros = find_scales(
        weight, symmetric=edit.symmetric, whole=edit.whole, column_weight=ready.importance, **grid
    )

    def lost(codes: Codes) -> float:
        layer.set_codes(codes)
        return relative_error(
            problem.target[rows], layer.dequantize(), None if problem.mean is None else problem.mean.C
        )

    nearest = lost(Codes(encode(weight, scales, zeros, **grid), scales, zeros))
    if ready.compensation is None:
        return {"bits": edit.bits, "method": "rtn", "relative_error": nearest}
    codes = Codes(round_with(ready.compensation, weight, scales, zeros, **grid), scales, zeros)
    own = lost(improve(ready.compensation, weight, codes, refit=not edit.whole, **grid))
    return {"bits": edit.bits, "method": "gptq", "relative_error": own, "rtn_error": nearest}


def _keep_or_fold_bias(old: nn.Module, new: nn.Module, problem: RoundingProblem, rows: Tensor) -> None:
    if not isinstance(old.bias, Tensor):
        return
    bias = old.bias.detach()
    if problem.exact_mean and problem.mean is not None:
        own = replace(problem.mean, T=problem.mean.T[rows], nu=problem.mean.nu[rows])
        bias = folded_bias(new.dequantize(), own)  # pyright: ignore[reportCallIssue]
    assert isinstance(new.bias, Tensor)
    new.bias.copy_(bias)


@torch.no_grad()
def round_outside(student: Student, edit: QuantizeLinears) -> dict[str, dict[str, Any]]:
    """Swap in an integer layer for a linear that no moments were collected for: to nearest, all columns alike."""
    weight, _ = stacked_weight([student.model.get_submodule(name) for name in edit.targets])
    return round_site(student, (edit,), RoundingProblem(edit.targets, weight), "rtn")


@torch.no_grad()
def round_table(student: Student, edit: QuantizeEmbedding) -> dict[str, Any]:
    """Swap in a table of integers, to nearest; a tied head keeps its bias."""
    old = student.model.get_submodule(edit.target)
    assert isinstance(old, nn.Embedding)
    weight = old.weight.detach()
    head = student.model.get_submodule(edit.head) if edit.head else None
    grid: dict[str, Any] = {"bits": edit.bits, "group_size": edit.group_size}
    scales, zeros = find_scales(weight, symmetric=edit.symmetric, **grid)
    student.edit(edit)
    table = student.model.get_submodule(edit.target)
    assert isinstance(table, QuantEmbedding)
    table.set_codes(Codes(encode(weight, scales, zeros, **grid), scales, zeros))
    if edit.head and head is not None and isinstance(head.bias, Tensor):
        new = student.model.get_submodule(edit.head)
        assert isinstance(new.bias, Tensor)
        new.bias.copy_(head.bias.detach())
    return {"bits": edit.bits, "method": "rtn", "relative_error": relative_error(weight, table.dequantize(), None)}
