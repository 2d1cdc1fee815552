"""Tensor decompositions: embedding tables as thin factors or tensor trains.

    table   y = W[i]           →   y = R[i] P                  low rank, weighted by how often text uses each row
                               →   y = G₁[i₁] G₂[i₂] G₃[i₃]     tensor train

An output head that is tied to a table uses the same factors. The mathematics is in `tensor_tables`, with its sources.

When not: on the linears of transformers, which this pass leaves alone. Tucker, CP and tensor trains lose there to
activation-aware low rank at equal size (arXiv:2606.03465); use `low_rank`. Tensor trains of trained tables too are
further from the original than frequency-weighted low rank of the same size, and slower: the default is low rank, and
the report prints plain low rank of equal size beside whichever was asked for. A tied table pays twice, at the input and
at the output: `quantize` (8 bit: a quarter of the bytes, almost free) comes first in value, though last in order.
"""

import math
from contextlib import suppress
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresskit.errors import CompressKitError
from compresskit.layers.low_rank_embedding import LowRankEmbedding
from compresskit.layers.tensor_train import TensorTrainEmbedding
from compresskit.layerwise.moments import MeanMoments, Moments
from compresskit.passes.base import PASSES, Pass, Trait
from compresskit.passes.low_rank import break_even_rank, rank_for
from compresskit.passes.tensor_tables import (
    column_digits,
    low_rank_table,
    rank_within,
    row_digits,
    row_frequencies,
    table_error,
    table_metric,
    tensor_train_cores,
    train_ranks,
)
from compresskit.progress import track, working
from compresskit.student import Student
from compresskit.surgery.edits import Edit
from compresskit.surgery.sites import select, tied_heads, without_cache
from compresskit.surgery.tensor_edits import MakeLowRankTable, MakeTensorTrain

# Ranks of tied tables are multiples of it: a later quantiser holds rows whose groups the head can read too.
_TIED_MULTIPLE = 16
_TOKENS_AT_A_TIME = 2048


@PASSES.add
class TensorDecomposition(Pass):
    """Hold the table of token embeddings in factors: frequency-weighted low rank, or a tensor train."""

    kind: Literal["tensor"] = "tensor"
    keep: float = Field(gt=0, le=1, description="share of each target's weights that stays, in (0, 1]")
    targets: str = Field(default="*", description="glob over the names of token tables")
    embeddings: Literal["low_rank", "tensor_train"] = Field(
        default="low_rank", description="low_rank: weighted by token frequency; tensor_train: for strong compression"
    )
    cores: int = Field(default=3, ge=2, le=5, description="of a tensor train")
    round_to: int | None = Field(
        default=None, ge=1, description="low ranks are multiples of this; by default 32, or 8 below 128 (16 if tied)"
    )
    on_misfit: Literal["error", "keep"] = Field(
        default="error", description="a target that cannot be factorised: an error, or it stays dense and is listed"
    )

    adds: ClassVar[frozenset[Trait]] = frozenset({"decomposed"})
    refuses: ClassVar[frozenset[Trait]] = frozenset({"quantized"})

    def plan(self, model: nn.Module) -> list[Edit]:
        """One edit a table."""
        return list(self._planned(model)[0])  # type: ignore[arg-type]

    def _planned(self, model: nn.Module) -> tuple[list[MakeLowRankTable | MakeTensorTrain], list[str]]:
        """The edits, and the names that stay dense."""
        assert isinstance(model, PreTrainedModel)
        name, table = _token_table(model)
        select([name], self.targets)
        if self.keep == 1:
            return [], []
        heads = [head for own, head in tied_heads(model) if own == name]
        reason = _unfit(table, heads)
        edit = None if reason else self._edit(name, table, heads[0] if heads else None)  # type: ignore[arg-type]
        if edit is not None:
            return [edit], []
        if self.on_misfit == "error":
            shape = "x".join(map(str, table.weight.shape)) if isinstance(table, nn.Embedding) else "factors"
            raise CompressKitError(
                f"{name} ({shape}) {reason or f'holds no fewer weights in factors at keep {self.keep:g}'}",
                where="targets",
                fix="narrow targets, lower keep, or say on_misfit: keep",
            )
        return [], [name]

    def _edit(self, name: str, table: nn.Embedding, head: str | None) -> MakeLowRankTable | MakeTensorTrain | None:
        """The edit whose factors hold about `keep` of the table's weights; None where none saves any."""
        rows, columns = table.num_embeddings, table.embedding_dim
        if self.embeddings == "low_rank":
            step = self.round_to or (_TIED_MULTIPLE if head else None)
            rank = rank_for(self.keep, rows, columns, round_to=step)
            return (
                MakeLowRankTable(target=name, head=head, rank=rank) if rank <= break_even_rank(rows, columns) else None
            )
        v, d = row_digits(rows, self.cores), column_digits(columns, self.cores)
        rank = rank_within(v, d, int(self.keep * rows * columns))
        return (
            MakeTensorTrain(target=name, head=head, rows=v, columns=d, ranks=train_ranks(v, d, rank)) if rank else None
        )

    def apply(self, student: Student, *, generator: torch.Generator) -> dict[str, Any]:
        """Count the calibration text's tokens, see what a tied head reads, and factorise."""
        edits, kept_dense = self._planned(student.model)
        layers = {edit.target: _factorise_table(student, edit) for edit in edits}
        return {"layers": layers, "kept_dense": kept_dense}


