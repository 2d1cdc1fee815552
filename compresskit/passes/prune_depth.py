"""Structured depth pruning: fewer blocks, or blocks without their attention or their FFN.

    before  h ← block₃(block₂(block₁(h)))                  h ← h + FFN(h)
    after   h ← block₃(block₁(h))                          h ← h

Which ones go is chosen on calibration text, one at a time, the others scored again after each (`layerwise.removal`):
by block influence, 1 − E[cos] of what a block reads and gives (ShortGPT, arXiv:2403.03853), or by the measured
divergence of the model's answer. Or a rule says it: `every: 2` keeps one of two (DistilBERT's initialisation, as
arXiv:1910.01108 tells it), `blocks` those that it lists. The weights that stay are not changed: a later pass with an
anchor asks its layers for what is missing, and `distill` trains them. A student of whole blocks is a stock checkpoint
where a config can say which they are. Not for small cuts, since a block is a large step; at the same size a narrower
model is better after training (Minitron, arXiv:2407.14679: loss 2.05 against 2.16).
`kl` is the default: SmolLM2-135M without 6 of its 30 blocks has a perplexity of 55.3 on wikitext-2 and 124.6 on another
domain, by `influence` 57.1 and 144.7 (19.5 and 54.5 before; one seed, calibrated on 32 windows of 256 tokens of
wikitext-2, `tools/bench_depth.py`). On MiniLM both take the same one of 6.
Departures: a block with layers that no other has, and that hands on more than hidden states (T5's first: the position
bias of all), never goes.
"""

import math
from collections import Counter
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresskit.data import Batch, Examples, Sequences
from compresskit.data.sequences import require_tokens
from compresskit.errors import CompressKitError
from compresskit.layers.empty_linear import EmptyLinear
from compresskit.layerwise.chain import check_chain
from compresskit.layerwise.removal import Divergences, Removal, Unit, choose_removals, influence
from compresskit.layerwise.survey import first_batches
from compresskit.passes.base import PASSES, Pass, TextPart, Trait
from compresskit.student import Student
from compresskit.surgery.depth_edits import DropBlocks, EmptyLinears, find_stack, get_stack
from compresskit.surgery.edits import Edit, write_ranges
from compresskit.surgery.modes import without_cache
from compresskit.surgery.sites import LinearLike, find_anatomy, obstacle

#: Calibration tokens, or images, that each score reads.
SCORE_TOKENS = {"influence": 4096, "kl": 1024}
SCORE_IMAGES = 64
#: Tokens, or images, that run together.
_TOGETHER, _IMAGES_TOGETHER = 512, 16
_UNITS = {"layer": "blocks", "attention": "attentions", "ffn": "FFNs"}


