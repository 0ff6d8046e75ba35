"""Files as sources: what is read, what rejects a row, what stops with file and line; and nothing half-written."""

import csv
import json
import os
import resource
import subprocess
import sys
import types
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dryfit.common.errors import UserError
from dryfit.common.files import read_report
from scripts.dataset import acquire
from scripts.dataset.sources import MAXIMUM_LINE_CHARACTERS, read_file
from scripts.runs import configuration
from scripts.tasks.shell.cleaning import defect
from tests.task_parts import shell

ROOT = Path(__file__).resolve().parents[3]
PAIRS = [
    ("list files in a", "ls a"),
    ("zeige größe", "du -sh ."),
    ('say "hi", twice', 'echo "hi, hi"'),
]
COLUMNS = {"request": "nl", "command": "bash"}


def run(folder: Path, *paths: Path, **changes: object) -> dict:
    outputs = types.SimpleNamespace(
        pairs=f"{folder}/out/raw.jsonl",
        external=f"{folder}/out/external.jsonl",
        benchmark=f"{folder}/out/benchmark.jsonl",
        rejected=f"{folder}/out/raw.rejected.jsonl",
        report=f"{folder}/out/acquire.json",
    )
    source = {
        "type": "files",
        "license": "unknown",
        "paths": [str(path) for path in paths],
        "columns": COLUMNS,
    }
    acquire.main(shell("sources"), [{**source, **changes}], [], outputs)
    return json.loads(Path(outputs.report).read_text())


def rows(folder: Path, name: str = "raw.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / "out" / name).read_text().splitlines()]


def json_lines(path: Path, pairs: list = PAIRS) -> Path:
    path.write_text("".join(json.dumps({"nl": nl, "bash": bash}) + "\n" for nl, bash in pairs))
    return path


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet", "data"])
def test_the_same_rows_from_each_format(tmp_path, ending):
    path = tmp_path / f"pairs.{ending}"
    changes = {}
    if ending == "csv":
        with path.open("w", newline="") as handle:
            csv.writer(handle).writerows(
                [("id", "nl", "bash"), *((str(n), *pair) for n, pair in enumerate(PAIRS))]
            )
    elif ending == "parquet":
        table = {
            "nl": [nl for nl, _ in PAIRS],
            "other": [1, 2, 3],
            "bash": [bash for _, bash in PAIRS],
        }
        pq.write_table(pa.table(table), path)
    elif ending == "json":
        path.write_text(json.dumps([{"nl": nl, "bash": bash} for nl, bash in PAIRS], indent=1))
    else:
        json_lines(path)
        changes = {"format": "jsonl"} if ending == "data" else {}
    report = run(tmp_path, path, **changes)
    assert [(row["request"], row["command"]) for row in rows(tmp_path)] == PAIRS
    assert [row["line"] for row in rows(tmp_path)] == ([2, 3, 4] if ending == "csv" else [1, 2, 3])
    assert report["rows"] == 3
    assert report["licenses"] == ["unknown"]
    assert report["sources"][0]["files"][0]["path"] == str(path)


def test_a_byte_order_mark_and_quoted_line_breaks(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_bytes(b'\xef\xbb\xbfnl,bash\r\n"a\nb","ls\n-l"\r\nc,ls\r\n')
    run(tmp_path, path)
    assert [(row["request"], row["command"], row["line"]) for row in rows(tmp_path)] == [
        ("a\nb", "ls\n-l", 2),
        ("c", "ls", 5),
    ]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b'{"nl": "a", "bash": "ls"}\n{"nl": "b", "bash"\n', "line 2"),
        ("a.jsonl", b'{"nl": "a", "bash": "ls"}\n\n[1]\n', "line 3"),
        ("a.jsonl", b"[" * 100_000 + b"\n", "nested too deeply"),
        ("a.jsonl", b'{"question": "a", "answer": "ls"}\n', "['question', 'answer']"),
        ("a.jsonl", b"", "no rows"),
        ("a.jsonl", b"\n\n", "no rows"),
        ("a.csv", b"", "no rows"),
        ("a.csv", b"nl,bash\n", "no rows"),
        ("a.csv", b"question,bash\na,ls\n", "['question', 'bash']"),
        ("a.csv", b'nl,bash\na,ls\n"never closed,ls\nb,ls\n', "line 3"),
        ("a.csv", b'nl,bash\n"' + b"x\n" * 800_000, "field larger than field limit"),
        ("a.csv", b"nl;bash\na;ls\n", "separated by commas"),
        ("a.csv", b"nl,bash,bash\na,ls,rm\n", "write:   nl,bash_1,bash_2"),
        (
            "a.csv",
            b"nl,bash,x,x\na,ls,1,2\n",
            "['x']",
        ),  # one that nobody reads: the header is wrong all the same
        ("a.csv", b"n\xe4l,bash\na,ls\n", "write:   columns: {request: n?l, command: bash}"),
        ("a.csv", b"nl\x00,bash\na,ls\n", "['nl\\x00', 'bash']"),
        ("a.csv", b"\x00\x00\x00\x00\na,ls\n", "no column 'nl'"),
        ("a.csv", b'"nl,bash\na,ls\nb,ls\n', "line 1"),
        ("a.csv", b"nl\n,bash\na,ls\n", "['nl']"),
        ("a.json", b'[{"nl": "a", "bash": "ls"},\n{"nl"]', "line 2"),
        ("a.json", b'{"nl": "a", "bash": "ls"}', "not a JSON object"),
        ("a.json", b"[1]", "not a JSON object"),
        ("a.json", b"[]", "no rows"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.json", '[{"nl": "größe", "bash": "ls"}]'.encode("latin-1"), "not UTF-8"),
        ("a.json", b'[{"question": "a"}]', "['question']"),
        ("a.parquet", b"no parquet", "Parquet"),
        ("a.txt", b"a\n", "format"),
        ("a.jsonl", '{"nl": "a", "bash": "ls"}\n'.encode("utf-16"), "UTF-16"),
        *(
            (
                "a.csv",
                "nl,bash\nliste größe,ls\n".encode(name),
                f"iconv -f {name[:6].upper()}{name[7:].upper()}",
            )
            for name in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be")
        ),
        ("a.jsonl", '{"nl": "größe", "bash": "ls"}\n'.encode("latin-1") * 3, "not UTF-8"),
    ],
)
def test_a_useless_file_stops_with_its_place_and_writes_nothing(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        run(tmp_path, path)
    assert expected in str(error.value)
    assert str(path) in str(error.value)
    assert not list((tmp_path / "out").glob("*"))
    # And a rerun with the file put right completes.
    run(tmp_path, json_lines(tmp_path / "right.jsonl"))
    assert len(rows(tmp_path)) == 3


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="does not exist") as error:
        run(tmp_path, tmp_path / "nothing.jsonl")
    assert "nothing.jsonl" in str(error.value)


