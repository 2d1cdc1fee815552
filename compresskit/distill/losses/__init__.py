"""Losses between a student and its teacher; adding one costs a file, a test and a line here."""

from compresskit.distill.losses.base import LOSSES, AnyLoss, Loss
from compresskit.distill.losses.embedding import Embedding
from compresskit.distill.losses.hidden import Hidden
from compresskit.distill.losses.kl import KL

__all__ = ["KL", "LOSSES", "AnyLoss", "Embedding", "Hidden", "Loss"]
