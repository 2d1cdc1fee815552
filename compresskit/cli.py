"""The command `compresskit`. It reads arguments, calls the library and prints; whatever is decided, is decided there.

Exit status: 0 done, 2 the user's mistake (where, what, fix on standard error), 130 interrupted, 1 anything else.
"""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import datasets
import transformers
import typer
from rich.console import Console
from rich.table import Table

from compresskit.api import measure, read_data_option, read_report
from compresskit.engine import run as run_recipe
from compresskit.errors import CompressKitError
from compresskit.export.folder import is_exported
from compresskit.export.generate import generate as generate_text
from compresskit.export.runtime import default_threads
from compresskit.job import prepare
from compresskit.listing import Listing, Row, describe_pass, list_modules, list_passes
from compresskit.models import TASKS, find_model, guess_task, load_empty
from compresskit.report import loading, render_table

#: Environment variable: any value lets unforeseen errors through with their traceback.
DEBUG_SWITCH = "COMPRESSKIT_DEBUG"

app = typer.Typer(
    help="Make a Hugging Face model small and fast: one recipe, every step proven.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="a YAML recipe", show_default=False)]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="override a value: --set passes.0.keep=0.8 (may be repeated)"),
]
Task = Annotated[
    str | None, typer.Option(help=f"{', '.join(TASKS)}; without it what the model's config.json says", metavar="TASK")
]


@app.command()
def run(
    recipe: RecipePath,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="where steps and results are kept")],
    settings: Settings = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="delete what an earlier run left in DIR first")] = False,
) -> None:
    """Do what RECIPE says; a run that was stopped goes on from its last finished step."""
    try:
        report = run_recipe(recipe, output, settings=settings or (), fresh=fresh, progress=_say)
    except KeyboardInterrupt:
        _say(f"interrupted; finished steps are kept in {output / 'steps'}: the same command goes on from there")
        raise typer.Exit(130) from None
    _print(render_table(report))
    _print(f"student: {output / 'student'}   report: {output / 'report.html'}")


@app.command()
def check(recipe: RecipePath, settings: Settings = None) -> None:
    """Find every mistake of RECIPE and foretell its result from shapes alone; no weight is read."""
    job = prepare(recipe, settings=settings or ())
    forecast = job.forecast
    original = forecast.steps[0]
    rows: list[Row] = [
        (
            step.kind,
            f"{most}{step.params:,}",
            f"{most}{step.size_bytes:,}",
            f"{most}{step.size_bytes / original.size_bytes:.1%}",
        )
        for step in forecast.steps
        for most in ["≤ " if step.at_most else ""]
    ]
    _print_listing(Listing("", ("after", "parameters", "bytes", "of the original"), rows))
    for exporter, predicted in zip(job.recipe.export, forecast.export_bytes, strict=True):
        if predicted is not None:
            _print(f"export {exporter.kind}: about {predicted:,} bytes")
    text = job.corpus
    parts = (len(part) for part in (text.calibration, text.training, text.evaluation))
    _print("sequences: {} calibration, {} training, {} evaluation".format(*parts))
    _print(f"memory: at least {forecast.memory_bytes / 1e6:,.0f} MB")
    _print(f"the student loads with {loading(forecast.loads_with)}")
    for warning in forecast.warnings:
        _say(f"warning: {warning}")


@app.command(name="eval")
def evaluate(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="a run's output, its student or onnx folder", show_default=False),
    ],
    data: Annotated[
        str | None, typer.Option(help="other text, as a recipe says it: '{source: text, path: a.txt}'")
    ] = None,
    original: Annotated[str | None, typer.Option(help="the model to compare with, where no run says it")] = None,
    task: Task = None,
) -> None:
    """Measure a student, or the very file that was exported, against its original on held-out text."""
    figures = measure(folder, data=read_data_option(data), original=original, task=task)
    runs_in = "ONNX Runtime" if is_exported(folder) else "torch"
    columns = ("figure", *(f"{name} ({runtime})" for name, runtime in zip(figures, ("torch", runs_in), strict=True)))
    names = list(dict.fromkeys(name for entry in figures.values() for name in entry))
    rows: list[Row] = [(name, *(_figure(entry.get(name)) for entry in figures.values())) for name in names]
    _print_listing(Listing("", columns, rows))


@app.command()
def generate(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="a run's onnx folder", show_default=False)],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="how the text begins", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="the most tokens to add")] = 64,
    threads: Annotated[int | None, typer.Option(min=1, help="of ONNX Runtime; without it every core")] = None,
) -> None:
    """Write on from PROMPT with an exported decoder, token by token, always the likeliest."""
    pieces = generate_text(folder, prompt, max_new_tokens=max_new_tokens, threads=threads or default_threads())
    sys.stdout.write(prompt)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    _print("")


@app.command()
def report(folder: Annotated[Path, typer.Argument(metavar="DIR", help="a run's output", show_default=False)]) -> None:
    """Print what a finished run cost and gained."""
    _print(render_table(read_report(folder)))


@app.command()
def passes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="a pass", show_default=False)] = None,
) -> None:
    """List the passes; with NAME, the options of one."""
    _print_listing(describe_pass(name) if name else list_passes())


@app.command()
def modules(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="as a recipe names it", show_default=False)],
    gguf_file: Annotated[str | None, typer.Option(help="the GGUF file in that folder")] = None,
    task: Task = None,
) -> None:
    """List the matrices of a model that `targets` may name."""
    source = find_model(model, gguf_file=gguf_file)
    _print_listing(list_modules(load_empty(source, task or guess_task(source))))


def _figure(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value if value is not None else "-")


def _print_listing(listing: Listing) -> None:
    if listing.text:
        _print(listing.text)
        _print("")
    if sys.stdout.isatty():
        table = Table(*listing.columns)
        for row in listing.rows:
            table.add_row(*row)
        Console().print(table, markup=False)
        return
    lines = [listing.columns, *listing.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(listing.columns))]
    for line in lines:
        _print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def _say(text: str) -> None:
    """Words about the work go to standard error, so that standard output holds the result alone."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _quiet_libraries() -> None:
    """Third parties say nothing and draw nothing: what matters is said by us."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


class _Notes(logging.Handler):
    """What passes note while they work, the ranks that they chose say."""

    def emit(self, record: logging.LogRecord) -> None:
        """Say it."""
        _say(record.getMessage())


def _show_notes() -> None:
    ours = logging.getLogger("compresskit")
    if not any(isinstance(handler, _Notes) for handler in ours.handlers):
        ours.addHandler(_Notes())
    ours.setLevel(logging.INFO)


def main() -> None:
    """Run the command and end the process with its status.

    `COMPRESSKIT_DEBUG=1` shows the traceback of what nobody foresaw; without it, that is one message too.
    """
    _quiet_libraries()
    _show_notes()
    try:
        status = app(standalone_mode=False)
    except CompressKitError as error:
        _say(str(error))
        sys.exit(error.exit_code)
    except typer.TyperException as error:
        _say(f"compresskit: {error.format_message()}\n  fix: `compresskit --help` shows how it is called")
        sys.exit(2)
    except Exception as error:
        if os.environ.get(DEBUG_SWITCH):
            raise
        _say(f"compresskit: {type(error).__name__}: {error}")
        _say(f"  fix: {DEBUG_SWITCH}=1 shows the traceback; please report it together with the command")
        sys.exit(1)
    sys.exit(status or 0)


if __name__ == "__main__":
    main()
