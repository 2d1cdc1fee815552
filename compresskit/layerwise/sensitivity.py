"""Which errors of a layer's output matter: the Fisher information of the model's answer.

    KL(answer ‖ answer with y + e) ≈ ½ eᵀ F e        F = E[g gᵀ],  g = ∂ log p(label) / ∂ y,  labels drawn from p

One forward and one backward pass over calibration text give F for every layer: no label, no training. An error that is
small for F is small in the answer, so layers of all kinds can be compared by it, and ½ of the error in the metric F is
how many nats a token it costs, as long as it is small.
Sources: Fisher-weighted low rank (FWSVD, arXiv:2207.00112) takes one number a row; the whole F of a layer's outputs
is the second factor of K-FAC (arXiv:1503.05671). Departure: of a tall weight only its range is kept, because no other
error can be made there.
"""

# T tokens, O out, I in, r min(I, O)

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresskit.data import Batch
from compresskit.layerwise.answer import read_answer, sampled_gradient
from compresskit.layerwise.output_pca import OutputMetric
from compresskit.layerwise.ranks import Group
from compresskit.layerwise.watch import check_token_rows
from compresskit.layerwise.weights import stacked_weight
from compresskit.models import answer_kind
from compresskit.surgery.modes import without_cache
from compresskit.surgery.sites import find_blocks

#: What every direction counts beside what was measured, in units of the mean: few tokens leave some at zero. Of 0.01
#: and 0.1 the latter left 5 % less KL on both texts (SmolLM2-135M, keep 0.8, 4096 tokens, one seed).
_DAMPING = 0.1
#: The same where no gradient at all reaches a layer.
_NOTHING = 1e-12


def range_basis(weight: Tensor) -> Tensor | None:
    """Orthonormal columns (O, I) float64 that span the outputs of a tall weight (O, I); None for a wide one."""
    return torch.linalg.qr(weight.double())[0] if weight.shape[0] > weight.shape[1] else None


@dataclass
class Fisher:
    """Sums over tokens of a group of layers that read the same input, their outputs stacked.

    Attributes:
        matrix: Qᵀ (Σ g gᵀ) Q, (r, r) float32, with Q the `range_basis` of the group's weight.
        power: Σ ‖g‖². count: tokens. outputs: O.
    """

    matrix: Tensor
    power: float
    count: int
    outputs: int

    def metric(self, weight: Tensor | None = None) -> OutputMetric:
        """F as a quadratic form for the group's stacked weight (O, I), today's; None for a block."""
        G = self.matrix.double() / max(self.count, 1)
        mean = self.power / max(self.count, 1) / self.outputs
        beyond = self.outputs - len(G)
        rest = max(self.power / max(self.count, 1) - float(G.trace()), 0.0) / beyond if beyond else mean
        damping = max(_DAMPING * mean, _NOTHING)
        G.diagonal().add_(damping)
        return OutputMetric(None if weight is None else range_basis(weight), G, rest + damping)


def collect_fisher(
    model: PreTrainedModel, batches: Iterable[Batch], groups: Sequence[Group], generator: torch.Generator
) -> dict[Group, Fisher]:
    """The Fisher information of the outputs of each group, and of each block's output, on the model as it is.

    Args:
        model: weights are not changed and get no gradient.
        batches: a few hundred tokens each: the whole graph of one is in memory.
        groups: names of linears that read the same input; a linear may be in several groups.
        generator: draws the labels.

    Cost: a forward and a backward pass, and T (O r + r²) products a group.
    """
    sums = {group: _empty(model, group) for group in groups}
    width = int(model.config.get_text_config().hidden_size)
    for block in find_blocks(model):
        sums[block,] = Fisher(torch.zeros(width, width), 0.0, 0, width), None
    with _frozen(model), without_cache(model), torch.enable_grad():
        for batch in batches:
            _add_batch(model, batch, sums, generator)
    return {group: fisher for group, (fisher, _) in sums.items()}


def _empty(model: nn.Module, group: Group) -> tuple[Fisher, Tensor | None]:
    weight, _ = stacked_weight([model.get_submodule(name) for name in group])
    size = min(weight.shape)
    basis = range_basis(weight)
    return Fisher(torch.zeros(size, size), 0.0, 0, len(weight)), None if basis is None else basis.float()


def _add(fisher: Fisher, g: Tensor, basis: Tensor | None) -> None:
    fisher.power += float(g.double().square().sum())
    fisher.count += len(g)
    projected = g.float() if basis is None else g.float() @ basis
    fisher.matrix.addmm_(projected.T, projected)


def _add_batch(
    model: PreTrainedModel, batch: Batch, sums: Mapping[Group, tuple[Fisher, Tensor | None]], generator: torch.Generator
) -> None:
    """Add g = ∂ log p(label) / ∂ y at every real token to each group; a gradient goes once its last group has it."""
    groups = {name: [group for group in sums if name in group] for group in sums for name in group}
    waiting: dict[Group, dict[str, Tensor]] = {group: {} for group in sums}
    real = batch["attention_mask"].bool().flatten()

    def arrive(name: str, gradient: Tensor) -> None:
        check_token_rows(name, gradient, batch["attention_mask"].shape)
        rows = gradient.flatten(0, -2)[real]
        for group in groups[name]:
            waiting[group][name] = rows
            if len(waiting[group]) == len(group):
                there = waiting.pop(group)
                _add(sums[group][0], torch.cat([there[one] for one in group], dim=1), sums[group][1])

    def watch(name: str, _module: nn.Module, _args: object, given: Tensor | tuple[Tensor, ...]) -> None:
        output = given if isinstance(given, Tensor) else given[0]
        output.register_hook(partial(arrive, name))

    handles = [model.get_submodule(name).register_forward_hook(partial(watch, name)) for name in groups]
    first = model.get_submodule(find_blocks(model)[0])
    handles.append(first.register_forward_pre_hook(_begin_graph, with_kwargs=True))
    try:
        answer = read_answer(model, batch)
        answer.backward(sampled_gradient(answer.detach(), generator, kind=answer_kind(model)))
    finally:
        for handle in handles:
            handle.remove()


def _begin_graph(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The first block's hidden states as leaves of the graph; copied, because some models add to them in place."""
    if "hidden_states" in kwargs:
        return args, kwargs | {"hidden_states": kwargs["hidden_states"].detach().requires_grad_().clone()}
    return (args[0].detach().requires_grad_().clone(), *args[1:]), kwargs


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter takes part in a backward pass inside."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_()
