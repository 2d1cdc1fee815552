"""How large an exported file will be, from shapes alone: what `check` tells, and what every file is judged by.

    bytes  =  the tensors of all layers that the answer depends on, tied ones once, as the file holds them
           +  what the graph says about each of these layers

The first part is what a model of any size that matters consists of; constants that tracing makes or folds away are a
few kilobytes beside it. The second is a round figure: the file of a tiny model is half names, nodes and shapes, which
no plan knows. So a file may differ by 3 % of its tensors and, on top, by this part and by a fixed room (`allowance`):
for MiniLM that is 0.2 MB of 90, for a model of ten thousand weights as much as the weights.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresskit.errors import RunFailedError
from compresskit.export.trace import OUTPUTS
from compresskit.layers.forms import onnx_forms, swapped
from compresskit.surgery.sites import CANNOT_RUN, blank_inputs

#: Nodes, names and shapes of one layer: 0.5 to 1.6 kB in encoders and decoders.
_LAYER_BYTES = 1500
#: Inputs, outputs, masks and positions.
_ROOM_BYTES = 16_000
#: The share of its weights by which a file may differ from what was predicted.
TOLERANCE = 0.03


class Prediction(NamedTuple):
    """Bytes of a file: its tensors, and about what the graph takes up beside them.

    `idle` are layers that run and do not matter for the output, as far as the empty model tells; the file has none.
    """

    weights: int
    graph: int
    idle: frozenset[str] = frozenset()

    @property
    def size_bytes(self) -> int:
        """Both."""
        return self.weights + self.graph

    def allowance(self, tolerance: float = TOLERANCE) -> float:
        """By how many bytes a file may differ."""
        return tolerance * self.weights + self.graph + _ROOM_BYTES


def _own_tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def on_meta(model: PreTrainedModel) -> PreTrainedModel:
    """The same modules with tensors that have shapes alone; nothing is copied, and what is shared stays shared."""
    twins: dict[int, Any] = {id(t): t.detach().to("meta") for t in model.buffers()}
    twins |= {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, twins)


@contextmanager
def _marked(model: nn.Module, marks: dict[str, Tensor]) -> Iterator[None]:
    """Inside, what layers with tensors answer depends on a mark each, `marks[name]`, and on all that they read.

    Integers carry no gradient: that is why layers are linked here and not by their weights.
    """

    def hook_for(name: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if not isinstance(output, Tensor) or not output.is_floating_point():
                return None
            marks[name] = torch.ones((), device=output.device, requires_grad=True)
            read = [one for one in args if isinstance(one, Tensor) and one.is_floating_point()]
            return output * marks[name] + sum(0 * one.sum() for one in read)

        return hook

    layers = {name: module for name, module in model.named_modules() if _own_tensors(module)}
    handles = [module.register_forward_hook(hook_for(name)) for name, module in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _without_use(model: PreTrainedModel, output: str) -> set[str]:
    """Layers that run and do not matter for `output`: poolers, say. None where the empty model cannot run.

    Args:
        model: on the meta device.
        output: of the model.
    """
    marks: dict[str, Tensor] = {}
    try:
        with torch.enable_grad(), model.device, _marked(model, marks):
            answer = model(**blank_inputs(model))[output]
            found = torch.autograd.grad(answer.sum(), list(marks.values()), allow_unused=True)
    except CANNOT_RUN:
        return set()
    return {name for name, gradient in zip(marks, found, strict=True) if gradient is None}


def predict_bytes(model: PreTrainedModel, task: str) -> Prediction:
    """The bytes of the file that `model` becomes.

    Args:
        model: with the student's layers; on the meta device or any other; left as it was.
        task: decides which output the file has.
    """
    twin = on_meta(model)
    with swapped(twin, onnx_forms(twin)):
        idle = _without_use(twin, OUTPUTS[task])
        layers = {name: m for name, m in twin.named_modules(remove_duplicate=False) if _own_tensors(m)}
        found: dict[int, int] = {}
        for name, module in layers.items():
            if name not in idle:
                found |= {id(tensor): tensor.nbytes for tensor in _own_tensors(module)}
    return Prediction(sum(found.values()), _LAYER_BYTES * (len(layers) - len(idle)), frozenset(idle))


def judge_bytes(prediction: Prediction, size_bytes: int, *, tolerance: float, where: str) -> None:
    """Accept the size of a file, or refuse it.

    Raises:
        RunFailedError: more than `allowance` apart.
    """
    apart = size_bytes - prediction.size_bytes
    if abs(apart) > prediction.allowance(tolerance):
        word = "larger" if apart > 0 else "smaller"
        raise RunFailedError(
            f"the file has {size_bytes:,} bytes, {abs(apart):,} {word} than the student's shapes say "
            f"({prediction.size_bytes:,}); {tolerance:.0%} of the weights and {prediction.graph + _ROOM_BYTES:,} bytes "
            f"for the graph may differ",
            where=where,
            fix="try 'fuse: false', or another opset; max_size_error moves the bound",
        )
