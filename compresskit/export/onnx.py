"""The student as a folder for ONNX Runtime, holding the very integers that were evaluated.

    student.model  →  trace  →  fuse  →  model.onnx  →  parity  →  latency against two baselines
                                              tokenizer, config, README.md, manifest.json

`model.onnx` has one output (`last_hidden_state` for feature extraction, else `logits`), free batch and length unless
the options fix them (`compresskit.export.sizes`), and the operators of `compresskit.layers.operators` wherever a layer
holds integers. Decoders take and give their keys and values too (`compresskit.export.cached`), embedders their
embedding. Nothing is written unless ONNX Runtime agrees with torch on held-out text, optimising much or not at all.

Weight-only products (`MatMulNBits`) have fast kernels only where their input is rounded to 8 bits too (accuracy level
4; SmolLM2-135M in 8 bit, one token on 2 cores: 17 ms, against 355 ms in float32). The student in torch multiplies in
float32, so the file is proven at level 0, and then shipped at level 4 with the difference that makes in the report.

LLM.int8 has no operator: its file is proven against the same codes without rounded activations, and
`parity.re_expressed` tells how far that is from the student.

`target: standard` writes ONNX's own operators alone (`compresskit.export.standard`), for other runtimes.
"""

import errno
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import onnx_ir as ir
import torch
from pydantic import Field, model_validator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresskit.cache import cache_folder
from compresskit.data import Batch, Sequences, token_positions, token_rows
from compresskit.errors import CompressKitError, RunFailedError
from compresskit.evaluate.latency import random_batch
from compresskit.evaluate.quality import LEAST_COMPARED
from compresskit.export import fidelity, parity, predict, standard
from compresskit.export.base import EXPORTERS, Exporter
from compresskit.export.baseline import Baseline, export_baseline
from compresskit.export.cached import ATTENTION_OPSET, first_step
from compresskit.export.files import model_bytes, save_graph
from compresskit.export.folder import (
    MODEL_FILE,
    describe_graph,
    example,
    integer_layers,
    write_manifest,
    write_readme,
)
from compresskit.export.fusion import set_accuracy
from compresskit.export.greedy import check_greedy, judge_greedy, prompts_of
from compresskit.export.hidden import refuse_hidden_floats
from compresskit.export.runtime import (
    by_shape,
    compare_latency,
    decode_cases,
    default_threads,
    latency_entry,
    open_session,
    repeated_cases,
    speed_entry,
    text_shapes,
)
from compresskit.export.sizes import FREE, Sizes
from compresskit.export.trace import OUTPUTS, cached_form, computes_in_integers, trace, trace_cached
from compresskit.export.widening import refuse_opset
from compresskit.layers.forms import re_expressed, swapped
from compresskit.sentence import SentenceEmbedding
from compresskit.student import Student
from compresskit.surgery.plugin import config_with_edits
from compresskit.whole import whole_folder


