"""PyTorch's memory snapshots: read without running anything, and put beside the traced step.

No GPU made the snapshots here. They are written in the form that PyTorch documents, out of a traced step's own events.
"""

import os
import pickle
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from dryfit.ask.command import main
from dryfit.common.errors import UserError
from dryfit.common.text import size_text
from dryfit.scenario.scenario import Scenario
from dryfit.tracing.snapshot import compare_snapshot, of_record, read_snapshot
from dryfit.tracing.trace import step_record

SCENARIO = {"model": "smollm2-135m", "method": "lora", "sequence_length": 64}
PLANTED = 20


@pytest.fixture(scope="module")
def record() -> Any:
    return step_record(Scenario.from_mapping(SCENARIO), (8, 9))


def events_of(record: Any) -> tuple[list[dict[str, Any]], int]:
    """The record as PyTorch's events, and where its last step begins."""
    plain, begin = of_record(record)
    free, addresses, events = [], {}, []
    for identity, size, _ in plain:
        if identity > 0:
            addresses[identity] = free.pop() if free else 0x7F0000000000 + 2**21 * len(addresses)
        frames = [
            {
                "filename": "/site-packages/torch/nn/modules/linear.py",
                "line": 125,
                "name": "forward",
            },
            {"filename": "/home/me/train.py", "line": 40, "name": "step"},
        ]
        event = {
            "addr": addresses[abs(identity)],
            "size": size,
            "stream": 0,
            "frames": frames,
            "time_us": len(events),
        }
        if identity > 0:
            events.append(event | {"action": "alloc"})
        else:
            events += [event | {"action": "free_requested"}, event | {"action": "free_completed"}]
            free.append(addresses[-identity])
    frees = sum(identity < 0 for identity, _, _ in plain[:begin])
    return events, begin + frees


def dumped(path: Path, events: list[dict[str, Any]]) -> Path:
    noise = [{"action": "segment_alloc", "addr": 1, "size": 2**21, "stream": 0, "frames": []}]
    content = {"segments": [], "device_traces": [[], noise + events], "allocator_settings": {}}
    path.write_bytes(pickle.dumps(content))
    return path


@pytest.mark.thorough
def test_a_snapshot_of_the_step_is_the_same_to_its_last_event(record, tmp_path) -> None:
    found = compare_snapshot(record, dumped(tmp_path / "mem.pickle", events_of(record)[0]))
    assert found.trace is found.snapshot is None and found.agreeing == found.events > 5000
    assert (
        str(found)
        == f"All {found.events:,} events of the step are the same in the trace and in the snapshot."
    )


def planted(events: list[dict[str, Any]], at: int, kind: str) -> list[dict[str, Any]]:
    """Events with one difference at an allocation, or at the next one's end."""
    changed = [dict(event) for event in events]
    if kind == "larger":
        changed[at]["size"] += 512
        for event in changed[at + 1 :]:
            if event["addr"] == changed[at]["addr"]:
                if event["action"] == "alloc":
                    break
                event["size"] += 512
    elif kind == "one more":
        changed.insert(at, changed[at] | {"addr": 5, "size": 777 * 512})
    elif kind == "one less":
        gone = changed.pop(at)["addr"]
        for index in range(at, len(changed)):
            if changed[index]["addr"] == gone:
                if changed[index]["action"] == "alloc":
                    break
                changed[index]["action"] = "nothing"
    else:  # an end comes later
        end = next(
            index
            for index in range(at, len(changed))
            if changed[index]["action"] == "free_completed"
        )
        later = next(
            index for index in range(end + 1, len(changed)) if changed[index]["action"] == "alloc"
        )
        event = changed.pop(end)
        changed.insert(later, event)
    return changed


