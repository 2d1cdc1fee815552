"""What a model loses without a block, or without the attention or FFN of one; and which go first.

    influence    1 − E[cos(h, h₋)]    h what the block gives, h₋ what it gives without the unit; of a whole block h₋
                                      is what it reads (ShortGPT's block influence, arXiv:2403.03853)
    kl           KL(answer ‖ answer without the unit), in nats an answer

The unit that loses least goes, and the others are scored again without it (SLEB, arXiv:2402.09025), until enough are
gone.
Influence costs about two forwards a round, kl one for every two blocks left.
"""

# N tokens, H hidden

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from compresskit.data import Batch
from compresskit.layerwise.chain import hidden_of, real_tokens
from compresskit.layerwise.trials import Trials
from compresskit.layerwise.watch import replaced_forwards
from compresskit.progress import track
from compresskit.surgery.modes import without_cache


@dataclass(frozen=True)
class Unit:
    """A block that can go, or a branch of one.

    Attributes:
        block: its number, from 0.
        module: the block, or the linear by which the branch writes into the stream.
        linears: of a branch, all its linears; none of a block.
    """

    block: int
    module: str
    linears: tuple[str, ...] = ()


Scores = Mapping[Unit, float]


@dataclass(frozen=True)
class Removal:
    """A unit that goes, and what its loss was when it went."""

    unit: Unit
    score: float


@contextmanager
def without(model: nn.Module, unit: Unit) -> Iterator[None]:
    """Inside, the block hands on what it reads, or the branch adds nothing."""
    module = model.get_submodule(unit.module)
    with replaced_forwards([module], partial(_give_zeros if unit.linears else _hand_on, module.forward)):
        yield


def _give_zeros(own: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    return torch.zeros_like(own(*args, **kwargs))


def _hand_on(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The hidden states as they come, in the form and with the other outputs (position biases, say) of the block."""
    hidden = _read(args, kwargs).clone()
    output = own(*args, **kwargs)
    return hidden if isinstance(output, Tensor) else (hidden, *output[1:])


def _read(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def choose_removals(
    model: nn.Module, units: Sequence[Unit], count: int, score: Callable[[Sequence[Unit]], Scores], *, label: str
) -> list[Removal]:
    """The `count` of `units` to remove, in the order in which they go; equal scores: the first.

    Args:
        model: unchanged afterwards.
        score: what each of the units that are left loses, on the model without those that went.
        label: shown beside the progress bar.
    """
    removals: list[Removal] = []
    with ExitStack() as removed:
        for _ in track(range(count), label):
            gone = {removal.unit for removal in removals}
            scores = score([unit for unit in units if unit not in gone])
            unit = min(scores, key=lambda unit: scores[unit])
            removals.append(Removal(unit, scores[unit]))
            removed.enter_context(without(model, unit))
    return removals


@torch.no_grad()
def influence(
    model: PreTrainedModel, blocks: Sequence[str], batches: Iterable[Batch], units: Sequence[Unit]
) -> dict[Unit, float]:
    """1 − E[cos(h, h₋)] of each unit over real tokens (all, where inputs have no mask), in [0, 2]."""
    sums, counts = dict.fromkeys(units, 0.0), dict.fromkeys(units, 0)

    def look(batch: Batch, here: Sequence[Unit], own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        less = {unit: _less(model, unit, own, args, kwargs) for unit in here}
        output = own(*args, **kwargs)
        for unit, hidden in less.items():
            cosine = F.cosine_similarity(hidden_of(output).double(), hidden.double(), dim=-1)
            real = cosine[real_tokens(batch, cosine.shape)]
            sums[unit] += float((1 - real).sum())
            counts[unit] += real.numel()
        return output

    with without_cache(model):
        for batch in batches:
            with ExitStack() as watched:
                for number in {unit.block for unit in units}:
                    here = [unit for unit in units if unit.block == number]
                    block = model.get_submodule(blocks[number])
                    watched.enter_context(replaced_forwards([block], partial(look, batch, here, block.forward)))
                model(**batch)
    return {unit: sums[unit] / counts[unit] for unit in units}


def _less(
    model: nn.Module, unit: Unit, own: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Tensor:
    """What a block gives without the unit; it may change in place what it reads, so it reads a copy."""
    hidden = _read(args, kwargs).clone()
    if not unit.linears:
        return hidden
    with without(model, unit):
        if "hidden_states" in kwargs:
            return hidden_of(own(*args, **(kwargs | {"hidden_states": hidden})))  # type: ignore[operator]
        return hidden_of(own(hidden, *args[1:], **kwargs))


class Divergences:
    """Scores by trial: the divergence of the model's answer without a unit from its answer when this was made.

    Args:
        model: in eval mode.
        blocks: names of its blocks.
        batches: held in memory with every block's output and the answers (a vocabulary wide, for language models).
    """

    def __init__(self, model: PreTrainedModel, blocks: Sequence[str], batches: Sequence[Batch]) -> None:
        self._model, self._blocks, self._batches = model, blocks, batches
        self._answers: Sequence[Tensor] | None = None

    def __call__(self, units: Sequence[Unit]) -> dict[Unit, float]:
        """Nats an answer lost without each unit, on the model as it is now."""
        trials = Trials(self._model, self._batches, blocks=self._blocks, answers=self._answers)
        self._answers = trials.answers
        found: dict[Unit, float] = {}
        for unit in units:
            with without(self._model, unit):
                found[unit] = trials.divergence(unit.block)
        return found
