"""The survey before widths are chosen: what each layer's output errors mean, and what cuts of each part really lose.

On the model as it is, measured once and kept on the disk: the Fisher information of the layers that write into the
stream (`sensitivity`), and a few trials a part (`trials`): its columns are cut and repaired as the pass will do it, all
other parts are whole, and the model's answer is compared. Widths for any budget follow from it without another look.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from compresskit.cache import cache_folder
from compresskit.data.cache import read_tensors, write_tensors
from compresskit.layerwise.moments import SiteMoments
from compresskit.layerwise.repair import Repaired
from compresskit.layerwise.sensitivity import Fisher
from compresskit.layerwise.survey import (
    measure_fisher,
    observe_first_tokens,
    read_fisher,
    store_fisher,
    survey_fingerprint,
    trial_batches,
)
from compresskit.layerwise.trials import Trials, trial_weight
from compresskit.layerwise.weights import layer_bias, stacked_weight
from compresskit.student import Student
from compresskit.surgery.parts import Part
from compresskit.surgery.sites import Site

#: Raised by one whenever the same model, text and options would give another survey.
VERSION = 2
#: Shares of a part's groups that are kept in its trials.
TRIED = (0.85, 0.65, 0.4)

#: How a part is cut to a number of groups: which ones stay, and what the layer that reads them becomes.
Cut = Callable[[Part, int, SiteMoments], tuple[Tensor, Repaired]]


def take_fisher(student: Student, parts: Sequence[Part], *, seed: int) -> dict[str, Fisher]:
    """The Fisher information of what each part's output layer gives, by its name; cached."""
    names = [part.output for part in parts]
    path = _path(student, f"fisher {VERSION} {names} {seed}")
    stored = read_tensors(path)
    if stored is None:
        found = measure_fisher(student, [(name,) for name in names], seed=seed)
        stored = store_fisher({(name,): found[name,] for name in names})
        write_tensors(path, stored)
    return {name: one for (name,), one in read_fisher(stored).items()}


def take_trials(
    student: Student, parts: Sequence[Part], cut: Cut, *, options: str
) -> dict[str, tuple[tuple[int, float], ...]]:
    """(kept groups, nats an answer loses) of every part at a few widths, by its output's name; cached.

    Args:
        student: not changed.
        parts: with more than one group each (of one nothing can be cut, and the pass refuses it).
        cut: cuts a part on the moments of what its output layer reads and gives today.
        options: everything that `cut` depends on besides its arguments.
    """
    path = _path(student, f"trials {VERSION} {[(part.output, len(part.groups)) for part in parts]} {options}")
    stored = read_tensors(path)
    if stored is None:
        stored = _try_widths(student, parts, cut)
        write_tensors(path, stored)
    return {name: tuple((int(kept), loss) for kept, loss in rows.tolist()) for name, rows in stored.items()}


def tried_counts(groups: int) -> list[int]:
    """The numbers of groups that are tried, of a part that has more than one: distinct, at least 1, fewer than all."""
    return sorted({min(max(1, round(share * groups)), groups - 1) for share in TRIED}, reverse=True)


def _path(student: Student, options: str) -> Path:
    return cache_folder() / "surveys" / f"{survey_fingerprint(student, f'width {options}')}.safetensors"


def _try_widths(student: Student, parts: Sequence[Part], cut: Cut) -> dict[str, Tensor]:
    by_output = {part.output: part for part in parts}
    trials = Trials(student.model, trial_batches(student))
    found: dict[str, Tensor] = {}

    def look(site: Site, moments: SiteMoments) -> None:
        part = by_output[site.linears[0]]
        layer = student.model.get_submodule(part.output)
        weight, bias = stacked_weight([layer])
        moments = moments.with_linear_target(weight, bias)
        rows = []
        for count in tried_counts(len(part.groups)):
            keep, repaired = cut(part, count, moments)
            masked = weight.new_zeros(weight.shape, dtype=torch.float64)
            masked[:, part.groups[keep].flatten()] = repaired.weight
            with trial_weight([layer], masked, layer_bias(layer) if repaired.bias is None else repaired.bias):
                rows.append((count, trials.divergence(part.block)))
        found[part.output] = torch.tensor(rows, dtype=torch.float64)

    sites = [Site(part.block, (part.output,), writes_stream=True) for part in parts]
    observe_first_tokens(student, sites, look, label="surveying widths")
    return found
