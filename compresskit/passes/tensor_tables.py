"""Embedding tables in fewer weights: frequency-weighted low rank, and tensor trains.

    low rank       W ≈ R P                     minimises  Σ_i p_i ‖S^½ (w_i − Pᵀ r_i)‖²
    tensor train   W[i, j] ≈ G₁[i₁, j₁] ⋯ Gₘ[iₘ, jₘ]      TT-SVD of W with its rows weighted

p_i is how often text uses row i: trained tables have nearly flat spectra, so a rank must be spent where the tokens are.
SmolLM2-135M at keep 0.8, calibrated on 64 windows of 256 tokens of wikitext-2 (train), on 16 windows of 128 of its
validation text: perplexity 40 before, 15 161 by plain low rank, 137 with S = 1, 55 by the pass
(`tools/bench_tensor.py`, methods "plain low rank", "frequency-weighted low rank" and "tensor, low_rank", seed 0).
Rows that calibration never saw count as Good and Turing estimate them. Where an output head is tied to the table, an
error in row w_i also moves the logit of token i by its product with the hidden state h, so S adds E[h hᵀ] to the
identity, both in units of the answers' power. Low rank is then output PCA again: rows are inputs, S^½ is the layer.

Sources: TT-matrix embeddings, Khrulkov and others (arXiv:1901.10787), TT-SVD by tensorly; weighting rows by frequency,
GroupReduce (arXiv:1806.06950) without its blocks; the metric of tied heads and the weights of tensor trains are ours.
"""

# V rows, D columns, K rank

import math
from collections.abc import Sequence

import numpy as np
import torch
from tensorly.backend import BackendManager
from tensorly.decomposition import tensor_train_matrix
from torch import Tensor

from compresskit.layerwise.output_pca import solve_output_pca

#: How many times an error of the logits weighs as much as one of the same share at the input. A sweep on SmolLM2-135M
#: at keep 0.8 gave perplexity 51, 41, 32 and 30 with 1, 10, 100 and 1000: it did not turn, and more was not tried. Its
#: windows are not those of the figures above.
HEAD_SHARE = 1000.0


def row_frequencies(indices: Tensor, rows: int) -> Tensor:
    """How likely each row is looked up next, (rows,) float64, all positive, sum 1.

    Args:
        indices: the rows that calibration looked up, any shape, not empty.
        rows: of the table.

    Source: counts with a pseudo-count of n₁ / n₀, what Good and Turing expect of a row that was never seen where n₁
    rows were seen once and n₀ never; at most 1, and at least 1 / n₀.
    """
    counts = torch.bincount(indices.flatten(), minlength=rows).double()
    unseen, once = int((counts == 0).sum()), int((counts == 1).sum())
    counts += min(1.0, max(once, 1) / unseen) if unseen else 0.0
    return counts / counts.sum()


def table_metric(table: Tensor, frequencies: Tensor, head_moment: Tensor | None) -> Tensor:
    """S (D, D) float64, positive definite: what an error in a row costs, as a share of what the row gives.

    Args:
        table: W (V, D).
        frequencies: p (V,).
        head_moment: E[h hᵀ] (D, D) of the hidden states that a tied head reads; None for tables without one.
    """
    W = table.double()
    moment = W.T @ (frequencies[:, None] * W)
    metric = torch.eye(W.shape[1], dtype=torch.float64) / moment.trace().clamp_min(torch.finfo(torch.float64).tiny)
    if head_moment is None:
        return metric
    power = (moment * head_moment).sum()
    return metric + HEAD_SHARE * head_moment / power if power > 0 else metric


def low_rank_table(
    table: Tensor, rank: int, *, frequencies: Tensor, metric: Tensor | None = None
) -> tuple[Tensor, Tensor, float]:
    """The factors R (V, K) and P (K, D) of the nearest table of rank K, float64, and how far it is.

    Args:
        table: W (V, D), any float dtype; not modified.
        rank: 1 ≤ K ≤ D.
        frequencies: p (V,), not negative; rows with 0 follow the others.
        metric: S (D, D), positive definite; None is the identity.

    Returns:
        R, P and Σ_i p_i (w_i − ŵ_i)ᵀ S (w_i − ŵ_i), which no other table of this rank undercuts.

    Raises:
        ValueError: rank out of range.

    Cost: two `eigh` of (D, D) and two products with the table, in float64.
    """
    W = table.double()
    moment = W.T @ (frequencies.double()[:, None] * W)
    if metric is None:
        found = solve_output_pca(torch.eye(W.shape[1], dtype=W.dtype), moment=moment)
        B, A = found.factors(rank)
        return W @ A.T, B.T, float(found.tail[rank])
    values, Q = torch.linalg.eigh(metric)
    root, inverse = (Q * values.sqrt()) @ Q.T, (Q / values.sqrt()) @ Q.T
    found = solve_output_pca(root, moment=moment)
    B, A = found.factors(rank)
    return W @ A.T, B.T @ inverse, float(found.tail[rank])


