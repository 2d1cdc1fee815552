"""What the benches share: their texts, calibration windows, models cut short, and peaks of memory (Linux only)."""

import argparse
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

from compresskit.data import Corpus, DataSource, Sequences, prepare_corpus
from compresskit.data.prepare import window_start
from compresskit.surgery.sites import find_blocks


def add_text_options(parser: argparse.ArgumentParser, *, scores: bool = True) -> None:
    """--calibrate and --score; `read_options` sees that they are given."""
    parser.add_argument("--calibrate", help="text file to calibrate on")
    if scores:
        parser.add_argument("--score", action="append", metavar="NAME=FILE", help="text to score on; may be repeated")


def read_options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line; with --quick, texts that are not given are Python's own documentation, in two halves."""
    options = parser.parse_args()
    scores = hasattr(options, "score")
    if options.quick and not options.calibrate:
        options.calibrate = _write_topics(0)
    if options.quick and scores and not options.score:
        options.score = [f"docs={_write_topics(1)}"]
    if not options.calibrate or (scores and not options.score):
        parser.error("say which texts: --calibrate FILE" + (" and --score NAME=FILE" if scores else ""))
    return options


def _write_topics(half: int) -> str:
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".txt", delete=False) as file:
        file.write("\n".join(text for _, text in sorted(topics.items())[half::2]))
    return file.name


def keep_blocks(model: torch.nn.Module, count: int) -> None:
    """Cut `model` to its first `count` blocks, in place."""
    path, _, name = find_blocks(model)[0].rpartition(".")[0].rpartition(".")
    parent = model.get_submodule(path)
    setattr(parent, name, getattr(parent, name)[:count])
    model.config.num_hidden_layers = count  # type: ignore[union-attr]


def calibration_corpus(options: argparse.Namespace, tokenizer: Any, *, task: str, seed: int) -> Corpus:
    """The calibration text that the options name, and next to nothing else."""
    data = DataSource(
        source="text",
        path=(options.calibrate,),
        max_length=options.calibration_tokens,
        calibration=options.calibration,
        training=0,
        evaluation=1,
    )
    return prepare_corpus(data, tokenizer, pack=task == "text-generation", seed=seed)


def windows(path: Path, tokenizer: Any, *, count: int, length: int) -> Sequences:
    """The first `count` windows of `length` tokens of a text file, each begun as the tokenizer begins a text."""
    text = path.read_text(encoding="utf-8")[: count * length * 8]
    ids, start = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], window_start(tokenizer)
    step = length - len(start)
    return Sequences([[*start, *ids[i * step : (i + 1) * step]] for i in range(count)], tokenizer.pad_token_id)


def peak_rss() -> int:
    """Peak resident memory since `reset_peak`, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def reset_peak() -> None:
    """Let the kernel count the peak from here."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
