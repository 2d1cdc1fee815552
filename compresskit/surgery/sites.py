"""The parts of a transformer that passes work on, found by running it once and watching which linears read what.

No table of model names: blocks are the elements of the outermost ModuleLists that hold linears; linears called with the
same tensor share an input site; three of them followed by a linear as wide as the queries are an attention, and so is
one Conv1D three times as wide as what follows (GPT-2's queries, keys and values, one after another); one or two
followed by a linear as wide as they are an FFN. The run needs shapes only, so it works on the meta device.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import takewhile

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compresskit.config import did_you_mean
from compresskit.errors import CompressKitError
from compresskit.layers.empty_linear import EmptyLinear
from compresskit.layers.linear import LinearLike, layer_widths
from compresskit.layers.low_rank import LowRankLinear
from compresskit.layers.pivoted_linear import PivotedLinear

#: What a model raises that cannot be run on blank inputs alone, without values, or with the widths that it has.
CANNOT_RUN = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError)


@dataclass(frozen=True)
class Site:
    """Linears of one block that read the same tensor, in call order; attention and FFN outputs write the stream."""

    block: int
    linears: tuple[str, ...]
    writes_stream: bool


@dataclass(frozen=True)
class Attention:
    """Self-attention: the module that knows the head counts, its projections, its shape.

    Where one layer projects queries, keys and values, one after another, it is named three times.
    """

    block: int
    module: str
    query: str
    key: str
    value: str
    output: str
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def fused(self) -> bool:
        """Whether one layer projects queries, keys and values."""
        return self.query == self.key


@dataclass(frozen=True)
class FeedForward:
    """A plain FFN (one input linear) or a gated one (two), `neurons` wide."""

    block: int
    inputs: tuple[str, ...]
    output: str
    neurons: int


@dataclass(frozen=True)
class Anatomy:
    """What `find_anatomy` saw, in the order of execution."""

    blocks: tuple[str, ...]
    sites: tuple[Site, ...]
    attentions: tuple[Attention, ...]
    feed_forwards: tuple[FeedForward, ...]

    def linears(self) -> list[str]:
        """Names of all linears inside blocks."""
        return [name for site in self.sites for name in site.linears]


@dataclass(frozen=True)
class _Call:
    name: str
    block: int
    source: tuple[int, str]  # of the tensor it reads; pivoted factors read inputs of their own choice
    in_features: int
    out_features: int
    is_conv1d: bool


def find_blocks(model: nn.Module) -> tuple[str, ...]:
    """Names of the repeated blocks, outermost ModuleLists first found; elements without a linear do not count."""
    names: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(block + ".") for block in names):
            continue
        names.extend(
            f"{name}.{key}" if name else key
            for key, child in module.named_children()
            if any(isinstance(part, LinearLike | EmptyLinear) for part in child.modules())
        )
    return tuple(names)


def find_anatomy(model: PreTrainedModel, *, factors: bool = False) -> Anatomy:
    """Blocks, input sites, attentions and FFNs of a text or image model, dense or already compressed.

    Args:
        model: on the meta device or with weights; run once on a small batch of blank inputs, not changed.
        factors: see low-rank layers as the two linears they are made of, for passes that work on single matrices.

    Raises:
        CompressKitError: a model that this walk does not understand (no blocks, sound, encoder and decoder).
    """
    blocks = find_blocks(model)
    where = type(model).__name__
    if not blocks:
        what = "no repeated blocks with linear layers"
        raise CompressKitError(what, where=where, fix="use an encoder or decoder made of nn.Linear")
    if has_two_stacks(model):
        raise CompressKitError(
            "the model has encoder and decoder: what cross-attention reads is no plain chain of blocks",
            where=where,
            fix="use an encoder or a decoder alone (of T5 a T5EncoderModel, or task: token-classification)",
        )
    if model.main_input_name not in ("input_ids", "pixel_values"):
        raise CompressKitError(
            f"the model reads {model.main_input_name!r}: only text and images are understood",
            where=where,
            fix="use a text encoder, a text decoder or an image classifier",
        )
    groups = _group_by_input(_trace(model, blocks, factors=False))
    attentions = [found for block in range(len(blocks)) for found in _find_attentions(model, block, groups)]
    taken = {name for a in attentions for name in (a.query, a.key, a.value, a.output)}
    feed_forwards = [found for block in range(len(blocks)) for found in _find_feed_forwards(block, groups, taken)]
    writers = {a.output for a in attentions} | {f.output for f in feed_forwards}
    if factors:
        groups = _group_by_input(_trace(model, blocks, factors=True))
        writers |= {f"{name}.expand" for name in writers}  # of two factors the last one writes
    sites = tuple(
        Site(group[0].block, tuple(call.name for call in group), any(call.name in writers for call in group))
        for group in groups
    )
    return Anatomy(blocks, sites, tuple(attentions), tuple(feed_forwards))


def blank_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """(2, 4) token ids or two blank images, on the model's device."""
    if model.main_input_name == "pixel_values":
        size: int | Sequence[int] = model.config.image_size
        sides = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.zeros(2, model.config.num_channels, *sides, device=model.device)}
    return {"input_ids": torch.zeros(2, 4, dtype=torch.long, device=model.device)}


