"""`linear_kl` in chunks of tokens, with the gradients made during the forward pass.

    for each chunk:   slabs = products with the heads, (V, C)              library products
                      loss += slab loss;  student slab ← ∂loss/∂product    a few passes, by divergence
                      ∂hidden = Wᵀ slab,  ∂W += slab · hidden              library products

The chunk is as many tokens as the memory budget holds, never a share of V or H: small chunks read the head again and
again (64 tokens took 2.6 times as long as the products alone); from about a thousand tokens on nothing is gained.
Products are stored, not made again: on a CPU they are nine tenths of the time. Tokens that count for nothing are
dropped before the products. What depends on the device is the slab's loss alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compresskit.kernels import forward_kl
from compresskit.kernels.buckets import TopK, bucket_loss_
from compresskit.kernels.divergence import working_dtype
from compresskit.kernels.gradients import kept_dtype
from compresskit.kernels.linear_kl.head import same_weight
from compresskit.kernels.linear_kl.problem import Problem, Projected, Teacher
from compresskit.kernels.linear_kl.products import ALIGNMENT, WeightGradient, borrowed, hidden_gradient, product_
from compresskit.kernels.slab import TILE_ELEMENTS, Readout, TokenTerms, slab_loss_, tile_bytes, tile_elements, tiles

# T tokens, V vocabulary, H hidden, C tokens of a chunk
#: `slab_loss_`, or another implementation of it.
SlabLoss = Callable[..., Tensor]
#: The part of the budget that tiles may take, and what they need at most; slabs take the rest.
_TILE_SHARE = 0.25
#: How many tiles of `slab_loss_` a tile of `forward_kl_` is as large as: it has few temporaries.
_QUICK_TILES = 2
#: Tokens of a chunk past which its products are no faster, by kind of device: more would only take memory.
_MOST_TOKENS = {"cpu": 1024}


@dataclass(frozen=True)
class Wants:
    """Which gradients are asked for; none at all means the loss alone."""

    hidden: bool
    weight: bool
    bias: bool

    def __bool__(self) -> bool:
        return self.hidden or self.weight or self.bias


@dataclass
class Gradients:
    """∂loss of each, in the `kept_dtype` of what it belongs to; None where it was not asked for."""

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None


def slab_bytes(problem: Problem) -> int:
    """Bytes of the slabs of one token."""
    return problem.vocabulary * sum(one.itemsize for one in _slab_dtypes(problem))


def _slab_dtypes(problem: Problem) -> list[torch.dtype]:
    """Of the student's slab, and of the teacher's where it has one."""
    ours, teacher = problem.hidden.dtype, problem.teacher
    if isinstance(teacher, TopK):
        return [ours]
    return [ours, teacher.hidden.dtype if isinstance(teacher, Projected) else teacher.dtype]


def least_memory_mb(problem: Problem) -> int:
    """The smallest budget in MiB that holds a chunk of one token."""
    return max(1, -int(-slab_bytes(problem) // ((1 - _TILE_SHARE) * 2**20)))


def tokens_per_chunk(problem: Problem, tokens: int, memory_mb: int) -> int:
    """The chunk's tokens: as many as the budget holds and speed asks for, in chunks of about equal size; at least 1."""
    slabs = memory_mb * 2**20 - _tile_bytes(problem, memory_mb)
    most = min(max(1, slabs // slab_bytes(problem)), _MOST_TOKENS.get(problem.hidden.device.type, tokens))
    chunks = max(1, -(-tokens // most))
    return max(1, -(-tokens // chunks))


def _tile_bytes(problem: Problem, memory_mb: int) -> int:
    return min(int(_TILE_SHARE * memory_mb * 2**20), tile_bytes(TILE_ELEMENTS, problem.hidden.dtype))


@torch.no_grad()
def chunked_linear_kl(problem: Problem, wants: Wants, memory_mb: int, slab_loss: SlabLoss) -> tuple[Tensor, Gradients]:
    """The loss, a scalar, and the gradients that are wanted, within `memory_mb` MiB beside them."""
    dtype, rows = working_dtype(problem.hidden.dtype), problem.active_rows()
    every = len(rows) == len(problem.hidden)
    chunk = tokens_per_chunk(problem, len(rows), memory_mb)
    tile = tile_elements(_tile_bytes(problem, memory_mb), problem.hidden.dtype)
    loss = torch.zeros((), dtype=dtype, device=problem.hidden.device)
    gradients = _start(problem, wants)
    weight = problem.head.weight
    sums = WeightGradient(weight, -(-len(rows) // chunk)) if wants.weight and isinstance(weight, Tensor) else None
    largest, lift = min(chunk, len(rows)), _lift(problem)
    with borrowed(_Slabs.bytes_of(problem, largest), problem.hidden.device) as memory:
        slabs = _Slabs(problem, memory, largest, slab_loss, wants_grad=bool(wants), tile=tile)
        for start in range(0, len(rows), chunk):
            # A slice where no token is dropped: views, no copies.
            part = slice(start, min(start + chunk, len(rows))) if every else rows[start : start + chunk]
            hidden, tokens = problem.hidden[part], _token_terms(problem, part, dtype, lift)
            student, theirs = slabs.fill(hidden, problem.teacher, part)
            loss += slabs.loss_(student, theirs, tokens)
            if gradients.hidden is not None:
                gradients.hidden[part] = hidden_gradient(student, weight).to(gradients.hidden.dtype)
            if gradients.bias is not None:
                gradients.bias[: len(student)] += student.sum(1, dtype=gradients.bias.dtype)
            if sums is not None:
                sums.add(student, hidden)
    if sums is not None:
        gradients.weight = sums.result()
    if gradients.bias is not None and problem.head.bias is not None:
        gradients.bias = gradients.bias.to(kept_dtype(problem.head.bias.dtype))
    if lift is not None:
        for one in (loss, gradients.hidden, gradients.weight, gradients.bias):
            if one is not None:
                one /= lift
    return loss, gradients


def _lift(problem: Problem) -> Tensor | None:
    """A power of two that brings what the largest slope is multiplied with near 1, a scalar; None but for float16.

    There the slab of ∂loss/∂product would lose most of itself below 6e-8, the least that float16 tells from 0.
    """
    if problem.hidden.dtype != torch.float16 or not len(problem.hidden):
        return None
    weights = [problem.divergence.temperature * problem.weight.float()]
    if problem.label_weight is not None:
        weights.append(problem.label_weight.float())
    largest = abs(problem.head.scale) * torch.cat(weights).amax()
    return torch.where(largest > 0, (-largest.log2().ceil()).exp2(), 1)


def _start(problem: Problem, wants: Wants) -> Gradients:
    hidden, bias = problem.hidden, problem.head.bias
    return Gradients(
        hidden=torch.zeros_like(hidden, dtype=kept_dtype(hidden.dtype)) if wants.hidden else None,
        bias=torch.zeros_like(bias, dtype=working_dtype(bias.dtype)) if wants.bias and bias is not None else None,
    )


def _token_terms(problem: Problem, part: slice | Tensor, dtype: torch.dtype, lift: Tensor | None) -> TokenTerms:
    weight = problem.weight[part].to(dtype)
    if lift is not None:
        weight = weight * lift
    if problem.labels is None or problem.label_weight is None:
        return TokenTerms(weight)
    label_weight = problem.label_weight[part].to(dtype)
    if lift is not None:
        label_weight = label_weight * lift
    # A label that is not read may be any number; entry 0 of weight 0 stands for it.
    labels = torch.where(label_weight != 0, problem.labels[part], 0)
    return TokenTerms(weight, labels, label_weight)


class _Slabs:
    """The slabs of every chunk in the same memory: how they are filled, and what their loss is.

    Args:
        memory: `bytes_of` bytes, uint8.
        tokens: of the largest chunk.
        slab_loss: for whatever has no quicker way.
    """

    def __init__(
        self, problem: Problem, memory: Tensor, tokens: int, slab_loss: SlabLoss, *, wants_grad: bool, tile: int
    ) -> None:
        self.width, teacher, self.divergence = problem.vocabulary, problem.teacher, problem.divergence
        self.head, self.shared = (
            problem.head,
            isinstance(teacher, Projected) and same_weight(problem.head.weight, teacher.head.weight),
        )
        self.slab_loss, self.wants_grad, self.tile = slab_loss, wants_grad, tile
        theirs = teacher.head.readout if isinstance(teacher, Projected) else Readout()
        self.readouts = self._cut(problem.head.readout), self._cut(theirs)
        self.dtypes = _slab_dtypes(problem)
        first = self._slab_bytes(self.dtypes[0], self.width, tokens)
        self.memory = [memory, memory if self.shared else memory[first:]]
        self.quick = (
            wants_grad
            and slab_loss is slab_loss_
            and memory.device.type != "mps"  # it adds up in float64, which these lack
            and isinstance(teacher, Projected)  # logits that a teacher gives as they are may hold −∞
            and forward_kl.serves(self.dtypes, self.divergence, self.readouts, labels=problem.labels is not None)
        )

    @classmethod
    def bytes_of(cls, problem: Problem, tokens: int) -> int:
        """Bytes of the slabs of so many tokens."""
        return sum(cls._slab_bytes(dtype, problem.vocabulary, tokens) for dtype in _slab_dtypes(problem))

    @staticmethod
    def _slab_bytes(dtype: torch.dtype, width: int, tokens: int) -> int:
        return -(-width * tokens * dtype.itemsize // ALIGNMENT) * ALIGNMENT

    def _cut(self, one: Readout) -> Readout:
        """The readout of the vocabulary that is compared."""
        return Readout(None if one.bias is None else one.bias[: self.width], one.scale, one.softcap)

    def _slab(self, number: int, tokens: int) -> Tensor:
        dtype = self.dtypes[number]
        count = self.width * tokens
        return self.memory[number][: count * dtype.itemsize].view(dtype).view(self.width, tokens)

    def fill(self, hidden: Tensor, teacher: Teacher, part: slice | Tensor) -> tuple[Tensor, Tensor | TopK]:
        """The student's slab of products and the teacher's, (V, C) each, or the cache as it is.

        Args:
            hidden: the student's of the chunk, (C, H).
            teacher: of all tokens.
            part: the chunk's rows of it.
        """
        tokens, states = len(hidden), self._states(hidden, 0)
        if self.shared and isinstance(teacher, Projected):
            both = self._slab(0, 2 * tokens)
            product_(both, self.head.weight, torch.cat([states, self._states(teacher.hidden[part], 1)]))
            return both[:, :tokens], both[:, tokens:]
        student = self._slab(0, tokens)
        product_(student, self.head.weight, states)
        if isinstance(teacher, TopK):
            return student, TopK(teacher.log_probs[part], teacher.indices[part])
        theirs = self._slab(1, tokens)
        if isinstance(teacher, Projected):
            product_(theirs, teacher.head.weight, self._states(teacher.hidden[part], 1))
        elif isinstance(part, slice):
            theirs.copy_(teacher[part, : self.width].T)
        else:  # by tiles: picked rows are a copy, and a whole one would be a slab beside the budget
            for some in tiles(theirs, self.tile):
                theirs[some] = teacher[:, some].index_select(0, part).T
        return student, theirs

    def _states(self, hidden: Tensor, number: int) -> Tensor:
        """Hidden states as the products take them."""
        factor = forward_kl.stretch(self.readouts[number], self.divergence.temperature, hidden.dtype)
        return hidden * factor if self.quick and factor != 1 else hidden

    def loss_(self, student: Tensor, teacher: Tensor | TopK, tokens: TokenTerms) -> Tensor:
        """The loss of filled slabs, a scalar; the student's becomes ∂loss/∂product where gradients are wanted."""
        ours, options = self.readouts[0], {"wants_grad": self.wants_grad, "tile": self.tile}
        if isinstance(teacher, TopK):
            return bucket_loss_(student, teacher, tokens, self.divergence, ours, **options)
        if self.quick:
            temperature, tile = self.divergence.temperature, _QUICK_TILES * self.tile
            return forward_kl.forward_kl_(student, teacher, tokens, temperature, self.readouts, tile=tile)
        return self.slab_loss(student, teacher, tokens, self.divergence, self.readouts, **options)
