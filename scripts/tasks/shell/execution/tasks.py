"""InterCode-ALFA: 300 requests, two commands that fulfil each, and the five file systems that they are about.

Read from the wheel ``icalfa`` on PyPI (MIT licence), whose code is not run and whose dependencies (a Docker daemon, a
language model as judge) stay away. Its file systems are made by its own set-up scripts, on a bare root of ours instead
of in Ubuntu's and Alpine's images.
"""

import hashlib
import json
import re
import shlex
import zipfile
from pathlib import Path
from typing import Any

from dryfit.common.errors import UserError
from scripts.common.code_digests import ROOT
from scripts.tasks.shell.execution.sandbox import SandboxState

LEVELS = ("easy", "medium", "hard")  # what the benchmark calls difficulty 0, 1 and 2
ASSETS = "icalfa/assets"
# What a container of Debian's family has, as far as commands look at it; set-up scripts run after it.
BARE_ROOT = ROOT / "config" / "execution" / "bare-root.sh"


def read_wheel(path: Path) -> tuple[list[dict[str, Any]], dict[str, SandboxState]]:
    """Tasks and file systems of the benchmark.

    Returns
    -------
    tasks
        In the benchmark's order: ``id``, ``request``, ``command``, ``alternatives``, ``state``, ``level``.
    states
        The file systems by name.

    Raises
    ------
    UserError
        When the wheel does not hold what is expected.
    """
    tasks: list[dict[str, Any]] = []
    states, bare_root = {}, BARE_ROOT.read_text(encoding="utf-8")
    try:
        with zipfile.ZipFile(path) as archive:
            for name in sorted(
                name
                for name in archive.namelist()
                if re.fullmatch(rf"{ASSETS}/datasets/.+\.json", name)
            ):
                number = re.findall(r"\d+", name)[-1]
                state, setup = f"fs-{number}", f"setup_nl2b_fs_{number}.sh"
                script = archive.read(f"{ASSETS}/docker/{setup}").decode("utf-8")
                image = archive.read(f"{ASSETS}/docker/nl2bash{number}.Dockerfile").decode("utf-8")
                variables = re.findall(r'^ENV (\w+)="?(.*?)"?$', image, re.MULTILINE)
                made = f"printf %s {shlex.quote(script)} > /{setup}; chmod 755 /{setup}; /bin/bash /{setup}"
                states[state] = SandboxState(f"\n{bare_root}\n{made}", dict(variables))
                for row in json.loads(archive.read(name)):
                    task = {
                        "command": row["gold"],
                        "alternatives": [row["gold2"]],
                        "request": row["query"],
                    }
                    tasks.append(
                        {
                            "id": len(tasks),
                            "level": LEVELS[row["difficulty"]],
                            "state": state,
                            **task,
                        }
                    )
    except (KeyError, IndexError, ValueError, TypeError, zipfile.BadZipFile) as error:
        tasks, problem = [], f"{type(error).__name__}: {error}"
    else:
        problem = "no tasks in it"
    if not tasks:
        raise UserError(
            f"The wheel does not hold the benchmark in the form that is known: {problem}.",
            where="dataset.benchmark in the configuration",
            found=path.name,
            allowed="the wheel of icalfa 0.3.6, or of a release with the same files",
        )
    return tasks, states


def mixed(tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tasks in the order of their requests' digests: the first so many are a sample that nobody chose."""
    return sorted(tasks, key=lambda task: hashlib.sha256(task["request"].encode()).hexdigest())
