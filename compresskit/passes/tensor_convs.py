"""Convolutions in fewer weights: Tucker-2 and CP, fitted to the inputs that calibration shows.

A convolution is a linear layer on patches x (in · taps), so everything it should be is in their moment P = E[x xᵀ] and
a target M (`layerwise.objective`). tensorly decomposes M with its input mode whitened by the root of the channels'
moment, which finds the channels that matter *on these inputs*; then the last factors are refitted in closed form on P
itself, which knows how neighbouring places go together:

    Tucker   A from Tucker of M ×_in C^½,  then core and B: output PCA of the best map from the patches of A x
    CP       A and taps from CP of M ×_in C^½,  then B: ridge regression on the components' outputs

CP of a given rank may have no best answer: components grow without bound and cancel each other. Both steps therefore
pay for size, and together the components of the result never have more than 1 / RIDGE times the energy of what they add
up to. Sources: Tucker-2, Kim and others (arXiv:1511.06530); CP, Lebedev and others (arXiv:1412.6553); bounded
components, after Phan and others (arXiv:2008.05441), who bound the sensitivity instead. Whitening and refit are ours.
"""

# O outputs, I inputs, K taps (all axes), R rank

import math
from collections.abc import Sequence

import numpy as np
import torch
from tensorly.backend import BackendManager
from tensorly.cp_tensor import CPTensor
from tensorly.decomposition import parafac, partial_tucker
from torch import Tensor
from torch.nn import functional as F

from compresskit.layers.factored_conv import Conv
from compresskit.layerwise.output_pca import solve_output_pca

#: Of CP: what a component's energy costs, as a share of the layer's own.
RIDGE = 1e-4
_TUCKER_ROUNDS = 10
_CP_ROUNDS = 50
_START_NOISE = 0.1
# Eigenvalues of a moment below this share of the largest are directions that no input takes.
_NOTHING = 1e-12


def patches(conv: Conv, x: Tensor) -> Tensor:
    """What each output place of a convolution reads: (places, I · K) for x (batch, I, …), batch outermost.

    The order of a row is that of `conv.weight.flatten(1)`; padding is what the layer pads with.
    """
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    # The layer's own attribute: it says 'same' and numbers alike.
    x = F.pad(x, list(conv._reversed_padding_repeated_twice), mode=mode)
    kernel, dilation, stride = conv.kernel_size, conv.dilation, conv.stride
    if x.dim() == 3:
        x, kernel, dilation, stride = x.unsqueeze(2), (1, *kernel), (1, *dilation), (1, *stride)
    return F.unfold(x, kernel, dilation=dilation, stride=stride).transpose(1, 2).flatten(0, 1)


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """C^½ and its pseudo-inverse, of a symmetric, positive semi-definite moment."""
    values, Q = torch.linalg.eigh(moment)
    kept = values > _NOTHING * values[-1].clamp_min(torch.finfo(values.dtype).tiny)
    roots = torch.where(kept, values.clamp_min(0).sqrt(), 0.0)
    return (Q * roots) @ Q.T, (Q * torch.where(kept, 1 / roots, 0.0)) @ Q.T


def _whiten(target: Tensor, moment: Tensor, kernel: Sequence[int]) -> tuple[np.ndarray, Tensor]:
    """M ×_in C^½ as (O, I, *kernel) with norm 1 (or 0), and C^−½, where C is the mean channel moment over the taps."""
    outputs, taps = target.shape[0], math.prod(kernel)
    inputs = target.shape[1] // taps
    channels = moment.view(inputs, taps, inputs, taps).diagonal(dim1=1, dim2=3).mean(-1)
    root, inverse = _roots(channels)
    white = torch.einsum("oik,ij->ojk", target.view(outputs, inputs, taps), root)
    norm = white.norm()
    white = white / norm if norm > 0 else white
    return white.reshape(outputs, inputs, *kernel).numpy(), inverse


