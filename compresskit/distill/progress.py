"""The training bar: steps, each loss, speed and time left, on stderr."""

from collections.abc import Sequence
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
        names: of the losses, in the order of `advance`'s values.
    """

    def __init__(self, title: str, steps: int, names: Sequence[str]) -> None:
        console = Console(stderr=True)
        self.names, self.smooth = names, list[float]()
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

    def advance(self, losses: Sequence[float], tokens_per_s: float) -> None:
        """One step is done."""
        if self.smooth:
            losses = [old + _RECENT * (new - old) for old, new in zip(self.smooth, losses, strict=True)]
        self.smooth = list(losses)
        facts = " ".join(f"{name} {value:.4f}" for name, value in zip(self.names, self.smooth, strict=True))
        self.progress.update(self.task, advance=1, facts=f"{facts} · {tokens_per_s:.0f} tokens/s")
