"""Every built-in pass; importing this registers them. A new pass is one file, one test file and one line here."""

from compresskit.passes.base import PASSES, Pass, Trait
from compresskit.passes.bitsandbytes import BitsAndBytes
from compresskit.passes.distill import Distill
from compresskit.passes.low_rank import LowRank
from compresskit.passes.low_rank_correction import LowRankCorrection
from compresskit.passes.prune_depth import PruneDepth
from compresskit.passes.prune_filters import PruneFilters
from compresskit.passes.prune_vocab import PruneVocab
from compresskit.passes.prune_width import PruneWidth
from compresskit.passes.quantize import Quantize
from compresskit.passes.tensor import TensorDecomposition

__all__ = [
    "PASSES",
    "BitsAndBytes",
    "Distill",
    "LowRank",
    "LowRankCorrection",
    "Pass",
    "PruneDepth",
    "PruneFilters",
    "PruneVocab",
    "PruneWidth",
    "Quantize",
    "TensorDecomposition",
    "Trait",
]
