"""Progress bars for whatever may take longer than two seconds; silent where nobody watches."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")


def track(items: Iterable[T], description: str, *, total: int | None = None) -> Iterator[T]:
    """The items themselves, with a bar on standard error while they are taken; none where that is not a terminal.

    Args:
        items: anything to iterate over once.
        description: what is being done, as a person would say it ("measuring fidelity").
        total: how many items there are, where `len(items)` cannot say.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        yield from progress.track(items, total=total, description=description)
