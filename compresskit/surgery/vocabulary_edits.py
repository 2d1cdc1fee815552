"""The edit that cuts a vocabulary: the rows of token tables and output heads, and every token id in the config."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from compresskit.errors import CompressKitError
from compresskit.surgery.edits import EDITS, Cutting, keep_slices, read_ranges, write_ranges
from compresskit.surgery.sites import tied_parameters

_ID_NAMES = ("_token_id", "_token_ids", "suppress_tokens", "bad_words_ids")


def vocabulary_parameters(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the parameters with a row for each token: the token table, the output head, its bias, tied ones.

    Raises:
        CompressKitError: a model that reads no tokens, whose table or head another pass has replaced, or with a table
            beside the first of which it is not known whether it counts tokens.
    """
    where = type(model).__name__
    if model.main_input_name != "input_ids":
        what = f"it reads {model.main_input_name!r}: there is no vocabulary to prune"
        raise CompressKitError(what, where=where, fix="leave prune_vocab out")
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    for module, kinds in ((table, nn.Embedding), (head, nn.Linear | None)):
        if not isinstance(module, kinds):
            what = f"its tokens are held by a {type(module).__name__}, whose rows cannot be cut"
            raise CompressKitError(what, where=where, fix="put prune_vocab before the pass that replaced it")
    assert isinstance(table, nn.Embedding)
    seeds = {id(table.weight)}
    if isinstance(head, nn.Linear):
        seeds |= {id(head.weight)} | (set() if head.bias is None else {id(head.bias)})
    names = tied_parameters(model, seeds)
    for name, other in model.named_modules():
        is_table = isinstance(other, nn.Embedding) and f"{name}.weight" not in names
        if is_table and other.num_embeddings == table.num_embeddings:
            what = f"{name} has a row for each of {table.num_embeddings} things too, and whether these are tokens is "
            raise CompressKitError(f"{what}not known", where=where, fix="leave prune_vocab out")
    return names


def config_token_ids(config: PretrainedConfig | GenerationConfig | None) -> set[int]:
    """Every token id that a config names."""
    found: set[int] = set()
    for holder in _holders(config):
        for name, value in vars(holder).items():
            if name.endswith(_ID_NAMES):
                found |= set(_flat(value))
    return found


def _flat(value: Any) -> Iterable[int]:
    if isinstance(value, int) and not isinstance(value, bool):
        yield value
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _flat(inner)


def _holders(config: PretrainedConfig | GenerationConfig | None) -> list[PretrainedConfig | GenerationConfig]:
    """A config, and the one of its text part, where that is another."""
    if config is None:
        return []
    text = config.get_text_config() if isinstance(config, PretrainedConfig) else config
    return [config] if text is config else [config, text]


def say_vocabulary(config: PretrainedConfig | GenerationConfig | None, kept: Sequence[int]) -> None:
    """Rewrite a config for the tokens `kept` (ascending): its `vocab_size`, and every token id; dropped ones go."""
    new = {old: index for index, old in enumerate(kept)}
    for holder in _holders(config):
        for name, value in list(vars(holder).items()):
            if name.endswith(_ID_NAMES):
                setattr(holder, name, _renumbered(value, new))
        if isinstance(holder, PretrainedConfig) and hasattr(holder, "vocab_size"):
            holder.vocab_size = len(kept)


def _renumbered(value: Any, new: dict[int, int]) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return new.get(value)
    if not isinstance(value, list | tuple):
        return value
    if all(isinstance(inner, int) for inner in value):
        return [new[inner] for inner in value if inner in new]
    kept = [inner for inner in value if set(_flat(inner)) <= new.keys()]
    return [_renumbered(inner, new) for inner in kept]


@EDITS.add
class PruneVocabulary(Cutting):
    """Keep some tokens: rows of the tables and heads that have one for each, renumbered in their order."""

    kind: Literal["prune_vocab"] = "prune_vocab"
    parameters: tuple[str, ...]
    keep: str

    def kept(self) -> list[int]:
        """The ids that stay, ascending, in the numbering before this edit."""
        return read_ranges(self.keep)

    def apply(self, model: nn.Module) -> None:
        """Slice the rows, tied ones together; real ones keep their values. The model's configs are rewritten too."""
        named = dict(model.named_parameters(remove_duplicate=False))
        missing = [name for name in self.parameters if name not in named]
        if missing:
            what, fix = f"the model has no parameter {missing[0]!r}", "use the model that these edits were made for"
            raise CompressKitError(what, where="edits", fix=fix)
        kept = read_ranges(self.keep, limit=min(len(named[name]) for name in self.parameters))
        index = torch.tensor(kept)
        cut: dict[int, nn.Parameter] = {}
        for name in self.parameters:
            path, _, own = name.rpartition(".")
            holder, old = model.get_submodule(path), id(named[name])
            if old in cut:
                setattr(holder, own, cut[old])
            else:
                keep_slices(holder, own, index, dim=0)
                cut[old] = getattr(holder, own)
            _correct_counts(holder, kept)
        if isinstance(model, PreTrainedModel):
            for module in model.modules():
                if isinstance(vars(module).get("vocab_size"), int):
                    setattr(module, "vocab_size", len(kept))  # noqa: B010
            say_vocabulary(model.config, kept)
            say_vocabulary(getattr(model, "generation_config", None), kept)


def _correct_counts(module: nn.Module, kept: list[int]) -> None:
    """Set what a table or a head says about its rows."""
    if isinstance(module, nn.Embedding) and module.num_embeddings != len(module.weight):
        module.num_embeddings = len(kept)
        if module.padding_idx is not None:
            module.padding_idx = kept.index(module.padding_idx) if module.padding_idx in kept else None
    elif isinstance(module, nn.Linear):
        module.out_features = len(kept)


def narrowed(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """A twin of `model` with the tokens `kept` alone: it reads their new numbers and answers in them.

    It gives the model's own answers to text in these tokens, with logits of these tokens alone. All other parameters
    are the model's own; `model` stays as it is.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    PruneVocabulary(parameters=vocabulary_parameters(twin), keep=write_ranges(kept)).apply(twin)
    return twin
