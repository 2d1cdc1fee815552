"""How true sentence embeddings of ONNX files are to the original's in torch."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresskit.data import Batch
from compresskit.evaluate.quality import compare_embeddings, evaluating, mean_pool
from compresskit.export.runtime import run_session


def _pooled(hidden: np.ndarray, batch: Batch) -> Tensor:
    return mean_pool(torch.from_numpy(hidden), batch["attention_mask"])


def session_fidelity(
    original: PreTrainedModel, sessions: Mapping[str, ort.InferenceSession], batches: Sequence[Batch], *, output: str
) -> dict[str, dict[str, float]]:
    """`compare_embeddings` of the original in torch with each session, by the session's name.

    Args:
        original: the untouched model.
        sessions: files with one output, (batch, length, width).
        batches: three texts or more, with every input that the files have.
        output: the original's name of that output.
    """
    with evaluating(original):
        expected = torch.cat([_pooled(original(**batch)[output].numpy(), batch) for batch in batches])
    return {
        name: compare_embeddings(
            expected, torch.cat([_pooled(run_session(session, batch), batch) for batch in batches])
        )
        for name, session in sessions.items()
    }
