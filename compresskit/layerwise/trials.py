"""Trials: what the model's answer loses when one layer is changed and all others are as they were.

The model runs once on a few sequences as it is; a trial in block b starts from what block b − 1 gave then, so it costs
the blocks from b on and the head.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresskit.data import Batch
from compresskit.layers.linear import layer_widths
from compresskit.layerwise.answer import divergence, read_answer
from compresskit.layerwise.watch import replaced_forwards
from compresskit.models import answer_kind
from compresskit.surgery.modes import without_cache
from compresskit.surgery.sites import find_blocks


class Trials:
    """The answers of a model on a few sequences, to compare changed ones with.

    Args:
        model: as it is now; in eval mode.
        batches: held in memory with every block's output and the answers (a vocabulary wide, for language models).
        blocks: their names; by default those of `find_blocks`.
        answers: what to compare with, `answers` of earlier trials; by default the model's own.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Batch],
        *,
        blocks: Sequence[str] | None = None,
        answers: Sequence[Tensor] | None = None,
    ) -> None:
        self._model, self._batches = model, batches
        self._blocks = [model.get_submodule(name) for name in (find_blocks(model) if blocks is None else blocks)]
        self._outputs: list[list[Any]] = []
        given: list[Tensor] = []
        with without_cache(model):
            for batch in batches:
                outputs: list[Any] = []
                handles = [
                    block.register_forward_hook(lambda _module, _args, output, keep=outputs: keep.append(output))
                    for block in self._blocks
                ]
                try:
                    given.append(read_answer(model, batch))
                finally:
                    for handle in handles:
                        handle.remove()
                self._outputs.append(outputs)
        #: (N, V) for each batch
        self.answers: Sequence[Tensor] = given if answers is None else answers

    @torch.no_grad()
    def divergence(self, block: int) -> float:
        """Nats an answer between `answers` and the model as it is now, changed in `block` alone (counted from 0)."""
        kind = answer_kind(self._model)
        total, count = 0.0, 0
        with without_cache(self._model):
            for batch, outputs, answer in zip(self._batches, self._outputs, self.answers, strict=True):
                before = outputs[block - 1] if block else None
                with replaced_forwards(self._blocks[:block], lambda *args, given=before, **kwargs: given):
                    now = read_answer(self._model, batch)
                total += divergence(answer, now, kind=kind) * len(now)
                count += len(now)
        return total / count


@contextmanager
def trial_weight(layers: Sequence[nn.Module], weight: Tensor, bias: Tensor | None) -> Iterator[None]:
    """Linears that read the same input compute the stacked weight (O, I) and bias (O,) inside."""
    sizes = [layer_widths(layer)[0] for layer in layers]
    weights = weight.float().split(sizes)
    biases = [None] * len(layers) if bias is None else bias.float().split(sizes)
    with ExitStack() as stack:
        for layer, w, b in zip(layers, weights, biases, strict=True):
            stack.enter_context(replaced_forwards([layer], partial(_linear, w, b)))
        yield


def _linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return nn.functional.linear(x, weight, bias)
