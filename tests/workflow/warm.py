"""A Snakemake that has loaded itself once and then answers many commands, each in a fresh child of its process.

    python -m tests.workflow.warm       reads and answers lines of JSON

Two thirds of what a dry run computes is Python loading Snakemake and its plugins. The child has what a new process
would have: its command, folder and environment, and no module of this project, so it reads the checkout's.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(command: list[str], folder: str, environ: dict[str, str], stdout: str, stderr: str) -> None:
    """Become the command in this process, and end."""
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(folder)
    sys.argv = command
    from snakemake.cli import main

    status = 1
    try:
        main()
        status = 0
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve() -> None:
    """Answer each request with the exit status of its command, until nobody asks any more."""
    import jsonschema  # noqa: F401
    import smart_open  # noqa: F401
    from snakemake.cli import get_argument_parser

    get_argument_parser()  # loads the plugins
    sys.path = [path for path in sys.path if Path(path or os.curdir).resolve() != ROOT]
    for line in sys.stdin:
        child = os.fork()
        if not child:
            run(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
