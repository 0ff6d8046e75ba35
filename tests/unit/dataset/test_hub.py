"""The Hub source against a small server of its protocol: what works, and each way it can fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.dataset.hub_server import CONFIGS, REPOSITORY, HubServer

ROOT = Path(__file__).resolve().parents[3]
SECRET = "hf_VerySecretToken123"
# What the rule's script does, as a process of its own: the libraries read their settings when they are imported.
# Only the waits between the libraries' attempts are shortened.
RUN = """
import json, sys, time, types
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.05))
from scripts.common.job import job
from scripts.dataset.acquire import main
from scripts.tasks.support import registry
folder, sources = sys.argv[1], json.loads(sys.argv[2])
outputs = types.SimpleNamespace(pairs=f"{folder}/raw.jsonl", external=f"{folder}/external.jsonl",
    benchmark=f"{folder}/benchmark.jsonl",
    rejected=f"{folder}/raw.rejected.jsonl", report=f"{folder}/acquire.json")
with job(types.SimpleNamespace(rule="acquire_dataset", log=[f"{folder}/acquire.log"])):
    main(registry.task({"name": "shell", "harm": True}, "sources"), sources, [], outputs)
"""


def json_lines(rows: int, first: str = "nl", second: str = "bash") -> bytes:
    lines = (
        json.dumps({first: f"list the files in d{number}", second: f"ls d{number}"})
        for number in range(rows)
    )
    return "\n".join(lines).encode() + b"\n"


FILES = {
    "README.md": CONFIGS.encode(),
    "train/a.jsonl": json_lines(3000),
    "test/b.jsonl": json_lines(7),
}


def source(**changes: object) -> dict:
    columns = {"request": "nl", "command": "bash"}
    return {
        "type": "hub",
        "license": "mit",
        "repository": REPOSITORY,
        "config": "train",
        "split": "train",
        "columns": columns,
        **changes,
    }


def acquire(
    folder: Path, endpoint: str, seconds: int = 60, **changes: object
) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(folder / "hub-cache"),
        "HF_HUB_OFFLINE": "0",  # other tests, and users, may have switched the Hub off
        "HF_TOKEN": SECRET,
        "HF_HUB_ETAG_TIMEOUT": str(seconds),
        "HF_HUB_DOWNLOAD_TIMEOUT": str(seconds),
        "PYTHONPATH": str(ROOT),
        "USE_TORCH": "0",  # as in the environment that the rule runs in; `datasets` would import it where it is
    }
    command = [sys.executable, "-c", RUN, str(folder / "out"), json.dumps([source(**changes)])]
    return subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=600
    )


def written(folder: Path) -> set[str]:
    return {path.name for path in (folder / "out").iterdir()} - {"acquire.log"}


def test_reads_a_config_and_records_the_commit(tmp_path):
    with HubServer(FILES) as server:
        done = acquire(tmp_path, server.endpoint)
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "out/raw.jsonl").read_text().splitlines()
    assert len(rows) == 3000
    assert json.loads(rows[-1]) == {
        "command": "ls d2999",
        "line": 3000,
        "request": "list the files in d2999",
        "source": f"{REPOSITORY}/train/train",
    }
    report = json.loads((tmp_path / "out/acquire.json").read_text())
    assert report["sources"][0]["commit"] == "a" * 40
    assert report["licenses"] == ["mit"]
    assert json.loads((tmp_path / "out/revisions.json").read_text()) == {
        f"{REPOSITORY}@main": "a" * 40
    }
    # The token went to the server, and nowhere else.
    assert server.authorizations == {f"Bearer {SECRET}"}
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
    assert SECRET not in done.stdout + done.stderr


@pytest.mark.thorough
def test_a_moved_revision_stops_unless_accepted_or_pinned(tmp_path):
    with HubServer(FILES) as server:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/revisions.json").write_text(
            json.dumps({f"{REPOSITORY}@main": "a" * 40})
        )  # an earlier run's
        server.commit = "b" * 40
        done = acquire(tmp_path, server.endpoint, config="test")
        assert done.returncode == 1
        assert "has moved" in done.stderr
        assert f"revision: {'a' * 40}" in done.stderr
        accepted = acquire(tmp_path, server.endpoint, config="test", accept_new_revision=True)
        assert accepted.returncode == 0, accepted.stderr
    assert (
        json.loads((tmp_path / "out/acquire.json").read_text())["sources"][0]["commit"] == "b" * 40
    )


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("unauthorized", "who you are (401)"),
        ("gated", "accepted the dataset's terms"),
        ("missing", "no such dataset, or it is private"),
        ("slow", "does not answer in time"),
        ("breaks", "broke off"),
    ],
)
def test_a_failing_hub_is_explained_and_a_rerun_completes(tmp_path, mode, expected):
    with HubServer(FILES, mode) as server:
        done = acquire(tmp_path, server.endpoint, 1 if mode == "slow" else 60)
        assert done.returncode == 1
        assert expected in done.stderr
        assert "Traceback" not in done.stderr
        assert SECRET not in done.stderr
        assert written(tmp_path) == set()
        if mode not in ("slow", "breaks"):  # the others fail at the same place
            return
        server.mode = "ok"
        done = acquire(tmp_path, server.endpoint)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "out/raw.jsonl").read_text().splitlines()) == 3000


@pytest.mark.thorough
def test_an_unreachable_hub(tmp_path):
    done = acquire(tmp_path, "http://127.0.0.1:9")
    assert done.returncode == 1
    assert "The Hub can't be reached" in done.stderr
    assert written(tmp_path) == set()


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"config": "nothing"}, "'train'"),
        ({"split": "nothing"}, "train"),
        ({"columns": {"request": "question", "command": "bash"}}, "['nl', 'bash']"),
    ],
)
def test_wrong_names_show_those_that_exist(tmp_path, changes, expected):
    with HubServer(FILES) as server:
        done = acquire(tmp_path, server.endpoint, **changes)
    assert done.returncode == 1
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert written(tmp_path) == set()
