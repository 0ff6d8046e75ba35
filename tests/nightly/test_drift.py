"""A published row of each source, traced with the versions that were measured, and three timed rows: `make test-drift`.

Nothing else traces the A100's rows again, for their versions are others than the project's. They did not run for a
while, and nobody saw it. Each row takes from some seconds to a minute.
"""

import re

import pytest

from dryfit.common.files import read_json
from dryfit.hours.step_time import simulate
from tests.repository import ROOT
from validation import environments, measurements, timed_rows, times
from validation.rows import SOURCES, read

# The quickest rows that show what is particular about their source.
ROWS = {
    "t4": "t4-sweep-10",
    "t4-final": "t4-final-06",
    "t4-notebook": "t4-notebook-08",
    "a100": "a100-013",
    "granite": "granite-016",
    "liger": "liger-000",
    "fsdp": "fsdp-mistral-057",
    "fsdp-granite": "fsdp-granite-009",
    "fsdp-liger": "fsdp-liger-128",
    "torchtitan": "torchtitan-8",
    "peft": "peft-vera-default",
    "unread-peft": "unread-peft-c3a-default",
    "canifinetune": "canifinetune-00",
    "unread-fp16": "unread-fp16-0",
    "unread-llama-2-70b": "unread-fsdp-mistral-065",
    "unread-llama-3-8b": "unread-fsdp-liger-032",
}
TIMED = (
    "time-mistral-main-011",
    "time-peft-vera-default",
    "time-t4-sweep-19",
)  # one A100, an L40S, a T4
KEPT = {row["id"]: row for row in read_json(measurements.REPORT)["rows"]}
KEPT_TIMES = {row["id"]: row for row in read_json(times.REPORT)["rows"]}
NEAR = 0.0002  # of the kept prediction: the newest torch that the pins allow may differ by a few blocks
NEAR_SECONDS = 0.005
LIBRARIES = ("transformers", "peft", "bitsandbytes")


def skip_elsewhere(environment: str) -> None:
    """Skip where other versions are installed than those of a file in envs/."""
    text = (ROOT / "envs" / environment).read_text(encoding="utf-8")
    pinned = dict(re.findall(rf"- ({'|'.join(LIBRARIES)})==(\S+)", text))
    if environments.installed(*LIBRARIES) != pinned:
        pytest.skip(f"needs the versions of envs/{environment}: make test-drift")


@pytest.mark.parametrize("source", ROWS)
def test_a_row_comes_out_as_it_is_published(source: str) -> None:
    skip_elsewhere(SOURCES[source].environment)
    (row,) = (row for row in read(source) if row.id == ROWS[source])
    (found,) = measurements.validate([row])
    kept = KEPT[row.id]
    assert found["error_percent"].keys() == kept["error_percent"].keys()
    for stage in found["error_percent"]:
        assert found["predicted_bytes"][stage] == pytest.approx(
            kept["predicted_bytes"][stage], rel=NEAR
        )


@pytest.mark.parametrize("identity", TIMED)
def test_a_timed_row_comes_out_as_it_is_published(identity: str) -> None:
    skip_elsewhere("torch.yaml")
    (row,) = (row for row in timed_rows.read() if row.id == identity)
    seconds, _ = simulate(timed_rows.costs_of(row), times.speed_of_row(row))
    found = times.compare(row, seconds + row.seconds_beside_the_step)
    assert found["predicted_seconds"] == pytest.approx(
        KEPT_TIMES[identity]["predicted_seconds"], rel=NEAR_SECONDS
    )