def test_spoilt_rows_are_rejected_with_their_reason(tmp_path):
    path = tmp_path / "mixed.jsonl"
    lines = [
        b'{"nl": "good", "bash": "ls"}',
        '{"nl": "größe", "bash": "ls"}'.encode("latin-1"),
        b'{"nl": "an unused column", "bash": "ls", "x": "\xff"}',
        b'{"nl": "no command"}',
        b'{"nl": 7, "bash": "ls"}',
        b'{"nl": null, "bash": "ls"}',
        b'{"nl": "half \\ud800", "bash": "ls"}',
        b'{"nl": "two commands", "bash": "ls", "bash": "rm -rf /"}',
        '{"nl": "größe", "bash": "ls"}'.encode(),
    ]
    path.write_bytes(b"\n".join(lines))
    report = run(tmp_path, path)
    assert [row["line"] for row in rows(tmp_path)] == [1, 3, 9]
    rejected = {row["line"]: row["reason"] for row in rows(tmp_path, "raw.rejected.jsonl")}
    assert rejected == {
        2: "request is not UTF-8",
        4: "command is missing",
        5: "request is not text but int",
        6: "request is missing",
        7: "request has half a surrogate pair",
        8: "the key 'bash' stands there twice",
    }
    assert report["rows"] + report["rejected"] == len(lines)
    assert sum(report["reasons"].values()) == report["rejected"]


