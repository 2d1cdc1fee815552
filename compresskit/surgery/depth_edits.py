"""Edits that take blocks out of a model, or attentions and FFNs out of its blocks.

A model's stack is the ModuleList of its blocks; the config counts them, and has lists with one entry a block (which
attention it uses, say). Blocks know their number, by which they find their place in a key/value cache. All of that is
corrected where blocks go, so that the model runs, generates and is saved like one that was built with fewer.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from compresskit.errors import CompressKitError
from compresskit.layers.empty_linear import EmptyLinear
from compresskit.layers.linear import LinearLike, layer_widths
from compresskit.surgery.edits import EDITS, Cutting, Edit, get_module, read_ranges, set_module
from compresskit.surgery.sites import CANNOT_RUN, has_two_stacks

#: How modules call their block's number.
_NUMBERS = ("layer_idx", "layer_id", "layer_index", "layer_number", "layer_num", "block_idx")
#: Ends of the names of config lists that are never one entry a block.
_NOT_BY_BLOCK = ("token_id", "architectures", "_size")


def find_stack(model: PreTrainedModel) -> str:
    """The name of the one ModuleList that holds the model's blocks.

    Raises:
        CompressKitError: none has as many elements as the config counts (blocks are shared, or grouped in stages), or
            several have (encoder and decoder); blocks that read what others keep in the cache.
    """
    config = model.config.get_text_config()
    count = getattr(config, "num_hidden_layers", None)
    lists: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists.append(name)
    stacks = [name for name in lists if len(get_stack(model, name)) == count]
    if has_two_stacks(model) or len(stacks) != 1:
        seen = ", ".join(f"{name} of {len(get_stack(model, name))}" for name in lists) or "none"
        counted = "whose blocks the config counts" if count is None else f"of the {count} blocks that the config counts"
        what = f"there is no one list {counted} (lists: {seen})"
        if has_two_stacks(model):
            what = "the model has encoder and decoder, and only one stack of blocks is understood"
        fix = "use an encoder or decoder with a list of blocks of its own, neither shared nor in stages"
        if count is None and any(isinstance(module, nn.Conv2d) for module in model.modules()):
            fix = "use prune_filters, which is for convolutional networks"
        raise CompressKitError(what, where=type(model).__name__, fix=fix)
    for name, module in get_stack(model, stacks[0]).named_modules():
        if getattr(module, "is_kv_shared_layer", False):
            what = f"{stacks[0]}.{name} reads the keys and values of another block"
            raise CompressKitError(what, where=type(model).__name__, fix="use a model whose blocks do not share them")
    return stacks[0]


def get_stack(model: nn.Module, name: str) -> nn.ModuleList:
    """The ModuleList called `name`.

    Raises:
        CompressKitError: something else is there.
    """
    stack = get_module(model, name)
    if not isinstance(stack, nn.ModuleList):
        raise CompressKitError(f"{name} is a {type(stack).__name__}, not a list of blocks", where="edits")
    return stack


@EDITS.add
class DropBlocks(Cutting):
    """Keep some of a model's blocks; they are numbered anew, in the module names too."""

    kind: Literal["drop_blocks"] = "drop_blocks"
    stack: str
    keep: str

    def apply(self, model: nn.Module) -> None:
        """Shorten the list; the blocks that stay are the same objects."""
        stack = get_stack(model, self.stack)
        kept = read_ranges(self.keep, limit=len(stack))
        for new, old in enumerate(kept):
            _renumber(stack[old], old, new)
        for config in _configs_above(model, self.stack):
            cut_depth(config, kept, of=len(stack))
        set_module(model, self.stack, nn.ModuleList([stack[old] for old in kept]))


def _renumber(block: nn.Module, old: int, new: int) -> None:
    for module in block.modules():
        for name in _NUMBERS:
            if vars(module).get(name) == old:
                setattr(module, name, new)


def _configs_above(model: nn.Module, stack: str) -> Iterator[PretrainedConfig]:
    """The configs of the modules that hold the stack, each once; of a composite one the part for text."""
    seen: list[PretrainedConfig] = []
    parts = stack.split(".")
    for depth in range(len(parts)):
        config = getattr(model.get_submodule(".".join(parts[:depth])), "config", None)
        if isinstance(config, PretrainedConfig):
            text = config.get_text_config()
            if not any(text is one for one in seen):
                seen.append(text)
                yield text


def cut_depth(config: PretrainedConfig, kept: Sequence[int], *, of: int) -> None:
    """Make a config with lists of `of` entries, one a block, and that count, say the blocks `kept`; in place."""
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == of and not name.endswith(_NOT_BY_BLOCK):
            setattr(config, name, type(value)(value[index] for index in kept))
    config.num_hidden_layers = len(kept)


@EDITS.add
class EmptyLinears(Edit):
    """Take the weights of linears away: they give zeros. All of a branch go at once, so that it adds nothing."""

    kind: Literal["empty_linears"] = "empty_linears"
    targets: tuple[str, ...]

    def apply(self, model: nn.Module) -> None:
        """Replace each layer, dense, low-rank or quantised."""
        for name in self.targets:
            old = get_module(model, name)
            if not isinstance(old, LinearLike):
                raise CompressKitError(f"{name} is a {type(old).__name__}, not a linear layer", where=self.kind)
            outputs, inputs = layer_widths(old)
            set_module(model, name, EmptyLinear(inputs, outputs))


def cut_config(original: PreTrainedModel, edits: Iterable[DropBlocks]) -> PretrainedConfig | None:
    """The original's config for fewer blocks; None where a model built from it has others than those that stay.

    That is so where a block's place decides what it is (the first one without a norm, every n-th with experts) and no
    list in the config says it. Seen by building it, without memory, and comparing block by block.
    """
    config: PretrainedConfig = type(original.config).from_dict(original.config.to_dict())
    stacks: dict[str, list[int]] = {}
    for edit in edits:
        blocks = stacks.get(edit.stack) or list(range(len(get_stack(original, edit.stack))))
        kept = read_ranges(edit.keep, limit=len(blocks))
        cut_depth(config.get_text_config(), kept, of=len(blocks))
        stacks[edit.stack] = [blocks[index] for index in kept]
    try:
        with torch.device("meta"):
            built = type(original)._from_config(type(config).from_dict(config.to_dict()))
    except (StrictDataclassError, *CANNOT_RUN):  # the config says the number of blocks elsewhere too
        return None
    for name, blocks in stacks.items():
        ours, theirs = get_stack(original, name), get_stack(built, name)
        if len(theirs) != len(blocks) or any(
            _shape_of(ours[old]) != _shape_of(theirs[new]) for new, old in enumerate(blocks)
        ):
            return None
    return config if _widths(original, stacks) <= _widths(built, stacks) else None


def _widths(model: nn.Module, stacks: Iterable[str]) -> set[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all parameters outside the stacks."""
    inside = tuple(f"{stack}." for stack in stacks)
    return {(name, tuple(p.shape)) for name, p in model.named_parameters() if not name.startswith(inside)}


def _shape_of(block: nn.Module) -> list[Any]:
    """What a block is, apart from the values of its weights and its number."""
    said: list[Any] = []
    for name, module in block.named_modules():
        plain = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, int | float | str | None) and not key.startswith("_") and key not in _NUMBERS
        }
        plain.pop("training", None)
        weights = {key: tuple(p.shape) for key, p in module.named_parameters(recurse=False)}
        said.append((name, type(module), plain, weights))
    return said
