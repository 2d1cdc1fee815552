"""One budget for many items: which option each takes, so that their measured losses add up to least.

    minimise  Σ lossᵢ(choiceᵢ)     subject to   Σ costᵢ(choiceᵢ) ≤ budget

Each item (a site, a block, a layer) brings options with a cost (parameters, bits) and a loss (measured, or predicted).
The greedy choice walks the lower convex hulls, always where a unit of cost buys most: the optimum whenever it ends on a
corner, and never more than one hull step from it (Lagrangian relaxation of the multiple-choice knapsack).
"""

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """What one choice costs and what is lost by it."""

    cost: int
    loss: float


def lower_hull(options: Sequence[Option]) -> list[int]:
    """Indices of the options on the lower convex hull of (cost, loss), by growing cost and falling loss."""
    order = sorted(range(len(options)), key=lambda i: (options[i].cost, options[i].loss))
    hull: list[int] = []
    for index in order:
        if hull and options[index].loss >= options[hull[-1]].loss:
            continue
        while len(hull) > 1 and _slope(options, hull[-2], index) <= _slope(options, hull[-2], hull[-1]):
            hull.pop()
        hull.append(index)
    return hull


def _slope(options: Sequence[Option], cheap: int, dear: int) -> float:
    """Loss per unit of cost from one option to a dearer one; below zero."""
    return (options[dear].loss - options[cheap].loss) / (options[dear].cost - options[cheap].cost)


def greedy_path(items: Sequence[Sequence[Option]], budget: float = math.inf) -> Iterator[list[int]]:
    """The choices that the greedy walk passes, from the cheapest of all on; each but the first buys one hull step.

    The first step that the budget cannot pay ends it: what is left is better saved for a part of that step.
    """
    hulls = [lower_hull(options) for options in items]
    place = [0] * len(items)
    spent = sum(options[hull[0]].cost for options, hull in zip(items, hulls, strict=True))
    steps = [(_slope(o, h[0], h[1]), i) for i, (o, h) in enumerate(zip(items, hulls, strict=True)) if len(h) > 1]
    heapq.heapify(steps)
    yield [hull[0] for hull in hulls]
    while steps:
        _, item = heapq.heappop(steps)
        options, hull, at = items[item], hulls[item], place[item]
        price = options[hull[at + 1]].cost - options[hull[at]].cost
        if spent + price > budget:
            return
        spent += price
        place[item] = at = at + 1
        yield [hull[index] for hull, index in zip(hulls, place, strict=True)]
        if at + 1 < len(hull):
            heapq.heappush(steps, (_slope(options, hull[at], hull[at + 1]), item))


def allocate(items: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """The index of the option that each item takes.

    Args:
        items: at least one option each; they need not be sorted, convex or monotone.
        budget: the most that all choices may cost together.

    Raises:
        ValueError: the cheapest options alone cost more.
    """
    least = sum(min(option.cost for option in options) for options in items)
    if least > budget:
        raise ValueError(f"the cheapest options cost {least}, the budget is {budget}")
    *_, chosen = greedy_path(items, budget)
    spent = sum(options[index].cost for options, index in zip(items, chosen, strict=True))
    return _spend_rest(items, chosen, budget - spent)


def _spend_rest(items: Sequence[Sequence[Option]], chosen: list[int], left: int) -> list[int]:
    """The same choice, with what is left spent on single options between the corners of a hull, best first."""
    while True:
        better = [
            (now.loss - option.loss, item, index)
            for item, options in enumerate(items)
            for now in [options[chosen[item]]]
            for index, option in enumerate(options)
            if option.loss < now.loss and option.cost - now.cost <= left
        ]
        if not better:
            return chosen
        _, item, index = max(better, key=lambda entry: (entry[0], -entry[1], -entry[2]))
        left -= items[item][index].cost - items[item][chosen[item]].cost
        chosen[item] = index
