"""What a user would ship without compresskit: the original as float ONNX, and its stock dynamic int8."""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime
import torch
import transformers
from onnxruntime.quantization import QuantType, quantize_dynamic
from transformers import PreTrainedModel

from compresskit.cache import writing_to_cache
from compresskit.data import Batch
from compresskit.export.files import save_graph
from compresskit.export.fusion import share_tables
from compresskit.export.trace import cached_form, fuse_float, trace, trace_cached
from compresskit.fingerprint import model_fingerprint
from compresskit.progress import working
from compresskit.whole import whole_folder

#: Raised by one whenever the same model would give other files.
_VERSION = 2


@dataclass(frozen=True)
class Baseline:
    """Two files made of the original.

    Attributes:
        float_model: float32, with ONNX Runtime's fusions.
        int8_model: `quantize_dynamic` of the unfused float graph with int8 weights, a scale per channel: its best form.
    """

    float_model: Path
    int8_model: Path


def export_baseline(
    original: PreTrainedModel,
    batch: Batch,
    *,
    output: str,
    opset: int | None,
    cache: Path,
    keeps_past: bool = False,
    last_only: bool = False,
) -> Baseline:
    """Both files of the original, made once and kept under `cache`.

    Args:
        original: left as it was.
        batch: sample inputs, see `trace`.
        output: the output that the student's file gives too.
        opset: as for the student.
        cache: keyed inside by the model, the options and the versions that made the files.
        keeps_past, last_only: of a decoder, as for the student (`trace_cached`).
    """
    versions = (_VERSION, onnxruntime.__version__, onnx.__version__, transformers.__version__, torch.__version__)
    # Of inputs that are not text the graph has the shape, but for the batch.
    inputs = [(name, None if "input_ids" in batch else tuple(batch[name].shape[1:])) for name in sorted(batch)]
    key = json.dumps([model_fingerprint(original), inputs, output, opset, keeps_past, last_only, versions])
    folder = cache / hashlib.sha256(key.encode()).hexdigest()[:16]
    files = Baseline(folder / "float.onnx", folder / "int8.onnx")
    if folder.is_dir():
        return files
    with writing_to_cache(folder), whole_folder(folder, replace=False) as scratch:
        if keeps_past:
            form = cached_form(original)
            graph = trace_cached(original, batch, form=form, fuse=False, opset=opset, last_only=last_only)
        else:
            graph = trace(original, batch, output=output, fuse=False, opset=opset)
        save_graph(graph, scratch / "plain.onnx")
        with working("quantising the original with onnxruntime"):
            _stock_int8(scratch / "plain.onnx", scratch / files.int8_model.name)
        # The plain file is read lazily; it goes after the fused one is written.
        graph = ir.load(scratch / "plain.onnx")
        fuse_float(graph)
        share_tables(graph)
        save_graph(graph, scratch / files.float_model.name)
        for path in scratch.glob("plain.onnx*"):
            path.unlink()
    return files


def _stock_int8(source: Path, target: Path) -> None:
    model = onnx.load(str(source))
    # Its own shape inference then runs afresh; shapes under the exporter's names would contradict it.
    del model.graph.value_info[:]
    large = source.with_name(f"{source.name}.data").is_file()
    logging.disable(logging.WARNING)  # it advises pre-processing on the root logger
    try:
        quantize_dynamic(
            model,
            str(target),
            weight_type=QuantType.QInt8,
            per_channel=True,
            use_external_data_format=large,
            # Its shape inference ends at operators of other domains, GroupQueryAttention say.
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )
    finally:
        logging.disable(logging.NOTSET)
