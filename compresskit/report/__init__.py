"""What a run did, for programs (`report.json`) and for people (`report.html`, and a table on the terminal)."""

import json
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from compresskit.report.figures import (
    background,
    further_facts,
    label,
    loading,
    metric_names,
    pass_rows,
    shape_rows,
    speed_rows,
    verdicts,
    write_bytes,
)
from compresskit.report.table import render_table
from compresskit.whole import write_whole

__all__ = ["SCHEMA_VERSION", "loading", "render_html", "render_table", "write_report"]

SCHEMA_VERSION = 1
_TEMPLATE = "report.html.j2"
#: A mapping or list of more (one of every text) is for programs; the page says where it is.
_MOST_VALUES = 500


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write `report.json` and `report.html` to `folder`, each whole or not at all.

    Args:
        report: the public contract's report: `model`, `passes` (entry 0 the original), `export`, `environment`, and
            what else the run has to say. `schema_version` is added; figures that are not finite become null.
        folder: exists.

    Raises:
        OSError: the disk refuses.
    """
    report = _finite({"schema_version": SCHEMA_VERSION, **report})
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(folder / "report.json", text.encode())
    write_whole(folder / "report.html", render_html(report).encode())


def render_html(report: dict[str, Any]) -> str:
    """The page: one self-contained file without scripts or outside resources; all text is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(label=label, bytes=write_bytes, plain=_plain)
    return environment.get_template(_TEMPLATE).render(
        report=report,
        rows=pass_rows(report),
        metrics=metric_names(report),
        verdicts=verdicts(report),
        background=background(report),
        exports=[(one, speed_rows(one), shape_rows(one), further_facts(one)) for one in report["export"]],
    )


def _plain(value: Any) -> str:
    """A value of an option or a note, short: text as it is, numbers to five digits, mappings and lists with commas."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict | list | tuple) and len(value) > _MOST_VALUES:
        return f"{len(value):,} values, in report.json"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(inner) for inner in value) or "none"
    if isinstance(value, float):
        return f"{value:.5g}"
    return json.dumps(value)


def _finite(value: Any) -> Any:
    """The same data with null for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