@EXPORTERS.add
class OnnxExport(Exporter):
    """Write ONNX for ONNX Runtime on a CPU."""

    version: ClassVar[int] = 4

    kind: Literal["onnx"] = "onnx"  # pyright: ignore[reportIncompatibleVariableOverride]
    #: ort: ONNX Runtime's own operators; standard: ONNX's alone, integer weights as blocked DequantizeLinear
    target: Literal["ort", "standard"] = "ort"
    #: ONNX operator set; None is the newest that the exporter knows
    opset: int | None = Field(default=None, ge=18, le=23)
    #: use ONNX Runtime's fused operators; false gives a plainer graph that computes the same; none in a standard file
    fuse: bool = True
    #: decoders take and give keys and values: each new token is read once; false reads the whole text at every token
    cache: bool = True
    #: of decoders that keep their past: logits of all tokens, or of the last alone (less work for long prompts)
    logits: Literal["all", "last"] = "all"
    #: feature extraction: `sentence_embedding` too, pooled and normalised as the model's 1_Pooling says, where it does
    pooling: bool = True
    #: texts (or images) that the file takes at a time, for runtimes that need to know; None is any number
    batch: int | None = Field(default=None, ge=1)
    #: tokens of every text, shorter ones padded, longer ones cut; a decoder needs `cache: false` for it; None is any
    length: int | None = Field(default=None, ge=1)
    #: of weight-only products: 4 rounds their input to 8 bits in blocks, up to 20 times as fast; 0 stays in float32; of
    #: a standard file each session chooses (ONNX Runtime takes 4)
    accuracy_level: Literal[0, 4] = 4
    #: largest ‖onnx − torch‖ / ‖torch‖ that passes; of a segment where activations are rounded
    max_relative_error: float = Field(default=parity.BOUND, gt=0)
    #: largest share of its weights by which the file may differ from what the student's shapes say
    max_size_error: float = Field(default=predict.TOLERANCE, gt=0)
    #: held-out texts in the comparison with the original; half of them, in ragged batches, in the parity check
    texts: int = Field(default=64, ge=8)
    #: also export the original, as float and as onnxruntime's stock dynamic int8, and compare
    baselines: bool = True
    #: timed runs of each model at each shape
    rounds: int = Field(default=25, ge=3)
    #: threads of ONNX Runtime; None is every core this process may use
    threads: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _fits_together(self) -> "OnnxExport":
        if self.target == "standard" and self.opset and self.opset < standard.OPSET:
            least = ATTENTION_OPSET if self.cache else standard.OPSET
            what = f"target: standard needs opset {standard.OPSET} or later, for blocked DequantizeLinear"
            raise ValueError(f"{what}; leave opset out, or say opset: {least}")
        if self.target == "standard" and self.cache and self.opset and self.opset < ATTENTION_OPSET:
            raise ValueError(
                f"target: standard keeps a decoder's past with opset {ATTENTION_OPSET}, which brought Attention; leave "
                f"opset out, or say cache: false"
            )
        if self.logits == "last" and not self.cache:
            raise ValueError("logits: last goes with cache: true; a graph without a past has use for every token")
        return self

    def check(self, model: PreTrainedModel, task: str) -> None:
        """Refuse layers that the target has no form of, and a length that the model cannot take.

        Raises:
            CompressKitError: integers without a standard form; a length above the model's positions, of inputs that
                are no text, or beside keys and values.
        """
        if self.target == "standard":
            standard.refuse_layers(model)
        refuse_opset(model, self.opset)
        positions = token_positions(model)
        wrong = None
        if self.length is None:
            return
        if model.main_input_name != "input_ids":
            wrong = (f"{type(model).__name__} reads no text, and its inputs have one shape already", "leave length out")
        elif task == "text-generation" and self.cache:
            what = "a decoder that keeps its past reads the whole prompt first and then single tokens"
            wrong = (what, "add 'cache: false' for one graph that reads texts of one length, or fix batch alone")
        elif positions is not None and positions < self.length:
            wrong = (
                f"{self.length} is more than the model's {positions} positions",
                f"use length: {positions} or less",
            )
        if wrong:
            raise CompressKitError(wrong[0], where="length", fix=wrong[1])

    def predict_bytes(self, model: PreTrainedModel, task: str) -> int:
        """The bytes of the file and of the weights beside it (`compresskit.export.predict`)."""
        return predict.predict_bytes(model, task).size_bytes

    @property
    def _sizes(self) -> Sizes:
        return Sizes(self.batch, self.length)

    def write(self, student: Student, folder: Path) -> dict[str, Any]:
        """Write, prove and time the student; the report's entry.

        Returns:
            `kind`, `files`, `size_bytes` (of the model) and `predicted_bytes`, `operators`, `parity`, `latency_ms` (p50
            and p95 at 1 × 64 tokens, and by shape), and with baselines `baseline` and `stock_int8` (each `size_bytes`,
            `latency_ms`), `speed` (the original's float time over this one's, by shape), and `fidelity` for feature
            extraction.

        Raises:
            RunFailedError: parity or bytes past their bounds, or a disk that refuses; then no `model.onnx` is left.
        """
        self.check(student.model, student.task)
        batch = sample_batch(student)
        output = OUTPUTS[student.task]
        threads = self.threads or default_threads()
        with _explaining_refusal(folder), whole_folder(folder) as scratch:
            graph = self._trace(student, batch, output)
            if self.target == "standard":
                standard.use_standard_operators(graph)
            refuse_hidden_floats(graph, student.model, where=str(folder))
            save_graph(graph, scratch / MODEL_FILE)
            prediction = predict.predict_bytes(student.model, student.task)
            size = model_bytes(scratch / MODEL_FILE)
            predict.judge_bytes(prediction, size, tolerance=self.max_size_error, where=str(folder))
            found = self._check_parity(student, graph, scratch / MODEL_FILE, output, threads, folder)
            facts = describe_graph(graph)
            del graph
            compared = self._compare(student, scratch / MODEL_FILE, batch, threads)
            write_companions(student, scratch)
            write_readme(scratch, student.task, _example(student, facts, self._sizes))
            layers = {name: bits for name, bits in integer_layers(student.model).items() if name not in prediction.idle}
            write_manifest(scratch, {"task": student.task, **facts, "integer_layers": layers, "parity": found})
            entry = {
                "kind": self.kind,
                "files": sorted(path.name for path in scratch.iterdir()),
                "operators": facts["operators"],
                "parity": found,
                "size_bytes": model_bytes(scratch / MODEL_FILE),
                "predicted_bytes": prediction.size_bytes,
            }
        return entry | compared

    def _sentence(self, student: Student) -> SentenceEmbedding | None:
        """How texts become embeddings inside the graph; None where nothing says so."""
        wanted = self.pooling and student.task == "feature-extraction" and student.sentence.is_told
        return student.sentence if wanted else None

    def _keeps_past(self, student: Student) -> bool:
        return self.cache and student.task == "text-generation"

    def _trace(self, student: Student, batch: Batch, output: str) -> ir.Model:
        """The graph, its integers in ONNX Runtime's operators."""
        fuse = self.fuse and self.target == "ort"
        if not self._keeps_past(student):
            opset = self.opset or (standard.OPSET if self.target == "standard" else None)
            sentence = self._sentence(student)
            options = {"output": output, "fuse": fuse, "opset": opset, "sentence": sentence}
            return trace(student.model, batch, **options, sizes=self._sizes)
        form = cached_form(student.model) if self.target == "ort" else "attention"
        options = {"form": form, "fuse": fuse, "opset": self.opset, "last_only": self.logits == "last"}
        return trace_cached(student.model, batch, **options, sizes=self._sizes)

    def _texts(self, student: Student) -> list[Batch]:
        """Held-out texts for the parity check, with all that model and file read, in the sizes that the file takes."""
        texts = parity.parity_batches(student.corpus.evaluation, texts=self.texts // 2, batch=self.batch)
        batches = [complete_batch(student, batch) for ragged in texts for batch in self._sizes.fit(ragged)]
        if not self._keeps_past(student):
            return batches
        return [first_step(student.model, batch, last_only=self.logits == "last") for batch in batches]

    def _check_parity(
        self, student: Student, graph: ir.Model, path: Path, output: str, threads: int, folder: Path
    ) -> dict[str, Any]:
        """Prove the file against the student, layers without an operator in their ONNX form (`re_expressed`)."""
        forms = re_expressed(student.model)
        if not forms:
            return self._prove(student, graph, path, output, threads, folder)
        batches = self._texts(student)
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
        batches = self._texts(student)
        open_model = partial(open_session, threads=threads)
        exact = partial(open_model, exact=True)
        found = parity.check_parity(path, exact, student.model, batches, output=output)
        parity.judge_parity(found, bound=self.max_relative_error, where=str(folder))
        found["bound"] = self.max_relative_error
        if sentence := self._sentence(student):
            found["embedding_error"] = fidelity.check_embedding(exact(path), batches, sentence)
            fidelity.judge_embedding(found["embedding_error"], bound=self.max_relative_error, where=str(folder))
        if self._keeps_past(student):
            prompts = prompts_of(token_rows(student.corpus.evaluation), self.batch)
            found["greedy"] = check_greedy(exact(path), student.model, prompts)
            if not computes_in_integers(student.model):
                judge_greedy(found["greedy"], bound=self.max_relative_error, where=str(folder))
        # A small batch, of texts of uneven lengths where there are two.
        one = min(batches[1:4] or batches, key=lambda batch: next(iter(batch.values())).numel())
        found["levels"] = parity.check_levels(exact, path, one)
        bound = parity.noise_bound(found, self.max_relative_error)
        parity.judge_levels(found["levels"], bound=bound, where=str(folder))
        ships_other = self.accuracy_level and set_accuracy(graph, self.accuracy_level)
        if ships_other:
            save_graph(graph, path)
        if ships_other or (self.target == "standard" and standard.has_blocks(graph)):
            found["shipped"] = parity.check_shipped(open_model(path), student.model, batches, output=output)
            bound = parity.noise_bound(found, parity.ROUNDED_BOUND)
            parity.judge_shipped(found["shipped"], bound=bound, where=str(folder))
            levels = found["shipped"]["levels"] = parity.check_levels(open_model, path, one)
            parity.judge_levels(levels, bound=bound, where=str(folder))
        return found

    def _compare(self, student: Student, path: Path, batch: Batch, threads: int) -> dict[str, Any]:
        """Latency of the student and, where asked for, of both baselines; their sizes and fidelity."""
        paths = {"student": path}
        if self.baselines:
            cache = cache_folder() / "baselines"
            output = OUTPUTS[student.task]
            files: Baseline = export_baseline(
                student.original,
                batch,
                output=output,
                opset=self.opset,
                cache=cache,
                keeps_past=self._keeps_past(student),
                last_only=self.logits == "last",
            )
            paths = {"baseline": files.float_model, "stock_int8": files.int8_model, "student": path}
        sessions = {name: open_session(file, threads=threads) for name, file in paths.items()}
        is_text = isinstance(student.corpus.evaluation, Sequences)
        cases = text_cases(student, self._sizes) if is_text else repeated_cases(batch, self._sizes)
        if self._keeps_past(student):
            cases |= decode_cases(token_positions(student.model), self._sizes)
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
                [
                    complete_batch(student, self._sizes.cut(one))
                    for one in corpus.evaluation.batches(16, limit=self.texts)
                ]
                for corpus in (student.original_corpus, student.corpus)
            )
            given = {name: own if name == "student" else original for name in sessions}
            output, sentence = OUTPUTS[student.task], student.sentence
            found = fidelity.session_fidelity(
                student.original, original, sessions, given, output=output, sentence=sentence
            )
            entry["fidelity"], entry["stock_int8"]["fidelity"] = found["student"], found["stock_int8"]
        return entry


def text_cases(student: Student, sizes: Sizes = FREE) -> dict[str, Batch]:
    """Unpadded texts of ordinary tokens, by the shapes that latencies are told for, or that the file takes."""
    tokenizer = student.tokenizer
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    shapes = text_shapes(token_positions(student.model), sizes)
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


@contextmanager
def _explaining_refusal(folder: Path) -> Iterator[None]:
    """Turn a place that may not be written to into a message.

    Raises:
        RunFailedError: with the way out.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise RunFailedError(
            f"cannot be written: {error.strerror}", where=str(folder), fix="name another folder with --output"
        ) from error


def _example(student: Student, facts: Mapping[str, Any], sizes: Sizes) -> str | None:
    """The lines of Python for the folder's README."""
    tokenizer = student.tokenizer
    if "input_ids" not in facts["inputs"] or not isinstance(tokenizer, PreTrainedTokenizerBase):
        return None
    length = sizes.length or token_positions(student.model) or tokenizer.model_max_length
    padding = {"pad_id": tokenizer.pad_token_id or 0, "pad_token": tokenizer.pad_token or "", "length": length}
    return example(student.task, list(facts["inputs"]), list(facts["outputs"]), padding, sizes)


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
