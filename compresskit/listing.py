"""What there is to choose from, as rows of text: the passes, the options of one, the modules of a model."""

import inspect
from dataclasses import dataclass

from pydantic import BaseModel
from torch import nn
from transformers import PreTrainedModel

from compresskit.config import Registry, did_you_mean
from compresskit.errors import CompressKitError
from compresskit.options import branches, describe_default, describe_type, notes
from compresskit.passes import PASSES
from compresskit.surgery.sites import Anatomy, find_anatomy

Row = tuple[str, ...]


@dataclass(frozen=True)
class Listing:
    """A table with words above it."""

    text: str
    columns: Row
    rows: list[Row]


def list_passes() -> Listing:
    """Every pass and what it does."""
    rows = [(kind, _first_line(PASSES[kind])) for kind in PASSES]
    return Listing("", ("pass", "what it does"), rows)


def describe_pass(kind: str) -> Listing:
    """The options of one pass, and of everything that nests in it.

    Raises:
        CompressKitError: no such pass.
    """
    if kind not in PASSES:
        near = did_you_mean(kind, PASSES)
        fix = f"did you mean {near!r}?" if near else f"the passes are: {', '.join(PASSES)}"
        raise CompressKitError(f"no pass {kind!r}", fix=fix)
    cls = PASSES[kind]
    traits = [f"in Python {cls.__name__}"]
    traits += [f"makes the model {', '.join(sorted(cls.adds))}"] if cls.adds else []
    traits += [f"refuses a model that is {', '.join(sorted(cls.refuses))}"] if cls.refuses else []
    text = "\n\n".join(part for part in (inspect.getdoc(cls) or "", "; ".join(traits)) if part)
    return Listing(text, ("option", "type", "default", "meaning"), _options(cls, ""))


def _options(cls: type[BaseModel], prefix: str) -> list[Row]:
    rows: list[Row] = []
    said = notes(cls)
    for name, field in cls.model_fields.items():
        if name == "kind":
            continue
        kind = describe_type(field.annotation, field.metadata)
        rows.append((f"{prefix}{name}", kind, describe_default(field), said.get(name, "")))
        for branch in branches(field.annotation, field.metadata):
            inner = [branch[word] for word in branch] if isinstance(branch, Registry) else [branch]
            for nested in inner:
                label = nested.model_fields["kind"].default if isinstance(branch, Registry) else None
                mark = f"{prefix}{name}({label})." if label else f"{prefix}{name}."
                if label:
                    rows.append((mark.removesuffix("."), f"{kind}: {label}", "", _first_line(nested)))
                rows += _options(nested, mark)
    return rows


def _first_line(cls: type[BaseModel]) -> str:
    return (inspect.getdoc(cls) or "").partition("\n")[0]


def list_modules(model: PreTrainedModel) -> Listing:
    """Every matrix of a model that `targets` may name: its shape and its part; shapes are enough (meta device)."""
    parts = _parts(find_anatomy(model)) if model.main_input_name == "input_ids" else {}
    rows = [
        (name, " × ".join(map(str, module.weight.shape)), parts.get(name, "outside the blocks"))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d | nn.Conv2d)
    ]
    return Listing("", ("module", "shape", "part"), rows)


def _parts(anatomy: Anatomy) -> dict[str, str]:
    parts = {name: f"block {site.block}" for site in anatomy.sites for name in site.linears}
    for attention in anatomy.attentions:
        heads = f"{attention.heads} heads of {attention.head_dim}"
        kv_heads = f"{attention.kv_heads} heads of {attention.head_dim}"
        named = {"query": heads, "key": kv_heads, "value": kv_heads, "output": heads}
        for role, shape in named.items():
            parts[getattr(attention, role)] = f"block {attention.block} attention {role}, {shape}"
    for feed_forward in anatomy.feed_forwards:
        place = f"block {feed_forward.block} FFN"
        parts |= dict.fromkeys(feed_forward.inputs, f"{place} input, {feed_forward.neurons} neurons")
        parts[feed_forward.output] = f"{place} output, {feed_forward.neurons} neurons"
    return parts