def _token_table(model: PreTrainedModel) -> tuple[str, nn.Module]:
    """The module that looks up token ids, and its name.

    Raises:
        CompressKitError: a model that reads no token ids.
    """
    if model.main_input_name != "input_ids":
        what = f"{type(model).__name__} reads {model.main_input_name!r}, not token ids"
        raise CompressKitError(what, where="targets", fix="leave this pass out")
    table = model.get_input_embeddings()
    return next(name for name, module in model.named_modules() if module is table), table


def _unfit(table: nn.Module, heads: list[str]) -> str | None:
    """Why a table cannot be factorised at all."""
    if isinstance(table, LowRankEmbedding | TensorTrainEmbedding):
        return "is factorised already"
    if not isinstance(table, nn.Embedding) or type(table).forward is not nn.Embedding.forward:
        return f"is a {type(table).__name__}, which does more than look rows up"
    return f"is tied to {len(heads)} heads" if len(heads) > 1 else None


@torch.no_grad()
def _factorise_table(student: Student, edit: MakeLowRankTable | MakeTensorTrain) -> dict[str, Any]:
    """Swap a table for its factors; what was done and what it cost, plain low rank of equal size beside it."""
    old = student.model.get_submodule(edit.target)
    assert isinstance(old, nn.Embedding)
    W = old.weight.detach()
    seen = torch.tensor([token for row in student.corpus.calibration.rows for token in row])
    frequencies = row_frequencies(seen, len(W))
    moment = _input_moment(student, edit.head).C if edit.head else None
    metric = table_metric(W, frequencies, moment)
    student.edit(edit)
    new = student.model.get_submodule(edit.target)
    with working(f"factorising {edit.target}"):
        _fill_table(new, W, frequencies, metric)
    size = sum(parameter.numel() for parameter in new.parameters())
    equal = max(1, min(size // sum(W.shape), W.shape[1]))
    power = table_error(W, frequencies=frequencies, metric=metric)

    def relative(error: float) -> float:
        return math.sqrt(max(error, 0.0) / power) if power > 0 else 0.0

    R, P, _ = low_rank_table(W, equal, frequencies=torch.ones(len(W), dtype=torch.float64))
    notes = {
        "method": edit.kind,
        "rank": edit.rank if isinstance(edit, MakeLowRankTable) else list(edit.ranks),
        "tied_head": edit.head,
        "seen_rows": int((torch.bincount(seen, minlength=len(W)) > 0).sum()),
        "relative_error": relative(table_error(W - _expanded(new), frequencies=frequencies, metric=metric)),
        "plain_low_rank": relative(table_error(W - R @ P, frequencies=frequencies, metric=metric)),
    }
    if isinstance(edit, MakeTensorTrain):
        error = low_rank_table(W, equal, frequencies=frequencies, metric=metric)[2]
        notes["weighted_low_rank"] = relative(error)
    return notes


def _expanded(table: nn.Module) -> Tensor:
    """Every row of a factorised table, (V, D)."""
    assert isinstance(table, LowRankEmbedding | TensorTrainEmbedding)
    return table(torch.arange(table.num_embeddings))


def _fill_table(table: nn.Module, weight: Tensor, frequencies: Tensor, metric: Tensor) -> None:
    """Write the factors of `weight` into a new table, and so into the head that shares them."""
    if isinstance(table, LowRankEmbedding):
        R, P, _ = low_rank_table(weight, table.rank, frequencies=frequencies, metric=metric)
        table.rows.weight.copy_(R)
        table.project.copy_(P)
    elif isinstance(table, TensorTrainEmbedding):
        shape = {"rows": table.rows, "columns": table.columns, "ranks": table.ranks}
        for core, found in zip(table.cores, tensor_train_cores(weight, frequencies=frequencies, **shape), strict=True):
            core.copy_(found)


class _SeenError(Exception):
    """Ends a forward as soon as the wanted input was seen."""


@torch.no_grad()
def _input_moment(student: Student, name: str) -> MeanMoments:
    """E[h hᵀ] of what the linear `name` reads for the calibration text's tokens, about zero."""
    module = student.model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    moments = Moments.zeros(module.in_features, 0)
    calibration = student.corpus.calibration.by_length()
    size = max(1, _TOKENS_AT_A_TIME // len(calibration.rows[-1]))
    read: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        read.append(args[0])
        raise _SeenError

    handle = module.register_forward_pre_hook(keep)
    try:
        with without_cache(student.model):
            for batch in track(calibration.batches(size), f"what {name} reads", total=-(-len(calibration) // size)):
                with suppress(_SeenError):
                    student.model(**batch)
                moments.update_input(read.pop()[batch["attention_mask"].bool()])
    finally:
        handle.remove()
    return moments.mean(centred=False)
