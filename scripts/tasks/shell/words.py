"""What documents call commands, their metrics and their stages."""

from typing import Any

from scripts.tasks.shell.task import Shell


class Task(Shell):
    def has_harm(self) -> bool:
        return True

    def labels(self) -> dict[str, tuple[str, bool | None]]:
        return {
            "loss": ("Loss on the expected answers (nats per token)", False),
            "equivalent": ("Right: the expected command, or one known to do the same", True),
            "exact": ("Exact match", True),
            "exact_canonical": ("Exact match after shfmt's normalization", True),
            "program": ("Same program (first word)", True),
            "parses": ("Parses as Bash, as answered", True),
            "parses_without_fence": ("Parses as Bash, after a code fence is stripped", True),
            "chrf": ("chrF", True),
            "deletes_unasked": ("Deletes, asked only to read", False),
            "changes_unasked": ("Changes or deletes, asked only to read", False),
            "danger": ("Flagged as dangerous by the screen", False),
            "refused_taught": ("Refused, of requests for harm of taught kinds", True),
            "refused_harmful": ("Refused, of requests for harm of untaught kinds", True),
            "danger_harmful": ("Flagged as dangerous, asked for harm", False),
            "refused_harmless": ("Refused, though harmless", False),
        }

    def headline(self) -> tuple[str, ...]:
        return (
            "loss",
            "equivalent",
            "exact",
            "program",
            "deletes_unasked",
            "changes_unasked",
            "danger",
        )

    def check_title(self) -> str:
        return "Check the syntax (shfmt)"

    def words(self) -> dict[str, Any]:
        return {
            "about": "Bash",
            "adapter_summary": "A request in English goes in, one Bash command comes out: to be read, checked and run"
            " by hand.",
            "answer": self.answer,
            "answers": "commands",
            "answers_a_request": "to answer a request in English with one Bash command",
            "before_use": "read it before you run it",
            "counts_as_right": "An answer counts as right if it is the expected command or is known to do the same."
            " Rules on the syntax tree decide that, for quotes, the order of options and the tests of `find`. Other"
            " commands that do the same count as wrong.",
            "dataset": "requests in English and Bash commands",
            "dropped": "Duplicates, what Bash can't parse and what a static screen calls dangerous were taken out. The"
            " screen reads the syntax of a command; it knows neither the machine nor what the files mean. Nothing was"
            " executed.",
            "fine_tuned_for": "Bash commands",
            "held_together": True,
            "in_a_tool": "show the command, explain it, screen it and ask before running it. `python -m scripts.screen`"
            " of this project reads commands, one a line, and says which are dangerous",
            "learns": "learns Bash",
            "only_where": "Use it only where a person reads each command before it runs.",
            "out_of_scope": "running answers unseen, other shells, other languages than English, scripts of several"
            " lines, and any work in which a wrong command does lasting harm",
            "pairs": "requests and Bash commands",
            "read_first": "Read each command before you run it.",
            "same": "do the same",
            "summary": "A request in English goes in, one Bash command comes out.",
            "tags": ["bash", "shell", "command-line"],
            "task_name": "Bash command from a request in English",
            "use": "suggest a Bash command that a person reads, checks and runs by hand",
        }
