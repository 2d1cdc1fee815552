"""The block-by-block walk: calibration text runs through the student, the original beside it, one block at a time.

At every input site of a block the moments of its input x and its target t are collected on the student as it is now,
upstream changes included, and handed to the pass, which changes the layers there before the walk goes on. So errors of
earlier blocks, sites and passes are seen by the later ones, which can repair them:

    inside a branch            t = (1 − α) y + α y₀            y the layer's answer today, y₀ the original layer's
    at a writer of the stream  t = y + α (s₀ − s)              s the residual stream after the addition

Outputs that were pruned away are left out of y₀. Memory: both models, the hidden states of all calibration tokens at
one depth (twice where anchored), and the moments of one site.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from compresskit.data import Batch
from compresskit.layerwise.moments import Moments
from compresskit.layerwise.weights import stacked_weight
from compresskit.progress import track
from compresskit.student import Student
from compresskit.surgery.provenance import kept_outputs
from compresskit.surgery.sites import Site, find_blocks, without_cache

_ADDITIONS = {torch.add, torch.Tensor.add, torch.Tensor.add_, torch.Tensor.__add__, torch.Tensor.__radd__}
_ADDITIONS.add(torch.Tensor.__iadd__)


@dataclass(frozen=True)
class SiteMoments:
    """Moments of one site: of the sequences to fit on, and of the quarter kept apart to choose the shrinkage by."""

    fit: Moments
    held_out: Moments

    @property
    def all(self) -> Moments:
        """Both together."""
        return self.fit + self.held_out


class _SiteSeenError(Exception):
    """Ends a block's forward as soon as everything wanted from it is there."""


