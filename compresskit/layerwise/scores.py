"""How much each input column of a layer is worth: what is lost where it is cut.

    y = W x       cut column j: W[:, j] x_j is missing from y

Columns are cut alone (neurons) or in groups (the dimensions of a head, or of a key/value group's queries): the scores
of a group's columns add up, and where columns of a group act together (`taylor_scores`, `remove_one_by_one`) the whole
block of the group counts. Higher is worth more. Which score leaves the better model is for a bench to say.
"""

# O out, I in, G groups, g columns in a group, k removed groups

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compresskit.layerwise.moments import MeanMoments, Moments, ridged
from compresskit.layerwise.objective import shrunk_weight
from compresskit.layerwise.output_pca import OutputMetric

Score = Literal["magnitude", "wanda", "flap", "leverage", "taylor", "random", "obs"]
#: λ of the one-by-one removal in units of the mean of C's diagonal.
OBS_SHRINKAGE = 0.1
#: λ of the leverage scores in units of the mean of C's diagonal.
LEVERAGE_RIDGE = 1.0


def needs_metric(score: Score) -> bool:
    """Whether a score reads the Fisher information of the layer's outputs."""
    return score in ("taylor", "obs")


def magnitude_scores(weight: Tensor) -> Tensor:
    """‖W[:, j]‖² for each input j of W (O, I): (I,) float64. It knows nothing of the data."""
    return weight.double().square().sum(0)


def wanda_scores(weight: Tensor, moments: MeanMoments) -> Tensor:
    """Σ_o |W[o, j]| · √E[x_j²] for each input j of W (O, I): (I,) float64, from moments centred or not.

    Source: Wanda (arXiv:2306.11695), its scores of single weights summed over a column (Wanda-sp in arXiv:2312.11983).
    """
    return weight.double().abs().sum(0) * _second_moment(moments).diagonal().clamp_min(0).sqrt()


def fluctuation_scores(weight: Tensor, moments: MeanMoments) -> Tensor:
    """Var(x_j) · ‖W[:, j]‖² for each input j of W (O, I): (I,) float64, from centred moments.

    Source: FLAP's weighted input feature variance (arXiv:2312.11983).
    """
    return moments.C.diagonal() * magnitude_scores(weight)


def leverage_scores(moments: MeanMoments, *, ridge: float = LEVERAGE_RIDGE) -> Tensor:
    """The diagonal of C (C + λ I)⁻¹, λ = ridge · mean(diag C): (I,) float64 in [0, 1).

    What the other inputs cannot say of input j, whatever the layer makes of it.
    Source: ridge leverage scores as in MoDeGPT (arXiv:2408.09632), whose λ is 1 in the units of the data.
    """
    scale = float(moments.C.diagonal().mean())
    if scale <= 0:
        return torch.zeros_like(moments.mu)
    return 1 - ridge * scale * _inverse(moments.C, ridge).diagonal()


def taylor_scores(weight: Tensor, moments: MeanMoments, metric: OutputMetric, groups: Tensor) -> Tensor:
    """E[(Σ_{j in group} x_j · ∂ log p(label) / ∂ x_j)²] for each group: (G,) float64.

    Twice the nats that the model's answer loses, in second order, where the group's columns give nothing. Inputs and
    output gradients are taken as independent, as in K-FAC: Σ_{j,k} E[x_j x_k] (Wᵀ F W)[j, k] over the group.

    Args:
        weight: W (O, I).
        moments: centred or not; the mean is part of what is cut.
        metric: F (O, O), the Fisher information of the outputs, from `layerwise.sensitivity`.
        groups: columns of each group, (G, g) int64.

    Source: squared first-order Taylor (Molchanov et al., arXiv:1906.10771) and the Fisher masks of arXiv:2204.09656.
    """
    W = weight.double()
    weighed = metric.times(W)
    felt = torch.stack([W[:, columns].T @ weighed[:, columns] for columns in groups])
    return (_blocks(_second_moment(moments), groups) * felt).sum((1, 2))


def add_up(scores: Tensor, groups: Tensor) -> Tensor:
    """The sum of each group's column scores, (G,)."""
    return scores[groups].sum(1)


