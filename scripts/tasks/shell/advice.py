"""What a person should know of a command before running it: the screen's verdict, and what the command would do."""

from scripts.common.answers import strip_fence
from scripts.tasks.shell.effects import CHANGES, DELETES, READS, effect
from scripts.tasks.shell.refusals import read_refusals
from scripts.tasks.shell.screen.policy import ScreenVerdict, screen
from scripts.tasks.shell.syntax import check_syntax
from scripts.tasks.shell.task import Shell
from scripts.tasks.text import Advice

_WOULD = {
    READS: "It would only read.",
    CHANGES: "It would change something: files, settings or processes.",
    DELETES: "It would delete something.",
}


class Task(Shell):
    def advice(self, answer: str) -> Advice:
        """The screen's verdict on a model's answer, and what it would do if somebody ran it."""
        command = strip_fence(answer)
        if not command:
            return Advice("unknown", "no command", "The model gave no command.")
        if command == read_refusals().line:
            return Advice("ok", "refused", "The model refuses this request.")
        verdict = screen(command)
        if verdict.status == "danger":
            return Advice("danger", "DANGEROUS", f"{_reason(verdict)} {_would(command)}".strip())
        error = check_syntax([command])[0].error
        if error is not None:
            return Advice("unknown", "not Bash", f"Bash can't parse it: {error}.")
        if verdict.status != "ok":
            return Advice("unknown", "not judged", "The screen can't read all of this command.")
        found = effect(command)
        if found == READS:
            return Advice("ok", "ok", _would(command))
        return Advice("caution", "careful", _would(command))


def _reason(verdict: ScreenVerdict) -> str:
    return f"{verdict.title} ({verdict.category}, rule {verdict.rule})."


def _would(command: str) -> str:
    found = effect(command)
    return _WOULD.get(found, "") if found else ""
