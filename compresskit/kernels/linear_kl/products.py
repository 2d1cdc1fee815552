"""The matrix products around a slab, in the orientation that is fastest on a CPU: vocabulary first.

With W (V, H) and hidden states X (C, H):   slab = W Xᵀ,   ∂X = (Wᵀ slab)ᵀ,   ∂W += slab X.   In float32 each of them
runs at about the speed of the best orientation; with tokens first, the first product took 1.1 to 1.2 times as long.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from compresskit.kernels.divergence import working_dtype
from compresskit.kernels.gradients import kept_dtype
from compresskit.kernels.linear_kl.head import TiledWeight

# V vocabulary, C tokens of a chunk, H hidden
#: Rows of a weight that are dequantised, or added in another dtype, at once.
_ROWS = 8192
#: Bytes of a cache line, at whose multiples large memory begins.
ALIGNMENT = 64


def large_empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory; on a CPU in huge pages where Linux has them, which saves most of the time of its first use.

    numpy asks for huge pages (madvise), torch does so only by an environment variable. numpy begins anywhere, and a
    product whose rows straddle cache lines takes a third longer to write.
    """
    if device.type != "cpu" or 0 in shape:
        return torch.empty(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % ALIGNMENT
    return torch.from_numpy(memory[first : first + size]).view(dtype).view(shape)


#: The largest memory that a finished call left for the next one, on the CPU.
_RESTING: list[Tensor] = []
_LOCK = Lock()


@contextmanager
def borrowed(size: int, device: torch.device) -> Iterator[Tensor]:
    """Uninitialised memory of at least `size` bytes, (≥ size,) uint8, that the next call gets again.

    On a CPU the system clears fresh pages, which takes a third of the time of the product that fills them; so calls
    hand their memory on, until `release_memory`. Calls at the same time each have their own.
    """
    if device.type != "cpu":
        yield torch.empty(size, dtype=torch.uint8, device=device)
        return
    with _LOCK:
        memory = _RESTING.pop() if _RESTING else None
    if memory is None or memory.numel() < size:
        memory = None  # goes before the larger one comes
        memory = large_empty(size, dtype=torch.uint8, device=device)
    try:
        yield memory
    finally:
        with _LOCK:
            if not _RESTING or _RESTING[0].numel() < memory.numel():
                _RESTING[:] = [memory]


def release_memory() -> None:
    """Give the memory that `linear_kl` keeps between calls on a CPU (at most its `memory_mb`) back to the system."""
    with _LOCK:
        _RESTING.clear()


def _row_slices(count: int) -> Iterator[slice]:
    for start in range(0, count, _ROWS):
        yield slice(start, min(start + _ROWS, count))


def product_(slab: Tensor, weight: Tensor | TiledWeight, hidden: Tensor) -> None:
    """slab (V, C) ← W Xᵀ, with the first V rows of the weight."""
    if not isinstance(weight, TiledWeight):
        torch.mm(weight[: len(slab)], hidden.T, out=slab)
        return
    for part in _row_slices(len(slab)):
        torch.mm(weight.rows(part.start, part.stop).to(hidden.dtype), hidden.T, out=slab[part])


def hidden_gradient(slab: Tensor, weight: Tensor | TiledWeight) -> Tensor:
    """∂X (C, H) of a chunk from the slab of ∂loss/∂product."""
    if not isinstance(weight, TiledWeight):
        return torch.mm(weight[: len(slab)].T, slab).T
    total = slab.new_zeros(weight.shape[1], slab.shape[1], dtype=working_dtype(slab.dtype))
    for part in _row_slices(len(slab)):
        total += torch.mm(weight.rows(part.start, part.stop).to(slab.dtype).T, slab[part])
    return total.T


class WeightGradient:
    """Σ over chunks of slab · X, (V, H), summed in float32 (float64 for float64) whatever the weight's dtype.

    In 16 bits each chunk's product is rounded before it is added, as the library returns it, and several chunks take
    memory for a float32 sum beside the result, 4 V H bytes more than the gradient's own.

    Args:
        weight: whose gradient it is; rows past the slab's get 0.
        chunks: how many will be added; a single one needs no sum.
    """

    def __init__(self, weight: Tensor, chunks: int) -> None:
        self.weight, self.chunks = weight, chunks
        self.in_place = chunks < 2 or weight.dtype in (torch.float32, torch.float64)
        self.total: Tensor | None = None

    def add(self, slab: Tensor, hidden: Tensor) -> None:
        """Add one chunk's slab (V, C) and hidden states (C, H)."""
        if self.total is None:
            dtype = self.weight.dtype if self.in_place else torch.float32
            self.total = large_empty(*self.weight.shape, dtype=dtype, device=self.weight.device)
            self.total[len(slab) :].zero_()
            if self.in_place:
                torch.mm(slab, hidden, out=self.total[: len(slab)])
                return
            self.total[: len(slab)].zero_()
        if self.in_place:
            self.total[: len(slab)].addmm_(slab, hidden)
            return
        for part in _row_slices(len(slab)):
            self.total[part] += torch.mm(slab[part], hidden)

    def result(self) -> Tensor:
        """The sum in the weight's `kept_dtype`, contiguous however the weight lies."""
        dtype = kept_dtype(self.weight.dtype)
        return self.weight.new_zeros(self.weight.shape, dtype=dtype) if self.total is None else self.total.to(dtype)
