"""Pairs out of a package that people wrote: what is taken, what is left out, and what happens without it."""

import io
import tarfile
from types import SimpleNamespace

import pytest

from dryfit.common.errors import UserError
from dryfit.common.files import read_jsonl, read_report, write_jsonl, write_report
from scripts.common import wheels
from scripts.dataset import acquire
from scripts.tasks.shell import examples
from tests.task_parts import shell

SORT = """\
# sort

sort the lines of `unsorted.txt`

    sort unsorted.txt


sort the lines ignoring case (see `eg tail`):

    sort -f case.txt


two commands at once

    sort a.txt
    sort b.txt


print the sizes

    $ du -sh .
    12K     .


fill this in

    sort <file>


# Basic Usage

Explained here:

    sort steps.txt
"""
PAIRS = [
    ("sort the lines of unsorted.txt", "sort unsorted.txt", 5),
    ("sort the lines ignoring case: case.txt", "sort -f case.txt", 10),
    ("print the sizes", "du -sh .", 21),
]


def archive(folder, place="eg-1/eg/examples/sort.md"):
    path = folder / "eg-1.tar.gz"
    with tarfile.open(path, "w:gz") as made:
        for name, text in ((place, SORT), ("eg-1/LICENSE.txt", "MIT")):
            about = tarfile.TarInfo(name)
            about.size = len(text.encode())
            made.addfile(about, io.BytesIO(text.encode()))
    return path


def test_what_an_example_is(tmp_path):
    rows, license = examples.read_archive(archive(tmp_path))
    assert [(row["request"], row["command"], row["line"]) for row in rows] == PAIRS
    assert {row["family"] for row in rows} == {"eg.sort"} and license == b"MIT"


def test_another_layout_is_explained(tmp_path):
    with pytest.raises(UserError, match="has no examples where they are looked for") as error:
        examples.read_archive(archive(tmp_path, "eg-1/docs/sort.md"))
    assert "requirement: eg==1.2.3" in str(error.value)


def outputs(folder, *names):
    return SimpleNamespace(**{name: str(folder / f"{name}.json") for name in names})


def fetch(folder):
    made = outputs(folder, "pairs", "license", "report")
    examples.main({"requirement": "eg==1.2.3", "sha256": "0" * 64}, made)
    return made


def pip_says(monkeypatch, words):
    run = SimpleNamespace(returncode=1, stderr=words)
    monkeypatch.setattr(wheels.subprocess, "run", lambda *_, **__: run)


def test_another_digest_stops_the_run(tmp_path, monkeypatch):
    pip_says(
        monkeypatch, "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE."
    )
    with pytest.raises(UserError, match="DO NOT MATCH THE HASHES") as error:
        fetch(tmp_path)
    assert not isinstance(error.value, wheels.Unreachable)
    assert "whose archive has the digest" in str(error.value)


def test_only_the_pages_of_the_most_used_programs_are_read(tmp_path):
    rows = [
        {
            "request": f"use {name}",
            "command": name,
            "family": f"eg.{name}",
            "line": 1,
            "source": f"eg/{name}.md",
        }
        for name in ("find", "grep", "tail", "keytool")
    ]
    found, report = str(tmp_path / "pairs.jsonl"), str(tmp_path / "examples.json")
    write_jsonl(found, rows)
    write_report(
        report,
        {"requirement": "eg==1.2.3", "archive_sha256": "0" * 64, "missing": None, "pairs": 4},
        found,
    )
    source = {
        "type": "examples",
        "license": "MIT",
        "requirement": "eg==1.2.3",
        "found": found,
        "report": report,
    }
    for programs, kept in (({}, 4), ({"programs": 30}, 3), ({"programs": 3}, 2)):
        made, (about,) = acquire.acquire(shell("sources"), [{**source, **programs}], {})
        assert len(made) == about["rows"] == kept and about.get("programs") == programs.get(
            "programs"
        )


def test_without_a_network_the_run_goes_on_and_its_report_says_so(tmp_path, monkeypatch):
    pip_says(
        monkeypatch,
        "Failed to establish a new connection\nERROR: No matching distribution found for eg==1.2.3",
    )
    made = fetch(tmp_path)
    assert list(read_jsonl(made.pairs)) == []
    assert "could not fetch eg==1.2.3" in read_report(made.report, made.pairs)["missing"]

    names = ("pairs", "external", "benchmark", "rejected", "report")
    written = SimpleNamespace(**{name: str(tmp_path / f"out-{name}.json") for name in names})
    sources = [
        {"type": "embedded", "license": "MIT", "seed": 1, "pairs": 5},
        {"type": "examples", "license": "MIT", "requirement": "eg==1.2.3", "sha256": "0" * 64},
    ]
    acquire.main(
        shell("sources"), sources, [], written, None, {"found": made.pairs, "report": made.report}
    )
    report = read_report(written.report, written.pairs)
    assert report["rows"] == 5
    assert (
        report["sources"][1]["rows"] == 0 and "could not fetch" in report["sources"][1]["missing"]
    )
