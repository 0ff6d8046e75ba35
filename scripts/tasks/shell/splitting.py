"""Which commands hold rows together: all but the line that refuses, which answers many requests."""

from scripts.tasks.shell.cleaning import command_key
from scripts.tasks.shell.refusals import read_refusals
from scripts.tasks.shell.task import Shell


class Task(Shell):
    answer_key = staticmethod(command_key)

    def holds_together(self, answer: str) -> bool:
        """Whether rows with this command ask for the same."""
        return answer != read_refusals().line