def tucker_factors(
    target: Tensor, in_rank: int, out_rank: int, *, moment: Tensor, kernel: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Tucker-2 factors of a convolution: M ≈ B · core · (A ⊗ 1).

    Args:
        target: M (O, I·K), any float dtype; computed in float64.
        in_rank: 1 … I; at I the input mode stays as it is and A is the identity.
        out_rank: 1 … O; at O the output mode stays as it is and B is the identity.
        moment: P (I·K, I·K), symmetric, positive semi-definite; singular ones work.
        kernel: taps along each axis, K in all.

    Returns:
        A (in_rank, I), core (out_rank, in_rank, *kernel), B (O, out_rank), float64. Given A, no other core and B are
        nearer.

    Raises:
        ValueError: ranks out of range.
    """
    M, P, taps = target.double(), moment.double(), math.prod(kernel)
    outputs, inputs = M.shape[0], M.shape[1] // taps
    if not (1 <= in_rank <= inputs and 1 <= out_rank <= outputs):
        raise ValueError(f"ranks {in_rank} and {out_rank} of a convolution from {inputs} to {outputs} channels")
    A = torch.eye(inputs, dtype=torch.float64)
    if in_rank < inputs:
        white, inverse = _whiten(M, P, kernel)
        ranks = [min(out_rank, in_rank * taps), in_rank]
        with BackendManager.backend_context("numpy"):
            (_, (_, basis)), _ = partial_tucker(white, ranks, modes=[0, 1], n_iter_max=_TUCKER_ROUNDS)
        A = torch.from_numpy(np.ascontiguousarray(basis)).T @ inverse
    reduced, small = _reduce(M, P, A, taps)
    if out_rank == outputs:
        B, core = torch.eye(outputs, dtype=torch.float64), reduced
    else:
        rank = min(out_rank, *reduced.shape)
        B, core = solve_output_pca(reduced, moment=small).factors(rank)
        B, core = F.pad(B, (0, out_rank - rank)), F.pad(core, (0, 0, 0, out_rank - rank))
    return A, core.reshape(out_rank, in_rank, *kernel), B


def _reduce(M: Tensor, P: Tensor, A: Tensor, taps: int) -> tuple[Tensor, Tensor]:
    """The best map to M's outputs from patches of A x, (O, R·K), and the moment of these, (R·K, R·K)."""
    rank, inputs = A.shape
    if rank == inputs:
        return M, P
    Z = torch.einsum("ri,kl->rkil", A, torch.eye(taps, dtype=A.dtype)).reshape(rank * taps, inputs * taps)
    PZ = P @ Z.T
    small = Z @ PZ
    return M @ PZ @ torch.linalg.pinv(small, rtol=_NOTHING, hermitian=True), small


def tucker_weight(A: Tensor, core: Tensor, B: Tensor) -> Tensor:
    """The convolution that Tucker factors add up to, (O, I·K)."""
    return torch.einsum("op,prk,ri->oik", B, core.flatten(2), A).flatten(1)


def cp_factors(
    target: Tensor, rank: int, *, moment: Tensor, kernel: Sequence[int], ridge: float = RIDGE
) -> tuple[Tensor, list[Tensor], Tensor]:
    """CP factors of a convolution: M ≈ Σ_r B[:, r] · A[r] ⊗ taps₁[r] ⊗ taps₂[r] ….

    Args:
        target: M (O, I·K), any float dtype; computed in float64.
        rank: R ≥ 1, of any size.
        moment: P (I·K, I·K), symmetric, positive semi-definite.
        kernel: taps along each axis.
        ridge: ρ > 0; each component gives outputs of energy ‖B[:, r]‖², and Σ_r ‖B[:, r]‖² ≤ E‖M x‖² / ρ.

    Returns:
        A (R, I) and taps (R, k) for each axis, scaled so that each component's inner signal has energy 1 (or is 0),
        and B (O, R); float64. Given A and taps, no B costs less in error and ρ times its energy.

    Cost: about 50 rounds of alternating least squares over M for each mode.
    """
    M, P = target.double(), moment.double()
    white, inverse = _whiten(M, P, kernel)
    with BackendManager.backend_context("numpy"):
        found = parafac(
            white,
            rank,
            n_iter_max=_CP_ROUNDS,
            init=_first_modes(white, rank),  # pyright: ignore[reportArgumentType] # a start is taken too
            l2_reg=ridge,  # pyright: ignore[reportArgumentType] # any number
            tol=1e-7,
        )
    modes = [torch.from_numpy(np.ascontiguousarray(mode)) for mode in found.factors]
    A, taps = (inverse @ modes[1]).T, [mode.T for mode in modes[2:]]
    signals = components(A, taps)
    energy = ((signals @ P) * signals).sum(1)
    scale = torch.where(energy > 0, energy.clamp_min(torch.finfo(torch.float64).tiny).rsqrt(), 0.0)
    A, signals = A * scale[:, None], signals * scale[:, None]
    gram = signals @ P @ signals.T
    gram.diagonal().add_(ridge)
    return A, taps, torch.linalg.solve(gram, signals @ P @ M.T).T


def _first_modes(tensor: np.ndarray, rank: int) -> CPTensor:
    """Where alternating least squares starts: each mode's leading singular vectors, and noise.

    Exact singular vectors of a symmetric tensor are a saddle that no step leaves.
    """
    draw = np.random.default_rng(0)
    modes = []
    for axis, size in enumerate(tensor.shape):
        unfolded = np.moveaxis(tensor, axis, 0).reshape(size, -1)
        leading = np.linalg.eigh(unfolded @ unfolded.T)[1][:, ::-1][:, :rank]
        noise = draw.standard_normal((size, rank)) / math.sqrt(size)
        noise[:, : leading.shape[1]] *= _START_NOISE
        noise[:, : leading.shape[1]] += leading
        modes.append(noise)
    return CPTensor((None, modes))


def components(A: Tensor, taps: Sequence[Tensor]) -> Tensor:
    """A[r] ⊗ taps₁[r] ⊗ … as rows, (R, I·K): B times them is the convolution."""
    rows = A
    for along in taps:
        rows = (rows[:, :, None] * along[:, None, :]).flatten(1)
    return rows


def tucker_ranks(
    keep: float, outputs: int, inputs: int, taps: int, *, multiple: int = 1, least_inputs: int = 16
) -> tuple[int, int]:
    """Ranks whose factors hold at most `keep` of the weights: the same share of either mode, in multiples.

    With one tap, or fewer input channels than `least_inputs`, the input mode is left whole: cutting it saves nothing.
    The output rank is the largest that fits, at most `outputs`; 0 where none does.
    """
    budget = keep * outputs * inputs * taps
    cost = inputs**2 + outputs**2
    # s² O I K + s (I² + O²) = budget
    share = (math.sqrt(cost**2 + 4 * outputs * inputs * taps * budget) - cost) / (2 * outputs * inputs * taps)
    whole = taps == 1 or inputs < least_inputs
    in_rank = inputs if whole else min(inputs, max(1, round(share * inputs / multiple)) * multiple)
    left = budget - (inputs * in_rank if in_rank < inputs else 0)
    out_rank = max(0, int(left / (in_rank * taps + outputs)))
    if out_rank >= outputs:  # that mode is whole then, and what its factor would have cost is for the other
        in_rank = int(budget / (inputs + taps * outputs))
        return in_rank // multiple * multiple or in_rank, outputs
    return in_rank, out_rank // multiple * multiple or out_rank


def cp_rank(keep: float, outputs: int, inputs: int, kernel: Sequence[int], *, multiple: int = 1) -> int:
    """The largest CP rank, a multiple where it can be, whose factors hold at most `keep` of the weights; 0 if none."""
    rank = int(keep * outputs * inputs * math.prod(kernel) / (outputs + inputs + sum(kernel)))
    return rank // multiple * multiple or rank