def test_spoilt_rows_of_a_csv(tmp_path):
    path = tmp_path / "mixed.csv"
    path.write_bytes(b'nl,bash\na,ls\nb\nc,ls,-l\n"d\n\xff\nd",ls\n\xff\xfe,ls\n\ne,pwd\n')
    run(tmp_path, path)
    assert [(row["request"], row["line"]) for row in rows(tmp_path)] == [("a", 2), ("e", 10)]
    assert {row["line"]: row["reason"] for row in rows(tmp_path, "raw.rejected.jsonl")} == {
        3: "row has 1 fields instead of 2",
        4: "row has 3 fields instead of 2",
        5: "request is not UTF-8",
        8: "request is not UTF-8",
    }


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json"])
def test_a_nul_or_control_character_is_left_to_cleaning(tmp_path, name):
    path = tmp_path / name
    row = b'{"nl": "nul \x00", "bash": "ls"}\n'
    path.write_bytes(
        {"a.csv": b"nl,bash\nnul \x00,ls\n", "a.jsonl": row, "a.json": b"[" + row + b"]"}[name]
    )
    run(tmp_path, path)
    (row,) = rows(tmp_path)
    assert defect(row["request"], row["command"]) == "request has a NUL byte"


def test_columns_without_a_name_are_nobodys(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"nl,bash,,\na,ls,,\n")  # as spreadsheets leave them behind
    run(tmp_path, path)
    assert [row["command"] for row in rows(tmp_path)] == ["ls"]


def test_rows_of_an_external_test_set_that_cannot_be_read_are_listed_too(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"nl": "a", "bash": "ls"}\n{"nl": "b", "bash": 7}\n')
    names = {name: f"{name}.jsonl" for name in ("pairs", "external", "benchmark", "rejected")} | {
        "report": "acquire.json"
    }
    outputs = types.SimpleNamespace(**{name: str(tmp_path / file) for name, file in names.items()})
    source = {"type": "files", "license": "MIT", "paths": [str(path)], "columns": COLUMNS}
    acquire.main(
        shell("sources"),
        [{"type": "embedded", "license": "MIT", "seed": 1, "pairs": 3}],
        [source],
        outputs,
    )
    (rejected,) = map(json.loads, Path(outputs.rejected).read_text().splitlines())
    assert (rejected["line"], rejected["reason"]) == (2, "command is not text but int")
    report = read_report(outputs.report, outputs.pairs, outputs.external, outputs.rejected)
    assert (report["rows"], report["rejected"], report["reasons"]) == (3, 0, {})
    assert (report["external"][0]["rows"], report["external"][0]["rejected"]) == (1, 1)


def test_a_parquet_file_with_two_columns_of_one_name(tmp_path):
    path = tmp_path / "a.parquet"
    columns = [pa.array([text]) for text in ("a", "ls", "rm -rf /")]
    pq.write_table(pa.table(columns, names=["nl", "bash", "bash"]), path)
    with pytest.raises(UserError, match="same name") as error:
        run(tmp_path, path)
    assert "bash_2" in str(error.value)


def test_values_of_a_parquet_file_that_are_no_text(tmp_path):
    path = tmp_path / "a.parquet"
    nl, bash = pa.array(["a", None, "c"]), pa.array([b"ls", b"\xff", None])
    pq.write_table(pa.table({"nl": nl, "bash": bash, "number": [1, None, 3]}), path)
    with pytest.raises(UserError, match=r"command is not text but bytes \(1\)"):
        run(tmp_path, path)
    with pytest.raises(UserError, match=r"command is not text but float"):
        run(tmp_path, path, columns={"request": "nl", "command": "number"})


# Why CSV and JSON lines have readers of their own: what the libraries make of one spoilt row among good ones.
SPOILT_CSV = b'nl,bash\na,ls\n\nb\n"c\nd",pwd\n'  # lines: 1 header, 2 row, 3 blank, 4 without a command, 5 and 6 row


