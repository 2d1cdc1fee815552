"""Second moments of a layer's input and target: all that the layer-wise problem needs to know of the data.

    C = E[x xᵀ]    T = E[t xᵀ]    μ = E[x]    ν = E[t]        x the input, t what the layer should give

Sums are kept in float64, so that moments of any number of tokens add without loss and a quarter of the sequences can be
held out and added back. Padding never enters: the caller passes only the rows of real tokens.
"""

# N tokens, I in, O out

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor


@dataclass
class Moments:
    """Running sums over tokens; add two with `+`.

    Attributes:
        count: N.
        x: Σ x, (I,). t: Σ t, (O,). xx: Σ x xᵀ, (I, I). tx: Σ t xᵀ, (O, I). tt: Σ ‖t‖². All float64.
        low, high: the least and the greatest x of each input, and 0 where all lie on one side of it, (I,) float64.
    """

    count: int
    x: Tensor
    t: Tensor
    xx: Tensor
    tx: Tensor
    tt: float
    low: Tensor
    high: Tensor

    @classmethod
    def zeros(cls, in_features: int, out_features: int) -> "Moments":
        """Empty sums."""
        zeros = partial(torch.zeros, dtype=torch.float64)
        return cls(
            0,
            zeros(in_features),
            zeros(out_features),
            zeros(in_features, in_features),
            zeros(out_features, in_features),
            0.0,
            zeros(in_features),
            zeros(in_features),
        )

    def update(self, x: Tensor, t: Tensor) -> None:
        """Add tokens: x (N, I) and t (N, O), any float dtype."""
        x, t = x.double(), t.double()
        self.update_input(x)
        self.t += t.sum(0)
        self.tx.addmm_(t.T, x)
        self.tt += float(t.square().sum())

    def update_input(self, x: Tensor) -> None:
        """Add inputs x (N, I) alone; `with_linear_target` then says what their targets are."""
        x = x.double()
        self.count += x.shape[0]
        self.x += x.sum(0)
        self.xx.addmm_(x.T, x)
        if len(x):
            self.low = torch.minimum(self.low, x.amin(0))
            self.high = torch.maximum(self.high, x.amax(0))

    def with_linear_target(self, weight: Tensor, bias: Tensor | None) -> "Moments":
        """The moments for t = W x + b, exactly, from the input's sums: W (O, I), b (O,)."""
        W = weight.double()
        b = torch.zeros(W.shape[0], dtype=W.dtype) if bias is None else bias.double()
        Wx = W @ self.x
        tx = W @ self.xx + torch.outer(b, self.x)
        tt = float((tx * W).sum() + b @ Wx + self.count * (b @ b))
        return Moments(self.count, self.x, Wx + self.count * b, self.xx, tx, tt, self.low, self.high)

    def without_bias(self, bias: Tensor) -> "Moments":
        """The moments for the target t − b, of a layer whose bias b (O,) stays as it is."""
        b = bias.double()
        tx = self.tx - torch.outer(b, self.x)
        tt = self.tt - 2 * float(b @ self.t) + self.count * float(b @ b)
        return replace(self, t=self.t - self.count * b, tx=tx, tt=tt)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            self.count + other.count,
            self.x + other.x,
            self.t + other.t,
            self.xx + other.xx,
            self.tx + other.tx,
            self.tt + other.tt,
            torch.minimum(self.low, other.low),
            torch.maximum(self.high, other.high),
        )

    @property
    def peak(self) -> Tensor:
        """The greatest |x| of each input, (I,) float64."""
        return torch.maximum(-self.low, self.high)

    def mean(self, *, centred: bool) -> "MeanMoments":
        """Per-token moments, about the means or about zero.

        Raises:
            ValueError: no token was seen.
        """
        if self.count == 0:
            raise ValueError("no token reached this layer")
        n = self.count
        mu, nu = (self.x / n, self.t / n) if centred else (torch.zeros_like(self.x), torch.zeros_like(self.t))
        C = (self.xx / n).addr_(mu, mu, alpha=-1)
        T = (self.tx / n).addr_(nu, mu, alpha=-1)
        return MeanMoments(C=C, T=T, mu=mu, nu=nu, target_power=self.tt / n - float(nu @ nu))


@dataclass(frozen=True)
class SiteMoments:
    """Moments of one site: of the sequences to fit on, and of the quarter kept apart to choose the shrinkage by.

    Of fewer than four sequences one is kept apart.
    """

    fit: Moments
    held_out: Moments

    @property
    def all(self) -> Moments:
        """Both together."""
        return self.fit + self.held_out

    @property
    def span(self) -> tuple[Tensor, Tensor]:
        """The least and the greatest x of each input, zero between them, (I,) float64."""
        return torch.minimum(self.fit.low, self.held_out.low), torch.maximum(self.fit.high, self.held_out.high)

    @property
    def peak(self) -> Tensor:
        """The greatest |x| of each input, (I,) float64."""
        return torch.maximum(self.fit.peak, self.held_out.peak)

    def with_linear_target(self, weight: Tensor, bias: Tensor | None) -> "SiteMoments":
        """The moments for the target W x + b: what a layer gives today."""
        return SiteMoments(self.fit.with_linear_target(weight, bias), self.held_out.with_linear_target(weight, bias))

    def without_bias(self, bias: Tensor) -> "SiteMoments":
        """The moments for the target less a bias (O,) that stays as it is: what the weights alone should give."""
        return SiteMoments(self.fit.without_bias(bias), self.held_out.without_bias(bias))


def ridged(C: Tensor, ratio: float) -> Tensor:
    """C + λ I for λ = ratio · mean(diag C), (I, I) float64: positive definite for ratio > 0; λ = 1 where C is zero.

    A diagonal that rounding left below zero counts as zero: the sum's has none that is not positive.
    """
    moment = C.to(torch.float64, copy=True)
    moment.diagonal().clamp_min_(0)
    level = float(moment.diagonal().mean())
    moment.diagonal().add_(ratio * level if level > 0 else 1.0)
    return moment


@dataclass(frozen=True)
class MeanMoments:
    """C (I, I), T (O, I), means μ (I,) and ν (O,) (zeros where not centred), and E‖t − ν‖²."""

    C: Tensor
    T: Tensor
    mu: Tensor
    nu: Tensor
    target_power: float

    def error(self, weight: Tensor) -> float:
        """E‖(t − ν) − W (x − μ)‖² for a weight (O, I), in closed form: tr(W C Wᵀ) − 2 tr(T Wᵀ) + E‖t − ν‖²."""
        W = weight.double()
        return float(((W @ self.C - 2 * self.T) * W).sum()) + self.target_power
