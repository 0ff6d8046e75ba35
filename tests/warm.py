"""New processes of Python that have the heavy packages already: a server imports them once and forks for each command.

Two thirds of what a dry run computes is Python importing Snakemake, and most of a tiny chain's job is Python importing
PyTorch, transformers and PEFT. The forked process has what a new one would have: its command, folder, environment and
open files, and no module of this project, so it reads the checkout's. A user's run never comes here.

    launchers()      a folder with `python`, `snakemake` and `dryfit`, to be put first into PATH

A launcher asks the server, waits, and ends as the forked process ended. Whatever the server can't stand in for (options
of Python, another setting that packages read while they are imported) it starts as a process of its own.
"""

from __future__ import annotations

import array
import json
import os
import signal
import socket
import sys

if False:  # a launcher has no time for it
    from collections.abc import Callable

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# What packages read from the environment while they are imported, and what job.py sets before that. The number of
# threads is read then too, and set anew in each process.
READ_AT_IMPORT = (
    "ACCELERATE_",
    "BITSANDBYTES_",
    "BNB_",
    "CUDA_",
    "GOMP_",
    "HF_",
    "KMP_",
    "LD_",
    "PYTHONHASHSEED",
)
READ_AT_IMPORT += ("PYTORCH_", "TORCH", "TQDM_", "TRANSFORMERS_")
SET_BY_JOBS = {"GOMP_SPINCOUNT": "3000", "TQDM_DISABLE": "1"}
HEAVY = ("bitsandbytes", "matplotlib.figure", "pandas", "peft", "pyarrow.parquet", "sacrebleu")
HEAVY += ("transformers.models.llama.modeling_llama", "transformers.trainer")
# What Snakemake itself imports late: pandas to compare parameters, nbformat for scripts that might be notebooks.
PLANNING = ("jsonschema", "nbformat", "pandas", "smart_open", "snakemake.storage")
LONGEST = 2**20  # bytes of a request
HERE = hasattr(os, "pidfd_open")  # Linux; elsewhere each command is a process of its own


# --- the launcher: the standard library's smallest modules alone, since it starts for each command --------------------


def launch(name: str, address: str, python: str, environment: dict[str, str]) -> None:
    """Be the command of this process: in a child of the server, or in Python itself where that can't be."""
    arguments = {"snakemake": ["-P", "-m", "snakemake"], "dryfit": ["-P", "-m", "scripts.ask"]}.get(
        name, []
    )
    arguments += sys.argv[1:]
    if name == "dryfit":  # as the Makefile writes it
        os.environ["PYTHONPATH"] = ROOT
    rest = arguments[1:] if arguments[:1] == ["-P"] else arguments
    known = rest[:1] == ["-m"] or (rest and rest[0].endswith(".py"))
    if not known or not HERE or read_at_import({**SET_BY_JOBS, **os.environ}) != environment:
        os.execv(python, [python, *arguments])
    request = {"arguments": arguments, "environ": dict(os.environ), "folder": os.getcwd()}
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", (0, 1, 2)))]
        server.sendmsg([json.dumps(request).encode() + b"\n"], rights)
        said = server.recv(16)
    if not said:
        with open(address + ".said", encoding="utf-8", errors="replace") as file:
            sys.exit(
                f"The server of tests/warm.py ended while it ran: {' '.join(arguments)}\n{file.read()[-2000:]}"
            )
    status = int(said)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status not in (
            signal.SIGKILL,
            signal.SIGSTOP,
        ) else None
        os.kill(os.getpid(), -status)
    os._exit(status)


def read_at_import(environ: dict[str, str]) -> dict[str, str]:
    """The part of an environment that must be the server's, or a command needs a process of its own."""
    return {
        name: value for name, value in sorted(environ.items()) if name.startswith(READ_AT_IMPORT)
    }


# --- the server -------------------------------------------------------------------------------------------------------


def serve(address: str, packages: list[str]) -> dict:
    """Fork a child for each command, until nobody needs the server any more; returns in each child what it shall be."""
    import contextlib
    import gc
    import selectors

    waiting = selectors.DefaultSelector()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    waiting.register(listener, selectors.EVENT_READ)
    waiting.register(0, selectors.EVENT_READ)  # ends with the process of tests
    children: dict[int, tuple[int, socket.socket]] = {}
    gc.disable()  # imports make many objects and few cycles
    print("ready", flush=True)
    while True:
        for key, _ in waiting.select():
            if key.fileobj is listener:
                connection = listener.accept()[0]
                request, files = receive(connection)
                if request is None:
                    connection.close()
                    continue
                load(request["arguments"], packages)
                gc.freeze()  # or a child's collection would copy all that was imported
                child = os.fork()
                if not child:
                    gc.enable()
                    for registered in waiting.get_map().values():
                        if registered.fd:
                            os.close(registered.fd)
                    waiting.close()
                    connection.close()
                    return {**request, "files": files}
                for file in files:
                    os.close(file)
                ended = os.pidfd_open(child)
                children[ended] = child, connection
                waiting.register(ended, selectors.EVENT_READ, "ended")
                waiting.register(connection, selectors.EVENT_READ, child)
            elif key.data == "ended":
                child, connection = children.pop(key.fd)
                status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                waiting.unregister(key.fd)
                os.close(key.fd)
                if connection in waiting.get_map():
                    waiting.unregister(connection)
                with contextlib.suppress(OSError):  # whoever asked may be gone
                    connection.sendall(str(status).encode())
                connection.close()
            elif key.fd == 0:
                for child, _ in children.values():
                    os.kill(child, signal.SIGTERM)
                sys.exit()
            else:  # the launcher was ended: so is what it stands for
                waiting.unregister(key.fileobj)
                os.kill(key.data, signal.SIGTERM)


