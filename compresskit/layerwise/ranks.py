"""What a site's low-rank factors weigh and lose at every rank, shared between its layers or not.

shared    y₁ = B₁ A x, y₂ = B₂ A x      k (O₁ + O₂ + I) weights          k (O₁ + O₂ + I − k) with A pivoted
separate  y₁ = B₁ A₁ x, y₂ = B₂ A₂ x    k₁ (O₁ + I) + k₂ (O₂ + I)        k₁ (O₁ + I − k₁) + k₂ (O₂ + I − k₂)
"""

# I in, O out, k rank

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from compresskit.layerwise.allocation import Option, allocate, greedy_path

RANK_MULTIPLE = 8
#: Ranks of larger layers are multiples of it, so that the usual group size of a later quantiser divides them.
COARSE_MULTIPLE = 32
#: A site whose trials show no loss at all costs this share of its predicted error: next to nothing, and still ranked.
_UNFELT = 1e-9

Group = tuple[str, ...]
#: Ranks of groups of layers that share a first factor; layers in no group stay dense.
Ranks = tuple[tuple[Group, int], ...]


def factor_weights(out_features: int, in_features: int, rank: int, *, pivot: bool) -> int:
    """Weights of B (out, rank) and A (rank, in), of which a pivoted A does not store its identity."""
    return rank * (out_features + in_features - (rank if pivot else 0))


def break_even_rank(out_features: int, in_features: int, *, pivot: bool = False) -> int:
    """The largest rank whose factors hold fewer weights than the dense matrix."""
    if pivot:
        return min(out_features, in_features) - 1
    return (out_features * in_features - 1) // (out_features + in_features)


def rank_step(out_features: int, in_features: int, round_to: int | None) -> int:
    """What ranks of such a layer are multiples of: `round_to`, or by default 32, or 8 for thin layers."""
    return round_to or (COARSE_MULTIPLE if min(out_features, in_features) >= 4 * COARSE_MULTIPLE else RANK_MULTIPLE)


def rank_for(
    keep: float, out_features: int, in_features: int, *, round_to: int | None = None, pivot: bool = False
) -> int:
    """The rank whose factors hold about `keep` of the dense matrix's weights.

    Args:
        keep: share that stays, in (0, 1].
        round_to: the rank is the nearest multiple of it that still saves weights, and at least one multiple; None
            takes 32 from rank 128 on and 8 below.
        pivot: whether A holds an identity.
    """
    total, product = out_features + in_features, out_features * in_features
    exact = (total - math.sqrt(total**2 - 4 * keep * product)) / 2 if pivot else keep * product / total
    step = round_to or (COARSE_MULTIPLE if exact >= 4 * COARSE_MULTIPLE else RANK_MULTIPLE)
    saving = break_even_rank(out_features, in_features, pivot=pivot) // step
    return max(1, min(round(exact / step), saving)) * step


@dataclass(frozen=True)
class SiteCurve:
    """What the layers of one input site lose at every rank.

    Attributes:
        names: the layers, which read the same input.
        outputs: their widths. inputs: the width of what they read.
        shared: predicted error at ranks 0, 1, … with one A for all.
        separate: the same for each layer on its own; empty for a site of one layer.
        trials: (predicted error, measured loss) of ranks that were tried on the model; may be empty.
    """

    names: Group
    outputs: tuple[int, ...]
    inputs: int
    shared: tuple[float, ...]
    separate: tuple[tuple[float, ...], ...] = ()
    trials: tuple[tuple[float, float], ...] = ()

    @property
    def dense_weights(self) -> int:
        """Weights of all layers as they are."""
        return sum(self.outputs) * self.inputs

    def loss(self, predicted: float) -> float:
        """What a predicted error costs: itself, or as the trials say, on a straight line between their logarithms."""
        points = sorted((error, max(loss, _UNFELT * error)) for error, loss in self.trials if error > 0)
        if predicted <= 0 or not points:
            return max(predicted, 0.0)
        ratios = [(math.log(error), math.log(loss / error)) for error, loss in points]
        x = min(max(math.log(predicted), ratios[0][0]), ratios[-1][0])
        for (left, low), (right, high) in pairwise(ratios):
            if left <= x <= right and right > left:
                return predicted * math.exp(low + (high - low) * (x - left) / (right - left))
        return predicted * math.exp(ratios[0][1])


@dataclass(frozen=True)
class SiteOption(Option):
    """One choice of ranks for a site."""

    ranks: Ranks = ()


def site_options(
    curve: SiteCurve, *, share: bool | None, pivot: bool, round_to: int | None, floor: float
) -> list[SiteOption]:
    """All choices for a site that save weights, and the one that leaves it dense.

    Args:
        share: whether layers share a first factor; None offers both.
        pivot: whether first factors hold an identity.
        round_to: what ranks are multiples of; None takes 32, or 8 for thin layers.
        floor: share of the site's weights below which no choice goes.
    """
    options = [SiteOption(curve.dense_weights, 0.0)]
    if share is not False or not curve.separate:
        options += _group_options(curve, curve.names, sum(curve.outputs), curve.shared, pivot, round_to)
    if share is not True and curve.separate:
        options += _separate_options(curve, pivot, round_to)
    return [
        replace(option, loss=curve.loss(option.loss))
        for option in options
        if floor * curve.dense_weights <= option.cost <= curve.dense_weights
    ]


def _group_options(
    curve: SiteCurve, names: Group, rows: int, errors: Sequence[float], pivot: bool, round_to: int | None
) -> list[SiteOption]:
    """The ranks of a group, by predicted error."""
    step = rank_step(rows, curve.inputs, round_to)
    ranks = range(step, break_even_rank(rows, curve.inputs, pivot=pivot) + 1, step)
    return [SiteOption(factor_weights(rows, curve.inputs, k, pivot=pivot), errors[k], ((names, k),)) for k in ranks]


def _separate_options(curve: SiteCurve, pivot: bool, round_to: int | None) -> list[SiteOption]:
    """The best combinations of the layers' own options by predicted error, as the greedy choice meets them."""
    layers = [
        [
            SiteOption(rows * curve.inputs, 0.0),
            *_group_options(curve, (name,), rows, errors, pivot, round_to),
        ]
        for name, rows, errors in zip(curve.names, curve.outputs, curve.separate, strict=True)
    ]
    combined = []
    for choice in greedy_path(layers):
        chosen = [options[index] for options, index in zip(layers, choice, strict=True)]
        ranks = tuple(part for option in chosen for part in option.ranks)
        combined.append(SiteOption(sum(o.cost for o in chosen), sum(o.loss for o in chosen), ranks))
    return combined


def even_ranks(curve: SiteCurve, rank: int, *, share: bool | None, pivot: bool, round_to: int | None) -> Ranks:
    """A site's ranks at the weights of one shared factor of rank `rank`; `share` None shares where that is better."""
    whole = SiteOption(
        factor_weights(sum(curve.outputs), curve.inputs, rank, pivot=pivot),
        curve.shared[rank],
        ((curve.names, rank),),
    )
    if share is not None or not curve.separate:
        return whole.ranks
    apart = [option for option in _separate_options(curve, pivot, round_to) if option.cost <= whole.cost]
    return min([whole, *apart], key=lambda option: option.loss).ranks


def allocate_ranks(options: Sequence[Sequence[SiteOption]], budget: int) -> list[Ranks]:
    """Each site's choice under one budget of weights for all.

    Raises:
        ValueError: the cheapest choices together weigh more.
    """
    return [site[index].ranks for site, index in zip(options, allocate(options, budget), strict=True)]
