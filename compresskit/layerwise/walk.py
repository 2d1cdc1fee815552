"""The block-by-block walk: calibration text runs through the student, the original beside it, one block at a time.

At every input site of a block the moments of its input x and its target t are collected on the student as it is now,
upstream changes included, and handed to the pass, which changes the layers there before the walk goes on. So errors of
earlier blocks, sites and passes are seen by the later ones, which can repair them:

    inside a branch            t = (1 − α) y + α y₀            y the layer's answer today, y₀ the original layer's
    at a writer of the stream  t = y + α (s₀ − s)              s the residual stream after the addition
    where that is not seen     t = y                           the output is normalised or scaled before the addition

Of image models the tokens are what the first block makes of each image: its patches. Outputs that were pruned away are
left out of y₀. Where blocks were dropped, y₀ and s₀ are those of the block that the student's block was in the
original, s₀ with what the blocks between did: the first writer after a gap is asked for it. Memory: both models, the
moments of one site, and of all calibration tokens the hidden states at one depth and, where anchored, the original's
outputs at the sites of one block that are still to be visited.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compresskit.data import Batch, Examples, Sequences
from compresskit.data.sequences import require_tokens
from compresskit.errors import CompressKitError
from compresskit.layers.linear import layer_widths
from compresskit.layerwise.chain import check_chain, hidden_of, real_tokens
from compresskit.layerwise.moments import Moments, SiteMoments
from compresskit.layerwise.watch import AllSeenError, Watch, check_token_rows, replaced_forwards
from compresskit.layerwise.weights import stacked_weight
from compresskit.progress import track
from compresskit.student import Student
from compresskit.surgery.modes import without_cache
from compresskit.surgery.provenance import Provenance
from compresskit.surgery.sites import Site, find_blocks

#: Sequences without which nothing can be kept apart to choose the shrinkage by.
LEAST_CALIBRATION = 2
#: Numbers of inputs and targets that are copied to float64 together; a whole batch of a wide layer is too much memory.
_NUMBERS_IN_DOUBLE = 2**21


@dataclass(frozen=True)
class BlockBatch:
    """One batch at a block that all sites of were visited.

    Attributes:
        run: what the student's block gives for it as it is now, (batch, length, width).
        target: what the original's gave, of the same shape.
        rows: flat indices of real tokens.
    """

    run: Callable[[], Tensor]
    target: Tensor
    rows: Tensor


_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class _Lane:
    """One batch on its way: what each block is called with, and the hidden states before the current block.

    Attributes:
        calls: positional and named arguments of each block but the hidden states; the same tensors in all.
        original_calls: those of the original's blocks, where it has others.
        student, original: hidden states, (batch, length, width); the original's only where anchored.
        beside: of the current block of the original, the outputs (tokens, O) of each target layer that is still to be
            visited, padding included, and under `…+` the stream after they were added.
        rows: flat indices of real tokens: of the sequences to fit on, and of those held out.
    """

    calls: Sequence[_Arguments]
    original_calls: Sequence[_Arguments]
    student: Tensor
    original: Tensor | None
    rows: tuple[Tensor, Tensor]
    beside: dict[str, Tensor] = field(default_factory=dict)

    def run(self, block: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """What a block of the student gives, (batch, length, width)."""
        return _call(block, self.calls[index], hidden)

    def run_original(self, block: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """What a block of the original gives, (batch, length, width)."""
        return _call(block, self.original_calls[index], hidden)

    def forget(self, names: Iterable[str]) -> None:
        """Drop what these layers of the original gave: each is visited once."""
        for name in names:
            self.beside.pop(name, None)
            self.beside.pop(f"{name}+", None)


def _call(block: nn.Module, arguments: _Arguments, hidden: Tensor) -> Tensor:
    args, kwargs = arguments
    if "hidden_states" in kwargs:
        return hidden_of(block(*args, **(kwargs | {"hidden_states": hidden})))
    return hidden_of(block(hidden, *args, **kwargs))


def _block_calls(model: nn.Module, blocks: Sequence[str], batch: Batch) -> tuple[list[Any], Tensor]:
    """How the model calls each of `blocks` (without the hidden states), and the hidden states before the first.

    Only the first block is computed: the others give what it gave, which has the right shape and type. The model is
    left at the last, so that what follows (an output head, say) is not computed either.
    """
    modules = [model.get_submodule(name) for name in blocks]
    calls: list[Any] = []
    first: list[Tensor] = []
    output: list[Any] = []

    def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if "hidden_states" in kwargs:
            hidden, rest = kwargs["hidden_states"], (args, kwargs | {"hidden_states": None})
        else:
            hidden, rest = args[0], (args[1:], kwargs)
        if not first:
            first.append(hidden)
        calls.append(rest)
        if len(calls) == len(modules):
            raise AllSeenError

    handles = [module.register_forward_pre_hook(record, with_kwargs=True) for module in modules]
    handles.append(modules[0].register_forward_hook(lambda _module, _args, given: output.append(given)))
    try:
        with replaced_forwards(modules[1:], lambda *args, **kwargs: output[0]):
            model(**batch)
    except AllSeenError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return calls, first[0]


def held_out(calibration: Examples) -> Tensor:
    """Which examples are kept apart to choose the shrinkage by, (examples,) bool: every fourth; of fewer, the last.

    Raises:
        CompressKitError: one example.
    """
    count = len(calibration)
    if count < LEAST_CALIBRATION:
        raise CompressKitError(
            "one calibration example is too few: some are fitted on, others choose how far to trust the fit",
            where="data.calibration",
            fix=f"use calibration: {LEAST_CALIBRATION} or more (hundreds are better)",
        )
    period = min(4, count)
    return torch.arange(count) % period == period - 1


def _split_rows(batch: Batch, tokens: torch.Size, held: Tensor) -> tuple[Tensor, Tensor]:
    """Flat indices of real ones among (batch, length) tokens: of sequences that are not `held` (batch,), and are."""
    real = real_tokens(batch, tokens)
    return (real & ~held[:, None]).flatten().nonzero()[:, 0], (real & held[:, None]).flatten().nonzero()[:, 0]


class Walk:
    """One walk of a pass over the blocks of a student.

    Args:
        student: its model is changed by `solve`; its original is only read.
        anchor: α in [0, 1]; at 0 the original is not run, unless `finish` needs it.
        finish: called after the sites of each block, with the block's name and batches.
        batch_tokens: tokens run together, padding included.
    """

    def __init__(
        self,
        student: Student,
        *,
        anchor: float,
        finish: Callable[[str, list[BlockBatch]], None] | None = None,
        batch_tokens: int = 2048,
    ) -> None:
        self._student, self._anchor, self._finish = student, anchor, finish
        self._blocks = find_blocks(student.model)
        self._provenance = Provenance(student.edits)
        self._original_blocks = find_blocks(student.reference)
        self._original_modules = dict(student.reference.named_modules())
        self._batch_tokens = batch_tokens

    @torch.no_grad()
    def run(self, sites: Iterable[Site], solve: Callable[[Site, SiteMoments], None], *, label: str) -> None:
        """Visit `sites` (in execution order); `solve` gets each one's moments and changes its layers.

        Args:
            sites: input sites, as `find_anatomy` lists them; their names must stay valid until they are visited.
            solve: called once a site.
            label: shown beside the progress bar.
        """
        for index, here, lanes in self._visits(sites, label):
            self._advance_original(index, here, lanes)
            for site in here:
                solve(site, self._collect(site, lanes))
            if here and self._finish:
                self._finish(self._blocks[index], self._block_batches(index, lanes))
            self._advance_student(index, lanes)

    @torch.no_grad()
    def observe(self, sites: Iterable[Site], look: Callable[[Site, SiteMoments], None], *, label: str) -> None:
        """The moments of the inputs of `sites` alone, on a model that stays as it is: a block runs once for all."""
        for index, here, lanes in self._visits(sites, label):
            block = self._student.model.get_submodule(self._blocks[index])
            modules = {site.linears[0]: self._student.model.get_submodule(site.linears[0]) for site in here}
            widths = {name: layer_widths(module)[1] for name, module in modules.items()}
            sums = {name: (Moments.zeros(width, 0), Moments.zeros(width, 0)) for name, width in widths.items()}
            for lane in lanes:
                watch = Watch({}, read=modules, stop_early=False)
                given = watch.run(partial(lane.run, block, index, lane.student))
                assert given is not None
                lane.student = given
                for name, x in watch.inputs.items():
                    check_token_rows(name, x, lane.student.shape[:2])
                    for moments, all_rows in zip(sums[name], lane.rows, strict=True):
                        for rows in _parts(all_rows, x.shape[-1]):
                            moments.update_input(_flat(x)[rows])
            for site in here:
                fit, held_out = sums[site.linears[0]]
                self._check_reached(site, fit.count + held_out.count)
                look(site, SiteMoments(fit, held_out))

    def _visits(self, sites: Iterable[Site], label: str) -> Iterator[tuple[int, list[Site], list[_Lane]]]:
        """Each block's index and sites, up to the last that has any, and the batches on their way."""
        by_block: dict[int, list[Site]] = {}
        for site in sites:
            by_block.setdefault(site.block, []).append(site)
        with without_cache(self._student.model), without_cache(self._student.reference):
            require_tokens(self._student.corpus.calibration)
            check_chain(self._student.model, next(self._student.corpus.calibration.batches(2)))
            lanes = self._open_lanes()
            for index in track(range(max(by_block) + 1), label):
                yield index, by_block.get(index, []), lanes

    def _check_reached(self, site: Site, tokens: int) -> None:
        """Refuse a site whose inputs no token showed."""
        if not tokens:
            raise CompressKitError(
                "no token of the calibration text reaches this layer: there is nothing to fit it to",
                where=site.linears[0],
                fix="leave it out of targets, or calibrate on text that uses it",
            )

    def _open_lanes(self) -> list[_Lane]:
        student, original = self._student.model, self._student.reference
        lanes, sequences = [], 0
        calibration = self._student.corpus.calibration.by_length()
        held = held_out(calibration)
        for batch in calibration.batches(max(1, self._batch_tokens // self._longest(calibration))):
            calls, hidden = _block_calls(student, self._blocks, batch)
            original_calls, beside = calls, None
            if self._anchor or self._finish:
                other = self._original_blocks != self._blocks
                original_calls, beside = _block_calls(original, self._original_blocks[: None if other else 1], batch)
                original_calls = original_calls if other else calls
            split = _split_rows(batch, hidden.shape[:2], held[sequences : sequences + len(hidden)])
            lanes.append(_Lane(calls, original_calls, hidden, beside, split))
            sequences += len(hidden)
        return lanes

    def _longest(self, calibration: Examples) -> int:
        """Tokens of the longest of these sequences, which is the last, or of any of these images."""
        if isinstance(calibration, Sequences):
            return len(calibration.rows[-1])
        return _block_calls(self._student.model, self._blocks[:1], next(calibration.batches(1)))[1].shape[1]

    def _advance_original(self, index: int, sites: Sequence[Site], lanes: list[_Lane]) -> None:
        """Run the original up to and with the block that the student's was, keeping what its layers at `sites` give."""
        now = self._number(index)
        block = self._student.reference.get_submodule(self._original_blocks[now])
        watched = sites if self._anchor else ()
        names = {self._original_name(name): site for site in watched for name in site.linears}
        linears = {name: self._original_modules[name] for name in names if name in self._original_modules}
        writers = [name for name in linears if names[name].writes_stream]
        for lane in lanes:
            if lane.original is None:
                return
            for dropped in range(self._number(index - 1) + 1 if index else 0, now):
                module = self._student.reference.get_submodule(self._original_blocks[dropped])
                lane.original = lane.run_original(module, dropped, lane.original)
            watch = Watch(linears, writers, read={}, stop_early=False)
            lane.original = watch.run(partial(lane.run_original, block, now, lane.original))
            lane.beside = {name: _flat(output) for name, output in watch.outputs.items()}
            lane.beside |= {f"{name}+": _flat(stream) for name, stream in watch.streams.items()}

    def _number(self, index: int) -> int:
        """Which of the original's blocks the student's block `index` is."""
        return self._original_blocks.index(self._original_name(self._blocks[index]))

    def _block_batches(self, index: int, lanes: list[_Lane]) -> list[BlockBatch]:
        block = self._student.model.get_submodule(self._blocks[index])
        return [
            BlockBatch(partial(lane.run, block, index, lane.student), lane.original, torch.cat(lane.rows))
            for lane in lanes
            if lane.original is not None
        ]

    def _advance_student(self, index: int, lanes: list[_Lane]) -> None:
        block = self._student.model.get_submodule(self._blocks[index])
        for lane in lanes:
            lane.student = lane.run(block, index, lane.student)

    def _original_name(self, name: str) -> str:
        """The original's layer that gives what this one gives: a low-rank layer's last factor stands for the layer."""
        return self._provenance.original_name(name.removesuffix(".expand"))

    def _collect(self, site: Site, lanes: list[_Lane]) -> SiteMoments:
        linears = {name: self._student.model.get_submodule(name) for name in site.linears}
        weight, bias = stacked_weight(list(linears.values()))
        fit, held_out = (Moments.zeros(weight.shape[1], weight.shape[0]) for _ in range(2))
        anchored = self._is_anchored(site, lanes[0])
        # What the layers give today is read only where it is a part of the target.
        read_outputs = anchored and (site.writes_stream or self._anchor < 1)
        block = self._student.model.get_submodule(self._blocks[site.block])
        reader = {site.linears[0]: linears[site.linears[0]]}
        for lane in lanes:
            writers = site.linears if anchored and site.writes_stream else ()
            watch = Watch(linears if read_outputs else {}, writers, read=reader, stop_early=True)
            watch.run(partial(lane.run, block, site.block, lane.student))
            if site.linears[0] not in watch.inputs:
                continue
            check_token_rows(site.linears[0], watch.inputs[site.linears[0]], lane.student.shape[:2])
            x = _flat(watch.inputs[site.linears[0]])
            for moments, all_rows in zip((fit, held_out), lane.rows, strict=True):
                for rows in _parts(all_rows, sum(weight.shape)):
                    if anchored:
                        moments.update(x[rows], self._target(site, lane, watch, rows))
                    else:
                        moments.update_input(x[rows])
            lane.forget([self._original_name(name) for name in site.linears])
        self._check_reached(site, fit.count + held_out.count)
        moments = SiteMoments(fit, held_out)
        return moments if anchored else moments.with_linear_target(weight, bias)

    def _is_anchored(self, site: Site, lane: _Lane) -> bool:
        """Whether the original says what the site should give: its layers' outputs, or the stream they are added to.

        A writer whose output is normalised or scaled before the addition (Gemma 3, OLMo 2, Granite) is not anchored:
        its stream is not seen, and its own original output makes students worse.
        """
        names = [self._original_name(name) for name in site.linears]
        return all((f"{name}+" if site.writes_stream else name) in lane.beside for name in names)

    def _target(self, site: Site, lane: _Lane, watch: Watch, rows: Tensor) -> Tensor:
        """t (tokens, O) of the tokens `rows` of one batch."""
        first = site.linears[0]
        given = [_flat(watch.outputs[name])[rows] for name in site.linears if name in watch.outputs]
        if site.writes_stream:
            was, now = lane.beside[f"{self._original_name(first)}+"], _flat(watch.streams[first])
            return torch.cat(given, dim=1) + self._anchor * (was[rows] - now[rows])
        keep = self._provenance.left_of
        y0 = [keep(name.removesuffix(".expand"), lane.beside[self._original_name(name)][rows]) for name in site.linears]
        target = torch.cat(y0, dim=1)
        return torch.lerp(torch.cat(given, dim=1), target, self._anchor) if given else target


def _parts(rows: Tensor, width: int) -> tuple[Tensor, ...]:
    """`rows` in parts of tokens that may be copied to float64 together, `width` numbers each."""
    return rows.split(max(1, _NUMBERS_IN_DOUBLE // width))


def _flat(hidden: Tensor) -> Tensor:
    """(batch, length, width) as (batch · length, width)."""
    return hidden.reshape(-1, hidden.shape[-1])
