"""How a model's hidden states become sentence embeddings, as the folders of sentence-transformers say it.

    modules.json            the parts in order: the transformer, a pooling, perhaps a normalisation or a dense layer
    1_Pooling/config.json   which poolings; several are concatenated

A folder that says nothing pools the mean, as most embedders do. Normalisation changes no cosine, so measuring goes
without; dense layers after the pooling are carried along and not measured.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compresskit.errors import CompressKitError

# N texts, T tokens, D width

_ROOT_FILES = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")
_PART_FILES = ("*.json", "*.safetensors")


def _weights(hidden: Tensor, mask: Tensor) -> Tensor:
    return mask.to(hidden.dtype)[:, :, None]


def _at(hidden: Tensor, place: Tensor) -> Tensor:
    """The hidden state (N, D) at a place (N,) of each text."""
    return hidden.gather(1, place[:, None, None].expand(-1, 1, hidden.shape[2]))[:, 0]


def mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean over real tokens, (N, D)."""
    return (hidden * _weights(hidden, mask)).sum(1) / _weights(hidden, mask).sum(1).clamp_min(1)


def mean_sqrt(hidden: Tensor, mask: Tensor) -> Tensor:
    """The sum over real tokens, divided by the root of their number, (N, D)."""
    return (hidden * _weights(hidden, mask)).sum(1) / _weights(hidden, mask).sum(1).clamp_min(1).sqrt()


def weighted_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean over real tokens, the i-th of them weighing i, (N, D)."""
    weights = _weights(hidden, mask.cumsum(1) * mask)
    return (hidden * weights).sum(1) / weights.sum(1).clamp_min(1)


def maximum(hidden: Tensor, mask: Tensor) -> Tensor:
    """The greatest value of each channel over real tokens, (N, D)."""
    return hidden.masked_fill(~mask.bool()[:, :, None], -torch.inf).amax(1)


def first(hidden: Tensor, mask: Tensor) -> Tensor:
    """The first real token (CLS), (N, D); padding may stand on either side."""
    return _at(hidden, mask.int().argmax(1))


def last(hidden: Tensor, mask: Tensor) -> Tensor:
    """The last real token, (N, D); padding may stand on either side."""
    return _at(hidden, mask.shape[1] - 1 - mask.int().flip(1).argmax(1))


#: By the names of sentence-transformers, in the order in which it concatenates them.
POOLINGS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": first,
    "max": maximum,
    "mean": mean,
    "mean_sqrt_len_tokens": mean_sqrt,
    "weightedmean": weighted_mean,
    "lasttoken": last,
}
#: Their switches in 1_Pooling/config.json, where they differ from `pooling_mode_NAME`.
_SWITCHES = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
}


@dataclass(frozen=True)
class SentenceEmbedding:
    """From hidden states to one vector a text.

    Attributes:
        poolings: keys of `POOLINGS`; what several give is concatenated.
        files: what sentence-transformers needs beside a checkpoint to load it, by relative name.
    """

    poolings: tuple[str, ...] = ("mean",)
    files: Mapping[str, bytes] = field(default_factory=dict)

    def pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Embeddings (N, D · poolings) in `hidden`'s dtype, of hidden states (N, T, D); mask (N, T) is 1 at tokens."""
        return torch.cat([POOLINGS[name](hidden, mask) for name in self.poolings], dim=-1)

    @property
    def _parts(self) -> set[str]:
        """The kinds of parts that the folder lists, "Pooling" say."""
        listed = json.loads(self.files.get("modules.json", b"[]"))
        return {str(part.get("type", "")).rpartition(".")[2] for part in listed}

    @property
    def is_told(self) -> bool:
        """Whether the folder says how texts become embeddings, and `embed` does all of it."""
        return "Pooling" in self._parts <= {"Transformer", "Pooling", "Normalize"}

    def embed(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Embeddings as the folder wants them: pooled, and of length 1 where it normalises; shapes as for `pool`."""
        pooled = self.pool(hidden, mask)
        return F.normalize(pooled, dim=-1) if "Normalize" in self._parts else pooled

    def write(self, folder: Path) -> None:
        """Put the files into a checkpoint's folder."""
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


#: What a folder that says nothing means.
MEAN_POOLED = SentenceEmbedding()


def read_sentence_embedding(folder: Path) -> SentenceEmbedding:
    """What a model's folder says about its embeddings.

    Raises:
        CompressKitError: a pooling that is not known, or files that cannot be read.
    """
    if not (folder / "modules.json").is_file():
        return MEAN_POOLED
    parts = [folder / part["path"] for part in _read(folder / "modules.json") if part.get("path")]
    outside = [part for part in parts if not part.resolve().is_relative_to(folder.resolve())]
    if outside:
        raise CompressKitError(f"names {outside[0]}, outside its folder", where=str(folder / "modules.json"))
    pooling = next((part / "config.json" for part in parts if "Pooling" in part.name), None)
    poolings = _poolings(pooling) if pooling is not None and pooling.is_file() else ("mean",)
    paths = [folder / name for name in _ROOT_FILES]
    paths += [path for part in parts for pattern in _PART_FILES for path in sorted(part.glob(pattern))]
    pickled = any(not list(part.glob("*.safetensors")) and list(part.glob("*.bin")) for part in parts)
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths if path.is_file()}
    return SentenceEmbedding(poolings, {} if pickled else files)


def _poolings(path: Path) -> tuple[str, ...]:
    said = _read(path)
    one = said.get("pooling_mode")
    names = [one] if isinstance(one, str) else list(one or [])
    names = names or [n for n in POOLINGS if said.get(_SWITCHES.get(n, f"pooling_mode_{n}"), n == "mean")]
    unknown = [name for name in names if name not in POOLINGS]
    if unknown or not names:
        what = f"pools by {unknown[0]!r}, which is not known" if unknown else "names no pooling"
        raise CompressKitError(what, where=str(path), fix=f"use one of {', '.join(POOLINGS)}")
    return tuple(names)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CompressKitError(f"cannot be read: {error}", where=str(path), fix="restore the file") from error
