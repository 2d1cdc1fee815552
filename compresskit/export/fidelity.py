"""How true sentence embeddings of ONNX files are to the original's in torch."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresskit.data import Batch
from compresskit.evaluate.quality import compare_embeddings, evaluating
from compresskit.export.runtime import run_session
from compresskit.sentence import SentenceEmbedding


def session_fidelity(
    original: PreTrainedModel,
    batches: Sequence[Batch],
    sessions: Mapping[str, ort.InferenceSession],
    given: Mapping[str, Sequence[Batch]],
    *,
    output: str,
    sentence: SentenceEmbedding,
) -> dict[str, dict[str, float]]:
    """`compare_embeddings` of the original in torch with each session, by the session's name.

    Args:
        original: the untouched model.
        batches: three texts or more, with every input that the files have.
        sessions: files with one output, (batch, length, width).
        given: by the session's name, the same batches in the ids that it reads.
        output: the original's name of that output.
        sentence: how embeddings are pooled.
    """

    def pooled(hidden: np.ndarray, batch: Batch) -> Tensor:
        return sentence.pool(torch.from_numpy(hidden).to(torch.float64), batch["attention_mask"])

    with evaluating(original):
        expected = torch.cat([pooled(original(**batch)[output].numpy(), batch) for batch in batches])
    found = {
        name: torch.cat([pooled(run_session(session, batch), batch) for batch in given[name]])
        for name, session in sessions.items()
    }
    return {name: compare_embeddings(expected, embeddings) for name, embeddings in found.items()}
