"""What is a clean command, which ones are the same, and the check of their syntax."""

import re
import unicodedata
from collections.abc import Sequence

from scripts.tasks.shell.syntax import check_syntax
from scripts.tasks.shell.task import Shell
from scripts.tasks.support import keys
from scripts.tasks.text import Checked

_QUOTES = re.compile("[\"'`\u2018\u2019\u201c\u201d]")
_OPERATOR = re.compile(r"\s*([|&;<>()]+)\s*")
_SPACE = re.compile(r"\s+")


def command_key(text: str) -> str:
    """What is left of a command when case, quotes, space and the final semicolon don't count.

    Coarser than equality of meaning on purpose: more is kept together than is equal, so nothing leaks.
    """
    text = _QUOTES.sub("", unicodedata.normalize("NFKC", text).casefold())
    text = _OPERATOR.sub(r" \1 ", text.replace("\n", " ; "))
    return _SPACE.sub(" ", text).strip().rstrip("; ")


def defect(request: str, command: str) -> str | None:
    """Why a cleaned pair can't be used, or None."""
    if found := keys.defect(request, command):
        return found
    return None if any(character.isalpha() for character in request) else "request has no words"


class Task(Shell):
    clean_request = staticmethod(keys.clean_request)
    defect = staticmethod(defect)
    answer_key = staticmethod(command_key)

    def check(self, rows: Sequence[tuple[str, str]]) -> list[Checked]:
        """A command must be Bash, and do something."""
        syntax = check_syntax([command for _, command in rows])
        checked = []
        for canonical, error in syntax:
            does = any(
                line and not line.lstrip().startswith("#")
                for line in (canonical or "").splitlines()
            )
            reason = (
                "command is not Bash"
                if canonical is None
                else None
                if does
                else "command does nothing"
            )
            checked.append(Checked(reason, error))
        return checked
