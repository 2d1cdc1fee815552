"""How many bits each input site gets under one budget: what the model's answer loses at every width, as trials tell.

    for every site and width: round its weights to nearest, run the model, take the KL divergence   →   greedy choice

One trial a site and width, each from the site's block on; all are kept on the disk: another budget costs nothing.
Losses of sites are added up as if they did not meet, which ranks them well enough to choose by.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compresskit.cache import cache_folder
from compresskit.data.cache import read_tensors, write_tensors
from compresskit.errors import CompressKitError
from compresskit.layers.grid import decode, quantize_weight
from compresskit.layerwise.allocation import Option, allocate
from compresskit.layerwise.survey import survey_fingerprint, trial_batches
from compresskit.layerwise.trials import Trials, trial_weight
from compresskit.layerwise.weights import dense_weight, stacked_weight
from compresskit.progress import track
from compresskit.student import Student
from compresskit.surgery.edits import QuantizeLinears
from compresskit.surgery.sites import Site

#: Raised by one whenever the same model and text would give other losses.
_VERSION = 3

SiteEdits = Mapping[Site, tuple[QuantizeLinears, ...]]


@dataclass(frozen=True)
class Budget:
    """What all linears in the blocks may cost together.

    Attributes:
        mean_bits: bits of a code, on average over weights; or
        size_bytes: bytes of codes, scales and zeros.
        rest_bytes: what else of the student counts against the budget that the user gave.
    """

    mean_bits: float | None = None
    size_bytes: int | None = None
    rest_bytes: int = 0

    def cost(self, model: nn.Module, edits: Sequence[QuantizeLinears], bits: int) -> int:
        """What the layers of a site cost at one width, in code bits or in bytes."""
        if self.size_bytes is None:
            return sum(_weights(model, edit) for edit in edits) * bits
        return sum(held_bytes(model, edit, bits) for edit in edits)

    def limit(self, model: nn.Module, sites: SiteEdits) -> int:
        """The budget, in the unit of `cost`."""
        if self.size_bytes is not None:
            return self.size_bytes
        weights = sum(_weights(model, edit) for edits in sites.values() for edit in edits)
        return int((self.mean_bits or 0) * weights)


def _weights(model: nn.Module, edit: QuantizeLinears) -> int:
    layers: list[Any] = [model.get_submodule(name) for name in edit.targets]
    return sum(layer.in_features * layer.out_features for layer in layers)


def held_bytes(model: nn.Module, edit: QuantizeLinears, bits: int) -> int:
    """Bytes of the codes, scales and zeros of an edit's layers at some width."""
    total = 0
    for name in edit.targets:
        layer: Any = model.get_submodule(name)
        held = edit.at(bits).layer(layer.in_features, layer.out_features, bias=False, device="meta")
        total += sum(one.nbytes for one in held.buffers())
    return total


def choose_by_shape(model: nn.Module, sites: SiteEdits, widths: Sequence[int], budget: Budget) -> dict[str, int]:
    """Bits by name of layer that spend the budget, as far as shapes can say: the data then choose other sites.

    All sites get the smallest width, and then in their order the next, as long as the budget lasts.

    Raises:
        CompressKitError: a budget that the smallest width exceeds.
    """
    limit, (least, *wider) = budget.limit(model, sites), sorted(widths)
    chosen = dict.fromkeys(sites, least)
    costs = {site: budget.cost(model, edits, least) for site, edits in sites.items()}
    spent = sum(costs.values())
    if spent > limit:
        needed = spent + budget.rest_bytes
        raise CompressKitError(
            f"the linears in the blocks take {spent} bytes at {least} bits, and all else {budget.rest_bytes}",
            where="budget_bytes",
            fix=f"say budget_bytes: {needed} or more",
        )
    for bits in wider:
        for site, edits in sites.items():
            cost = budget.cost(model, edits, bits)
            if spent - costs[site] + cost <= limit:
                spent += cost - costs[site]
                chosen[site], costs[site] = bits, cost
    return {name: bits for site, bits in chosen.items() for edit in sites[site] for name in edit.targets}


def choose_bits(
    student: Student, sites: SiteEdits, widths: Sequence[int], budget: Budget
) -> tuple[dict[str, int], dict[str, dict[str, float | int]]]:
    """Bits by name of layer, and the table that they follow from: the loss of each site at each width, and its choice.

    Args:
        student: not changed.
        sites: what is to be rounded, by input site; all layers of a site get the same width.
        widths: in bits, on offer.

    Raises:
        CompressKitError: a budget that the smallest width exceeds.
    """
    model = student.model
    choose_by_shape(model, sites, widths, budget)  # refuses what nothing fits, before any trial
    losses = measure_losses(student, sites, widths)
    options = [
        [Option(budget.cost(model, edits, bits), losses[site.linears][bits]) for bits in widths]
        for site, edits in sites.items()
    ]
    picked = [widths[index] for index in allocate(options, budget.limit(model, sites))]
    chosen = {name: bits for site, bits in zip(sites, picked, strict=True) for name in site.linears}
    table: dict[str, dict[str, float | int]] = {
        " + ".join(site.linears): {f"kl at {width} bits": losses[site.linears][width] for width in widths}
        | {"chosen": bits}
        for site, bits in zip(sites, picked, strict=True)
    }
    return chosen, table


def measure_losses(
    student: Student, sites: SiteEdits, widths: Sequence[int]
) -> dict[tuple[str, ...], dict[int, float]]:
    """Nats an answer that each site loses when it alone is rounded to each width; read from the cache where it is."""
    forms = [
        (site.linears, [edit.model_dump(mode="json", exclude={"bits"}) for edit in edits])
        for site, edits in sites.items()
    ]
    name = survey_fingerprint(student, f"bits {_VERSION} {forms} {list(widths)}")
    path = cache_folder() / "surveys" / f"{name}.safetensors"
    stored = read_tensors(path)
    if stored is None:
        trials = Trials(student.model, trial_batches(student))
        rows = [
            [_try(student, trials, site, edits, bits) for bits in widths]
            for site, edits in track(list(sites.items()), "trying bits")
        ]
        stored = {"losses": torch.tensor(rows, dtype=torch.float64)}
        write_tensors(path, stored)
    return {
        site.linears: dict(zip(widths, row, strict=True))
        for site, row in zip(sites, stored["losses"].tolist(), strict=True)
    }


@torch.no_grad()
def _try(student: Student, trials: Trials, site: Site, edits: Sequence[QuantizeLinears], bits: int) -> float:
    """The divergence of the answer when the layers of one site are rounded to nearest at `bits`."""
    form = {name: edit for edit in edits for name in edit.targets}
    layers = [student.model.get_submodule(name) for name in site.linears]
    rounded = []
    for name, layer in zip(site.linears, layers, strict=True):
        edit = form[name].at(bits)
        grid: dict[str, Any] = {"bits": bits, "group_size": edit.group_size}
        codes = quantize_weight(dense_weight(layer), symmetric=edit.symmetric, whole=edit.whole, **grid)
        rounded.append(decode(codes.codes, codes.scales, codes.zeros, **grid))
    with trial_weight(layers, torch.cat(rounded), stacked_weight(layers)[1]):
        return trials.divergence(site.block)
