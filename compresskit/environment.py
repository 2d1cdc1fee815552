"""The machine and the library versions that figures were measured with."""

import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

_PACKAGES = ("compresskit", "torch", "transformers", "onnxruntime", "onnx", "numpy", "datasets", "tokenizers")

#: Another version of one of these may give other weights from the same options.
_COMPUTING = ("compresskit", "torch", "transformers", "bitsandbytes")
#: Another version of one of these may give another file of the same student.
_EXPORTING = ("compresskit", "torch", "transformers", "onnx", "onnxscript", "onnxruntime")


def describe_environment() -> dict[str, Any]:
    """Processor, memory, threads and versions, as JSON data."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": _versions(_PACKAGES),
    }


def exporting_versions() -> dict[str, str]:
    """The versions of what makes an exported file of the same student, by package."""
    return _versions(_EXPORTING)


def computing_versions() -> dict[str, str]:
    """The versions of what computes a step's weights, by package."""
    return _versions(_COMPUTING)


def _versions(packages: Iterable[str]) -> dict[str, str]:
    return {name: found for name in packages if (found := _version(name)) is not None}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name; Linux keeps it in /proc/cpuinfo."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
