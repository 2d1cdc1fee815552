"""Sentence embeddings of ONNX files: how true they are to the original's in torch, and to what the folder asks for."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresskit.data import Batch
from compresskit.errors import RunFailedError
from compresskit.evaluate.quality import compare_embeddings, evaluating
from compresskit.export.parity import Difference
from compresskit.export.runtime import run_outputs, run_session
from compresskit.export.trace import EMBEDDING
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


def check_embedding(session: ort.InferenceSession, batches: Sequence[Batch], sentence: SentenceEmbedding) -> float:
    """‖got − expected‖ / ‖expected‖ of the output `sentence_embedding` and of what torch makes of `last_hidden_state`.

    Args:
        session: gives both.
        batches: texts.
        sentence: how texts become embeddings.
    """
    difference = Difference()
    for batch in batches:
        hidden, got = run_outputs(session, ["last_hidden_state", EMBEDDING], batch)
        expected = sentence.embed(torch.from_numpy(hidden).double(), batch["attention_mask"])
        difference.add(got, expected.numpy())
    return difference.relative


def judge_embedding(error: float, *, bound: float, where: str) -> None:
    """Accept what `check_embedding` found, or refuse the file.

    Raises:
        RunFailedError: an error past the bound.
    """
    if not error <= bound:
        raise RunFailedError(
            f"the file pools its hidden states otherwise than 1_Pooling says: {error:.3g} (relative); the bound is "
            f"{bound:g}",
            where=where,
            fix="try 'fuse: false', or 'pooling: false' and pool outside",
        )
