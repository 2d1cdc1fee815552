"""How alike the sentence embeddings of two models are, in torch or in ONNX Runtime."""

from collections.abc import Iterable

import numpy as np
import onnxruntime as ort
import torch
from scipy.stats import rankdata
from torch import nn

from compresskit.data import Batch
from compresskit.export.runtime import run_session


def mean_pool(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Sentence embeddings (batch, width): the mean of the unmasked positions, at unit length."""
    weights = mask[..., None].astype(np.float64)
    mean = (hidden * weights).sum(1) / weights.sum(1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def embed_torch(model: nn.Module, batches: Iterable[Batch], *, output: str) -> np.ndarray:
    """Sentence embeddings of all texts by a torch model."""
    parts = []
    for batch in batches:
        with torch.no_grad():
            parts.append(mean_pool(model(**batch)[output].numpy(), batch["attention_mask"].numpy()))
    return np.concatenate(parts)


def embed_session(session: ort.InferenceSession, batches: Iterable[Batch]) -> np.ndarray:
    """Sentence embeddings of all texts by ONNX Runtime."""
    return np.concatenate([mean_pool(run_session(session, b), b["attention_mask"].numpy()) for b in batches])


def embedding_fidelity(original: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """How alike two sets of unit embeddings (texts, width) are: mean cosine, and Spearman of pairwise similarities."""
    upper = np.triu_indices(len(original), k=1)
    ranks = [rankdata((embeddings @ embeddings.T)[upper]) for embeddings in (original, other)]
    rank = np.corrcoef(*ranks)[0, 1]
    return {"mean_cosine": float((original * other).sum(1).mean()), "spearman": float(rank)}
