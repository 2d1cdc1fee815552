"""Edits that put the factors of a decomposition where an embedding table or a convolution was."""

from abc import abstractmethod
from typing import Any, Literal

import torch
from torch import nn

from compresskit.errors import CompressKitError
from compresskit.layers.factored_conv import Conv, FactoredConv, cp_chain, is_plain, tucker_chain
from compresskit.layers.low_rank import LowRankLinear
from compresskit.layers.low_rank_embedding import LowRankEmbedding
from compresskit.layers.tensor_train import TensorTrainEmbedding, TensorTrainHead
from compresskit.surgery.edits import EDITS, Edit, get_module, set_module, untie


class _ReplacingTable(Edit):
    """Edits that replace an embedding table, and the output head and other tables that are tied to it, if any."""

    target: str
    head: str | None = None
    #: other tables that hold the same weight (an encoder's, a decoder's): they look up in the same factors
    tables: tuple[str, ...] = ()

    def apply(self, model: nn.Module) -> None:
        """Insert zero factors; the pass fills those of the target, which are those of all."""
        for name in (self.target, *self.tables):
            old = get_module(model, name)
            if not isinstance(old, nn.Embedding):
                raise CompressKitError(f"{name} is a {type(old).__name__}, not an Embedding", where=self.kind)
            set_module(model, name, self._table(old))
        if self.head:
            old = get_module(model, self.head)
            if not isinstance(old, nn.Linear):
                raise CompressKitError(f"{self.head} is a {type(old).__name__}, not a Linear", where=self.kind)
            set_module(model, self.head, self._head(get_module(model, self.target), old.bias))
        untie(model)
        for name in self.tables:
            own = [each for each, _ in get_module(model, name).named_parameters()]
            self._tie(model, name, dict(zip(own, own, strict=True)))
        if self.head:
            self._tie(model, self.head, self._shared_with_head())

    def _tie(self, model: nn.Module, other: str, names: dict[str, str]) -> None:
        """Make parameters of `other` those of the target, and tell transformers, which ties them when it loads."""
        known: dict[str, str] | None = getattr(model, "all_tied_weights_keys", None)
        for own, shared in names.items():
            parent, _, name = f"{other}.{own}".rpartition(".")
            holder = get_module(model, parent)
            parameter = get_module(model, self.target).get_parameter(shared)
            if isinstance(holder, nn.ParameterList):
                holder[int(name)] = parameter
            else:
                setattr(holder, name, parameter)
            if known is not None:
                known[f"{other}.{own}"] = f"{self.target}.{shared}"

    @abstractmethod
    def _table(self, old: nn.Embedding) -> nn.Module:
        """The table of zeros for `old`."""

    @abstractmethod
    def _head(self, table: nn.Module, bias: nn.Parameter | None) -> nn.Module:
        """A head of zeros for a new table, with the old head's bias."""

    @abstractmethod
    def _shared_with_head(self) -> dict[str, str]:
        """For each parameter of the head that is one of the table's, which."""


def _place(old: nn.Embedding) -> dict[str, Any]:
    """What a new table takes over from the old one beside its shape."""
    return {"padding_idx": old.padding_idx, "device": old.weight.device, "dtype": old.weight.dtype}


@EDITS.add
class MakeLowRankTable(_ReplacingTable):
    """Hold an embedding table as a thin table and a projection; a tied head uses the same two."""

    kind: Literal["low_rank_table"] = "low_rank_table"
    rank: int

    def _table(self, old: nn.Embedding) -> LowRankEmbedding:
        return LowRankEmbedding(old.num_embeddings, old.embedding_dim, self.rank, **_place(old))

    def _head(self, table: nn.Module, bias: nn.Parameter | None) -> LowRankLinear:
        assert isinstance(table, LowRankEmbedding)
        place = {"device": table.project.device, "dtype": table.project.dtype}
        head = LowRankLinear(table.embedding_dim, table.num_embeddings, self.rank, bias=bias is not None, **place)
        if bias is not None:
            head.expand.bias = bias
        return head

    def _shared_with_head(self) -> dict[str, str]:
        return {"reduce.weight": "project", "expand.weight": "rows.weight"}


@EDITS.add
class MakeTensorTrain(_ReplacingTable):
    """Hold an embedding table as a tensor train; a tied head uses the same cores."""

    kind: Literal["tensor_train"] = "tensor_train"
    #: digits of a row's number, digits of a column's, and the ranks between the cores
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    ranks: tuple[int, ...]

    def _table(self, old: nn.Embedding) -> TensorTrainEmbedding:
        shape = {"rows": self.rows, "columns": self.columns, "ranks": self.ranks}
        return TensorTrainEmbedding(old.num_embeddings, old.embedding_dim, **shape, **_place(old))

    def _head(self, table: nn.Module, bias: nn.Parameter | None) -> TensorTrainHead:
        assert isinstance(table, TensorTrainEmbedding)
        head = TensorTrainHead(table, bias=bias is not None)
        if bias is not None:
            head.bias = bias
        return head

    def _shared_with_head(self) -> dict[str, str]:
        return {f"cores.{k}": f"cores.{k}" for k in range(len(self.rows))}


class _ReplacingConv(Edit):
    """Edits that replace a convolution by a chain of smaller ones."""

    target: str
    #: whether the last factor has a bias (a centred fit adds one)
    bias: bool

    def apply(self, model: nn.Module) -> None:
        """Insert zero factors; the pass fills them."""
        old = get_module(model, self.target)
        if not is_plain(old):
            what = f"{self.target} is a {type(old).__name__}, not a convolution without groups"
            raise CompressKitError(what, where=self.kind)
        assert isinstance(old, Conv)
        factors = self._factors(old)
        with torch.no_grad():
            for factor in factors:
                factor.weight.zero_()
                if factor.bias is not None:
                    factor.bias.zero_()
        set_module(model, self.target, FactoredConv(old, factors))

    @abstractmethod
    def _factors(self, old: Conv) -> list[Conv]:
        """The chain for `old`."""


@EDITS.add
class MakeTuckerConv(_ReplacingConv):
    """Hold a convolution as 1×1, a small core, and 1×1; a factor of full rank is left out."""

    kind: Literal["tucker_conv"] = "tucker_conv"
    in_rank: int
    out_rank: int

    def _factors(self, old: Conv) -> list[Conv]:
        return tucker_chain(old, self.in_rank, self.out_rank, bias=self.bias or old.bias is not None)


@EDITS.add
class MakeCPConv(_ReplacingConv):
    """Hold a convolution as 1×1, taps along each axis in each channel, and 1×1."""

    kind: Literal["cp_conv"] = "cp_conv"
    rank: int

    def _factors(self, old: Conv) -> list[Conv]:
        return cp_chain(old, self.rank, bias=self.bias or old.bias is not None)
