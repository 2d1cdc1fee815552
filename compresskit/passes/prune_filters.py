"""Structured pruning of convolutional networks: fewer channels, everywhere at once.

    before  y = W₂ ∗ f(norm(W₁ ∗ x))        W₁ (c, in, k, k), W₂ (out, c, k, k)
    after   the same with W₁[K], norm[K] and W₂[:, K]

Channels that are added to each other along a residual stream go together. torch-pruning (DepGraph, arXiv:2301.12900)
finds these groups and scores them; of each group the same share stays, so parameters fall by about keep². Images only,
and networks without attention: those have `prune_width` and `prune_depth`, and torch-pruning never ends on grouped
queries. The student needs the plug-in. There is no repair: distil afterwards where the model can be trained, or use
`tensor`, which fits what it changes.
Departures: gradients of `taylor` are of labels drawn from the model's own answers, so that none are needed.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn
from transformers import PreTrainedModel

from compresskit.data import Batch
from compresskit.errors import CompressKitError
from compresskit.layerwise.answer import sampled_gradient
from compresskit.layerwise.channels import Importance, choose_channels
from compresskit.models import answer_kind
from compresskit.passes.base import PASSES, Pass, TextPart, Trait
from compresskit.student import Student
from compresskit.surgery.channel_edits import PruneChannels
from compresskit.surgery.edits import Edit

#: Pixels a side of the image that shapes are planned with, where the config says none.
_SIDE = 64
#: Calibration images whose gradients `taylor` adds up, and how many run together.
TAYLOR_IMAGES, _TOGETHER = 64, 16
_HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_heads", "n_head")


@PASSES.add
class PruneFilters(Pass):
    """Remove channels of convolutional networks, with all that depends on them."""

    kind: Literal["prune_filters"] = "prune_filters"
    keep: float = Field(gt=0, le=1, description="share of the channels of each group that stays")
    importance: Importance = Field(default="magnitude", description="torch-pruning's criterion, by name")
    round_to: int = Field(default=8, ge=1, description="channels that stay are a multiple of this, rounded down")
    limit_s: float = Field(default=120.0, gt=0, description="seconds after which torch-pruning is given up")

    adds: ClassVar[frozenset[Trait]] = frozenset({"pruned"})
    refuses: ClassVar[frozenset[Trait]] = frozenset({"quantized", "decomposed"})
    needs: ClassVar[frozenset[TextPart]] = frozenset({"calibration"})

    def plan(self, model: nn.Module) -> list[Edit]:
        """The edit with some channels kept: which ones really stay is for the weights to say."""
        assert isinstance(model, PreTrainedModel)
        self._check(model)
        side = getattr(model.config, "image_size", None) or _SIDE
        size = (side, side) if isinstance(side, int) else tuple(side)
        shape = (2, getattr(model.config, "num_channels", 3), *size)
        with model.device:
            batch = {"pixel_values": torch.zeros(shape)}
        return [*self._edits(model, batch, importance="magnitude", seed=0)]

    def apply(self, student: Student, *, generator: torch.Generator) -> dict[str, Any]:
        """Choose the channels that go, and take them out."""
        model = student.model
        self._check(model)
        batch = next(student.corpus.calibration.batches(2))
        with _gradients(student, generator) if self.importance == "taylor" else nullcontext():
            edits = self._edits(model, batch, importance=self.importance, seed=generator.initial_seed())
        for edit in edits:
            student.edit(edit)
        _check_runs(model, batch)
        layers = {cut.module: _widths(model.get_submodule(cut.module)) for edit in edits for cut in edit.cuts}
        return {"layers": layers}

    def _check(self, model: PreTrainedModel) -> None:
        """Refuse what torch-pruning may not see.

        Raises:
            CompressKitError: a model that reads no images, has no head, or has attention.
        """
        where, fix = type(model).__name__, "use prune_width or prune_depth"
        if model.main_input_name != "pixel_values":
            raise CompressKitError(f"the model reads {model.main_input_name!r}, no images", where=where, fix=fix)
        attention = next((name for name, m in model.named_modules() if _counts_heads(m)), None)
        if attention is not None:
            raise CompressKitError(f"{attention} is an attention, which torch-pruning cannot cut", where=where, fix=fix)
        if answer_kind(model) == "states":
            what = "without a head its hidden states would be narrower than the original's"
            raise CompressKitError(what, where=where, fix="use task: image-classification")

    def _edits(self, model: PreTrainedModel, batch: Batch, *, importance: Importance, seed: int) -> list[PruneChannels]:
        if self.keep == 1:
            return []
        base = model.base_model_prefix
        layers = [name for name, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None]
        cuts = choose_channels(
            model,
            batch,
            keep=self.keep,
            importance=importance,
            round_to=self.round_to,
            fixed=tuple(name for name in layers if name != base and not name.startswith(f"{base}.")),
            seed=seed,
            limit_s=self.limit_s,
        )
        if not cuts:
            what = f"keep {self.keep} in multiples of {self.round_to}, by {importance}, cuts no channel"
            raise CompressKitError(what, where="keep", fix="use a smaller keep or round_to, or another importance")
        return [PruneChannels(cuts=cuts)]


def _counts_heads(module: nn.Module) -> bool:
    return any(isinstance(vars(module).get(name), int) for name in _HEAD_COUNTS)


def _widths(layer: nn.Module) -> list[int]:
    """The shape of a layer's weight."""
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return list(weight.shape)


@contextmanager
def _gradients(student: Student, generator: torch.Generator) -> Iterator[None]:
    """Inside, weights have the gradients of log p(label), summed, for labels drawn from the model's own answers."""
    model = student.model
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(True)
    try:
        with torch.enable_grad():
            for batch in student.corpus.calibration.limit(TAYLOR_IMAGES).batches(_TOGETHER):
                answer = model(**batch)[0]
                answer.backward(sampled_gradient(answer.detach(), generator, kind=answer_kind(model)))
        yield
    finally:
        model.zero_grad(set_to_none=True)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])


@torch.no_grad()
def _check_runs(model: PreTrainedModel, batch: Batch) -> None:
    try:
        model(**batch)
    except (RuntimeError, ValueError, IndexError) as error:
        what = f"a part of the network depends on a number of channels that was changed ({str(error).splitlines()[0]})"
        raise CompressKitError(what, where=type(model).__name__, fix="leave prune_filters out") from error
