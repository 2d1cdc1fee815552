"""Writing ONNX files, and folders that appear whole or not at all."""

import contextlib
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

# A protobuf holds at most 2 GiB; past this the weights go beside the graph.
_SINGLE_FILE_BYTES = 1_800_000_000


def save_graph(graph: ir.Model, path: Path) -> None:
    """Write `graph` to `path`, with its weights in `path`.data where one file cannot hold them."""
    weights = sum(v.const_value.nbytes for v in graph.graph.initializers.values() if v.const_value is not None)
    ir.save(graph, path, external_data=f"{path.name}.data" if weights > _SINGLE_FILE_BYTES else None)


def model_bytes(path: Path) -> int:
    """Bytes of an ONNX file and of the weights beside it."""
    data = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (data.stat().st_size if data.is_file() else 0)


def count_operators(graph: ir.Model) -> dict[str, int]:
    """How often each operator stands in the graph, the most frequent first."""
    names = (f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in graph.graph.all_nodes())
    return dict(Counter(names).most_common())


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A scratch folder beside `folder` that takes its place when the block ends well, and vanishes when it does not.

    A scratch folder that a killed run left behind is removed first (by the store too, which its name tells what it is).
    A kill while `folder` is being replaced leaves none: give the export again.
    """
    scratch = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        if folder.exists():
            shutil.rmtree(folder)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
