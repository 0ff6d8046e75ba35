"""The task sql: queries parsed by sqlglot, and run on SQLite in memory."""

from pathlib import Path

import pytest

from dryfit.common.errors import UserError
from scripts.tasks import sql
from scripts.tasks.support import registry
from tests.repository import ROOT
from tests.task_parts import text

DATABASE = str(ROOT / "tests" / "data" / "sql" / "schema.sql")
COUNT = {"request": "How many orders?", "command": "SELECT COUNT(*) FROM orders"}


@pytest.fixture
def tables():
    with sql.database(Path(DATABASE).read_text(encoding="utf-8")) as made:
        yield made


def test_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sqlglot", None)
    with pytest.raises(UserError) as error:
        registry.checked("sql")
    assert "pip install sqlglot==" in str(error.value)


@pytest.mark.parametrize(
    ("query", "detail"),
    [
        ("SELECT name FROM customers WHERE city = 'Lyon'", None),
        ("WITH a AS (SELECT 1) SELECT * FROM a;", None),
        ("INSERT INTO t VALUES (1)", None),
        ("hello world", "it is no statement"),
        ("SELECT 1; SELECT 2", "2 statements"),
        ("SELECT FROM WHERE", "Expected table name"),
    ],
)
def test_what_is_a_query(query: str, detail: str | None) -> None:
    pytest.importorskip("sqlglot")
    (found,) = text("cleaning", "sql").check([("?", query)])
    assert found.reason == (None if detail is None else "query is not SQL")
    assert detail is None or detail in found.detail


def test_scores() -> None:
    pytest.importorskip("sqlglot")
    task = text("scores", "sql", database=DATABASE)
    answers = [
        "SELECT COUNT(*) FROM orders",
        "```sql\nselect count( * ) from Orders;\n```",
        "SELECT 30",
        "ls",
        "SELECT 3",
    ]
    rows = task.score(answers, [COUNT] * 5)
    assert [row["exact"] for row in rows] == [True, False, False, False, False]
    assert [row["canonical"] for row in rows] == [True, True, False, False, False]
    assert [row["parses"] for row in rows] == [True, True, True, False, True]
    assert [row["same_rows"] for row in rows] == [True, True, True, False, False]
    assert task.flags() == ("exact", "same_rows", "canonical", "parses")


def test_the_order_counts_where_it_is_asked_for(tables) -> None:
    names, backwards = (
        "SELECT name FROM customers ORDER BY name",
        "SELECT name FROM customers ORDER BY name DESC",
    )
    assert not sql.same_rows(tables, backwards, names)
    assert sql.same_rows(tables, backwards, "SELECT name FROM customers")


@pytest.mark.parametrize(
    "query",
    [
        "DROP TABLE orders",
        "DELETE FROM orders",
        "CREATE TABLE x (a)",
        "ATTACH DATABASE '/tmp/stolen.db' AS other",
        "PRAGMA writable_schema = 1",
        "SELECT load_extension('/tmp/x.so')",
        "VACUUM INTO '/tmp/copy.db'",
        "SELECT zeroblob(100000000)",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) FROM n",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n",
        "SELECT 1; SELECT 2",
    ],
)
def test_a_query_only_reads_and_ends(tables, query: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        sql.run(tables, query)
    assert sql.run(tables, "SELECT COUNT(*) FROM orders") == [(30,)]


def test_rows_that_do_not_run_are_not_learned() -> None:
    pytest.importorskip("sqlglot")
    task = text("cleaning", "sql", database=DATABASE)
    found = task.check([("?", "SELECT price FROM orders"), ("?", "SELECT amount FROM orders")])
    assert [one.reason for one in found] == ["query does not run", None]
    assert "no such column" in found[0].detail


def test_wrong_databases(tmp_path: Path) -> None:
    (tmp_path / "bad.sql").write_text("CREATE TABLE")
    for options, said in (
        ({"metrics": ["same_rows"]}, "needs a database"),
        ({"database": str(tmp_path / "bad.sql")}, "incomplete input"),
        ({"database": "nowhere.sql"}, "nowhere.sql"),
    ):
        with pytest.raises(UserError, match=said):
            registry.checked({"name": "sql", **options})
