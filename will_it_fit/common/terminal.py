"""What a command line does around its work: messages to standard error, progress, errors without a traceback."""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from will_it_fit.common.errors import UserError

T = TypeVar("T")
log = logging.getLogger("will_it_fit")


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


def moved(old: str, new: str) -> None:
    """Say that a command has a new name; the old one goes on working."""
    print(f"python -m {old} is now python -m {new}", file=sys.stderr)


def progress(items: Iterable[T], label: str, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Yield the items, with a bar on a terminal and a line in the log every few seconds elsewhere."""
    from tqdm import tqdm

    if sys.stderr.isatty():
        yield from tqdm(items, desc=label, total=total, unit=unit, leave=False)
        return
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    started = last = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= 10:
            last = now
            rate = number / (now - started)
            left = f", about {(total - number) / rate:.0f} s left" if total else ""
            log.info(
                "%s: %d%s %s (%.1f %s/s%s)", label, number, f" of {total}" if total else "", unit, rate, unit, left
            )
