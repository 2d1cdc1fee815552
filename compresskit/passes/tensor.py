"""Tensor decompositions of embedding tables and convolutions.

    table         y = W[i]     →   y = R[i] P                  low rank, weighted by how often text uses each row
                               →   y = G₁[i₁] G₂[i₂] G₃[i₃]     tensor train
    convolution   y = W ∗ x    →   1×1, small core, 1×1         Tucker
                               →   1×1, taps of each axis, 1×1  CP

What is tied to a table, an output head or the tables of an encoder and a decoder, uses the same factors. The
mathematics is in `tensor_tables` and `tensor_convs`, with its sources; what a convolution should give is the anchored
target of `layerwise.objective`.

When not: on the linears of transformers, which this pass leaves alone. Tucker, CP and tensor trains lose there to
activation-aware low rank at equal size (arXiv:2606.03465); use `low_rank`. Tensor trains of trained tables too are
further from the original than frequency-weighted low rank of the same size, and slower: the default is low rank. A
convolution with few input channels (a patch embedding) has no input mode to cut, and Tucker is low rank there. Without
training the loss is large wherever spectra are flat, as those of trained tables are: `quantize` to 8 bit saves three
quarters of a table for next to nothing. The report prints low rank of equal size beside everything: `plain_low_rank`,
truncated SVD, of tables, and `output_pca`, on the same inputs, of convolutions.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresskit.data import token_rows
from compresskit.data.sequences import require_tokens
from compresskit.errors import CompressKitError
from compresskit.layers.factored_conv import (
    Conv,
    FactoredConv,
    cp_chain,
    factors_of,
    is_plain,
    tap_axes,
    tucker_chain,
    weights_in,
)
from compresskit.layers.low_rank_embedding import LowRankEmbedding
from compresskit.layers.tensor_train import TensorTrainEmbedding
from compresskit.layerwise.moments import Moments, SiteMoments
from compresskit.layerwise.objective import fit_weight, folded_bias
from compresskit.layerwise.output_pca import solve_output_pca, squared_error
from compresskit.layerwise.probe import probe
from compresskit.layerwise.ranks import break_even_rank, factor_weights, rank_for
from compresskit.layerwise.walk import held_out
from compresskit.passes.base import PASSES, Pass, TextPart, Trait
from compresskit.passes.tensor_convs import (
    components,
    cp_factors,
    cp_rank,
    patches,
    tucker_factors,
    tucker_ranks,
    tucker_weight,
)
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
from compresskit.surgery.edits import Edit, table_multiplier
from compresskit.surgery.provenance import Provenance
from compresskit.surgery.sites import select, tied_modules
from compresskit.surgery.tensor_edits import MakeCPConv, MakeLowRankTable, MakeTensorTrain, MakeTuckerConv

# Ranks of tied tables are multiples of it: a later quantiser holds rows whose groups the head can read too.
_TIED_MULTIPLE = 16
# Ranks of convolutions with at least this many channels on both sides are multiples of 8.
_WIDE_CONV = 64
_TOKENS_AT_A_TIME = 2048
_PLACES_AT_A_TIME = 512

_TableEdit = MakeLowRankTable | MakeTensorTrain
_ConvEdit = MakeTuckerConv | MakeCPConv


@PASSES.add
class TensorDecomposition(Pass):
    """Hold token embeddings and convolutions in factors: weighted low rank or tensor train; Tucker or CP."""

    kind: Literal["tensor"] = "tensor"
    keep: float = Field(gt=0, le=1, description="share of each target's weights that stays, in (0, 1]")
    targets: str = Field(default="*", description="glob over names of token table and convolutions")
    embeddings: Literal["low_rank", "tensor_train"] | None = Field(
        default="low_rank", description="low_rank: weighted by token frequency; tensor_train; null leaves tables dense"
    )
    convs: Literal["tucker", "cp"] | None = Field(
        default="tucker", description="how convolutions are factorised; null leaves them dense"
    )
    cores: int = Field(default=3, ge=2, le=5, description="of a tensor train")
    round_to: int | None = Field(
        default=None, ge=1, description="ranks are multiples of this; by default 8 to 32, for small convolutions 1"
    )
    bias: bool = Field(default=True, description="give convolutions without a bias one, to fold the mean into")
    anchor: float = Field(
        default=1.0, ge=0, le=1, description="of convolutions: how far the target moves to the original's output"
    )
    on_misfit: Literal["error", "keep"] = Field(
        default="error", description="a target that cannot be factorised: an error, or it stays dense and is listed"
    )

    adds: ClassVar[frozenset[Trait]] = frozenset({"decomposed"})
    refuses: ClassVar[frozenset[Trait]] = frozenset({"quantized"})
    version: ClassVar[int] = 2
    needs: ClassVar[frozenset[TextPart]] = frozenset({"calibration"})

    def plan(self, model: nn.Module) -> list[Edit]:
        """One edit for the token table and one for each convolution."""
        return list(self._planned(model)[0])

    def _planned(self, model: nn.Module) -> tuple[list[_TableEdit | _ConvEdit], list[str]]:
        """The edits, and the names that stay dense."""
        assert isinstance(model, PreTrainedModel)
        found = self._candidates(model)
        edits: list[_TableEdit | _ConvEdit] = []
        misfits: dict[str, str] = {}
        chosen = select(list(found), self.targets)
        for name in chosen if self.keep < 1 else ():
            planned = self._edit(model, name, found[name])
            if isinstance(planned, str):
                misfits[name] = planned
            else:
                edits.append(planned)
        if misfits and self.on_misfit == "error":
            listed = "\n    ".join(f"{name} {why}" for name, why in misfits.items())
            raise CompressKitError(
                f"{len(misfits)} of the targets cannot be factorised:\n    {listed}",
                where="targets",
                fix="narrow targets, use another keep, or say on_misfit: keep",
            )
        return edits, list(misfits)

    def _candidates(self, model: PreTrainedModel) -> dict[str, nn.Module]:
        """The token table and every convolution, by name, as far as the options want them.

        Raises:
            CompressKitError: a model that has neither.
        """
        wanted: list[nn.Module] = []
        if self.embeddings and model.main_input_name == "input_ids":
            wanted.append(model.get_input_embeddings())
        if self.convs:
            inside = {
                id(part) for module in model.modules() if isinstance(module, FactoredConv) for part in module.factors
            }
            convs = (module for module in model.modules() if isinstance(module, FactoredConv | Conv))
            wanted += [module for module in convs if id(module) not in inside]
        names = {id(module): name for name, module in model.named_modules()}
        if not wanted:
            what = f"{type(model).__name__} has neither a token table nor a convolution that the options want"
            raise CompressKitError(what, where="targets", fix="leave this pass out; linears are for low_rank")
        return {names[id(module)]: module for module in wanted}

    def _edit(self, model: PreTrainedModel, name: str, module: nn.Module) -> _TableEdit | _ConvEdit | str:
        """The edit whose factors hold about `keep` of a target's weights, or why there is none."""
        if isinstance(module, LowRankEmbedding | TensorTrainEmbedding | FactoredConv):
            return "is factorised already"
        if isinstance(module, Conv):
            return self._conv_edit(name, module)
        if not isinstance(module, nn.Embedding) or table_multiplier(module) != 1:
            return f"is a {type(module).__name__}, which does more than look rows up"
        tied = tied_modules(model, name)
        heads = [own for own, other in tied.items() if isinstance(other, nn.Linear)]
        tables = [
            own for own, other in tied.items() if isinstance(other, nn.Embedding) and table_multiplier(other) == 1
        ]
        others = [own for own in tied if own not in (*heads, *tables)]
        if others or len(heads) > 1:
            return f"is tied to {', '.join(others or heads)}: factors are shared with plain tables and one head alone"
        return self._table_edit(name, module, heads, tuple(tables))

    def _table_edit(
        self, name: str, table: nn.Embedding, heads: list[str], others: tuple[str, ...]
    ) -> _TableEdit | str:
        rows, columns = table.num_embeddings, table.embedding_dim
        said: dict[str, Any] = {"target": name, "head": heads[0] if heads else None, "tables": others}
        if self.embeddings == "low_rank":
            rank = rank_for(self.keep, rows, columns, round_to=self.round_to or (_TIED_MULTIPLE if heads else None))
            if rank > break_even_rank(rows, columns):
                return f"({rows}x{columns}): rank {rank} saves nothing above {break_even_rank(rows, columns)}"
            share = factor_weights(rows, columns, rank, pivot=False) / (rows * columns)
            if share > 2 * self.keep:
                return f"({rows}x{columns}): the smallest rank, {rank}, holds {share:.1%} of it"
            return MakeLowRankTable(rank=rank, **said)
        v, d = row_digits(rows, self.cores), column_digits(columns, self.cores)
        rank = rank_within(v, d, int(self.keep * rows * columns))
        if rank:
            return MakeTensorTrain(rows=v, columns=d, ranks=train_ranks(v, d, rank), **said)
        return f"({rows}x{columns}): even a train of rank 1 holds more than keep {self.keep:g}"

    def _conv_edit(self, name: str, conv: Conv) -> _ConvEdit | str:
        shape = f"({'x'.join(map(str, conv.weight.shape))})"
        if conv.groups > 1:
            return f"{shape} has {conv.groups} groups: its channels are apart already"
        if not is_plain(conv):
            return f"{shape} is a {type(conv).__name__}, not a plain convolution"
        outputs, inputs, kernel = conv.out_channels, conv.in_channels, conv.kernel_size
        taps, multiple = math.prod(kernel), self.round_to or (8 if min(outputs, inputs) >= _WIDE_CONV else 1)
        if self.convs == "cp" and tap_axes(conv) and taps > 1:
            rank = cp_rank(self.keep, outputs, inputs, kernel, multiple=multiple)
            if rank and weights_in(cp_chain(conv, rank, bias=False)) < conv.weight.numel():
                return MakeCPConv(target=name, rank=rank, bias=self.bias)
        else:
            in_rank, out_rank = tucker_ranks(self.keep, outputs, inputs, taps, multiple=multiple)
            if out_rank and weights_in(tucker_chain(conv, in_rank, out_rank, bias=False)) < conv.weight.numel():
                return MakeTuckerConv(target=name, in_rank=in_rank, out_rank=out_rank, bias=self.bias)
        return f"{shape} holds no fewer weights in factors at keep {self.keep:g}"

    def apply(self, student: Student, *, generator: torch.Generator) -> dict[str, Any]:
        """Factorise the table on token counts, then each convolution on the inputs that it now gets."""
        require_tokens(student.corpus.calibration)
        edits, kept_dense = self._planned(student.model)
        layers: dict[str, dict[str, Any]] = {}
        for edit in track(edits, self.kind):
            if isinstance(edit, _TableEdit):
                layers[edit.target] = _factorise_table(student, edit)
            else:
                layers[edit.target] = self._factorise_conv(student, edit)
        return {"layers": layers, "kept_dense": kept_dense}

    @torch.no_grad()
    def _factorise_conv(self, student: Student, edit: _ConvEdit) -> dict[str, Any]:
        """Swap a convolution for its factors, fitted to the anchored target on the inputs that it now gets."""
        old = student.model.get_submodule(edit.target)
        assert isinstance(old, Conv)
        moments = _conv_moments(student, edit.target, old, self.anchor)
        weight, bias = old.weight.detach().flatten(1), old.bias
        centred = edit.bias or bias is not None
        target, mean = weight.double(), moments.all.mean(centred=centred)
        if self.anchor:
            target, mean, _ = fit_weight(weight, moments.fit, moments.held_out, centred=centred)
        student.edit(edit)
        new = student.model.get_submodule(edit.target)
        assert isinstance(new, FactoredConv)
        factors, found = _conv_factors(edit, old, target, mean.C)
        for own, values in zip(factors_of(new), factors, strict=True):
            own.weight.copy_(values.reshape(own.weight.shape))
        if new.bias is not None:
            new.bias.copy_(folded_bias(found, mean))
        equal = min(weights_in(list(factors_of(new))) // sum(target.shape), *target.shape)
        best = float(solve_output_pca(target, moment=mean.C).tail[equal])
        relative = _relative_to(squared_error(target, torch.zeros_like(target), mean.C))
        return {
            "method": edit.kind,
            "rank": edit.rank if isinstance(edit, MakeCPConv) else [edit.in_rank, edit.out_rank],
            "relative_error": relative(squared_error(target, found, mean.C)),
            "output_pca": relative(best),
        }


def _relative_to(power: float) -> Callable[[float], float]:
    """Errors as the root of their share of `power`."""
    return lambda error: math.sqrt(max(error, 0.0) / power) if power > 0 else 0.0


def _conv_factors(edit: _ConvEdit, old: Conv, target: Tensor, moment: Tensor) -> tuple[list[Tensor], Tensor]:
    """The weights of each factor in the order of the chain, and the convolution (O, I·K) that they add up to."""
    if isinstance(edit, MakeCPConv):
        A, taps, B = cp_factors(target, edit.rank, moment=moment, kernel=old.kernel_size)
        axes = tap_axes(old)
        for axis, along in enumerate(taps):  # an axis that needs no factor has one tap: a number for each component
            A = A if axis in axes else A * along
        return [A, *(taps[axis] for axis in axes), B], B @ components(A, [taps[axis] for axis in axes])
    A, core, B = tucker_factors(target, edit.in_rank, edit.out_rank, moment=moment, kernel=old.kernel_size)
    first = [A] if edit.in_rank < old.in_channels else []
    last = [B] if edit.out_rank < old.out_channels else []
    return [*first, core, *last], tucker_weight(A, core, B)


def _conv_moments(student: Student, name: str, conv: Conv, anchor: float) -> SiteMoments:
    """Moments of the patches that a convolution reads in the student, and of what it should give.

    Raises:
        CompressKitError: one calibration example, or a convolution that does not run.
    """
    calibration, provenance = student.corpus.calibration, Provenance(student.edits)
    held, weight = held_out(calibration), conv.weight.detach().flatten(1)
    parts = [Moments.zeros(weight.shape[1], weight.shape[0]) for _ in range(2)]
    for is_held, batch in zip(held.tolist(), calibration.batches(1), strict=True):
        x, target = probe(student.model, name, batch)
        if anchor:
            given = probe(student.reference, provenance.original_name(name), batch)[1]
            target = torch.lerp(target, provenance.left_of(name, given, dim=1), anchor)
        rows, wanted = patches(conv, x), target.flatten(2).transpose(1, 2).flatten(0, 1)
        for some, t in zip(rows.split(_PLACES_AT_A_TIME), wanted.split(_PLACES_AT_A_TIME), strict=True):
            parts[is_held].update(some, t)
    return SiteMoments(*parts)


@torch.no_grad()
def _factorise_table(student: Student, edit: _TableEdit) -> dict[str, Any]:
    """Swap a table for its factors; what was done and what it cost, plain low rank of equal size beside it."""
    old = student.model.get_submodule(edit.target)
    assert isinstance(old, nn.Embedding)
    W = old.weight.detach()
    seen = torch.tensor([token for row in token_rows(student.corpus.calibration) for token in row])
    frequencies = row_frequencies(seen, len(W))
    moment = _head_moment(student, edit.head) if edit.head else None
    metric = table_metric(W, frequencies, moment)
    student.edit(edit)
    new = student.model.get_submodule(edit.target)
    with working(f"factorising {edit.target}"):
        _fill_table(new, W, frequencies, metric)
    size = sum(parameter.numel() for parameter in new.parameters())
    equal = max(1, min(size // sum(W.shape), W.shape[1]))
    relative = _relative_to(table_error(W, frequencies=frequencies, metric=metric))
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


def _head_moment(student: Student, name: str) -> Tensor:
    """E[h hᵀ] (D, D) of what the output head reads for the calibration text's tokens."""
    module = student.model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    moments = Moments.zeros(module.in_features, 0)
    calibration = student.corpus.calibration.by_length()
    size = max(1, _TOKENS_AT_A_TIME // len(token_rows(calibration)[-1]))
    for batch in track(calibration.batches(size), f"what {name} reads", total=-(-len(calibration) // size)):
        hidden, _ = probe(student.model, name, batch)
        moments.update_input(hidden[batch["attention_mask"].bool()])
    return moments.mean(centred=False).C
