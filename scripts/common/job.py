"""What every job does around its work: open its log, show progress, end with a message instead of a traceback.

A rule's script ends with::

    if __name__ == "__main__":
        with job(snakemake):
            main(snakemake.input, snakemake.output, snakemake.params)

and imports heavy packages inside the functions that compute with them, so that the log is open
before the first of them can fail.
"""

import ctypes
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dryfit.common.errors import UserError
from dryfit.common.terminal import log, messages_to_stderr
from scripts.common import contents


@contextmanager
def job(snakemake: Any) -> Iterator[None]:
    """Run a rule's work with its log open. A :class:`UserError` ends the job with its message alone.

    The terminal shows what the project says; what libraries print and warn about stays in the log.
    """
    messages_to_stderr()
    if not snakemake.log:  # alone, where a debugger may ask (scripts/runs/alone.py)
        yield
        return
    end_with_parent()
    # Torch's threads meet thousands of times a second. One that spins for long while it waits takes the CPU from
    # the one that it waits for when other programs want it too: 8 tokens a second at a load of 8, and 36 where it
    # sleeps after 2,000 turns. On a quiet machine sleeping at once costs a third (178 instead of 282), after 3,000
    # turns an eighth (245).
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    if not sys.stderr.isatty():
        os.environ.setdefault(
            "TQDM_DISABLE", "1"
        )  # the libraries' own bars fill a log with fragments
    path = Path(str(snakemake.log[0]))
    path.parent.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(path, mode="w", encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(file)
    with _output_into(file):
        log.info("rule %s: python %s (%s)", snakemake.rule, sys.version.split()[0], sys.prefix)
        started = time.monotonic()
        try:
            yield
            contents.remember_written(getattr(snakemake, "output", ()))
            log.info("rule %s: done in %.1f s", snakemake.rule, time.monotonic() - started)
        except UserError as error:
            log.error("%s", error)
            sys.exit(1)
        except BaseException as error:
            if "No space left on device" in str(
                error
            ):  # libraries say it in errors of their own kinds
                again = "Free some space and give the same command again: it goes on from here."
                log.error("The disk is full (%s). %s", error, again)
                sys.exit(1)
            log.error("%s", traceback.format_exc())
            raise
    file.close()
    log.removeHandler(file)


def end_with_parent() -> None:
    """Let the kernel end this process when the one that started it is killed: the next must not find it writing.

    ``PR_SET_PDEATHSIG`` of prctl(2). What was saved is found again: training resumes from its checkpoint.
    """
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
        if os.getppid() != parent:  # it was faster
            os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _output_into(file: logging.FileHandler) -> Iterator[None]:
    """Send standard output and error, those of C libraries too, into a log; our messages go to the terminal as well."""
    (terminal,) = [handler for handler in log.handlers if handler is not file]
    kept = {number: os.dup(number) for number in (1, 2)}
    with os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace") as stream:
        before = terminal.setStream(stream)
        for number in kept:
            os.dup2(file.stream.fileno(), number)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, descriptor in kept.items():
                os.dup2(descriptor, number)
                os.close(descriptor)
            terminal.setStream(before or sys.stderr)


def keep_host_memory() -> None:
    """Let glibc keep freed memory instead of returning it to the system: a step on the CPU is then a quarter faster.

    Large tensors otherwise come from fresh, zeroed pages each time (``M_MMAP_MAX``, ``M_TRIM_THRESHOLD`` and
    ``M_TOP_PAD`` of mallopt(3)). For training on the CPU; a measurement of resident memory is better off without.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 64 * 2**20)):
        mallopt(option, value)
