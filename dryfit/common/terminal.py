"""What a command line does around its work: messages to standard error, progress, errors without a traceback."""

import logging
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from dryfit.common.errors import UserError

T = TypeVar("T")
log = logging.getLogger("dryfit")


def messages_to_stderr() -> None:
    """Messages for people go to standard error; standard output is for results."""
    log.setLevel(logging.INFO)
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)


def command(main: Callable[[], int | None]) -> None:
    """Run a command line's ``main`` and exit with the status that it returns, 0 for None.

    A :class:`UserError` is status 2 with its message alone. Any other error is the program's own, not an answer:
    status 3, after the traceback. Announcements of libraries to their developers are not shown.
    """
    messages_to_stderr()
    if not sys.warnoptions:
        warnings.simplefilter("ignore", FutureWarning)
    # Importing it warns, on processors with bf16 instructions, that a package with another CPU kernel is not installed.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        status = main()
        sys.stdout.flush()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)  # as shells do: 128 and the signal's number
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception:
        traceback.print_exc()
        sys.exit(3)
    sys.exit(status or 0)


@contextmanager
def left_out_if_it_fails(name: str, failed: list[str] | None) -> Iterator[None]:
    """Let an answer stand although a search beside it fails, whose name ``failed`` gets."""
    try:
        yield
    except Exception:  # whatever a library raises for a step that nobody asked about
        log.debug("the search for %s failed", name, exc_info=True)
        if failed is not None:
            failed.append(name)


class _Line:
    """What is being done, on standard error: on a terminal one line that changes, in a log a line now and then.

    A thread of its own says it, so that it is heard in the middle of a long step. It begins after two seconds.
    """

    FIRST_SECONDS, TERMINAL_SECONDS, LOG_SECONDS = 2.0, 0.5, 15.0

    def __init__(self, doing: str) -> None:
        self.doing, self._since, self._width = doing, time.monotonic(), 0
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._speak, daemon=True)
        self._thread.start()

    def _speak(self) -> None:
        on_terminal = sys.stderr.isatty()
        pause = self.FIRST_SECONDS
        while not self._ended.wait(pause):
            pause = self.TERMINAL_SECONDS if on_terminal else self.LOG_SECONDS
            with self._lock:
                if not self.doing:
                    continue
                text = f"{self.doing} ({time.monotonic() - self._since:.0f} s)"
                sys.stderr.write(f"\r{text:<{self._width}}" if on_terminal else f"{text}\n")
                sys.stderr.flush()
                self._width = len(text) if on_terminal else 0

    def now(self, doing: str) -> None:
        """Something else is being done; nothing: the line makes room for what is printed."""
        with self._lock:
            self.doing = doing
            if not doing and self._width:
                sys.stderr.write("\r" + " " * self._width + "\r")
                sys.stderr.flush()
                self._width = 0

    def end(self) -> None:
        self._ended.set()
        self._thread.join()
        self.now("")


_line: _Line | None = None


@contextmanager
def working(doing: str) -> Iterator[None]:
    """Say what is being done while the block runs, should it take longer than two seconds.

    A block inside of another one changes what the outer one says.
    """
    global _line
    if _line is not None:
        now_doing(doing)
        yield
        return
    _line = _Line(doing)
    try:
        yield
    finally:
        ended, _line = _line, None
        ended.end()


def now_doing(doing: str) -> None:
    """Change what :func:`working` says, where it says anything; "" takes the line away before something is printed."""
    if _line is not None:
        _line.now(doing)


def progress(
    items: Iterable[T], label: str, total: int | None = None, unit: str = "it"
) -> Iterator[T]:
    """Yield the items, and say how many there were and how long the rest may take."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    of, started = f" of {total}" if total else "", time.monotonic()
    with working(f"{label}: 0{of} {unit}"):
        for number, item in enumerate(items, 1):
            yield item
            left = (
                f", about {(total - number) * (time.monotonic() - started) / number:.0f} s left"
                if total
                else ""
            )
            now_doing(f"{label}: {number}{of} {unit}{left}")
