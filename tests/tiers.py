"""Which tests each target runs, and about how long it takes.

`make test` leaves out what is marked ``thorough``: a test whose behaviour a cheaper one reaches too, at another size,
in another tool or with processes of its own. `make test-rest`, and so `make test-all`, runs those. What is marked
``nightly`` differs from a test that they run in sizes, pairs or another model alone: `make test-night` runs it.

Of a test with many cases ``few(n)`` keeps n for `make test`, the same ones each time, and the others are thorough;
``few(n, m)`` keeps m others for `make test-rest`, and the rest is for the night. A file that is named runs whole.

    python -m tests.tiers test      what `make test` says before it begins
"""

import json
import random
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Written by `pytest --record-time`, for each tier when it runs whole.
TIMES = Path(__file__).with_name("tiers.json")
TIERS = {"not thorough": "test", "not nightly": "test-all"}  # what -m says


def mark(items: Iterable[Any]) -> None:
    """Mark the cases that `few` leaves out.

    Which ones are kept depends on the test's name and on its cases alone. A case that is skipped is thorough, and so is
    what the night runs.
    """
    families = defaultdict(list)
    for item in items:
        if item.get_closest_marker("nightly"):
            item.add_marker("thorough")
        elif item.get_closest_marker("few") and not item.get_closest_marker("thorough"):
            if any(mark.args[:1] == (True,) for mark in item.iter_markers("skipif")):
                item.add_marker("thorough")
            else:
                families[item.nodeid.partition("[")[0]].append(item)
    for name, cases in families.items():
        few, *more = cases[0].get_closest_marker("few").args
        draw = random.Random(name)
        kept = draw.sample(range(len(cases)), min(few, len(cases)))
        left = [number for number in range(len(cases)) if number not in kept]
        each_time = draw.sample(left, min(*more, len(left))) if more else left
        for number in left:
            cases[number].add_marker("thorough")
            if number not in each_time:
                cases[number].add_marker("nightly")


def selected(request: Any, argument: str) -> set[Any]:
    """The values of an argument in the cases of a fixture's module that run: what else it would prepare is not used."""
    cases = [
        item
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    ]
    return {item.callspec.params[argument] for item in cases if argument in item.callspec.params}


def expected(tier: str) -> str:
    """About how long a tier takes, as it was last recorded."""
    times = json.loads(TIMES.read_text(encoding="utf-8"))[tier]
    tests, seconds, core = (
        times[name] for name in ("tests", "seconds_of_two_cores", "core_seconds")
    )
    return f"{tests:,} tests, about {seconds / 60:.0f} minutes on two cores ({core / 60:.0f} core minutes)"


def record(tier: str, tests: int, seconds: float, core_seconds: float) -> None:
    """Keep how long a tier took on two cores."""
    times = json.loads(TIMES.read_text(encoding="utf-8")) if TIMES.exists() else {}
    times[tier] = {
        "core_seconds": round(core_seconds),
        "seconds_of_two_cores": round(seconds),
        "tests": tests,
    }
    TIMES.write_text(json.dumps(times, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    print(expected(sys.argv[1]), flush=True)
