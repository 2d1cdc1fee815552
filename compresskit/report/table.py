"""The report on a terminal: what each pass cost and gained."""

import io
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from compresskit.report.figures import Cell, background, label, metric_names, pass_rows, speed_rows, verdicts

_WIDEST = 400  # a table is as wide as it needs to be; wrapping numbers would make it unreadable


def render_table(report: dict[str, Any]) -> str:
    """Plain text: verdicts, a line for each pass (below each figure, what the pass changed in it), and the exports.

    Args:
        report: as `report.json` holds it.
    """
    parts = [f"{report['model']}", *(f"! {text}" for text in report.get("warnings", ()))]
    parts += [*verdicts(report), *background(report)]
    parts.append(_as_text(_passes(report)))
    parts += [_as_text(_export(entry)) for entry in report["export"]]
    return "\n".join(part for part in parts if part)


def _passes(report: dict[str, Any]) -> Table:
    names = metric_names(report)
    table = _table("pass", "parameters", "bytes", "of original", *map(label, names), "seconds")
    for row in pass_rows(report):
        metrics = [row.metrics.get(name, Cell("")) for name in names]
        cells = [row.params, row.size, Cell(f"{row.share:.1%}"), *metrics, Cell(row.seconds)]
        table.add_row(row.kind, *(_two_lines(cell) for cell in cells))
    return table


def _export(entry: dict[str, Any]) -> Table:
    table = _table(f"export {entry['kind']}", "bytes", "of float", "p50 ms", "p95 ms", "speed")
    for row in speed_rows(entry):
        table.add_row(row.name, row.size, row.size_share, row.p50, row.p95, row.speed)
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _two_lines(cell: Cell) -> str:
    return f"{cell.text}\n{cell.change}" if cell.change else cell.text


def _as_text(table: Table) -> str:
    screen = io.StringIO()
    Console(file=screen, width=_WIDEST, color_system=None, markup=False, highlight=False).print(table)
    return "\n".join(line.rstrip() for line in screen.getvalue().splitlines()).strip("\n")
