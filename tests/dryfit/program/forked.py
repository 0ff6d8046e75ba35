"""`dryfit run` whose program runs in a fork of this process, which has imported PyTorch: nothing else is changed.

    python -m tests.dryfit.program.forked run PROGRAM ARGS

The server of tests/warm.py forks this process. It has imported what a new one imports before the program's first line,
and no other package: what a program imports itself comes after the card, as it does for a user.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

IMPORTED = ("torch", "torch._dynamo")  # by `simulated_machine`
_POPEN = subprocess.Popen


class Fork:
    """A process as :class:`subprocess.Popen` starts it, but for Python itself, which is there already."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        cwd: Any,
        env: dict[str, str],
        stdin: int,
        stdout: Any,
        stderr: Any,
        preexec_fn: Callable[[], None],
        start_new_session: bool,
    ) -> None:
        executable, *options, module = command[:4]
        assert (executable, options, stdin, stdout) == (
            sys.executable,
            ["-P", "-m"],
            subprocess.DEVNULL,
            stderr,
        )
        self.returncode: int | None = None
        failing, fails = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(fails)
            with os.fdopen(failing, "rb") as said:
                if said.read():
                    raise subprocess.SubprocessError("Exception occurred in preexec_fn.")
            return
        try:
            os.close(failing)
            subprocess.Popen = _POPEN
            if start_new_session:
                os.setsid()
            nothing = os.open(os.devnull, os.O_RDONLY)
            for number, file in ((0, nothing), (1, stdout.fileno()), (2, stdout.fileno())):
                os.dup2(file, number)
            os.chdir(cwd)
            try:
                preexec_fn()
            except BaseException:
                os.write(fails, b"it failed")
                raise
            os.close(fails)
            os.environ.clear()
            os.environ.update(env)
            tempfile.tempdir = None
            for name in [name for name in sys.modules if name.partition(".")[0] == "dryfit"]:
                del sys.modules[name]
            sys.argv = [module, *command[4:]]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        finally:
            os._exit(1)

    def __enter__(self) -> Fork:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end, as :meth:`subprocess.Popen.wait`."""
        ends = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            pid, status = os.waitpid(self.pid, 0 if ends is None else os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > ends:
                raise subprocess.TimeoutExpired(self.pid, timeout)
            else:
                time.sleep(0.02)
        return self.returncode


def main() -> None:
    from dryfit.ask import command

    subprocess.Popen = Fork
    command.run()


if __name__ == "__main__":
    main()
