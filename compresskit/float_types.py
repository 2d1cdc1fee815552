"""In which float types a model's files hold its weights, and as what they load. In memory: float32."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open
from torch import nn
from transformers import PretrainedConfig

_HALVES = {"BF16": torch.bfloat16, "F16": torch.float16}
_CODES = ("U8", "I8")
_FLOATS = ("F64", "F32", *_HALVES)
_NOTE: Final = "compresskit_float_types"


@dataclass(frozen=True)
class FloatTypes:
    """What a model's files say.

    Attributes:
        stored: the type of most weights: float32, bfloat16 or float16.
        loaded: what from_pretrained gives unless it is told otherwise.
    """

    stored: torch.dtype = torch.float32
    loaded: torch.dtype = torch.float32


def read_float_types(folder: Path, config: PretrainedConfig) -> FloatTypes:
    """What the headers of a folder's weights and its config tell; of a config that says nothing, what is stored.

    Raises:
        SafetensorError: a header that cannot be read.
    """
    found: list[tuple[str, str, int]] = []  # layer, type, elements
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - no mapping
                part = stored.get_slice(name)
                found.append((name.rpartition(".")[0], part.get_dtype(), math.prod(part.get_shape())))
    # What stands beside integers (scales, maxima) is float32 whatever the weights are.
    coded = {layer for layer, dtype, _ in found if dtype in _CODES}
    elements: Counter[str] = Counter()
    for layer, dtype, count in found:
        elements[dtype] += 0 if layer in coded else count
    most = max(_FLOATS, key=elements.__getitem__)
    kept = _HALVES.get(most, torch.float32) if elements[most] else torch.float32
    said = config.dtype
    return FloatTypes(kept, said if isinstance(said, torch.dtype) else kept)


def note_float_types(model: nn.Module, types: FloatTypes) -> None:
    """Note on a model that is float32 in memory what its files hold."""
    setattr(model, _NOTE, types)


def float_types(model: nn.Module) -> FloatTypes:
    """What a model's files hold; of a model that came from none, float32."""
    return getattr(model, _NOTE, FloatTypes())
