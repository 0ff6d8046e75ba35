"""Whether a command only reads, changes something, or deletes something: what a person loses by running it by mistake.

The rules say what is dangerous for everybody. This says less, of more commands: an answer that deletes is wrong where
somebody wanted to look, however harmless it is elsewhere. ``config/effects.yaml`` has what the table of programs
does not know.
"""

from functools import cache

from dryfit.common.files import read_yaml
from scripts.common.code_digests import ROOT
from scripts.tasks.shell.screen import paths
from scripts.tasks.shell.screen.commands import Refused, ShellCommand
from scripts.tasks.shell.screen.policy import default
from scripts.tasks.shell.screen.predicates import Language, Test
from scripts.tasks.shell.screen.reader import read

READS, CHANGES, DELETES = "reads", "changes", "deletes"
_ORDER = (READS, CHANGES, DELETES)
_GONE = frozenset(
    {"mv", "truncate"}
)  # these take something from its place, and the policy counts that as deleted


@cache
def _selections() -> dict[str, list[Test]]:
    language = Language(default().programs, default().places)
    content = read_yaml(ROOT / "config" / "effects.yaml")
    return {
        name: [language.selection(keys) for keys in content[name]] for name in (DELETES, CHANGES)
    }


def effect(text: str) -> str | None:
    """The worst that a text of commands does: ``reads``, ``changes`` or ``deletes``; None where it can't be parsed.

    What is moved away or emptied is changed. A program that no table knows is taken to read.
    """
    try:
        commands = read(text, default().programs).commands
    except (Refused, RecursionError):
        return None
    return max((_of_command(command) for command in commands), key=_ORDER.index, default=READS)


def _of_command(command: ShellCommand) -> str:
    programs = default().programs
    if paths.deletes(command, programs) and command.name not in _GONE:
        return DELETES
    for name, tests in _selections().items():
        if any(test(command) for test in tests):
            return name
    # In place counts where the files come from another command's output, too.
    in_place = command.has(*programs.of(command.name).in_place)
    return (
        CHANGES
        if in_place or paths.deletes(command, programs) or paths.writes(command, programs)
        else READS
    )
