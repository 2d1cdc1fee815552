"""Output heads: what turns hidden states into logits, in forms that need not be expanded."""

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from compresskit.kernels.slab import Readout

# T tokens, V vocabulary, H hidden, R rank

_handles = itertools.count(1)
_TILED: "weakref.WeakValueDictionary[int, TiledWeight]" = weakref.WeakValueDictionary()


class TiledWeight:
    """A frozen weight that is made tile by tile, for example from 4-bit integers.

    Make it outside of functions that `torch.compile` compiles: those can use it, but not make it.

    Args:
        shape: (V, H).
        rows: gives the float weight of the vocabulary from `start` to `stop`, (stop − start, H).
        dtype: of what `rows` gives.
    """

    def __init__(
        self, shape: tuple[int, int], rows: Callable[[int, int], Tensor], dtype: torch.dtype = torch.float32
    ) -> None:
        self.shape, self.rows, self.dtype = shape, rows, dtype
        # An operator takes tensors and numbers only, so the weight travels through it as its number.
        self.handle = next(_handles)
        _TILED[self.handle] = self

    @staticmethod
    def of(handle: int) -> "TiledWeight":
        """The weight of that number, which must still be alive."""
        return _TILED[handle]


def same_weight(ours: Tensor | TiledWeight, theirs: Tensor | TiledWeight) -> bool:
    """Whether both are the very same numbers in memory, so that one product serves both."""
    if isinstance(ours, TiledWeight) or isinstance(theirs, TiledWeight):
        return ours is theirs
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape or ours.stride() != theirs.stride():
        return False
    return ours.data_ptr() == theirs.data_ptr()


@dataclass(frozen=True)
class Head:
    """z = cap · tanh(scale · (W R x + b) / cap): the logits (T, V) of hidden states x (T, H).

    Attributes:
        weight: W (V, H), or (V, R) of a low-rank head; frozen where it does not require grad.
        bias: b (V,), or None.
        reduce: the thin factor R (R, H) of a low-rank head, or None. It is applied first, so W R is never formed.
        scale: a factor on the logits (a model that divides them by 8 has 1/8).
        softcap: cap > 0, or None for no tanh.
    """

    weight: Tensor | TiledWeight
    bias: Tensor | None = None
    reduce: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def readout(self) -> Readout:
        """What follows the product."""
        return Readout(self.bias, self.scale, self.softcap)

    def reduced(self, hidden: Tensor) -> Tensor:
        """What meets `weight`: (T, H) or (T, R)."""
        return hidden if self.reduce is None else F.linear(hidden, self.reduce)

    def logits_of_reduced(self, hidden: Tensor) -> Tensor:
        """All logits (T, V) of hidden states that `reduced` has passed: the plain way."""
        weight = self.weight
        whole = weight.rows(0, weight.shape[0]).to(hidden.dtype) if isinstance(weight, TiledWeight) else weight
        return self.readout.logits(F.linear(hidden, whole), self.bias)
