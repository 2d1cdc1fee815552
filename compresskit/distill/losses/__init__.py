"""Losses between a student and its teacher; adding one costs a file, a test and a line here."""

from compresskit.distill.losses.attention import AttentionMaps
from compresskit.distill.losses.base import LOSSES, AnyLoss, Loss
from compresskit.distill.losses.contrastive import Contrastive
from compresskit.distill.losses.embedding import Embedding
from compresskit.distill.losses.hidden import Hidden
from compresskit.distill.losses.kl import KL, logits_of
from compresskit.distill.losses.relation import Relation

__all__ = [
    "KL",
    "LOSSES",
    "AnyLoss",
    "AttentionMaps",
    "Contrastive",
    "Embedding",
    "Hidden",
    "Loss",
    "Relation",
    "logits_of",
]
