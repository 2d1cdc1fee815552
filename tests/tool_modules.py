"""Scripts of `tools/`, which is no package, as modules."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

TOOLS = Path(__file__).parent.parent / "tools"


@contextmanager
def loaded_tool(name: str) -> Iterator[ModuleType]:
    """`tools/NAME.py` as a module, which others can import by its name meanwhile (dataclasses look it up)."""
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[name]