def table_error(difference: Tensor, *, frequencies: Tensor, metric: Tensor) -> float:
    """Σ_i p_i δ_iᵀ S δ_i of a table's rows δ (V, D)."""
    rows = difference.double()
    return float((((rows @ metric) * rows).sum(1) * frequencies).sum())


def column_digits(columns: int, order: int) -> tuple[int, ...]:
    """`order` factors of `columns`, ascending, as equal as its divisors allow."""
    found: list[int] = []
    for left in range(order, 1, -1):
        ideal = columns ** (1 / left)
        divisors = [size for size in range(1, columns + 1) if columns % size == 0]
        found.append(min(divisors, key=lambda size: abs(math.log(size / ideal))))
        columns //= found[-1]
    return tuple(sorted([*found, columns]))


def row_digits(rows: int, order: int) -> tuple[int, ...]:
    """`order` nearly equal counts, ascending, whose product is at least `rows` and hardly more."""
    found: list[int] = []
    for left in range(order, 0, -1):
        size = round(rows ** (1 / left)) if left > 1 else rows
        found.append(max(size, 1))
        rows = -(-rows // found[-1])
    return tuple(sorted(found))


def train_ranks(rows: Sequence[int], columns: Sequence[int], rank: int) -> tuple[int, ...]:
    """The inner ranks of a train of rank `rank`: less where the tensor itself has fewer."""
    sizes = [v * d for v, d in zip(rows, columns, strict=True)]
    return tuple(min(rank, math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, len(sizes)))


def train_weights(rows: Sequence[int], columns: Sequence[int], ranks: Sequence[int]) -> int:
    """How many weights the cores hold."""
    ends = [1, *ranks, 1]
    return sum(a * v * d * b for a, v, d, b in zip(ends, rows, columns, ends[1:], strict=False))


def rank_within(rows: Sequence[int], columns: Sequence[int], budget: int) -> int:
    """The largest rank whose train holds at most `budget` weights; 0 where even rank 1 holds more."""
    low, high = 0, max(train_ranks(rows, columns, math.prod(rows) * math.prod(columns)))
    while low < high:
        middle = (low + high + 1) // 2
        fits = train_weights(rows, columns, train_ranks(rows, columns, middle)) <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def tensor_train_cores(
    table: Tensor,
    *,
    rows: Sequence[int],
    columns: Sequence[int],
    ranks: Sequence[int],
    frequencies: Tensor | None = None,
) -> list[Tensor]:
    """Cores of shapes (v_k, r_{k−1}, d_k, r_k), float64, of a tensor train near the table.

    Args:
        table: W (V, D), with V at most the product of `rows`; the numbers past V count as rows of zeros.
        rows, columns: digits of row and column numbers.
        ranks: inner ranks; at the largest that `train_ranks` gives, the train is the table.
        frequencies: p (V,), positive. Each digit of a row is weighted by the root of its own frequency, since only a
            product of one factor a digit leaves a train a train; None weighs all rows alike.

    Cost: an SVD of each unfolding in float64, about V · D · r₁ operations each.
    Source: TT-SVD, whose error is at most √(m − 1) times the least of these ranks.
    """
    padding = math.prod(rows) - table.shape[0]
    W = torch.nn.functional.pad(table.double(), (0, 0, 0, padding))
    roots = _digit_roots(frequencies, rows)
    W *= torch.cartesian_prod(*roots).prod(-1)[:, None]
    with BackendManager.backend_context("numpy"):
        train = tensor_train_matrix(W.reshape(*rows, *columns).numpy(), [1, *ranks, 1])
    cores = [torch.from_numpy(np.ascontiguousarray(core)).transpose(0, 1) for core in train.factors]
    return [core / root[:, None, None, None] for core, root in zip(cores, roots, strict=True)]


def _digit_roots(frequencies: Tensor | None, rows: Sequence[int]) -> list[Tensor]:
    """For each digit, the roots of how often its values occur, (v_k,)."""
    if frequencies is None:
        return [torch.ones(count, dtype=torch.float64) for count in rows]
    padded = torch.nn.functional.pad(frequencies.double(), (0, math.prod(rows) - len(frequencies))).view(*rows)
    others = [[axis for axis in range(len(rows)) if axis != k] for k in range(len(rows))]
    return [padded.sum(dim=axes).clamp_min(torch.finfo(torch.float32).tiny).sqrt() for axes in others]
