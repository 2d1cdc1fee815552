"""The student as a folder for ONNX Runtime, holding the very integers that were evaluated.

    student.model  →  trace  →  fuse  →  model.onnx, tokenizer, config  →  parity  →  latency against two baselines

`model.onnx` has one output (`last_hidden_state` for feature extraction, else `logits`), free batch and length, and
the operators of `compresskit.layers.operators` wherever a layer holds integers. Nothing is written unless ONNX Runtime
agrees with torch on held-out text.

Weight-only products (`MatMulNBits`) have fast kernels only where their input is rounded to 8 bits too (accuracy level
4; SmolLM2-135M in 8 bit, one token on 2 cores: 17 ms, against 355 ms in float32). The student in torch multiplies in
float32, so the file is proven at level 0, and then shipped at level 4 with the difference that makes in the report.

LLM.int8 has no operator: its file is proven against the same codes without rounded activations, and
`parity.re_expressed` tells how far that is from the student.

`target: standard` writes ONNX's own operators alone (`compresskit.export.standard`), for other runtimes.
"""

import inspect
from functools import partial
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir
import torch
from pydantic import Field, model_validator
from transformers import PreTrainedTokenizerBase

from compresskit.cache import cache_folder
from compresskit.data import Batch, Sequences, token_positions
from compresskit.evaluate.latency import random_batch
from compresskit.evaluate.quality import LEAST_COMPARED
from compresskit.export import fidelity, parity, standard
from compresskit.export.base import EXPORTERS, Exporter
from compresskit.export.baseline import Baseline, export_baseline
from compresskit.export.files import count_operators, model_bytes, save_graph
from compresskit.export.fusion import set_accuracy
from compresskit.export.runtime import (
    by_shape,
    compare_latency,
    default_threads,
    latency_entry,
    open_session,
    repeated_cases,
    speed_entry,
    text_shapes,
)
from compresskit.export.trace import OUTPUTS, trace
from compresskit.layers.forms import re_expressed, swapped
from compresskit.student import Student
from compresskit.surgery.plugin import config_with_edits
from compresskit.whole import whole_folder

MODEL_FILE = "model.onnx"


