"""`slab_loss_` as fused Triton kernels between library products: each logit is read twice, or three times, and never copied.

    statistics   running max and Σ exp of student and teacher, for reverse KL Σ q (a − b) too, for entropy Σ p b
    slopes       Σ r, only for the divergences whose gradient needs it and that no running sum gives
    gradient     student slab ← ∂loss/∂product in place, and D

A program takes a block of tokens and one part of the vocabulary, so that a slab of few tokens still fills a GPU; the
parts' sums are joined by a few operations on (parts, C). Numbers are float32 in registers. Bytes moved per logit in
bfloat16: 4 in the products that write both slabs, 4 a read of both, 2 to write the gradient, 4 in the products that read
it: 18 for forward and reverse KL, 22 for the rest.
"""

# Pyright does not know the types inside kernels.
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from compresskit.kernels.divergence import Divergence, Kind
from compresskit.kernels.slab import Readout, Statistics, TokenTerms, rule_factor
