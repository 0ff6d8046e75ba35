"""The task ``sql``: a question, and a query for it.

sqlglot parses what is to be learned and what models answer. With ``task.database``, a script that makes tables and
fills them, queries are run on it too: on SQLite in memory, reading alone, with limits on steps, rows and sizes.
"""

import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from dryfit.common.errors import UserError
from scripts.common.answers import strip_fence
from scripts.tasks import text

MOST_STEPS, MOST_ROWS, MOST_BYTES = (
    20_000_000,
    10_000,
    10_000_000,
)  # of one query: SQLite's instructions, rows, a value
STEPS_AT_ONCE = 100_000  # SQLite's instructions between two looks at the sum
READS = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE}
INSTALL = "pip install sqlglot==30.30.0"  # as pyproject.toml pins it


def statement(query: str, dialect: str) -> Any:
    """The one statement of a text as sqlglot's tree. A text without one raises ``ValueError`` with the reason."""
    try:
        import sqlglot
        from sqlglot import exp
    except ModuleNotFoundError:
        raise UserError(
            "The task sql needs sqlglot, which is not installed.",
            where="task: sql in the configuration",
            allowed="the version that pyproject.toml pins",
            write=INSTALL,
        ) from None
    try:
        found = [one for one in sqlglot.parse(query, read=dialect) if one is not None]
    except sqlglot.errors.SqlglotError as error:
        raise ValueError(str(error).split("\n")[0]) from None
    if len(found) != 1:
        raise ValueError(f"{len(found)} statements")
    if not isinstance(
        found[0], exp.Query | exp.DDL | exp.DML | exp.Update | exp.Delete | exp.Drop | exp.Alter
    ):
        raise ValueError("it is no statement")
    return found[0]


@contextmanager
def database(script: str) -> Iterator[sqlite3.Connection]:
    """The tables of a script, in memory, which can only be read from then on."""
    with closing(sqlite3.connect(":memory:")) as made:
        made.executescript(script)
        made.commit()
        made.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MOST_BYTES)

        def allow(action: int, first: str | None, second: str | None, *_: Any) -> int:
            called = action == sqlite3.SQLITE_FUNCTION and second != "load_extension"
            return sqlite3.SQLITE_OK if action in READS or called else sqlite3.SQLITE_DENY

        made.set_authorizer(allow)
        yield made


