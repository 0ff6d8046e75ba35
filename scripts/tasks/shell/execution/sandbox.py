"""Commands run sealed off from the host: without network, the host's files or its rights; never without the sandbox.

Two sandboxes of bubblewrap, one in the other. The *outer* one starts once: the host's /usr read-only, no network, one
tmpfs of limited size. In it runs ``worker.py``, which starts an *inner* one for each command. Nothing is written to the
host's disk, and what collects a command's changes can reach no file of the host outside /usr, whatever links the
command left. ``docs/execution.md`` lists what was tried against it.

Example
-------
>>> with Sandbox({"empty": State("mkdir /data")}) as sandbox:
...     (result,) = sandbox.run([("empty", "touch /data/a; ls /data")])
>>> result["stdout"], result["changes"]
('a\\n', {'/data/a': [None, ['file', '0o644', '0 bytes, sha256 e3b0...']]})
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from dryfit.common.errors import UserError
from dryfit.common.terminal import progress
from scripts.tasks.shell.execution import worker

NOBODY = 65534  # who the sandbox's processes are to the host that is root itself
# A worker that says nothing for so long hangs: preparing a state or a command is ended long before.
SILENCE_SECONDS = 120


class SandboxState(NamedTuple):
    """A file system that commands find: the Bash script that makes it on an empty root, and its environment."""

    script: str
    environment: Mapping[str, str] = {}


def unavailable(
    problem: str, allowed: str, found: object = None, write: str | None = None
) -> UserError:
    """There is no sandbox here, and so nothing was executed."""
    return UserError(
        f"{problem} Nothing was executed.",
        where="the target execute, or evaluation.execution: bubblewrap in the configuration",
        found=found,
        allowed=f"{allowed}; or evaluation.execution: none, and no target named execute",
        write=write,
    )


def find_bwrap() -> Path:
    """The bubblewrap of this machine.

    UserError: Without one, or where the sandbox does not support the platform.
    """
    machine = os.uname().machine
    if sys.platform != "linux" or machine not in worker.MACHINES:
        raise unavailable(
            "Commands can't be run sealed off on this machine.",
            f"Linux on {' or '.join(worker.MACHINES)}",
            f"{sys.platform} on {machine}",
        )
    path = shutil.which("bwrap")
    if path is None:
        raise unavailable(
            "bubblewrap, which seals off the commands, is not installed.",
            "bubblewrap 0.11 or newer (the program bwrap) on the PATH",
            write="apt-get install bubblewrap    # or: dnf install bubblewrap; conda install -c conda-forge bubblewrap",
        )
    return Path(os.path.realpath(path))


def explain(said: str) -> UserError:
    """What bubblewrap said when it made no sandbox, with what helps."""
    if "nknown option" in said:
        allowed, write = "bubblewrap 0.11 or newer, which knows overlays", "bwrap --version"
    elif "overlay" in said:
        allowed, write = (
            "a kernel whose overlays unprivileged users may mount and change (Linux 6.6 or newer)",
            None,
        )
    else:
        allowed = "user namespaces for ordinary users. Ask the administrator: Ubuntu 24.04 and newer refuse them to"
        allowed += " programs without an AppArmor profile (bubblewrap needs one with `userns,`), some systems by"
        allowed += " sysctl (user.max_user_namespaces, kernel.unprivileged_userns_clone), containers by their profile"
        write = "bwrap --unshare-all --ro-bind / / true    # works without a word where the sandbox does"
    return unavailable(
        "bubblewrap could not make the sandbox.", allowed, said.strip()[-500:] or "(nothing)", write
    )


class _Outer:
    """One outer sandbox with its worker, which runs one command at a time."""

    def __init__(self, bwrap: Path, limits: Mapping[str, int]) -> None:
        # Never with the host's root: its limits on processes don't hold, and files of the host would be its own.
        drop: dict = (
            {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
        )
        python, roots = _python(bool(drop))
        if bwrap.parts[1] != "usr":
            roots = [*roots, bwrap.parent, *filter(Path.is_dir, [bwrap.parent.with_name("lib")])]
        command = [str(bwrap), *worker.SEALED]
        command += "--unshare-net --cap-add CAP_SETFCAP --cap-add CAP_NET_ADMIN".split()
        command += [
            "--ro-bind",
            "/usr",
            "/usr",
            "--proc",
            "/proc",
            "--dev",
            "/dev",
            "--dir",
            "/tmp",
            *worker.ETC,
        ]
        command += [
            word for link in worker.LINKS for word in ("--symlink", f"usr/{link}", f"/{link}")
        ]
        command += [str(word) for path in sorted({*roots}) for word in ("--ro-bind", path, path)]
        command += [
            "--size",
            str(limits["scratch_bytes"]),
            "--tmpfs",
            "/scratch",
            "--remount-ro",
            "/",
        ]
        command += [
            "--setenv",
            "PATH",
            worker.PATH,
            "--chdir",
            "/",
            python,
            "-I",
            "-c",
            inspect.getsource(worker),
        ]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        try:
            self.process = subprocess.Popen(command, cwd="/", **pipes, **drop)
        except OSError as error:  # root of a namespace in which nobody else exists
            raise explain(f"{type(error).__name__}: {error}") from None
        self.load = 0  # commands that it has been given
        self.answered = False  # whether there is a sandbox at all
        self._send({"bwrap": str(bwrap), "limits": limits})

    def _send(self, message: object) -> None:
        with contextlib.suppress(BrokenPipeError):  # its end is noticed by who waits for an answer
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def ask(self, task: str, **arguments: object) -> dict:
        """Let the worker do something, and wait for what it says."""
        silence = threading.Timer(SILENCE_SECONDS, self.process.kill)
        silence.start()
        try:
            self._send([task, arguments])
            answer = self.process.stdout.readline()
        finally:
            silence.cancel()
        if not answer:
            self.process.kill()
            said = self.process.stderr.read().decode(errors="replace")
            if not self.answered:
                raise explain(said)
            raise UserError(
                f"The sandbox ended, or was silent for {SILENCE_SECONDS} seconds, in the middle of its work ({task}).",
                where="scripts/tasks/shell/execution/worker.py, which runs in it",
                found=said.strip()[-500:] or "(nothing)",
                write="the same command again; if it ends so again, please report it with what was found",
            )
        self.answered = True
        return json.loads(answer)

    def close(self) -> None:
        self.process.kill()  # bubblewrap's --die-with-parent takes everything inside along
        with contextlib.suppress(BrokenPipeError, ValueError):
            self.process.communicate()


def _python(dropped: bool) -> tuple[str, list[Path]]:
    """A Python that the worker can run with, and the folders outside /usr that it needs."""
    own = os.path.realpath(sys.executable)
    if own.startswith("/usr/"):
        return own, []
    if not dropped:
        return own, [Path(os.path.realpath(sys.base_prefix))]
    if os.access("/usr/bin/python3", os.X_OK):  # root's own may be for root alone
        return os.path.realpath("/usr/bin/python3"), []
    raise unavailable(
        "As root, the sandbox gives up root's rights first, and then can't read this Python.",
        "a Python in /usr/bin, or an ordinary user",
        own,
        "apt-get install python3",
    )


class Sandbox:
    """Sealed-off file systems to run commands in.

    Each state lives in one worker: all its commands find the very same files, down to the times in archives.

    Parameters
    ----------
    states
        The file systems by name.
    workers
        How many commands run at a time, at most as many as there are states. Each has a tmpfs of its own.
    limits
        What differs from :data:`scripts.tasks.shell.execution.worker.LIMITS`.

    Raises
    ------
    UserError
        On entering, where no sandbox can be made: what to install, or to ask the administrator for.
    """

    def __init__(
        self,
        states: Mapping[str, SandboxState],
        workers: int = 1,
        limits: Mapping[str, int] | None = None,
    ) -> None:
        self.states, self.count = states, max(1, min(workers, len(states)))
        self.limits = {**worker.LIMITS, **(limits or {})}
        self.outer: list[_Outer] = []
        self.home: dict[str, _Outer] = {}

    def __enter__(self) -> Sandbox:
        bwrap = find_bwrap()
        try:
            for _ in range(self.count):
                self.outer.append(_Outer(bwrap, self.limits))
            self._must_seal(self.outer[0])
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for outer in self.outer:
            outer.close()

    @staticmethod
    def _must_seal(outer: _Outer) -> None:
        """Raise unless a harmless command changes what it should, and nothing else: overlays work."""
        prepared = outer.ask("prepare", name="probe", script="mkdir /kept /gone", environment={})
        if prepared["status"] != 0:
            raise explain(prepared["stderr"])
        probe = outer.ask("run", state="probe", command="rmdir /gone && echo sealed > /kept/file")
        if list(probe["changes"]) != ["/gone", "/kept/file"]:
            raise explain(probe["stderr"])

    def _prepare(self, state: str) -> None:
        script, environment = self.states[state]
        made = self.home[state].ask(
            "prepare", name=state, script=script, environment=dict(environment)
        )
        if made["end"] != "exit":  # half a file system would be judged as if it were the whole
            raise UserError(
                f"The file system {state} was not finished within the sandbox's limits.",
                where="the limits in scripts/tasks/shell/execution/worker.py",
                found=f"its script was ended by the limit on {made['end']}",
                allowed=f"a machine with less to do; of time it has {self.limits['wall_seconds']} seconds",
            )

    def run(self, commands: Iterable[tuple[str, str]], label: str = "commands") -> list[dict]:
        """Run commands, each on a fresh copy of a state.

        Returns
        -------
        list of dict
            For each: ``stdout`` and ``stderr`` (text), ``end`` (``exit``, or the limit that it broke: ``time``,
            ``output``, ``memory``, ``inodes``; ``length``: it was not run), ``status`` (the exit status, None where a
            limit ended it), ``changes`` (``{path: [before, after]}``, each type, permissions and content, or None),
            ``complete`` (whether all changes could be read), ``wall_seconds``.

        Raises
        ------
        UserError
            Where a state can't be made within the limits.
        """
        jobs = list(commands)
        for state, count in Counter(state for state, _ in jobs).most_common():
            if state not in self.home:  # the largest first, each to the worker with the least to do
                self.home[state] = min(self.outer, key=lambda outer: outer.load)
                self._prepare(state)
            self.home[state].load += count
        results: list[dict] = [{}] * len(jobs)
        done: SimpleQueue[BaseException | None] = SimpleQueue()

        def work(outer: _Outer) -> None:
            try:
                for number, (state, command) in enumerate(jobs):
                    if self.home[state] is outer:
                        results[number] = outer.ask("run", state=state, command=command)
                        done.put(None)
            except BaseException as error:
                done.put(error)

        threads = [threading.Thread(target=work, args=[outer], daemon=True) for outer in self.outer]
        for thread in threads:
            thread.start()
        for error in progress((done.get() for _ in jobs), label, total=len(jobs), unit="command"):
            if error:
                raise error
        return results


def must_work() -> None:
    """Raise a :class:`UserError` unless a sandbox can be made here."""
    with Sandbox({}):
        pass
