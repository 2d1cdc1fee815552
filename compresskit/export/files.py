"""Writing ONNX files and counting what is in them.

Integers lie in a graph as the student's own tensors, no copy; weights beside a graph are written one by one. A single
file is held twice more while it is written, as protobuf and as bytes. Of float decoders, ONNX Runtime's fusions make
packed copies of products that read one input (two thirds of the weights), `fuse: false` does not.
"""

from collections import Counter
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