def run(tables: sqlite3.Connection, query: str) -> list[tuple]:
    """The rows of a query; a ``ValueError`` with the reason where it can't be run."""
    turns = iter(range(MOST_STEPS // STEPS_AT_ONCE))
    tables.set_progress_handler(lambda: next(turns, None) is None, STEPS_AT_ONCE)
    try:
        with closing(tables.execute(query)) as cursor:
            rows = cursor.fetchmany(MOST_ROWS + 1)
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as error:
        raise ValueError(str(error)) from None
    finally:
        tables.set_progress_handler(None, 0)
    if len(rows) > MOST_ROWS:
        raise ValueError(f"it returns more than {MOST_ROWS:,} rows")
    return rows


@cache
def _script(path: str) -> str:
    return Path(path).read_text(encoding="utf-8")


class Task(text.Task):
    """A question, and a query for it."""

    name = "sql"
    system = "Answer with one SQL query and nothing else."
    answer = "query"
    defaults: Mapping[str, Any] = {
        **text.Task.defaults,
        "checks": ["parses"],
        "metrics": ["canonical", "parses", "chrf"],
        "normalize": "space",
        "database": None,
        "dialect": "sqlite",
    }
    part_options: Mapping[str, tuple[str, ...]] = {
        **text.Task.part_options,
        "cleaning": ("checks", "database", "dialect"),
        "scores": ("metrics", "normalize", "database", "dialect"),
        "words": ("metrics", "normalize", "words", "database"),
    }
    checks: Mapping[str, Any] = {"parses": None, "runs": None}  # by check() below
    own_metrics = ("canonical", "parses", "same_rows", "normalized", "chrf")

    def check_options(self) -> None:
        super().check_options()
        needs = [
            name
            for key in ("checks", "metrics")
            for name in self.options[key]
            if name in ("runs", "same_rows")
        ]
        path = self.options["database"]
        if path is None and needs:
            raise UserError(
                f"{needs[0]} needs a database.",
                where="task in the configuration",
                allowed="a script that makes the tables and fills them",
                write="task:\n  database: data/schema.sql",
            )
        if path is not None:
            try:
                with database(_script(path)):
                    pass
            except (OSError, sqlite3.Error) as error:
                raise UserError(
                    f"The script of the database can't be run: {error}",
                    where="task.database in the configuration",
                    found=path,
                    allowed="statements that SQLite runs",
                ) from None
        statement("SELECT 1", self.options["dialect"])

    def files_of(self, part: str) -> list[Path]:
        path = self.options["database"]
        return [
            *super().files_of(part),
            *([Path(path)] if path and part in ("cleaning", "scores") else []),
        ]

    def check(self, rows: Sequence[tuple[str, str]]) -> list[text.Checked]:
        asked = self.options["checks"]
        others = text.Task(
            {**self.options, "checks": [one for one in asked if one not in self.checks]}
        )
        found = others.check(rows)

        def then(judge: Callable[[str], text.Checked]) -> list[text.Checked]:
            return [
                one if one.reason else judge(query)
                for one, (_, query) in zip(found, rows, strict=True)
            ]

        if "parses" in asked:
            found = then(self._parses)
        if self.options["database"]:
            with database(_script(self.options["database"])) as tables:
                found = then(lambda query: _runs(tables, query))
        return found

    def _parses(self, query: str) -> text.Checked:
        try:
            statement(query, self.options["dialect"])
        except ValueError as error:
            return text.Checked("query is not SQL", str(error))
        return text.Checked(None)

    def metrics(self) -> list[str]:
        """The metrics that are asked for: with a database what answers return, too."""
        asked = list(self.options["metrics"])
        return (
            ["same_rows", *asked]
            if self.options["database"] and "same_rows" not in asked
            else asked
        )

    def holds_together(self, answer: str) -> bool:
        return True  # one query answers one question, however it is put

    def plain(self, answer: str) -> str:
        return strip_fence(answer).removesuffix(";").strip()

    def score(
        self, answers: Sequence[str], pairs: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Any]]:
        asked, rows = self.metrics(), super().score(answers, pairs)
        for row, answer, pair in zip(rows, answers, pairs, strict=True):
            forms = [self._canonical(self.plain(one)) for one in (answer, pair["command"])]
            if "canonical" in asked:
                row["canonical"] = forms[0] is not None and forms[0] == forms[1]
            if "parses" in asked:
                row["parses"] = forms[0] is not None
        if "same_rows" in asked:
            with database(_script(self.options["database"])) as tables:
                for row, answer, pair in zip(rows, answers, pairs, strict=True):
                    row["same_rows"] = same_rows(
                        tables, self.plain(answer), self.plain(pair["command"])
                    )
        return rows

    def _canonical(self, query: str) -> str | None:
        try:
            found = statement(query, self.options["dialect"])
            return found.sql(self.options["dialect"], normalize=True, comments=False)
        except ValueError:
            return None

    def flags(self) -> tuple[str, ...]:
        built_in = tuple(
            name for name in ("same_rows", "canonical", "parses") if name in self.metrics()
        )
        first, *others = super().flags()
        return (first, *built_in, *others)

    def labels(self) -> dict[str, tuple[str, bool | None]]:
        loss_and_exact = dict(list(super().labels().items())[:2])
        return {
            **loss_and_exact,
            "same_rows": ("Returns the same rows", True),
            "canonical": ("Same query after sqlglot's normalization", True),
            "parses": ("Parses as SQL", True),
            **super().labels(),
        }

    def check_title(self) -> str:
        return "Check the queries (sqlglot)"

    def words(self) -> dict[str, Any]:
        return {
            **super().words(),
            "about": "SQL",
            "adapter_summary": "A question goes in, one SQL query comes out: to be read before it is run.",
            "answers": "queries",
            "answers_a_request": "to answer a question with one SQL query",
            "before_use": "read it before you run it",
            "dataset": "questions and SQL queries",
            "dropped": "Duplicates and what can't be parsed as SQL were taken out.",
            "fine_tuned_for": "SQL queries",
            "held_together": True,
            "in_a_tool": "show the query, and run it with rights to read alone",
            "learns": "learns SQL",
            "only_where": "Use it only where a person reads each query before it runs, or where it may only read.",
            "out_of_scope": "running queries unseen with rights to write, and tables that the training data lacks",
            "pairs": "questions and SQL queries",
            "read_first": "Read each query before you run it.",
            "counts_as_right": "An answer counts as right if it is the expected query, spaces at its ends aside. Other"
            " queries that return the same rows count as wrong.",
            "same": "return the same rows",
            "summary": "A question goes in, one SQL query comes out.",
            "tags": ["sql", "text-to-sql"],
            "task_name": "SQL query for a question",
            "use": "suggest a query that a person reads before it is run",
        }


def same_rows(tables: sqlite3.Connection, answer: str, expected: str) -> bool:
    """Whether two queries return the same rows, in the same order where the expected one asks for an order."""
    try:
        rows, wanted = run(tables, answer), run(tables, expected)
    except ValueError:
        return False
    ordered = "order by" in " ".join(expected.casefold().split())
    return rows == wanted if ordered else Counter(map(repr, rows)) == Counter(map(repr, wanted))


def _runs(tables: sqlite3.Connection, query: str) -> text.Checked:
    try:
        run(tables, query)
    except ValueError as error:
        return text.Checked("query does not run", str(error))
    return text.Checked(None)