def top_indices(scores: Tensor, count: int) -> Tensor:
    """The `count` highest-scored indices in ascending order; ties go to the lower index."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:count].sort().values


def choose_groups(
    score: Score,
    weight: Tensor,
    moments: Moments,
    groups: Tensor,
    count: int,
    *,
    centred: bool,
    metric: OutputMetric | None,
    generator: torch.Generator,
) -> Tensor:
    """The `count` groups of columns that are worth most by `score`, ascending (count,) int64.

    Args:
        weight: W (O, I), today's.
        moments: of the layer's inputs and of what it should give.
        groups: columns of each group, (G, g) int64, disjoint.
        centred: whether the mean of what is cut goes into a bias.
        metric: F; needed by `taylor` and, unless all errors count alike, read by `obs`.
        generator: draws the `random` scores.
    """
    if score == "obs":
        removal = remove_one_by_one(
            weight, moments.mean(centred=centred), groups, len(groups) - count, shrinkage=OBS_SHRINKAGE, metric=metric
        )
        left = torch.ones(len(groups), dtype=torch.bool)
        left[removal.order] = False
        return left.nonzero()[:, 0]
    if score == "random":
        return top_indices(torch.rand(len(groups), generator=generator), count)
    if score == "taylor":
        assert metric is not None
        return top_indices(taylor_scores(weight, moments.mean(centred=False), metric, groups), count)
    if score == "magnitude":
        columns = magnitude_scores(weight)
    elif score == "wanda":
        columns = wanda_scores(weight, moments.mean(centred=False))
    elif score == "flap":
        columns = fluctuation_scores(weight, moments.mean(centred=True))
    else:
        columns = leverage_scores(moments.mean(centred=centred))
    return top_indices(add_up(columns, groups), count)


@dataclass(frozen=True)
class RemovalPath:
    """Groups in the order in which they were removed, first (cheapest) to last, and what each one cost.

    Attributes:
        order: (k,) int64.
        rises: (k,) float64; their sum is what all of them cost together.
    """

    order: Tensor
    rises: Tensor


def remove_one_by_one(
    weight: Tensor,
    moments: MeanMoments,
    groups: Tensor,
    count: int,
    *,
    shrinkage: float,
    metric: OutputMetric | None = None,
) -> RemovalPath:
    """The `count` groups whose removal costs least, one after the other, with everything else refitted after each.

    The cost is the rise of E (t − W' x)ᵀ F (t − W' x) + λ tr((W' − W)ᵀ F (W' − W)) at its optimum: for a group S of
    columns it is tr(F M_S (P_SS)⁻¹ M_Sᵀ), where M is the optimum before and P = (C + λ I)⁻¹ for what is left. One
    column alone: (m_jᵀ F m_j) / P_jj.

    Args:
        weight: W (O, I), what the optimum is pulled towards.
        moments: C (I, I) and the target's T (O, I).
        groups: columns of each group, (G, g) int64, disjoint.
        count: how many groups go, below G.
        shrinkage: λ in units of mean(diag C); finite, above 0.
        metric: F; None counts all errors alike.

    Cost: one inverse of (I, I), then 2 k (O I + k I) products for single columns: neither the inverse nor the optimum
    is ever written anew; what they lost is kept as thin factors, as in a pivoted Cholesky decomposition.
    Source: Optimal Brain Surgeon (Hassibi and Stork, 1992), on columns as in SlimGPT (arXiv:2412.18110), greedily
    likewise. Departures: the target may be anchored, the pull towards W, and the metric F.
    """
    G, g = groups.shape
    if not 0 <= count < G:
        raise ValueError(f"{count} of {G} groups cannot be removed")
    P = _inverse(moments.C, shrinkage)
    M = shrunk_weight(weight, moments, shrinkage)
    felt = M if metric is None else metric.times(M)  # F M
    spread, power = _blocks(P, groups), torch.stack([M[:, c].T @ felt[:, c] for c in groups])  # P and MᵀFM, (G, g, g)
    V, A = P.new_zeros(len(P), count * g), M.new_zeros(len(M), count * g)  # P has lost V Vᵀ, and M has lost A Vᵀ
    order, rises = torch.zeros(count, dtype=torch.int64), P.new_zeros(count)
    gone = torch.zeros(G, dtype=torch.bool)
    for step in range(count):
        costs = _traces_of_quotients(spread, power).masked_fill(gone, torch.inf)
        chosen = int(costs.argmin())
        columns, done, now = groups[chosen], slice(0, step * g), slice(step * g, (step + 1) * g)
        p = P[:, columns] - V[:, done] @ V[columns, done].T
        m = M[:, columns] - A[:, done] @ V[columns, done].T
        root = torch.linalg.cholesky(p[columns])
        v, a = (torch.linalg.solve_triangular(root, part.T, upper=False).T for part in (p, m))
        Fa = a if metric is None else metric.times(a)
        crossed = M.T @ Fa - V[:, done] @ (A[:, done].T @ Fa)  # today's MᵀF a, (I, g)
        order[step], rises[step], gone[chosen] = chosen, costs[chosen], True
        V[:, now], A[:, now] = v, a
        mine, theirs = v[groups], crossed[groups]  # (G, g, g)
        spread -= mine @ mine.mT
        power += mine @ (a.T @ Fa) @ mine.mT - theirs @ mine.mT - mine @ theirs.mT
    return RemovalPath(order, rises)


def _inverse(C: Tensor, shrinkage: float) -> Tensor:
    """(C + λ I)⁻¹ for λ = shrinkage · mean(diag C), or for λ = 1 where no input ever moves."""
    return torch.cholesky_inverse(torch.linalg.cholesky(ridged(C, shrinkage)))


def _traces_of_quotients(spread: Tensor, power: Tensor) -> Tensor:
    """tr(S⁻¹ N) for each pair of (g, g) blocks; of a removed group, whose S is nearly zero, it says nothing."""
    if spread.shape[-1] == 1:
        return (power / spread)[:, 0, 0]
    return torch.linalg.solve_ex(spread, power)[0].diagonal(dim1=1, dim2=2).sum(1)


def _second_moment(moments: MeanMoments) -> Tensor:
    """E[x xᵀ] (I, I), from moments centred or not."""
    return moments.C + torch.outer(moments.mu, moments.mu)


def _blocks(matrix: Tensor, groups: Tensor) -> Tensor:
    """The diagonal blocks (G, g, g) of a matrix (I, I) that belong to groups."""
    return matrix[groups[:, :, None], groups[:, None, :]]
