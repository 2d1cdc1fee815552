"""Where compresskit keeps what it would otherwise make again: converted models, tokenised texts, baselines."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from compresskit.errors import RunFailedError


def cache_folder() -> Path:
    """`$COMPRESSKIT_CACHE`, else `~/.cache/compresskit`."""
    return Path(os.environ.get("COMPRESSKIT_CACHE") or Path.home() / ".cache" / "compresskit")


@contextmanager
def writing_to_cache(path: Path) -> Iterator[None]:
    """Makes the folder that `path` stands in, and says in words when the disk refuses.

    Raises:
        RunFailedError: the disk is full or cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise RunFailedError(
            f"cannot write {path}: {reason}",
            where="cache",
            fix="make room, or set COMPRESSKIT_CACHE to a folder on another disk",
        ) from error
