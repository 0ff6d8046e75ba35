"""The line that says what a long search is at."""

import io
import threading
from contextlib import redirect_stderr

import pytest

from dryfit.common import terminal
from dryfit.common.terminal import now_doing, progress, working


class Screen(io.StringIO):
    """Standard error, and word of each line on it."""

    def __init__(self, on_terminal: bool) -> None:
        super().__init__()
        self.on_terminal, self.spoke = on_terminal, threading.Event()

    def isatty(self) -> bool:
        return self.on_terminal

    def write(self, text: str) -> int:
        written = super().write(text)
        self.spoke.set()
        return written

    def next(self) -> str:
        """What stands there once the next line has come."""
        self.spoke.clear()
        assert self.spoke.wait(30)
        return self.getvalue()


@pytest.fixture(autouse=True)
def no_line_of_another_test(monkeypatch) -> None:
    """A generator that another test did not exhaust may still be at work."""
    monkeypatch.setattr(terminal, "_line", None)


@pytest.fixture(params=[True, False], ids=["terminal", "log"])
def screen(request, monkeypatch) -> Screen:
    for pause in ("FIRST_SECONDS", "TERMINAL_SECONDS", "LOG_SECONDS"):
        monkeypatch.setattr(terminal._Line, pause, 0.02)
    return Screen(request.param)


def test_a_long_step_is_heard_while_it_runs_and_the_terminals_line_goes(screen) -> None:
    with redirect_stderr(screen), working("tracing"):
        assert "tracing (0 s)" in screen.next()
        with working("replaying"):  # inside of the other: one line for both
            screen.next()
            assert "replaying (0 s)" in screen.next()
        now_doing("")
        if screen.on_terminal:
            assert screen.getvalue().endswith(" \r")
    shown = screen.getvalue()
    assert (
        shown.endswith(" \r")
        if screen.on_terminal
        else "\r" not in shown and shown.endswith(" s)\n")
    )
    now_doing("nobody listens")
    assert screen.getvalue() == shown and terminal._line is None


def test_what_ends_soon_says_nothing() -> None:
    made = Screen(on_terminal=False)
    with redirect_stderr(made):
        with pytest.raises(ZeroDivisionError), working("a moment"):
            raise ZeroDivisionError
        assert list(progress([1, 2], "items")) == [1, 2]
    assert made.getvalue() == "" and terminal._line is None


def test_progress_counts_what_is_done(screen) -> None:
    with redirect_stderr(screen):
        for item in progress(iter("ab"), "letters", total=2, unit="letter"):
            screen.next()
            assert f"letters: {'ab'.index(item)} of 2 letter" in screen.next()
