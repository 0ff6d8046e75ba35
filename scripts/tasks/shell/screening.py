"""What the screen says of commands that are to be learned."""

from collections.abc import Sequence

from scripts.tasks.shell.screen.policy import build
from scripts.tasks.shell.task import Shell
from scripts.tasks.text import Screened


class Task(Shell):
    def screen(self, answers: Sequence[str]) -> list[Screened]:
        """The policy's verdict on each command."""
        policy = build()
        verdicts = [policy.judge(command) for command in answers]
        return [Screened(one.status, one.category, one.rule) for one in verdicts]