class _Watch(TorchFunctionMode):
    """Records a site's input, its linears' outputs, and the sum that the first of them is added into.

    Args:
        linears: modules of the site, in order.
        want_stream: wait for the addition of the first linear's output to another tensor.
    """

    def __init__(self, linears: Sequence[nn.Module], *, want_stream: bool) -> None:
        super().__init__()
        self.input: Tensor | None = None
        self.outputs: list[Tensor | None] = [None] * len(linears)
        self.stream: Tensor | None = None
        self._want_stream = want_stream
        self._handles = [
            linear.register_forward_hook(partial(self._saw, index)) for index, linear in enumerate(linears)
        ]

    def _saw(self, index: int, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.input, self.outputs[index] = args[0], output
        if not self._want_stream and all(seen is not None for seen in self.outputs):
            raise _SiteSeenError

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`; where it adds the watched output, keep the sum."""
        result = func(*args, **(kwargs or {}))
        output = self.outputs[0]
        if self._want_stream and output is not None and func in _ADDITIONS and _one_is(output, args[:2]):
            self.stream = result
            raise _SiteSeenError
        return result

    def run(self, call: Callable[[], Any]) -> None:
        """Run a block under watch; it is left as soon as all is seen."""
        try:
            with self:
                call()
        except _SiteSeenError:
            pass
        finally:
            for handle in self._handles:
                handle.remove()


def _one_is(output: Tensor, args: Sequence[Any]) -> bool:
    """Whether an argument is `output`, by address: dropout in eval mode may hand on an alias."""
    return any(isinstance(a, Tensor) and a.data_ptr() == output.data_ptr() for a in args)


@dataclass
class _Lane:
    """One batch on its way: what each block is called with, and the hidden states before the current block."""

    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    student: Tensor
    original: Tensor | None
    fit_rows: Tensor
    held_out_rows: Tensor

    def run(self, block: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """The block's output hidden states, (batch, length, width)."""
        args, kwargs = self.calls[index]
        if "hidden_states" in kwargs:
            output = block(*args, **(kwargs | {"hidden_states": hidden}))
        else:
            output = block(hidden, *args, **kwargs)
        return output if isinstance(output, Tensor) else output[0]


def _block_calls(model: nn.Module, blocks: Sequence[str], batch: Batch) -> tuple[list[Any], Tensor]:
    """How the model calls each block (without the hidden states), and the hidden states before the first."""
    calls: list[Any] = []
    first: list[Tensor] = []

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if "hidden_states" in kwargs:
            hidden, rest = kwargs["hidden_states"], (args, kwargs | {"hidden_states": None})
        else:
            hidden, rest = args[0], (args[1:], kwargs)
        if not first:
            first.append(hidden)
        calls.append(rest)

    handles = [model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True) for name in blocks]
    try:
        model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return calls, first[0]


def _first_hidden(model: nn.Module, block: str, batch: Batch) -> Tensor:
    """The hidden states before the first block, without running the blocks."""
    seen: list[Tensor] = []

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
        raise _SiteSeenError

    handle = model.get_submodule(block).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        model(**batch)
    except _SiteSeenError:
        pass
    finally:
        handle.remove()
    return seen[0]


def _split_rows(batch: Batch, first_sequence: int) -> tuple[Tensor, Tensor]:
    """Flat indices of real tokens: of three sequences in four, and of the fourth."""
    real = batch["attention_mask"].bool()
    held = (torch.arange(first_sequence, first_sequence + len(real)) % 4 == 3)[:, None]
    return (real & ~held).flatten().nonzero()[:, 0], (real & held).flatten().nonzero()[:, 0]


class Walk:
    """One walk of a pass over the blocks of a student.

    Args:
        student: its model is changed by `solve`; its original is only read.
        anchor: α in [0, 1]; at 0 the original is not run.
        batch_size: sequences run together.
    """

    def __init__(self, student: Student, *, anchor: float, batch_size: int = 8) -> None:
        self._student, self._anchor = student, anchor
        self._blocks = find_blocks(student.model)
        self._kept = kept_outputs(student.edits)
        self._original_modules = dict(student.original.named_modules())
        self._batch_size = batch_size

    @torch.no_grad()
    def run(self, sites: Iterable[Site], solve: Callable[[Site, SiteMoments], None], *, label: str) -> None:
        """Visit `sites` (in execution order); `solve` gets each one's moments and changes its layers.

        Args:
            sites: input sites, as `find_anatomy` lists them; their names must stay valid until they are visited.
            solve: called once a site.
            label: shown beside the progress bar.
        """
        by_block: dict[int, list[Site]] = {}
        for site in sites:
            by_block.setdefault(site.block, []).append(site)
        with without_cache(self._student.model), without_cache(self._student.original):
            lanes = self._open_lanes()
            for index in track(range(len(self._blocks)), label):
                for site in by_block.get(index, ()):
                    solve(site, self._collect(site, lanes))
                if index >= max(by_block):
                    break
                self._advance(index, lanes)

    def _open_lanes(self) -> list[_Lane]:
        student, original = self._student.model, self._student.original
        lanes, sequences = [], 0
        for batch in self._student.corpus.calibration.batches(self._batch_size):
            calls, hidden = _block_calls(student, self._blocks, batch)
            beside = _first_hidden(original, self._blocks[0], batch) if self._anchor else None
            lanes.append(_Lane(calls, hidden, beside, *_split_rows(batch, sequences)))
            sequences += len(batch["input_ids"])
        return lanes

    def _advance(self, index: int, lanes: list[_Lane]) -> None:
        block = self._student.model.get_submodule(self._blocks[index])
        beside = self._student.original.get_submodule(self._blocks[index])
        for lane in lanes:
            lane.student = lane.run(block, index, lane.student)
            if lane.original is not None:
                lane.original = lane.run(beside, index, lane.original)

    def _originals(self, site: Site) -> list[nn.Module] | None:
        """The original's layers at this site; None where it has none (the first of two factors)."""
        names = [name.removesuffix(".expand") for name in site.linears]
        if not self._anchor or not all(name in self._original_modules for name in names):
            return None
        return [self._original_modules[name] for name in names]

    def _collect(self, site: Site, lanes: list[_Lane]) -> SiteMoments:
        linears = [self._student.model.get_submodule(name) for name in site.linears]
        originals = self._originals(site)
        weight, bias = stacked_weight(linears)
        fit, held_out = (Moments.zeros(weight.shape[1], weight.shape[0]) for _ in range(2))
        for lane in lanes:
            if originals is None:
                x = _flat(self._watch(linears, lane, self._student.model, lane.student, site.block, False).input)
                fit.update_input(x[lane.fit_rows])
                held_out.update_input(x[lane.held_out_rows])
            else:
                x, t = self._input_and_target(site, lane, linears, originals)
                fit.update(x[lane.fit_rows], t[lane.fit_rows])
                held_out.update(x[lane.held_out_rows], t[lane.held_out_rows])
        if originals is None:
            fit, held_out = fit.with_linear_target(weight, bias), held_out.with_linear_target(weight, bias)
        return SiteMoments(fit, held_out)

    def _input_and_target(
        self, site: Site, lane: _Lane, linears: list[nn.Module], originals: list[nn.Module]
    ) -> tuple[Tensor, Tensor]:
        """x (N, I) and t (N, O) of all positions of one batch, padding included."""
        assert lane.original is not None
        now = self._watch(linears, lane, self._student.model, lane.student, site.block, site.writes_stream)
        x = _flat(now.input)
        y = torch.cat([_flat(output) for output in now.outputs], dim=1)
        was = self._watch(originals, lane, self._student.original, lane.original, site.block, site.writes_stream)
        if now.stream is not None and was.stream is not None:
            return x, y + self._anchor * (_flat(was.stream) - _flat(now.stream))
        y0 = torch.cat(
            [self._keep(name, _flat(output)) for name, output in zip(site.linears, was.outputs, strict=True)], dim=1
        )
        return x, torch.lerp(y, y0, self._anchor)

    def _watch(
        self,
        linears: Sequence[nn.Module],
        lane: _Lane,
        model: nn.Module,
        hidden: Tensor,
        index: int,
        want_stream: bool,
    ) -> _Watch:
        watch = _Watch(linears, want_stream=want_stream)
        block = model.get_submodule(self._blocks[index])
        watch.run(lambda: lane.run(block, index, hidden))
        return watch

    def _keep(self, name: str, outputs: Tensor) -> Tensor:
        kept = self._kept.get(name.removesuffix(".expand"))
        return outputs if kept is None else outputs[:, kept]


def _flat(hidden: Tensor | None) -> Tensor:
    assert hidden is not None, "the site was not reached"
    return hidden.reshape(-1, hidden.shape[-1])
