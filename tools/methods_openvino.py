"""What `bench_export.py --openvino` sets beside a run: the original for OpenVINO, made of its float ONNX by NNCF.

    openvino-int8    encoders: weights and activations, scales fixed on calibration text (`nncf.quantize`, for
                     transformers: SmoothQuant and bias correction); decoders: weights alone, a scale a row
    openvino-int4    decoders: weights of blocks in groups of 64, table and head in 8 bit (`nncf.compress_weights`)

Files are those that `openvino.save_model` writes, which halves what stays float. OpenVINO runs them for the least
latency in one stream, with its own choice of arithmetic. A decoder's keys and values go in and out, as they do in ONNX.
"""

import contextlib
import hashlib
import importlib
import importlib.util
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from compresskit.cache import writing_to_cache
from compresskit.data import Batch
from compresskit.export.files import save_graph
from compresskit.export.onnx import complete_batch, sample_batch
from compresskit.export.trace import OUTPUTS, trace, trace_cached
from compresskit.fingerprint import model_fingerprint
from compresskit.student import Student
from compresskit.whole import whole_folder

PACKAGES = ("openvino", "nncf")
INT8, INT4 = "openvino-int8", "openvino-int4"
# SmolLM2 is 576 wide, which NNCF's own 128 does not divide.
_GROUP_SIZE = 64
# Calibration texts: NNCF's own number.
_TEXTS = 300
_SUFFIXES = (".xml", ".bin")
#: Raised by one whenever the same model and text would give other files.
_VERSION = 1


def missing_packages() -> list[str]:
    """Packages that are needed and not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def openvino_methods(task: str) -> tuple[str, ...]:
    """The forms that a model of this task is measured in."""
    return (INT8, INT4) if task == "text-generation" else (INT8,)


def openvino_bytes(path: Path) -> int:
    """Bytes of a model: graph and weights."""
    return sum(path.with_suffix(suffix).stat().st_size for suffix in _SUFFIXES)


class OpenVinoSession:
    """A compiled model that is asked as an `onnxruntime.InferenceSession` is.

    Args:
        path: of the .xml; the .bin lies beside it.
        threads: of the CPU.
        profile: whether the time of each node is taken.
    """

    def __init__(self, path: Path, *, threads: int, profile: bool = False) -> None:
        openvino = importlib.import_module("openvino")
        options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads}
        options |= {"PERF_COUNT": profile}
        compiled = openvino.Core().compile_model(str(path), "CPU", options)
        self._request = compiled.create_infer_request()
        self._inputs, self._outputs = (
            [_describe(one) for one in ports] for ports in (compiled.inputs, compiled.outputs)
        )

    def get_inputs(self) -> list[SimpleNamespace]:
        """Objects with `name` and `shape`; free sizes are None."""
        return self._inputs

    def get_outputs(self) -> list[SimpleNamespace]:
        """Objects with `name` and `shape`."""
        return self._outputs

    def run(self, names: Sequence[str] | None, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The named outputs, or all; valid until the next call."""
        self._request.infer(dict(feed), share_inputs=True)
        wanted = [one.name for one in self._outputs] if names is None else names
        return [self._request.get_tensor(name).data for name in wanted]

    def node_ms(self) -> Iterator[tuple[str, float]]:
        """The operator of each node of the last run and its time, where the session takes it."""
        for node in self._request.profiling_info:
            yield node.node_type, node.real_time.total_seconds() * 1e3


def _describe(port: Any) -> SimpleNamespace:
    shape = [size.get_length() if size.is_static else None for size in port.get_partial_shape()]
    return SimpleNamespace(name=port.get_any_name(), shape=shape)


def openvino_files(student: Student, cache: Path) -> dict[str, Path]:
    """The original's files by method, made once and kept under `cache`.

    Args:
        student: whose original and calibration text are used.
        cache: keyed inside by the model, the text and the versions that made the files.
    """
    nncf, openvino = importlib.import_module("nncf"), importlib.import_module("openvino")
    versions = (_VERSION, openvino.__version__, nncf.__version__)
    texts = _calibration(student)
    digest = hashlib.sha256(b"".join(one["input_ids"].numpy().tobytes() for one in texts)).hexdigest()
    key = json.dumps([model_fingerprint(student.original), student.task, digest, versions])
    folder = cache / f"openvino-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    files = {method: folder / f"{method}.xml" for method in openvino_methods(student.task)}
    if folder.is_dir():
        return files
    logging.getLogger("nncf").setLevel(logging.ERROR)
    # NNCF's progress goes where the bench's rows go.
    with (
        contextlib.redirect_stdout(sys.stderr),
        writing_to_cache(folder),
        whole_folder(folder, replace=False) as scratch,
    ):
        source = _write_float(student, scratch / "float.onnx")
        for method, path in files.items():
            model = openvino.convert_model(str(source))
            small = _compress(model, method, student.task, texts)
            openvino.save_model(small, str(scratch / path.name))
        for file in scratch.glob("float.onnx*"):
            file.unlink()
    return files


def _calibration(student: Student) -> list[Batch]:
    """The original's calibration texts one by one, with all that it takes."""
    batches: Iterator[Batch] = student.original_corpus.calibration.batches(1, limit=_TEXTS)
    return [complete_batch(student, batch) for batch in batches]


def _write_float(student: Student, path: Path) -> Path:
    """The original's plain graph, without ONNX Runtime's fusions."""
    batch, original = sample_batch(student), student.original
    if student.task == "text-generation":
        # NNCF does not read what OpenVINO makes of GroupQueryAttention.
        graph = trace_cached(original, batch, form="attention", fuse=False)
    else:
        graph = trace(original, batch, output=OUTPUTS[student.task], fuse=False)
    save_graph(graph, path)
    return path


def _compress(model: Any, method: str, task: str, texts: Sequence[Batch]) -> Any:
    """The model in integers, by NNCF."""
    nncf = importlib.import_module("nncf")
    if method == INT4:
        return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT4_ASYM, group_size=_GROUP_SIZE)
    if task == "text-generation":
        return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
    names = {port.get_any_name() for port in model.inputs}
    feeds = [{name: value.numpy() for name, value in text.items() if name in names} for text in texts]
    return nncf.quantize(model, nncf.Dataset(feeds), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(feeds))
