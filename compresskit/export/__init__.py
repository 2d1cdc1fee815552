"""Forms to ship a student in; each is proven against the student before it is put in its place."""

from compresskit.export.base import EXPORTERS, Exporter
from compresskit.export.onnx import OnnxExport

__all__ = ["EXPORTERS", "Exporter", "OnnxExport"]
