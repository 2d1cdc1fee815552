"""Cached files: written whole or not at all, checked when read, made again when damaged."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from compresskit.errors import RunFailedError


def write_atomically(path: Path, content: bytes) -> None:
    """Put `content` at `path` so that a reader sees all of it or what was there before.

    Raises:
        RunFailedError: the disk is full or cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(scratch, path)
        except OSError:
            Path(scratch).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise RunFailedError(
            f"cannot write {path}: {error.strerror or error}",
            where="cache",
            fix="make room, or set COMPRESSKIT_CACHE to a folder on another disk",
        ) from error


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
    write_atomically(path, _seal(json.dumps(made, ensure_ascii=False).encode()))
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
    write_atomically(path, _seal(save_tensors(tensors)))


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