@pytest.mark.few(2, 6)
@pytest.mark.parametrize("seed", range(PLANTED))
def test_a_planted_difference_is_the_first_that_is_found(record, tmp_path, seed: int) -> None:
    events, begin = events_of(record)
    draw = random.Random(seed)
    kind = ("larger", "one more", "one less", "freed later")[seed % 4]
    allocations = [
        index for index in range(begin, len(events)) if events[index]["action"] == "alloc"
    ]
    at = draw.choice(allocations[:-1])
    if (
        kind == "one less"
    ):  # among equal neighbours the next one takes its place, so its own size has to be another
        at = draw.choice(
            [
                one
                for one, other in pairwise(allocations)
                if events[one]["size"] != events[other]["size"]
            ]
        )
    found = compare_snapshot(record, dumped(tmp_path / "mem.pickle", planted(events, at, kind)))
    counted = [
        event for event in events[begin:at] if event["action"] in ("alloc", "free_completed")
    ]
    assert found.snapshot is not None or found.trace is not None
    if kind == "freed later":
        assert found.agreeing >= len(counted) and found.trace.freed
    else:
        assert found.agreeing == len(counted)
    if kind == "larger":
        assert found.snapshot.size == found.trace.size + 512 and "/home/me/train.py:40 step" in str(
            found
        )
    if kind == "one more":
        assert found.snapshot.size == 777 * 512


@pytest.mark.thorough
def test_the_command_names_the_first_difference(record, tmp_path, capsys) -> None:
    events, begin = events_of(record)
    at = next(
        index for index in range(begin + 500, len(events)) if events[index]["action"] == "alloc"
    )
    path = dumped(tmp_path / "mem.pickle", planted(events, at, "one more"))
    asked = tmp_path / "scenario.yaml"  # of a model's name alone, the step would be TRL's
    asked.write_text(yaml.safe_dump(SCENARIO))
    words = ["compare", str(asked), "--gpu", "rtx-4090", "--measured", str(path)]
    assert main(words) == 1
    out = capsys.readouterr().out
    assert "events are the same. Then the trace allocates" in out
    assert f"; the snapshot allocates {size_text(777 * 512)} (/home/me/train.py:40 step)" in out
    path = dumped(tmp_path / "same.pickle", events)
    assert main([*words[:-1], str(path)]) == 0


class Foreign:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("made-by-a-pickle",)


def test_nothing_of_a_foreign_pickle_runs(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for content in (
        Foreign(),
        {"device_traces": [[Foreign()]]},
        {"device_traces": [[{"action": os.getcwd}]]},
    ):
        Path("mem.pickle").write_bytes(pickle.dumps(content))
        with pytest.raises(UserError, match="holds more than plain values"):
            read_snapshot(Path("mem.pickle"))
    assert not Path("made-by-a-pickle").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is no snapshot"),
        (b"\x00\x01\x02text", "plain values|is no snapshot"),
        (
            pickle.dumps({"device_traces": [[{"action": "alloc"}]]})[:-9],
            "is no snapshot|plain values",
        ),
        (pickle.dumps([1, 2]), "has no `device_traces`"),
        (pickle.dumps({"device_traces": [[], []]}), "no history of events"),
        (pickle.dumps({"device_traces": [["alloc"]]}), "none that PyTorch writes"),
        (
            pickle.dumps({"device_traces": [[{"action": "alloc", "addr": "x", "size": 1}]]}),
            "none that PyTorch writes",
        ),
    ],
)
def test_what_is_no_snapshot_is_refused(tmp_path, content: bytes, said: str) -> None:
    path = tmp_path / "mem.pickle"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_snapshot(path)
    with pytest.raises(UserError, match="isn't there"):
        read_snapshot(tmp_path / "none")


def test_a_snapshot_of_something_else_is_refused(record, tmp_path) -> None:
    events = [
        {"action": "alloc", "addr": number, "size": 12345 + number, "frames": []}
        for number in range(100)
    ]
    with pytest.raises(UserError, match="Nothing in the snapshot is like the traced step"):
        compare_snapshot(record, dumped(tmp_path / "mem.pickle", events))
