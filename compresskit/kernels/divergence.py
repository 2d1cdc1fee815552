"""The divergences between a teacher's p and a student's q, as `reference`, `slab` and `buckets` compute them.

`slab_triton` has the same formulas as Triton code and `forward_kl` a form of its own of one of them; tests tie both to
what stands here.

A divergence D(p, q) = Σ_v f(p_v, q_v) of a token is given by its summand f and, for the gradient with respect to the
student's logits a (q = softmax(a)), by its slope r_v = q_v ∂f/∂q_v:

    ∂D/∂a_v = r_v − q_v Σ_u r_u                    (a multiple of q in r drops out)

| kind            | f                                   | r                      | m                |
| forward_kl      | p (ln p − ln q) − p + q             | −p                     |                  |
| reverse_kl      | q (ln q − ln p) − q + p             | q (ln q − ln p)        |                  |
| jsd             | β p (ln p − ln m) + (1−β) q (ln q − ln m) | (1−β) q (ln q − ln m) | β p + (1−β) q |
| skew_forward_kl | p (ln p − ln m) − p + m             | −(1−α) q p / m         | α p + (1−α) q    |
| skew_reverse_kl | q (ln q − ln m) − q + m             | q (ln q − ln m − α (q / m − 1)) | α q + (1−α) p |
| total_variation | ½ |p − q|                           | ½ q sign(q − p)        |                  |

Sources: generalised JSD as in GKD (arXiv:2306.13649), skew divergences as in DistiLLM (arXiv:2402.03898).

Near the teacher D is of second order in ln q − ln p, so what is rounded at the size of ln p would drown it. The terms
q − p (m − p, m − q) sum to 0; with them, the rounding of a token's normaliser leaves D in second order only; those of
jsd cancel element by element. ln p − ln m and ln q − ln m are made from ln q − ln p, never from ln m. For total
variation p and q that differ by rounding alone are equal (`tie`): the sign of noise would make a gradient of full size,
where student and teacher agree.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from compresskit.kernels.exponential import exp

#: Roundings of q by which p may differ from it and still be equal: those of the logits, which τ divides, and at least
#: those of ln p and ln q.
TIE, LEAST_TIE = 64, 16
#: Past this ln q − ln p, the smaller of both adds nothing to a mixture, in float64 as well.
FAR = 80.0
Kind = Literal["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation"]
#: What a token's weight is multiplied with: nothing, the teacher's largest probability, or its entropy / ln V.
WeightRule = Literal["none", "confidence", "entropy"]
MIXED = frozenset({"jsd", "skew_forward_kl", "skew_reverse_kl"})


@dataclass(frozen=True)
class Divergence:
    """Which divergence, and what the tokens count.

    Attributes:
        kind: see the table above.
        mix: β of `jsd` (0.5 is symmetric; the limits 0 and 1, divided by β and 1 − β, are forward and reverse KL), α of
            the skew divergences (how much of the first distribution is mixed into the second); not read by the rest.
        temperature: τ > 0; logits are divided by it, the divergence is multiplied with τ².
        weight_rule: a factor on each token's weight, computed from the teacher's distribution at τ.
    """

    kind: Kind = "forward_kl"
    mix: float = 0.5
    temperature: float = 1.0
    weight_rule: WeightRule = "none"

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"divergence {self.kind!r} is none of {', '.join(get_args(Kind))}")
        if self.weight_rule not in get_args(WeightRule):
            raise ValueError(f"weight_rule {self.weight_rule!r} is none of {', '.join(get_args(WeightRule))}")
        if self.kind in MIXED and not 0 < self.mix < 1:
            raise ValueError(f"mix must lie between 0 and 1, got {self.mix} for {self.kind}")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be above 0 and finite, got {self.temperature}")

    @property
    def tie(self) -> float:
        """By how many roundings of q total variation lets p differ from it."""
        return max(TIE / self.temperature, LEAST_TIE)

    @property
    def slope_sum(self) -> float | None:
        """Σ_v r_v where it is the same for all distributions; None where it must be summed."""
        return -1.0 if self.kind == "forward_kl" else None


FORWARD_KL = Divergence()


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which divergences of logits of `dtype` are computed: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def summand_and_slope(divergence: Divergence, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """f, r and q of each element, in the shape of `log_p` and `log_q` (equal, any); neither is modified.

    Autograd through the first gives the gradient that the second stands for. A probability 0 adds nothing, also where
    both are 0.
    """
    mix = divergence.mix
    if divergence.kind in MIXED:
        # Every mixture is finite, so a finite stand-in for ln 0 keeps numbers where p = q = 0.
        log_p, log_q = (log.clamp_min(torch.finfo(log.dtype).min / 4) for log in (log_p, log_q))
    # q − p in f leaves no room for the rounding of the quicker way.
    raised = exp if divergence.kind == "jsd" else torch.exp
    p, q = raised(log_p), raised(log_q)
    match divergence.kind:
        case "forward_kl":
            return (q - p).addcmul_(p, _gap(log_p, log_q, p)), -p, q
        case "reverse_kl":
            slope = q * _gap(log_q, log_p, q)
            return slope + (p - q), slope, q
        case "jsd":
            over_p, over_q = _over_mixture(log_p, log_q, mix)
            slope = (1 - mix) * q * over_q
            return mix * p * over_p + slope, slope, q
        case "skew_forward_kl":
            over, _ = _over_mixture(log_p, log_q, mix)
            return p * over + (1 - mix) * (q - p), (mix - 1) * q * over.exp(), q
        case "skew_reverse_kl":
            over, _ = _over_mixture(log_q, log_p, mix)
            return q * over + (1 - mix) * (p - q), q * (over - mix * over.expm1()), q
        case _:
            apart = q - p
            differ = apart.abs() > divergence.tie * torch.finfo(q.dtype).eps * q
            return 0.5 * apart.abs(), 0.5 * q * apart.sign() * differ, q


def _gap(log_x: Tensor, log_y: Tensor, x: Tensor) -> Tensor:
    """ln x − ln y where x > 0, else 0 (ln 0 − ln 0 is no number).

    By arithmetic: the bound is 0 where x is 0 and infinite elsewhere. torch.where takes thirty times as long on a CPU.
    """
    limits = torch.finfo(x.dtype)
    gap = log_x.clamp_min(limits.min / 4).sub_(log_y)
    return torch.minimum(gap, (x * limits.max).mul_(limits.max))


def _over_mixture(log_x: Tensor, log_y: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """ln x − ln m and ln y − ln m of m = share · x + (1 − share) · y, exact to their own size; both logs finite.

    With the smaller one taken out, m = x (1 + (1 − share) (y/x − 1)) where y is larger: a sum of positive terms.
    """
    apart = (log_y - log_x).clamp_(-FAR, FAR)
    larger = (apart > 0).to(apart.dtype)  # not |…| and max: at 0 their derivative would be another
    log_m = ((share + (1 - 2 * share) * larger) * (apart * (2 * larger - 1)).expm1()).log1p()
    over_y = apart * larger - log_m
    return over_y - apart, over_y