@PASSES.add
class PruneDepth(Pass):
    """Remove whole blocks, or attentions or FFNs of blocks."""

    kind: Literal["prune_depth"] = "prune_depth"
    keep: float | None = Field(default=None, gt=0, le=1, description="share of the blocks (or other units) that stays")
    every: int | None = Field(default=None, ge=2, description="instead: the first stays, and every n-th from it")
    blocks: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        default=None, min_length=1, description="instead: the numbers, from 0, of those that stay"
    )
    unit: Literal["layer", "attention", "ffn"] = Field(default="layer", description="what is removed from the blocks")
    score: Literal["influence", "kl"] = Field(
        default="kl",
        description="of keep: what goes first is what changes its input least, or what the answer misses least",
    )

    version: ClassVar[int] = 2
    adds: ClassVar[frozenset[Trait]] = frozenset({"pruned"})
    needs: ClassVar[frozenset[TextPart]] = frozenset({"calibration"})

    @model_validator(mode="after")
    def _one_choice(self) -> "PruneDepth":
        if sum(choice is not None for choice in (self.keep, self.every, self.blocks)) != 1:
            raise ValueError("give one of keep, every and blocks")
        twice = [number for number, times in Counter(self.blocks or ()).items() if times > 1]
        if twice:
            raise ValueError(f"blocks: {twice[0]} is listed twice")
        if self.keep is None:
            self._refuse_idle("score", "keep")
        return self

    def plan(self, model: nn.Module) -> list[Edit]:
        """The edits with the first units kept, where which ones stay is for the data to say."""
        assert isinstance(model, PreTrainedModel)
        stack, units = self._units(model)
        staying = self._staying(model, stack, units)
        if staying is None:
            count = self._count(len(units))
            pinned = self._pinned(model, stack, units)
            free = [unit.block for unit in units if unit.block not in pinned]
            staying = sorted({*pinned, *free[: count - len(pinned)]})
        return self._edits(model, stack, units, set(staying))

    def apply(self, student: Student, *, generator: torch.Generator) -> dict[str, Any]:
        """Choose what goes, and take it out."""
        model = student.model
        stack, units = self._units(model)
        staying, removals = self._staying(model, stack, units), []
        if staying is None:
            removals = self._choose(student, stack, units)
            gone = {removal.unit.block for removal in removals}
            staying = [unit.block for unit in units if unit.block not in gone]
        edits = self._edits(model, stack, units, set(staying))
        if edits and self.unit == "layer":
            _check_chain(student, stack)
        for edit in edits:
            student.edit(edit)
        left_out = sorted({unit.block for unit in units} - set(staying))
        scores = [{"block": removal.unit.block, "score": removal.score} for removal in removals]
        return {"unit": self.unit, "stay": staying, "removed": left_out, "order": scores}

    def _units(self, model: PreTrainedModel) -> tuple[str, list[Unit]]:
        """The list of blocks, and the units that there are in it.

        Raises:
            CompressKitError: no such list; a unit that is seen in no block.
        """
        stack = find_stack(model)
        names = [f"{stack}.{number}" for number in range(len(get_stack(model, stack)))]
        if self.unit == "layer":
            return stack, [Unit(number, name) for number, name in enumerate(names)]
        anatomy = find_anatomy(model)
        if anatomy.blocks != tuple(names):
            what = f"some elements of {stack} hold no linear layer"
            raise CompressKitError(what, where="unit", fix="use unit: layer")
        if self.unit == "attention":
            found = [
                # one name three times where one layer projects queries, keys and values
                (a.block, a.output, tuple(dict.fromkeys((a.query, a.key, a.value, a.output))))
                for a in anatomy.attentions
            ]
        else:
            found = [(f.block, f.output, (*f.inputs, f.output)) for f in anatomy.feed_forwards]
        if not found:
            what = f"no block has {_UNITS[self.unit]} that are seen"
            raise CompressKitError(what, where="unit", fix="use unit: layer; `compresskit modules MODEL` shows them")
        return stack, [Unit(*one) for one in found]

    def _staying(self, model: PreTrainedModel, stack: str, units: list[Unit]) -> list[int] | None:
        """The blocks whose unit stays, where a rule says it, ascending; None where it is for the data to say."""
        numbers = [unit.block for unit in units]
        if self.keep is not None:
            return numbers if self._count(len(units)) == len(units) else None
        staying = numbers[:: self.every] if self.blocks is None else sorted(self.blocks)
        absent = [number for number in staying if number not in numbers]
        if absent:
            kind = "blocks" if self.unit == "layer" else f"blocks with {_UNITS[self.unit]} that are seen"
            what = f"{absent[0]} is none of the {len(numbers)} {kind}"
            raise CompressKitError(what, where="blocks", fix=f"use numbers from {numbers[0]} to {numbers[-1]}")
        lost = sorted(_pinned(model, stack) - set(staying)) if self.unit == "layer" else []
        if lost:
            what = f"block {lost[0]} has parameters that no other has, and the others read what it makes of them"
            raise CompressKitError(what, where="blocks", fix=f"use blocks: with {lost[0]} among them")
        if len(staying) == len(numbers):
            what = f"all {len(numbers)} {_UNITS[self.unit]} stay"
            raise CompressKitError(what, where=self.kind, fix="leave the pass out, or list fewer")
        return staying

    def _count(self, units: int) -> int:
        """How many of the units stay."""
        assert self.keep is not None
        kept = round(self.keep * units)
        if kept == units and self.keep < 1:
            what = f"{self.keep} of {units} {_UNITS[self.unit]} cuts none"
            raise CompressKitError(what, where="keep", fix=f"keep at most {1 - 1 / units:.3f}")
        if kept == 0:
            what = f"{self.keep} of {units} {_UNITS[self.unit]} leaves none"
            raise CompressKitError(what, where="keep", fix=f"keep at least {1 / units:.3f}")
        return kept

    def _pinned(self, model: PreTrainedModel, stack: str, units: list[Unit]) -> set[int]:
        """The blocks that have to stay.

        Raises:
            CompressKitError: they are more than `keep` leaves, or all.
        """
        pinned = _pinned(model, stack) if self.unit == "layer" else set()
        count = self._count(len(units))
        if len(pinned) > count:
            what = f"{count} of {len(units)} blocks should stay, and others read what {sorted(pinned)} make"
            least = len(pinned) / len(units)
            fix = f"keep at least {least:.3f}" if least < 1 else "leave prune_depth out"
            raise CompressKitError(what, where="keep", fix=fix)
        return pinned

    def _edits(self, model: PreTrainedModel, stack: str, units: list[Unit], staying: set[int]) -> list[Edit]:
        gone = [unit for unit in units if unit.block not in staying]
        if not gone:
            return []
        if self.unit == "layer":
            return [DropBlocks(stack=stack, keep=write_ranges(staying))]
        return [EmptyLinears(targets=unit.linears) for unit in gone]

    def _choose(self, student: Student, stack: str, units: list[Unit]) -> list[Removal]:
        """The units to remove, chosen on calibration text.

        Raises:
            CompressKitError: blocks that are no plain chain; more units than may go; a score that is not a number.
        """
        model = student.model
        pinned = self._pinned(model, stack, units)
        free = [unit for unit in units if unit.block not in pinned]
        count = len(units) - self._count(len(units))
        blocks = _check_chain(student, stack)
        batches = _batches(student.corpus.calibration, SCORE_TOKENS[self.score])
        if self.score == "kl":
            score = Divergences(model, blocks, batches)
        else:
            score = partial(influence, model, blocks, batches)
        removals = choose_removals(model, free, count, score, label=f"choosing {_UNITS[self.unit]} to remove")
        if not all(math.isfinite(removal.score) for removal in removals):
            what = f"without some {_UNITS[self.unit]} the model's answer is not finite"
            raise CompressKitError(what, where="score", fix="say which blocks stay")
        return removals