@EXPORTERS.add
class OnnxExport(Exporter):
    """Write ONNX for ONNX Runtime on a CPU."""

    kind: Literal["onnx"] = "onnx"  # pyright: ignore[reportIncompatibleVariableOverride]
    #: ort: ONNX Runtime's own operators; standard: ONNX's alone, integer weights as blocked DequantizeLinear
    target: Literal["ort", "standard"] = "ort"
    #: ONNX operator set; None is the newest that the exporter knows
    opset: int | None = Field(default=None, ge=18, le=23)
    #: use ONNX Runtime's fused operators; false gives a plainer graph that computes the same; none in a standard file
    fuse: bool = True
    #: of weight-only products: 4 rounds their input to 8 bits in blocks, up to 20 times as fast; 0 stays in float32; of
    #: a standard file each session chooses (ONNX Runtime takes 4)
    accuracy_level: Literal[0, 4] = 4
    #: largest ‖onnx − torch‖ / ‖torch‖ that passes; of a segment where activations are rounded
    max_relative_error: float = Field(default=parity.BOUND, gt=0)
    #: held-out texts in the comparison with the original; half of them, in ragged batches, in the parity check
    texts: int = Field(default=64, ge=8)
    #: also export the original, as float and as onnxruntime's stock dynamic int8, and compare
    baselines: bool = True
    #: timed runs of each model at each shape
    rounds: int = Field(default=25, ge=3)
    #: threads of ONNX Runtime; None is every core this process may use
    threads: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _has_blocks(self) -> "OnnxExport":
        if self.target == "standard" and self.opset and self.opset < standard.OPSET:
            raise ValueError(f"target: standard needs opset {standard.OPSET} or later, for blocked DequantizeLinear")
        return self

    def write(self, student: Student, folder: Path) -> dict[str, Any]:
        """Write, prove and time the student; the report's entry.

        Returns:
            `kind`, `files`, `size_bytes` (of the model), `operators`, `parity`, `latency_ms` (p50 and p95 at 1 × 64
            tokens, and by shape), and with baselines `baseline` and `stock_int8` (each `size_bytes`, `latency_ms`),
            `speed` (the original's float time over this one's, by shape), and `fidelity` for feature extraction.

        Raises:
            RunFailedError: parity past the bound, or a disk that refuses; then no `model.onnx` is left.
        """
        batch = sample_batch(student)
        output = OUTPUTS[student.task]
        threads = self.threads or default_threads()
        if self.target == "ort":
            graph = trace(student.model, batch, output=output, fuse=self.fuse, opset=self.opset)
        else:
            graph = trace(student.model, batch, output=output, fuse=False, opset=self.opset or standard.OPSET)
            standard.use_standard_operators(graph)
        with whole_folder(folder) as scratch:
            save_graph(graph, scratch / MODEL_FILE)
            write_companions(student, scratch)
            entry = {
                "kind": self.kind,
                "files": sorted(path.name for path in scratch.iterdir()),
                "operators": count_operators(graph),
                "parity": self._check_parity(student, graph, scratch / MODEL_FILE, output, threads, folder),
                "size_bytes": model_bytes(scratch / MODEL_FILE),
            }
            del graph
            entry |= self._compare(student, scratch / MODEL_FILE, batch, threads)
        return entry

    def _check_parity(
        self, student: Student, graph: ir.Model, path: Path, output: str, threads: int, folder: Path
    ) -> dict[str, Any]:
        """Prove the file against the student, layers without an operator in their ONNX form (`re_expressed`)."""
        forms = re_expressed(student.model)
        if not forms:
            return self._prove(student, graph, path, output, threads, folder)
        texts = parity.parity_batches(student.corpus.evaluation, texts=self.texts // 2)
        batches = [complete_batch(student, batch) for batch in texts]
        expected = parity.model_outputs(student.model, batches, output=output)
        with swapped(student.model, forms):
            found = self._prove(student, graph, path, output, threads, folder)
            got = parity.model_outputs(student.model, batches, output=output)
        found["re_expressed"] = {"layers": len(forms), **parity.compare_outputs(got, expected, batches)}
        return found

    def _prove(
        self, student: Student, graph: ir.Model, path: Path, output: str, threads: int, folder: Path
    ) -> dict[str, Any]:
        """Prove the file in exact arithmetic; then, where it may be faster, write it so and see what that changes."""
        texts = parity.parity_batches(student.corpus.evaluation, texts=self.texts // 2)
        batches = [complete_batch(student, batch) for batch in texts]
        open_model = partial(open_session, threads=threads)
        exact = partial(open_model, exact=True)
        found = parity.check_parity(path, exact, student.model, batches, output=output)
        parity.judge_parity(found, bound=self.max_relative_error, where=str(folder))
        found["bound"] = self.max_relative_error
        ships_other = self.accuracy_level and set_accuracy(graph, self.accuracy_level)
        if ships_other:
            save_graph(graph, path)
        if ships_other or (self.target == "standard" and standard.has_blocks(graph)):
            found["shipped"] = parity.check_shipped(open_model(path), student.model, batches, output=output)
            noise = found.get("end_to_end", {}).get("rounding_noise", 0.0)
            parity.judge_shipped(found["shipped"], noise=noise, where=str(folder))
        return found

    def _compare(self, student: Student, path: Path, batch: Batch, threads: int) -> dict[str, Any]:
        """Latency of the student and, where asked for, of both baselines; their sizes and fidelity."""
        paths = {"student": path}
        if self.baselines:
            cache = cache_folder() / "baselines"
            output = OUTPUTS[student.task]
            files: Baseline = export_baseline(student.original, batch, output=output, opset=self.opset, cache=cache)
            paths = {"baseline": files.float_model, "stock_int8": files.int8_model, "student": path}
        sessions = {name: open_session(file, threads=threads) for name, file in paths.items()}
        is_text = isinstance(student.corpus.evaluation, Sequences)
        cases = text_cases(student) if is_text else repeated_cases(batch)
        rows = compare_latency(sessions, cases, rounds=self.rounds)
        entry: dict[str, Any] = {"latency_ms": latency_entry(rows["student"]), "threads": threads}
        if not self.baselines:
            return entry
        entry["speed"] = speed_entry(rows["student"])
        for name in ("baseline", "stock_int8"):
            entry[name] = {"size_bytes": model_bytes(paths[name]), "latency_ms": latency_entry(rows[name])}
        entry["stock_int8"]["speed"] = speed_entry(rows["stock_int8"])
        if is_text and student.task == "feature-extraction" and len(student.corpus.evaluation) >= LEAST_COMPARED:
            original, own = (
                [complete_batch(student, one) for one in corpus.evaluation.batches(16, limit=self.texts)]
                for corpus in (student.original_corpus, student.corpus)
            )
            given = {name: own if name == "student" else original for name in sessions}
            output, sentence = OUTPUTS[student.task], student.sentence
            found = fidelity.session_fidelity(
                student.original, original, sessions, given, output=output, sentence=sentence
            )
            entry["fidelity"], entry["stock_int8"]["fidelity"] = found["student"], found["stock_int8"]
        return entry


def text_cases(student: Student) -> dict[str, Batch]:
    """Unpadded texts of ordinary tokens, by the shapes that latencies are told for."""
    tokenizer = student.tokenizer
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    shapes = text_shapes(token_positions(student.model))
    return by_shape(complete_batch(student, random_batch(tokenizer, *shape)) for shape in shapes)


def complete_batch(student: Student, batch: Batch) -> Batch:
    """`batch` with the token types that the tokenizer gives such a model: zero, as for any single text."""
    takes = inspect.signature(student.model.forward).parameters
    if "token_type_ids" in student.tokenizer.model_input_names and "token_type_ids" in takes:
        return batch | {"token_type_ids": torch.zeros_like(batch["input_ids"])}
    return batch


def sample_batch(student: Student) -> Batch:
    """What the trace runs on: two texts of six tokens, one of them padded; of other inputs the first two examples."""
    evaluation = student.corpus.evaluation
    if not isinstance(evaluation, Sequences):
        return next(evaluation.batches(2))
    embedding: Any = student.model.get_input_embeddings()
    ids = torch.arange(12).view(2, 6) % int(embedding.num_embeddings)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return complete_batch(student, {"input_ids": ids, "attention_mask": mask})


def write_companions(student: Student, folder: Path) -> None:
    """Tokenizer and configuration, as runtimes of Hugging Face folders look for them.

    The configuration is that of the student's checkpoint, made from the original's (the student's own says other widths
    once it was read from a checkpoint), without the record of edits: here the graph says it all.
    """
    student.tokenizer.save_pretrained(folder)
    config = config_with_edits(student.original, student.edits).to_dict()
    for record in ("quantization_config", "compresskit_edits"):
        config.pop(record, None)
    config["architectures"] = [type(student.model).__name__]
    type(student.original.config).from_dict(config).save_pretrained(folder)