def test_pandas_would_fill_up_a_short_row_and_lose_the_lines(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(SPOILT_CSV)
    table = pd.read_csv(path)
    assert table["bash"].isna().tolist() == [
        False,
        True,
        False,
    ]  # not told apart from an empty command
    assert table.index.tolist() == [0, 1, 2]  # rows, not lines
    run(tmp_path, path)
    assert [row["line"] for row in rows(tmp_path)] == [2, 5]
    assert [(row["line"], row["reason"]) for row in rows(tmp_path, "raw.rejected.jsonl")] == [
        (4, "row has 1 fields instead of 2")
    ]


def test_pandas_would_rename_a_column_and_stop_at_one_line(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"nl,bash,bash\na,ls,rm\n")
    assert list(pd.read_csv(path)) == ["nl", "bash", "bash.1"]
    for spoilt in (b"\xff,ls\n", b"a,ls,-l\n"):
        path.write_bytes(b"nl,bash\na,ls\n" + spoilt + b"b,pwd\n")
        with pytest.raises((UnicodeDecodeError, pd.errors.ParserError)):
            pd.read_csv(path)
        run(tmp_path, path)
        assert [row["line"] for row in rows(tmp_path)] == [2, 4]


@pytest.mark.thorough
def test_datasets_would_stop_at_one_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"nl": "a", "bash": "ls"}\n{"nl": "\xff", "bash": "ls"}\n{"nl": "b", "bash": "ls"}\n'
    )
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "USE_TORCH": "0",
        "HF_HOME": str(tmp_path / "cache"),
    }
    script = (
        "import datasets, sys\n"
        "for row in datasets.load_dataset('json', data_files=sys.argv[1], split='train', streaming=True):\n"
        "    print(row)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, path], env=environment, capture_output=True, text=True
    )
    assert done.returncode and "'b'" not in done.stdout  # neither the row nor what comes after it
    assert "utf-8" in done.stderr
    run(tmp_path, path)
    assert [row["line"] for row in rows(tmp_path)] == [1, 3]
    assert [(row["line"], row["reason"]) for row in rows(tmp_path, "raw.rejected.jsonl")] == [
        (2, "request is not UTF-8")
    ]


def test_everything_rejected_names_the_reason(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"nl": "a", "bash": null}\n' * 3)
    with pytest.raises(UserError, match=r"command is missing \(3\)"):
        run(tmp_path, path)
    assert not list((tmp_path / "out").glob("*"))


def test_a_line_of_100_megabytes_is_rejected_in_bounded_memory(tmp_path):
    path = tmp_path / "long.jsonl"
    with path.open("wb") as handle:
        handle.write(b'{"nl": "a", "bash": "ls a"}\n{"nl": "')
        for _ in range(100):
            handle.write(b"x" * 1_000_000)
        handle.write(b'", "bash": "ls"}\n{"nl": "b", "bash": "ls b"}\n')
    # A process of its own, for its peak memory. 64 MB above an idle one is far below the line's length.
    script = (
        "import resource, sys\nfrom pathlib import Path\nfrom scripts.dataset.sources import read_file\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for record in read_file(sys.argv[1], {'request': 'nl', 'command': 'bash'}, None):\n"
        "    print(record.line, record.reason)\n"
        "assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64_000\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, path], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    reason = f"line is longer than {MAXIMUM_LINE_CHARACTERS} characters"
    assert done.stdout.splitlines() == ["1 None", f"2 {reason}", "3 None"]
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss > 0


@pytest.mark.thorough
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    content=st.binary(max_size=300) | st.text(max_size=200).map(str.encode),
    ending=st.sampled_from(["jsonl", "csv"]),
)
def test_no_content_of_a_file_crashes_reading(tmp_path, content, ending):
    path = tmp_path / f"any.{ending}"
    path.write_bytes(content)
    try:
        for record in read_file(str(path), COLUMNS, None):
            json.dumps(record.fields, ensure_ascii=False).encode()
    except UserError:
        pass


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"type": "files"}, "needs paths"),
        ({"type": "hub", "columns": COLUMNS}, "needs repository"),
        ({"type": "embedded", "seed": 1}, "needs pairs"),
        ({"type": "files", "paths": ["a.csv"], "seed": 1}, "has no seed"),
        ({"type": "embedded", "seed": 1, "pairs": 5, "paths": ["a.csv"]}, "has no paths"),
    ],
)
@pytest.mark.parametrize("key", ["sources", "external_test"])
def test_a_source_has_what_its_type_needs_and_nothing_else(key, source, expected):
    config = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    config["dataset"][key] = [{"license": "MIT", **source}]
    with pytest.raises(UserError, match=expected) as error:
        configuration.check(config)
    assert f"dataset.{key}" in str(error.value)


READY_MADE = sorted(
    path
    for path in (ROOT / "config/datasets").glob("*.yaml")
    if not path.name.startswith("embedded.")
)


@pytest.mark.parametrize("path", READY_MADE, ids=lambda path: path.stem)
def test_ready_made_entries_are_valid(path):
    config = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    entry = yaml.safe_load(path.read_text())
    assert set(entry) == {"dataset", "run"}
    assert entry["run"] == {"name": path.stem}
    checked = configuration.check({**config, "dataset": {**config["dataset"], **entry["dataset"]}})
    assert checked["dataset"]["name"] == path.stem
    for source in checked["dataset"]["sources"] + checked["dataset"]["external_test"]:
        assert {"type", "license", "repository", "split", "revision", "columns"} <= set(source)
