"""The house plan, read from the imports: a module uses only rooms below its own."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "compresskit"
#: lowest first; a package is one room
_ROOMS = """
errors config models kernels layers data vocabulary surgery student layerwise evaluate distill passes export
recipe forecast store job report engine api cli
"""
ROOMS = _ROOMS.split()
#: modules that share a room with the one they serve
SHARED = {
    "progress": "errors",
    "whole": "errors",
    "cache": "models",
    "fingerprint": "models",
    "float_types": "models",
    "model_folder": "models",
    "sentence": "models",
    "environment": "errors",
    "processors": "models",
    "options": "config",
    "recipe_text": "recipe",
    "recipe_mistakes": "recipe",
    "listing": "api",
    "__init__": "cli",
    "__main__": "cli",
}
MAX_LINES = 400
MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(parts: tuple[str, ...]) -> tuple[str, int]:
    """The room's name and height of a dotted path inside the package, `("passes", "low_rank")`."""
    name = SHARED.get(parts[0], parts[0])
    return name, ROOMS.index(name)


def imports(source: str) -> list[tuple[int, tuple[str, ...]]]:
    """Line and path inside compresskit of everything that the source imports from it, at any depth."""
    found: list[tuple[int, tuple[str, ...]]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{name.name}" for name in node.names]  # a name may be a module itself
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        dotted = [tuple(name.split(".")) for name in names]
        found += [(node.lineno, parts[1:]) for parts in dotted if parts[0] == "compresskit" and len(parts) > 1]
    return found


def upward_imports(path: Path, source: str) -> list[str]:
    """One line for each import of a room that is not below the importing one (its own package apart)."""
    own = path.with_suffix("").relative_to(PACKAGE).parts
    name, height = room_of(own)
    found: list[str] = []
    for line, parts in imports(source):
        other, other_height = room_of(parts)
        if other_height > height:
            place = path.relative_to(PACKAGE)
            found.append(f"{place}:{line}: {name} (room {height}) imports {other} (room {other_height})")
    return found


def test_modules_are_found() -> None:
    assert len(MODULES) > 20


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_rooms_below_its_own(path: Path) -> None:
    assert upward_imports(path, path.read_text(encoding="utf-8")) == []


def test_an_upward_import_is_named() -> None:
    source = "import torch\n\nfrom compresskit.passes.base import Pass\n"
    said = upward_imports(PACKAGE / "student.py", source)
    assert said == ["student.py:3: student (room 8) imports passes (room 12)"]


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Within a room too."""
    files = {path.with_suffix("").relative_to(PACKAGE).parts: path for path in MODULES}
    files = {parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts: path for parts, path in files.items()}
    edges = {
        parts: {target for _, used in imports(path.read_text(encoding="utf-8")) if (target := _module(used, files))}
        for parts, path in files.items()
    }
    done: set[tuple[str, ...]] = set()

    def visit(parts: tuple[str, ...], trail: tuple[tuple[str, ...], ...]) -> None:
        assert parts not in trail, " -> ".join(".".join(step) for step in (*trail, parts))
        if parts not in done:
            for target in edges[parts] - {parts}:
                visit(target, (*trail, parts))
            done.add(parts)

    for parts in files:
        visit(parts, ())


def _module(parts: tuple[str, ...], files: dict[tuple[str, ...], Path]) -> tuple[str, ...] | None:
    while parts and parts not in files:
        parts = parts[:-1]
    return parts or None


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_has_at_most_400_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_stand_at_the_top_of_the_file(path: Path) -> None:
    """Triton is the one exception: it may be absent."""
    inside = [
        f"line {node.lineno}"
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom) and "triton" not in ast.dump(node)
    ]
    assert inside == []


def test_only_the_engine_and_main_catch_whatever_comes() -> None:
    """The engine names the pass and what is saved; main, the last frame of all, makes it one message."""
    catching = [
        str(path.relative_to(PACKAGE))
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ExceptHandler)
        and (
            node.type is None
            or {"Exception", "BaseException"} & {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
        )
    ]
    assert sorted(set(catching)) == ["cli.py", "engine.py"]