def _pinned(model: PreTrainedModel, stack: str) -> set[int]:
    """The blocks that others rely on: with a layer (by its name inside the block) that no other block has, and handing
    on more than the hidden states, or what cannot be seen.
    """
    blocks = list(get_stack(model, stack))
    layers = [_weighted_layers(block) for block in blocks]
    owners = Counter(name for names in layers for name in names)
    unlike = {number for number, names in enumerate(layers) if any(owners[name] == 1 < len(layers) for name in names)}
    return unlike - _plain(model, blocks) if unlike else set()


@torch.no_grad()
def _plain(model: PreTrainedModel, blocks: list[nn.Module]) -> set[int]:
    """The blocks that give one tensor and nothing else; none where the model cannot run on blank inputs."""
    found: set[int] = set()

    def look(number: int, _module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            found.add(number)

    handles = [block.register_forward_hook(partial(look, number)) for number, block in enumerate(blocks)]
    try:
        return found if obstacle(model) is None else set()
    finally:
        for handle in handles:
            handle.remove()


def _weighted_layers(block: nn.Module) -> set[str]:
    """Names of the modules that have parameters of their own; a linear is one, whatever form an edit gave it."""
    found: set[str] = set()
    for name, module in block.named_modules():
        if any(name.startswith(f"{one}.") for one in found):
            continue
        if isinstance(module, LinearLike | EmptyLinear) or next(module.parameters(recurse=False), None) is not None:
            found.add(name)
    return found


def _check_chain(student: Student, stack: str) -> list[str]:
    """The names of the blocks, which are a plain chain.

    Raises:
        CompressKitError: they are not; calibration text that is all empty.
    """
    calibration = student.corpus.calibration
    require_tokens(calibration)
    blocks = [f"{stack}.{number}" for number in range(len(get_stack(student.model, stack)))]
    with without_cache(student.model):
        check_chain(student.model, next(calibration.batches(2)), blocks)
    return blocks


def _batches(calibration: Examples, tokens: int) -> list[Batch]:
    """The first of the calibration text, or images, to score on."""
    if not isinstance(calibration, Sequences):
        return list(calibration.limit(SCORE_IMAGES).batches(_IMAGES_TOGETHER))
    return first_batches(calibration, tokens, together=_TOGETHER)