@torch.no_grad()
def run_once(model: PreTrainedModel) -> None:
    """Run a model, on the meta device perhaps, on `blank_inputs`: for its hooks or its errors.

    Raises:
        One of CANNOT_RUN: it needs values that the meta device has not, other inputs, or other shapes than it has.
    """
    # A decoder without a cache looks for packed sequences: meta cannot.
    with model.device, _padding_unasked(model), _experts_gathered(model):
        model(**blank_inputs(model))


@contextmanager
def _padding_unasked(model: PreTrainedModel) -> Iterator[None]:
    """Keep transformers from asking ids for padding, to warn of it: the meta device has no values."""
    asking = "warn_if_padding_and_no_attention_mask"
    parts = [part for part in model.modules() if hasattr(part, asking) and asking not in vars(part)]
    for part in parts:
        setattr(part, asking, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        for part in parts:
            delattr(part, asking)


@contextmanager
def _experts_gathered(model: PreTrainedModel) -> Iterator[None]:
    """Let a mixture on the meta device gather each token's experts: torch's grouped product is bfloat16 alone there."""
    before = model.get_experts_implementation()
    if model.device.type == "meta":
        model.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        if model.device.type == "meta":
            model.set_experts_implementation(before)


def has_two_stacks(model: PreTrainedModel) -> bool:
    """Whether a model has an encoder and a decoder; an encoder saved alone may keep a config that speaks of both."""
    return model.config.is_encoder_decoder and not type(model).__name__.endswith("EncoderModel")


def obstacle(model: PreTrainedModel) -> str | None:
    """Why a model, on the meta device perhaps, cannot `run_once`; None where it can."""
    try:
        run_once(model)
    except CANNOT_RUN as error:
        return (str(error).splitlines() or [type(error).__name__])[0]
    return None


def _trace(model: PreTrainedModel, blocks: tuple[str, ...], *, factors: bool) -> list[_Call]:
    calls: list[_Call] = []
    seen_inputs: list[Tensor] = []  # kept alive, so that an id is never reused
    inside_factors = {
        f"{name}.{child}"
        for name, module in model.named_modules()
        if isinstance(module, LowRankLinear)
        for child in ("reduce", "reduce.rest", "expand")
    }
    pivoted = {f"{name}.rest": module for name, module in model.named_modules() if isinstance(module, PivotedLinear)}

    def watch(name: str, block: int, module: nn.Module):
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen_inputs.append(args[0])
            source = (id(args[0]), name if name in pivoted else "")
            earlier = next((call for call in calls if call.name == name), None)
            if earlier is not None and earlier.source != source:
                raise CompressKitError(
                    f"{name} runs more than once, on different inputs: there is no one thing that it should give",
                    where=type(model).__name__,
                    fix="use a model whose layers are not shared",
                )
            if earlier is not None:  # the first factor of several low-rank layers
                return
            outputs, inputs = layer_widths(module)
            calls.append(_Call(name, block, source, inputs, outputs, isinstance(module, Conv1D)))

        # A pivoted factor picks its inputs anew for each layer that shares it: watch what it picks them from.
        return pivoted.get(name, module).register_forward_pre_hook(hook)

    handles = []
    for index, block in enumerate(blocks):
        for inner, module in model.get_submodule(block).named_modules():
            name = f"{block}.{inner}"
            skip = isinstance(module, LowRankLinear) if factors else name in inside_factors
            if isinstance(module, LinearLike) and not skip:
                handles.append(watch(name, index, module))
    try:
        run_once(model)
    except CANNOT_RUN as error:
        raise CompressKitError(
            f"the model cannot be run on {model.main_input_name} alone, or not without its weights: {error}",
            where=type(model).__name__,
            fix="use another encoder or decoder",
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _group_by_input(calls: list[_Call]) -> list[list[_Call]]:
    groups: dict[tuple[int, str], list[_Call]] = {}
    for call in calls:
        groups.setdefault(call.source, []).append(call)
    return list(groups.values())


def _followers(groups: list[list[_Call]], index: int) -> list[_Call]:
    """The linears that run next in the same block, where they are alone at their input."""
    for group in groups[index + 1 :]:
        if group[0].block == groups[index][0].block:
            return group
    return []


def _find_attentions(model: PreTrainedModel, block: int, groups: list[list[_Call]]) -> list[Attention]:
    found = []
    for index, group in enumerate(groups):
        after = _followers(groups, index)
        if group[0].block != block or len(after) != 1:
            continue
        width = after[0].in_features
        if len(group) == 1 and group[0].is_conv1d and group[0].out_features == 3 * width:
            query = key = value = group[0]
            widths = (width, width)
        elif len(group) == 3:
            query, key, value = sorted(group, key=lambda call: -call.out_features)  # stable: equal widths in call order
            widths = (query.out_features, key.out_features)
            if key.out_features != value.out_features or query.out_features != width:
                continue
        else:
            continue
        module = _common_parent([call.name for call in group])
        head_dim = _head_dim(model, module)
        heads, kv_heads = (one // head_dim for one in widths)
        names = (query.name, key.name, value.name, after[0].name)
        found.append(Attention(block, module, *names, heads, kv_heads, head_dim))
    return found


def _common_parent(names: list[str]) -> str:
    parts = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return ".".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, parts))


def _head_dim(model: PreTrainedModel, module: str) -> int:
    for name, value in vars(model.get_submodule(module)).items():
        if (
            name.endswith(("head_dim", "head_size", "key_value_proj_dim"))
            and not name.startswith("all")
            and isinstance(value, int)
        ):
            return value
    config = model.config.get_text_config()
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _find_feed_forwards(block: int, groups: list[list[_Call]], taken: set[str]) -> list[FeedForward]:
    found = []
    for index, group in enumerate(groups):
        after = _followers(groups, index)
        if group[0].block != block or len(group) > 2 or len(after) != 1 or group[0].name in taken:
            continue
        widths = {call.out_features for call in group}
        if widths != {after[0].in_features} or after[0].out_features != group[0].in_features:
            continue
        found.append(FeedForward(block, tuple(call.name for call in group), after[0].name, after[0].in_features))
    return found


def tied_heads(model: PreTrainedModel) -> list[tuple[str, str]]:
    """(table, head) names of output heads that share the input embedding's weight."""
    tied = getattr(model, "all_tied_weights_keys", {})
    return [
        (source.removesuffix(".weight"), target.removesuffix(".weight"))
        for target, source in tied.items()
        if target.endswith(".weight") and isinstance(model.get_submodule(target.removesuffix(".weight")), nn.Linear)
    ]


def tied_parameters(model: PreTrainedModel, seeds: set[int]) -> tuple[str, ...]:
    """Names of the parameters `seeds` (by identity), and of those that are tied to them, in the model's order."""
    named = dict(model.named_parameters(remove_duplicate=False))
    found = {name for name, parameter in named.items() if id(parameter) in seeds}
    tied = [(one, other) for one, other in model.all_tied_weights_keys.items() if one in named and other in named]
    while grown := {name for pair in tied if found & set(pair) for name in pair} - found:
        found |= grown
    return tuple(name for name in named if name in found)


def tied_modules(model: PreTrainedModel, name: str) -> dict[str, nn.Module]:
    """The other modules that hold the weight of the module `name`, in the model's order: tables and heads."""
    names = tied_parameters(model, {id(model.get_parameter(f"{name}.weight"))})
    paths = (parameter.rpartition(".")[0] for parameter in names)
    return {path: model.get_submodule(path) for path in paths if path != name}


def select(names: list[str], pattern: str, *, where: str = "targets") -> list[str]:
    """The names that a glob matches, in order.

    Raises:
        CompressKitError: none does; the fix names the closest pattern.
    """
    chosen = [name for name in names if fnmatchcase(name, pattern)]
    if not chosen:
        if not names:
            what = f"{pattern!r} matches no module: the model has no layer of a kind that this pass works on"
            fix = "leave this pass out; `compresskit modules MODEL` lists the layers"
            raise CompressKitError(what, where=where, fix=fix)
        near = did_you_mean(pattern.strip("*."), names) or names[0]
        raise CompressKitError(
            f"{pattern!r} matches no module of the {len(names)} that this pass works on",
            where=where,
            fix=f"their names look like {near!r}; `compresskit modules MODEL` lists all",
        )
    return chosen