def receive(connection: socket.socket) -> tuple[dict | None, list[int]]:
    """A request, and standard input, output and error of whoever asks; None where it ended before it had asked."""
    said, files = b"", []
    while not said.endswith(b"\n"):
        part, rights, _, _ = connection.recvmsg(
            LONGEST, socket.CMSG_SPACE(3 * array.array("i").itemsize)
        )
        for _, _, data in rights:
            files += array.array("i", data)
        if not part:
            return None, files
        said += part
    return json.loads(said), files


def load(arguments: list[str], packages: list[str]) -> None:
    """Import what a command needs, if no command before it needed it."""
    import importlib

    if "snakemake" in arguments[:2]:
        from snakemake.cli import get_argument_parser

        get_argument_parser()  # loads the plugins
    for name in PLANNING if "snakemake" in arguments[:2] else packages:
        importlib.import_module(name)


def become(request: dict, launchers: str) -> None:
    """Be a command in this process, which has just been forked."""
    import runpy
    import tempfile

    for number, file in enumerate(request["files"]):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["environ"])
    os.chdir(request["folder"])
    tempfile.tempdir = None
    arguments = request["arguments"]
    safe_path = arguments[0] == "-P"
    kind, *sys.argv = (
        arguments[safe_path:] if arguments[safe_path] == "-m" else ["", *arguments[safe_path:]]
    )
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if "torch" in sys.modules and threads.isdecimal():
        sys.modules["torch"].set_num_threads(int(threads))
    if kind != "-m":
        sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
        runpy.run_path(sys.argv[0], run_name="__main__")
        return
    if not safe_path:
        sys.path.insert(0, os.getcwd())
    if sys.argv[0] == "snakemake":
        sys.executable = os.path.join(launchers, "python")  # which runs the scripts of its rules
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def ending_as_python(command: Callable, *arguments: object) -> None:
    """Call a function and end this process as Python ends, but for taking down each object that the server had.

    That would copy all of the server's memory, which takes longer than importing the packages.
    """
    import atexit
    import threading
    import traceback

    status = 0
    try:
        command(*arguments)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        status = 1
        traceback.print_exc()
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


# --- for tests --------------------------------------------------------------------------------------------------------

LAUNCHER = """#!{python} -IS
import sys
sys.path.insert(0, {folder!r})
from warm import launch
launch({name!r}, {address!r}, {python!r}, {environment!r})
"""
_started: dict[str, str] = {}


def launchers(environ: dict[str, str] | None = None, packages: tuple[str, ...] = HEAVY) -> str:
    """A folder with the launchers of a server that runs as long as this process.

    There is one for each kind of environment, and for each list of packages that it is to import.
    """
    import atexit
    import subprocess
    import tempfile

    environment = read_at_import({**SET_BY_JOBS, **(os.environ if environ is None else environ)})
    key = json.dumps([environment, packages])
    if key not in _started:
        folder = tempfile.mkdtemp(prefix="warm-")
        address = os.path.join(folder, "socket")
        for name in ("python", "python3", "snakemake", "dryfit"):
            path = os.path.join(folder, name)
            values = {
                "address": address,
                "environment": environment,
                "name": name,
                "python": sys.executable,
            }
            with open(path, "w", encoding="utf-8") as file:
                file.write(
                    LAUNCHER.format(folder=os.path.dirname(os.path.abspath(__file__)), **values)
                )
            os.chmod(path, 0o755)
        _started[key] = folder
        if not HERE:
            return folder
        with open(address + ".said", "w", encoding="utf-8") as said:
            process = subprocess.Popen(
                [sys.executable, "-P", os.path.abspath(__file__), address, *packages],
                env={**os.environ, **environment, "OPENBLAS_NUM_THREADS": "1"},
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
            )
        assert process.stdout.readline() == "ready\n"
        atexit.register(_end, process, folder)
    return _started[key]


def _end(process, folder: str) -> None:
    import shutil

    process.stdin.close()
    process.wait()
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    ending_as_python(become, serve(sys.argv[1], sys.argv[2:]), os.path.dirname(sys.argv[1]))
