"""An exported file measured as a student is: the same texts, the same figures, from the very file that is shipped."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import onnxruntime as ort
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresskit.data import Sequences
from compresskit.errors import CompressKitError
from compresskit.evaluate import Fidelity, measure_latency
from compresskit.export.files import model_bytes
from compresskit.export.folder import MODEL_FILE
from compresskit.export.runtime import open_session, run_session, session_feeds
from compresskit.student import HeldOut


class SessionModel(nn.Module):
    """A file that answers as the model answers from which it was exported.

    Args:
        session: of the file.
    """

    device = torch.device("cpu")

    def __init__(self, session: ort.InferenceSession) -> None:
        super().__init__()
        self._session = session
        self._name = session.get_outputs()[0].name

    def forward(self, **batch: Tensor) -> Any:
        """An object with the file's first output under its own name, a tensor."""
        return SimpleNamespace(**{self._name: torch.from_numpy(run_session(self._session, batch))})


def fixed_length(manifest: Mapping[str, Any]) -> int | None:
    """Tokens of the texts that an exported file takes; None where they are free, or it reads no text."""
    shape = manifest["inputs"].get("input_ids", {}).get("shape", [])
    return next((size for size in shape[1:] if isinstance(size, int)), None)


def exported_figures(
    folder: Path,
    manifest: Mapping[str, Any],
    fidelity: Fidelity,
    held_out: HeldOut | None,
    *,
    threads: int,
    length: int = 64,
    rounds: int = 30,
) -> dict[str, int | float]:
    """What the file in `folder` costs and how true it is to the original.

    Args:
        folder: an export.
        manifest: what `read_exported` says of it.
        fidelity: the original on held-out text.
        held_out: that text as the student reads it, where that is not how the original does.
        threads: of ONNX Runtime.
        length: tokens of the timed text.
        rounds: how often it is timed.

    Returns:
        `size_bytes`, `p50_ms` and `p95_ms` in ONNX Runtime (of one text of `length` tokens, or the first image; of a
        file of fixed sizes, of the batch that it takes), and the figures of `fidelity.measure`.

    Raises:
        CompressKitError: a file that does another task, or that gives the last token's logits alone.
    """
    task = manifest["task"]
    if task != fidelity.task:
        raise CompressKitError(f"is made for {task}", where=str(folder), fix=f"say --task {task}")
    session = open_session(folder / MODEL_FILE, threads=threads)
    if task == "text-generation" and session.get_outputs()[0].shape[1] == 1:
        raise CompressKitError(
            "gives logits of the last token alone; text is scored at every token",
            where=str(folder / MODEL_FILE),
            fix="export with 'logits: all' to measure, or measure the student",
        )
    given = held_out.sequences if held_out else fidelity.sequences
    timed = _of_length(given, length) if isinstance(given, Sequences) else given
    feed = session_feeds(session, next(timed.batches(1)))[0]
    found = measure_latency({"file": lambda: session.run(None, feed)}, rounds=rounds)["file"]
    # It answers all that Fidelity asks of a model.
    figures = fidelity.measure(cast(PreTrainedModel, SessionModel(session)), held_out)
    return {"size_bytes": model_bytes(folder / MODEL_FILE), **found, **figures}


def _of_length(texts: Sequences, length: int) -> Sequences:
    """One text of so many tokens, from those of `texts`, all of which the file knows."""
    tokens = itertools.chain.from_iterable(itertools.repeat(list(itertools.chain.from_iterable(texts.rows))))
    return Sequences([list(itertools.islice(tokens, length))], texts.pad_token_id)
