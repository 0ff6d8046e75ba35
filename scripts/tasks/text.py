"""The task ``text``: any prompt and its answer. Other tasks are classes over this one.

A task says what a row of it is, which rows may be learned, what an answer is worth, and what documents call it. Stages
ask it by the methods below; the pipeline outside ``scripts/tasks`` knows no task's language.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dryfit.common.errors import UserError
from dryfit.common.schema import closest
from scripts.tasks.support import keys, own

MAXIMUM_CHARACTERS = 200_000  # of a prompt or an answer: far more than a sequence holds


class Checked(NamedTuple):
    """Why a row may not be learned, or None, and what a parser said of it."""

    reason: str | None
    detail: str | None = None


class Screened(NamedTuple):
    """A screen's verdict on an answer: ``ok``, ``danger`` or another word where it can't be judged."""

    status: str
    category: str | None = None
    rule: str | None = None


class Advice(NamedTuple):
    """What a person should know of an answer before using it.

    ``level`` is ``ok``, ``caution``, ``danger`` or ``unknown``; ``verdict`` is two or three words, ``reason`` one
    sentence or two.
    """

    level: str
    verdict: str
    reason: str


Found = tuple[
    str, int, dict[str, Any]
]  # a row of a task's own source: where from, its line, its fields


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


NORMALIZERS: dict[str, Callable[[str], str]] = {
    "case": lambda text: unicodedata.normalize("NFKC", text).casefold().strip(),
    "space": lambda text: " ".join(text.split()),
    "words": _words,
    "number": lambda text: (re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", "")) or [""])[-1],
}


def _is_json(text: str) -> str | None:
    try:
        json.loads(text)
    except ValueError:
        return "answer is not JSON"
    return None


class Task:
    """Any prompt and its answer.

    Attributes
    ----------
    options
        The configuration's ``task``, with :attr:`defaults` where it says nothing.
    """

    name = "text"
    system = "Answer the request."
    answer = "answer"  # what an answer is called
    defaults: Mapping[str, Any] = {
        "checks": [],
        "metrics": ["normalized", "chrf"],
        "normalize": "words",
        "harm": False,
        "refusal": "I can't help with that.",
        "words": {},
    }
    part_options: Mapping[str, tuple[str, ...]] = {
        "sources": ("harm", "refusal"),
        "cleaning": ("checks",),
        "splitting": (),
        "screening": (),
        "benchmark": (),
        "scores": ("metrics", "normalize"),
        "words": ("metrics", "normalize", "words"),
    }
    project_files: Mapping[str, tuple[str, ...]] = {}  # by part, patterns of files that it reads
    source_types: tuple[str, ...] = ()  # of its own, beside files and hub
    guesses_columns = True  # by the names that people give them
    screens = False
    executes = False  # answers to a benchmark that comes as a package
    check_stage = "checks"
    checks: Mapping[str, Callable[[str], str | None]] = {"json": _is_json}
    own_metrics: tuple[str, ...] = (
        "normalized",
        "chrf",
    )  # beside exact and loss, which every task has
    compared: tuple[str, ...] = ("exact",)  # flags that base and tuned are compared on
    right_flag = "exact"  # the flag by which an answer counts as right
    details: tuple[
        str, ...
    ] = ()  # of these, what is of no interest where a model is compared with its merged self

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = {**self.defaults, **options}

    # --- the configuration -------------------------------------------------------------------------

    def options_of(self, part: str) -> dict[str, Any]:
        return {
            name: self.options[name]
            for name in self.part_options.get(part, ())
            if name in self.options
        }

    def files_of(self, part: str) -> list[Path]:
        """Files of the user's own that a part reads."""
        harm = self.options["harm"]
        return [Path(harm)] if part == "sources" and isinstance(harm, str) else []

    def check_options(self) -> None:
        """Refuse an option's value that can't be; a :class:`UserError` says what to write."""
        for key, known in (("checks", self.checks), ("metrics", self.own_metrics)):
            for name in self.options.get(key, ()):
                self._known(key, name, [*known, *(("exact", "loss") if key == "metrics" else ())])
        if "normalize" in self.options:
            self._known("normalize", self.options["normalize"], NORMALIZERS)
        if unknown := [key for key in self.options.get("words", ()) if key not in self.words()]:
            self._known("words", unknown[0], self.words())
        harm = self.options["harm"]
        if harm is True and not self.has_harm():
            raise UserError(
                f"The task {self.name} has no requests for harm of its own.",
                where="task.harm in the configuration",
                allowed="false; or a file of yours with a request a line: {request: ..., category: ...}",
                write="task:\n  harm: data/harm.jsonl",
            )
        for path in self.files_of("sources"):
            if not path.is_file():
                raise UserError(
                    "The file of requests for harm isn't there.", where="task.harm", found=str(path)
                )

    def _known(self, key: str, name: Any, known: Any) -> None:
        if isinstance(name, str) and own.is_own(name):
            own.load(name)
        elif name not in known:
            near = closest(str(name), known) or next(iter(known), "...")
            raise UserError(
                f"The task {self.name} knows no {key} called {name!r}.",
                where=f"task.{key} in the configuration",
                found=name,
                allowed=f"{', '.join(known)}; or a function of yours, module:function",
                write=f"task:\n  {key}: {near}"
                if key == "normalize"
                else f"task:\n  {key}: [{near}]",
            )

    def has_harm(self) -> bool:
        """Whether the task has requests for harm of its own."""
        return False

    # --- sources -----------------------------------------------------------------------------------

    def read(self, source: Mapping[str, Any], about: dict) -> Iterator[Found]:
        """The rows of a source of one of :attr:`source_types`; ``about`` is filled with what the report says."""
        raise NotImplementedError(source["type"])

    def harmful(self) -> list[dict]:
        """Requests for harm: ``request``, ``category`` and the refusal as ``command``."""
        path = self.options["harm"]
        if not path:
            return []
        found = []
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
                request = row["request"]
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    "A line of the requests for harm has no request.",
                    where=f"{path}, line {number}",
                    found=line[:120],
                    write='{"request": "...", "category": "..."}',
                ) from None
            about = {
                "category": str(row.get("category", "harm")),
                "command": self.options["refusal"],
            }
            found.append({**about, "request": request})
        return found

    # --- cleaning ----------------------------------------------------------------------------------

    def clean_request(self, text: str) -> str:
        return keys.clean_block(text)

    def clean_answer(self, text: str) -> str:
        return keys.clean_block(text)

    def defect(self, request: str, answer: str) -> str | None:
        """Why no task could learn a pair, or None."""
        return keys.defect(request, answer, MAXIMUM_CHARACTERS, self.answer)

    def check(self, rows: Sequence[tuple[str, str]]) -> list[Checked]:
        """Why this task's rows (request, answer) may not be learned."""
        functions = [
            (name, None if own.is_own(name) else self.checks[name])
            for name in self.options["checks"]
        ]
        loaded = {name: own.load(name) for name, built_in in functions if built_in is None}
        found = []
        for request, answer in rows:
            reasons = (
                built_in(answer) if built_in else own.judge(name, loaded[name], request, answer)
                for name, built_in in functions
            )
            found.append(Checked(next((reason for reason in reasons if reason), None)))
        return found

    def request_key(self, text: str) -> str:
        """What is left of a request when the way it is written doesn't count."""
        return keys.request_key(text)

    def answer_key(self, text: str) -> str:
        """The same of an answer."""
        return keys.request_key(text)

    def holds_together(self, answer: str) -> bool:
        """Whether rows with this answer ask for the same, and so belong into one split.

        "Yes" answers many questions, so answers in words do not.
        """
        return False

    def screen(self, answers: Sequence[str]) -> list[Screened]:
        """A verdict on each answer, where the task has a screen."""
        return [Screened("ok")] * len(answers)

    # --- scores ------------------------------------------------------------------------------------

    def plain(self, answer: str) -> str:
        """The answer without what a model puts around it."""
        return answer

    def score(
        self, answers: Sequence[str], pairs: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Any]]:
        """The metrics of each answer; ``pairs`` have ``request`` and ``command``, the expected answer."""
        asked = self.options["metrics"]
        functions = {name: own.load(name) for name in asked if own.is_own(name)}
        normal = self._normalizer() if "normalized" in asked else None
        rows = []
        for said, pair in zip(answers, pairs, strict=True):
            answer, expected = self.plain(said), pair["command"]
            row: dict[str, Any] = {"exact": said.strip() == expected.strip()}
            if normal:
                row["normalized"] = normal(answer) == normal(expected)
            for name, function in functions.items():
                row[name.partition(":")[2]] = own.measure(name, function, answer, expected)
            rows.append(row)
        return rows

    def _normalizer(self) -> Callable[[str], str]:
        name = self.options["normalize"]
        return own.load(name) if own.is_own(name) else NORMALIZERS[name]

    def flags(self) -> tuple[str, ...]:
        """Metrics of which more is better, that base and tuned are compared on."""
        asked = self.options["metrics"]
        normalized = ("normalized",) if "normalized" in asked else ()
        own_names = tuple(name.partition(":")[2] for name in asked if own.is_own(name))
        return (*self.compared, *normalized, *own_names)

    def harms(self, row: Mapping[str, Any]) -> dict[str, bool]:
        """Whether a scored answer does what nobody asked for, by the metric's name; without what can not apply."""
        return {}

    def summarize(
        self, rows: Sequence[Mapping[str, Any]], share: Callable[[list[bool]], Any]
    ) -> dict[str, Any]:
        """The figures of many answers: shares with Wilson intervals, means of numbers.

        ``share`` is :func:`scripts.common.statistics.share`. It is not imported here, so that an edit of the statistics
        does not prepare the data again.
        """
        found: dict[str, Any] = {"n": len(rows), **loss_of(rows)}
        if "chrf" in self.options["metrics"]:
            found["chrf"] = chrf(
                [self.plain(row["answer"]) for row in rows], [row["command"] for row in rows]
            )
        for name in self.flags():
            values = [row[name] for row in rows]
            whole = all(isinstance(value, bool) for value in values)
            found[name] = share(values) if whole else sum(values) / len(values)
        return found

    # --- advice ------------------------------------------------------------------------------------

    def advice(self, answer: str) -> Advice:
        """What a person should know of an answer before using it; a task without a screen knows little."""
        return Advice("unknown", "not checked", self.words()["read_first"])

    # --- words -------------------------------------------------------------------------------------

    def labels(self) -> dict[str, tuple[str, bool | None]]:
        """Each metric's name in documents, in their order, and whether more of it is better (None: neither)."""
        normalized = f"Same answer, normalized ({self.options.get('normalize', 'words')})"
        names = (name.partition(":")[2] for name in self.options["metrics"] if own.is_own(name))
        return {
            "loss": ("Loss on the expected answers (nats per token)", False),
            "exact": ("Exact match", True),
            "normalized": (normalized, True),
            **{name: (name.replace("_", " ").capitalize(), True) for name in names},
            "chrf": ("chrF", True),
            "refused_harmful": ("Refused, of requests for harm", True),
            "refused_harmless": ("Refused, though harmless", False),
        }

    def headline(self) -> tuple[str, ...]:
        """The metrics that the card shows; its details have all."""
        return ("loss", *self.flags())

    def check_title(self) -> str:
        """What documents call the stage of the task's checks."""
        return "Check the answers"

    def words(self) -> dict[str, Any]:
        """What documents call the task and its answers; ``task.words`` in the configuration may say other words."""
        return {
            "about": "text",
            "adapter_summary": "A request goes in, an answer comes out: to be checked by a person.",
            "answer": self.answer,
            "answers": "answers",
            "before_use": "check it before you rely on it",
            "dataset": "requests and answers",
            "fine_tuned_for": "a task of its own",
            "held_together": False,  # rows with the same answer, in one split
            "only_where": "Use it only where a person checks each answer.",
            "learns": "learns its task",
            "out_of_scope": "requests of other kinds than those of the training data",
            "pairs": "requests and answers",
            "read_first": "Check each answer before you rely on it.",
            "same": "say the same",
            "summary": "A request goes in, an answer comes out.",
            "tags": [],
            "task_name": "Answer to a request",
            "use": "answer requests like those of the training data",
            "in_a_tool": "check the answer before anything is done with it",
            "answers_a_request": "to answer requests of one kind",
            "dropped": "Duplicates and rows that the task's checks don't accept were taken out.",
            "counts_as_right": "An answer counts as right if it is the expected text, spaces at its ends aside. Answers"
            " that say the same in other words count as wrong.",
        }


def loss_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean loss of an answer token in nats, where a model was asked."""
    tokens = sum(row.get("answer_tokens", 0) for row in rows)
    return (
        {"loss": sum(row["loss_sum"] for row in rows) / tokens, "loss_tokens": tokens}
        if tokens
        else {}
    )


def chrf(answers: Sequence[str], expected: Sequence[str]) -> float:
    """chrF of a corpus, 0 to 100."""
    from sacrebleu.metrics import CHRF

    return CHRF().corpus_score(list(answers), [list(expected)]).score
