"""Which channels of a network go together, and which go: torch-pruning's dependency graph, under a time limit.

A channel that a layer gives is read by others, added to other layers' channels, normalised: it is cut in all of these
places or in none. torch-pruning (DepGraph, arXiv:2301.12900) finds the groups from one traced forward, and scores them
by criteria of its own. It works on a copy, in a child process that is ended when its time is over, because there are
networks on which it never ends (attention with grouped queries); what comes back is data for an edit.
"""

import copy
import importlib
import importlib.util
import multiprocessing
import warnings
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from compresskit.data import Batch
from compresskit.errors import CompressKitError
from compresskit.surgery.channel_edits import ChannelCut, misfit
from compresskit.surgery.edits import write_ranges

Importance = Literal["magnitude", "bn_scale", "lamp", "geometric_median", "taylor", "random"]
_CRITERIA: Mapping[Importance, tuple[str, dict[str, Any]]] = {
    "magnitude": ("GroupMagnitudeImportance", {"p": 2}),
    "bn_scale": ("BNScaleImportance", {}),
    "lamp": ("LAMPImportance", {}),
    "geometric_median": ("FPGMImportance", {}),
    "taylor": ("GroupTaylorImportance", {}),
    "random": ("RandomImportance", {}),
}


class _NoneLeftError(Exception):
    """A group of channels of which none would be left."""


def require_torch_pruning() -> None:
    """Refuse to go on without the package.

    Raises:
        CompressKitError: it is not installed.
    """
    if importlib.util.find_spec("torch_pruning") is None:
        what, fix = "prune_filters needs the package torch-pruning", "pip install 'compresskit[filters]'"
        raise CompressKitError(what, where="prune_filters", fix=fix)


def choose_channels(
    model: PreTrainedModel,
    batch: Batch,
    *,
    keep: float,
    importance: Importance,
    round_to: int,
    fixed: tuple[str, ...],
    seed: int,
    limit_s: float,
) -> tuple[ChannelCut, ...]:
    """The channels that stay of every layer that loses some.

    Args:
        model: not changed; for `taylor` with gradients.
        batch: two examples, say; on the meta device where the model is.
        keep: share of each group of channels that stays, a multiple of `round_to` at or below it.
        fixed: layers that keep all that they give (the head).
        seed: of the criterion `random`.
        limit_s: seconds after which it is given up.

    Raises:
        CompressKitError: torch-pruning is absent, does not end in time, or cannot follow this network; channels that
            are cut in layers that the edit does not know.
    """
    require_torch_pruning()
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    arguments = (theirs, model, batch, keep, importance, round_to, fixed, seed)
    child = context.Process(target=_answer, args=arguments, daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork beside threads: the child starts none
        child.start()
    theirs.close()
    try:
        answer: Any = ours.recv() if ours.poll(limit_s) else None
    except EOFError:
        answer = f"torch-pruning's process ended with status {child.exitcode}"
    finally:
        child.kill()
        child.join()
        ours.close()
    if isinstance(answer, _NoneLeftError):
        what = f"{answer}, in multiples of {round_to}, leaves none"
        raise CompressKitError(what, where="keep", fix="use a larger keep or a smaller round_to")
    where, fix = type(model).__name__, "use prune_width or prune_depth, or another model"
    if answer is None:
        raise CompressKitError(f"torch-pruning found no end within {limit_s:g} seconds", where=where, fix=fix)
    if isinstance(answer, str):
        raise CompressKitError(f"torch-pruning cannot follow this network: {answer}", where=where, fix=fix)
    return tuple(_to_cut(model, name, sides, where) for name, sides in answer.items())


def _to_cut(model: nn.Module, name: str, sides: dict[str, list[int]], where: str) -> ChannelCut:
    modules = dict(model.named_modules())
    why = misfit(modules[name]) if name in modules else "a parameter outside layers"
    if why:
        what = f"channels of {name} should go, and it is {why}"
        raise CompressKitError(what, where=where, fix="use another model, or tensor for its convolutions")
    return ChannelCut(module=name, **{side: write_ranges(kept) for side, kept in sides.items()})


def _answer(pipe: Connection, *arguments: Any) -> None:
    """In the child: send the cuts, or in words why there are none."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            pipe.send(_find_cuts(*arguments))
        except _NoneLeftError as error:
            pipe.send(error)
        except (
            RuntimeError,
            ValueError,
            TypeError,
            AttributeError,
            LookupError,
            AssertionError,
            ArithmeticError,
        ) as error:
            pipe.send((str(error).splitlines() or [type(error).__name__])[0])


def _find_cuts(
    model: PreTrainedModel,
    batch: Batch,
    keep: float,
    importance: Importance,
    round_to: int,
    fixed: tuple[str, ...],
    seed: int,
) -> dict[str, dict[str, list[int]]]:
    """By layer name and side (outputs, inputs) the channels that are left."""
    library: Any = importlib.import_module("torch_pruning")
    torch.manual_seed(seed)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    own, batch = _materialised(model), {name: _real(tensor) for name, tensor in batch.items()}
    for name, parameter in own.named_parameters():
        parameter.requires_grad_().grad = gradients[name]
    named = {id(part): name for part_of in (own.named_modules(), own.named_parameters()) for name, part in part_of}
    criterion, options = _CRITERIA[importance]
    pruner = library.pruner.BasePruner(
        own,
        batch,
        importance=getattr(library.importance, criterion)(**options),
        pruning_ratio=1 - keep,
        round_to=round_to,
        ignored_layers=[own.get_submodule(name) for name in fixed],
        forward_fn=lambda network, inputs: network(**inputs),
        output_transform=lambda output: output[0],
    )
    widths = {id(m): (pruner.DG.get_out_channels(m), pruner.DG.get_in_channels(m)) for m in pruner.layer_init_out_ch}
    for group in pruner.DG.get_all_groups(
        ignored_layers=pruner.ignored_layers, root_module_types=pruner.root_module_types
    ):
        root = group[0].dep.target.module
        if int(widths[id(root)][0] * keep) < round_to:  # torch-pruning leaves such a group as it is
            raise _NoneLeftError(f"{keep} of the {widths[id(root)][0]} channels of {named[id(root)]}")
    cuts: dict[str, dict[str, list[int]]] = {}
    for group in pruner.step(interactive=True):
        for dependency, indices in group:
            part = dependency.target.module
            if id(part) not in named:
                continue  # additions and the like
            gives = pruner.DG.is_out_channel_pruning_fn(dependency.handler)
            gone = set(indices)
            left = [index for index in range(widths[id(part)][0 if gives else 1]) if index not in gone]
            cuts.setdefault(named[id(part)], {})["outputs" if gives else "inputs"] = left
        group.prune()
    return cuts


def _materialised(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model; of one without memory one with zeros."""
    own = copy.deepcopy(model).eval()
    if any(tensor.is_meta for tensor in own.parameters()):
        own = own.to_empty(device="cpu")
        for tensor in [*own.parameters(), *own.buffers()]:
            tensor.data.zero_()
    return own


def _real(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor
