"""Progress bars for whatever may take longer than two seconds; silent where nobody watches."""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import length_hint
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
    if not sys.stderr.isatty():
        yield from items
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Drawn between items and not by a thread, which would disturb whatever is being timed.
    with Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False) as progress:
        task = progress.add_task(description, total=length_hint(items) or None if total is None else total)
        drawn = 0.0
        for item in items:
            yield item
            progress.advance(task)
            if time.monotonic() - drawn > 0.2:
                progress.refresh()
                drawn = time.monotonic()


@contextmanager
def working(description: str) -> Iterator[None]:
    """Says on a terminal's standard error what is going on, for one long step that has no parts to count.

    Args:
        description: what is being done ("tracing the graph"); wiped when it is done.
    """
    if not sys.stderr.isatty():
        yield
        return
    sys.stderr.write(f"\r{description} …")
    sys.stderr.flush()
    try:
        yield
    finally:
        sys.stderr.write("\r\x1b[2K")
        sys.stderr.flush()
