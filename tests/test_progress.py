"""A bar on a terminal, nothing elsewhere, and the items either way."""

import io
import sys

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
