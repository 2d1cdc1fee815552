"""Cached files: written whole or not at all, checked when read, made again when damaged."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from compresskit.cache import writing_to_cache
from compresskit.whole import write_whole


def _write(path: Path, content: bytes) -> None:
    with writing_to_cache(path):
        write_whole(path, content)


def _seal(body: bytes) -> bytes:
    return hashlib.sha256(body).digest() + body


def _unseal(path: Path) -> bytes | None:
    """The body of a sealed file; None where it is missing or not what was written."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    seal, body = content[:32], content[32:]
    return body if hashlib.sha256(body).digest() == seal else None


def cached_json(path: Path, make: Callable[[], Any]) -> Any:
    """What the sealed file holds, or else what `make` returns, which is written there."""
    body = _unseal(path)
    if body is not None:
        return json.loads(body)
    made = make()
    _write(path, _seal(json.dumps(made, ensure_ascii=False).encode()))
    return made


def read_tensors(path: Path) -> dict[str, Tensor] | None:
    """The named tensors written by `write_tensors`; None where the file is missing or damaged."""
    body = _unseal(path)
    if body is None:
        return None
    try:
        return load_tensors(body)
    except SafetensorError:  # sealed by another program
        return None


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write named tensors, sealed."""
    _write(path, _seal(save_tensors(tensors)))


def read_rows(path: Path) -> dict[str, list[list[int]]] | None:
    """The named token rows written by `write_rows`; None where the file is missing or damaged."""
    tensors = read_tensors(path)
    if tensors is None:
        return None
    parts = [name.removesuffix(".tokens") for name in tensors if name.endswith(".tokens")]
    return {
        part: [row.tolist() for row in tensors[f"{part}.tokens"].split(tensors[f"{part}.lengths"].tolist())]
        for part in parts
    }


def write_rows(path: Path, parts: dict[str, list[list[int]]]) -> None:
    """Write named token rows, sealed: a flat int32 tensor and the rows' lengths for each name."""
    tensors = {}
    for part, rows in parts.items():
        tensors[f"{part}.tokens"] = torch.tensor([token for row in rows for token in row], dtype=torch.int32)
        tensors[f"{part}.lengths"] = torch.tensor([len(row) for row in rows], dtype=torch.int32)
    write_tensors(path, tensors)
