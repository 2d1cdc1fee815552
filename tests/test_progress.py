"""A bar on a terminal, nothing elsewhere, and the items either way."""

import io
import sys

from rich.console import Console

from compresskit.distill import progress
from compresskit.progress import track, working


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_items_pass_through_and_nothing_is_written_where_nobody_watches(capsys):
    assert list(track(iter([3, 1, 2]), "counting", total=3)) == [3, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_a_terminal_sees_what_is_being_done(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    assert list(track([3, 1, 2], "counting")) == [3, 1, 2]
    assert "counting" in screen.getvalue()
    assert "/3" in screen.getvalue()


def test_leaving_early_closes_the_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    for item in track(range(5), "counting"):
        if item == 2:
            break
    assert list(track(range(2), "again")) == [0, 1]


def test_one_long_step_is_named_while_it_runs_and_wiped_afterwards(monkeypatch, capsys):
    with working("tracing"):
        pass
    assert capsys.readouterr() == ("", "")
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with working("tracing"):
        assert "tracing" in screen.getvalue()
    assert screen.getvalue().endswith("\r\x1b[2K")


def test_training_on_a_terminal_shows_each_loss_the_speed_and_the_time_left(monkeypatch):
    screen = io.StringIO()
    wide = Console(file=screen, force_terminal=True, width=160)
    monkeypatch.setattr(progress, "Console", lambda stderr: wide)
    with progress.TrainingBar("distill", 4) as bar:
        bar.advance({"kl": 2.0, "hidden": 0.5}, 1234.4)
        bar.advance({"kl": 1.0, "hidden": 0.5}, 1234.4)
    shown = screen.getvalue()
    assert "2/4" in shown
    assert "kl 1.9000 hidden 0.5000 · 1234 tokens/s" in shown
    assert "0:00:" in shown
