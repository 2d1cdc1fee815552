"""How many neurons and heads each block keeps under one budget, by what trials on the model say a cut loses.

A part (an FFN, an attention) was tried at a few widths; between and beyond them its loss is read off straight lines
between the logarithms of the share that is cut and of the loss. `layerwise.allocation` then spends the budget where a
parameter buys most.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from compresskit.layerwise.allocation import Option, allocate

#: Below it a loss is taken for this: nothing is lost for certain.
_LEAST_LOSS = 1e-9


@dataclass(frozen=True)
class WidthCurve:
    """What a part of `groups` groups loses when fewer are kept.

    Attributes:
        group_weights: weights that go with each group.
        trials: (kept groups, measured loss), kept below `groups`; at least one.
    """

    groups: int
    group_weights: int
    trials: tuple[tuple[int, float], ...]

    def loss(self, kept: int) -> float:
        """The loss at any number of kept groups: as tried where it was, 0 where all are kept; never falls with cuts."""
        if kept >= self.groups:
            return 0.0
        points = sorted((math.log(1 - count / self.groups), loss) for count, loss in self.trials)
        logs, most = [], _LEAST_LOSS
        for x, loss in points:
            most = max(most, loss)
            logs.append((x, math.log(most)))
        x = math.log(1 - kept / self.groups)
        if len(logs) == 1:  # errors grow about with the square of what is cut
            return math.exp(logs[0][1] + 2 * (x - logs[0][0]))
        for (left, low), (right, high) in pairwise(logs):
            if x <= right or right == logs[-1][0]:
                return math.exp(low + (high - low) * (x - left) / (right - left))
        raise AssertionError("the last segment takes everything beyond it")


def allocate_widths(
    curves: Sequence[WidthCurve], even: Sequence[int], *, floor: float, steps: Sequence[int]
) -> list[int]:
    """How many groups each part keeps, together no more weights than at the even counts.

    Args:
        curves: one a part.
        even: kept groups of each part where all are cut alike: they say the budget, and are always affordable.
        floor: share of the even count that every part keeps at least.
        steps: kept counts are multiples of these; one a part, and a divisor of its even count.
    """
    choices = [
        [count for count in range(step, curve.groups + 1, step) if floor * same <= count]
        for curve, same, step in zip(curves, even, steps, strict=True)
    ]
    options = [
        [Option(count * curve.group_weights, curve.loss(count)) for count in counts]
        for curve, counts in zip(curves, choices, strict=True)
    ]
    budget = sum(curve.group_weights * count for curve, count in zip(curves, even, strict=True))
    chosen = allocate(options, budget)
    return [counts[index] for counts, index in zip(choices, chosen, strict=True)]
