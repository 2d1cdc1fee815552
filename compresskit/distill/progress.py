"""The training bar: steps, each loss, speed and time left, on stderr."""

from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

#: How much the last step counts in the losses shown.
_RECENT = 0.1


class TrainingBar:
    """A context manager around a training loop. Nothing is drawn where stderr is no terminal.

    Args:
        title: what is being done.
        steps: how many steps there are.
    """

    def __init__(self, title: str, steps: int) -> None:
        console = Console(stderr=True)
        self.smooth = dict[str, float]()
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task(title, total=steps, facts="")

    def __enter__(self) -> "TrainingBar":
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def advance(self, parts: Mapping[str, float], tokens_per_s: float) -> None:
        """One step is done; parts that are not those of the step before begin anew."""
        self.smooth = {name: (old := self.smooth.get(name, new)) + _RECENT * (new - old) for name, new in parts.items()}
        facts = " ".join(f"{name} {value:.4f}" for name, value in self.smooth.items())
        self.progress.update(self.task, advance=1, facts=f"{facts} · {tokens_per_s:.0f} tokens/s")
