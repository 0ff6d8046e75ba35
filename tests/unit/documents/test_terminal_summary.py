"""The lines at the end of a command."""

from dataclasses import asdict

import pytest

from dryfit.common.files import write_report
from scripts.common.resource_table import judged
from scripts.documents import terminal_summary

GPU = {"title": "NVIDIA GeForce RTX 4090"}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A finished run in the working directory; returns its files."""
    monkeypatch.chdir(tmp_path)
    run = "results/tiny-r4"

    def compared(peak, fits, measured=None):
        trace = {"peak_allocated_bytes": peak, "required_bytes": peak}
        differences = {"measurement_to_trace": {"bytes": 0, "share": 0.0}} if measured else {}
        gpu = GPU if fits is not None else None
        return {
            "differences": differences,
            "fits": fits,
            "gpu": gpu,
            "measurement": measured,
            "trace": trace,
        }

    content = {
        "results/memory/big/full-bf16/compare.json": compared(76 * 2**30, False),
        f"{run}/memory/qlora/compare.json": compared(7.1 * 2**30, True),
        f"{run}/memory/training/compare.json": compared(
            0.91 * 2**30,
            None,
            {"device": {"name": "x86_64", "type": "cpu"}, "peak_allocated_bytes": 0.8 * 2**30},
        ),
        f"{run}/memory/training/gate.json": {
            "fits": None,
            "overridden": False,
            "reason": "nothing to gate",
            "required_bytes": 0.99 * 2**30,
        },
        f"{run}/evaluation/comparison.json": {
            "right_flag": "equivalent",
            "base": {"exact": {"count": 0}, "loss": 3.01},
            "exact": {"verdict": "better"},
            "loss": {"verdict": "better"},
            "safety": {},
            "tests": {
                name: {
                    "base": {"equivalent": {"count": 0}},
                    "baselines": {
                        name: {"equivalent": {"count": 7}} for name in ("nearest_row", "few_shot")
                    },
                    "beats_baselines": beats,
                    "tuned": {
                        "equivalent": {"count": count, "n": n},
                        "exact": {"count": count - 1},
                    },
                }
                for name, count, n, beats in (
                    ("known", 26, 90, True),
                    ("new", 2, 60, False),
                    ("benchmark", 1, 80, False),
                )
            },
            "tuned": {"exact": {"count": 28}, "loss": 0.839},
        },
        f"{run}/evaluation/execution.json": {
            "base": {"count": 9, "n": 71},
            "compared": {"verdict": "worse"},
            "tuned": {"count": 5, "n": 71},
        },
        f"{run}/MODEL_CARD.md": {},
        "results/tiny-sweep/sweep.json": {
            "recommendation": {"run": None, "reason": "the intervals do not tell"}
        },
    }
    for path, value in content.items():
        write_report(path, value)
    return list(content)


def test_a_run_ends_with_what_a_person_wanted_to_know(files):
    assert terminal_summary.run_lines(
        "tiny-r4", files[:2], terminal_summary.reader(files), card=True
    ) == [
        "tiny-r4",
        "  full-bf16         76.00 GiB, does not fit NVIDIA GeForce RTX 4090",
        "  qlora             7.10 GiB, fits NVIDIA GeForce RTX 4090",
        "  this run's step   0.91 GiB on a GPU; measured 0.80 GiB (CPU), predicted for it to the byte",
        "  gate              0.99 GiB needed: nothing to gate",
        "  right, known      26 of 90 (25 of them exact), the base 0, few shot 7, nearest row 7: training"
        " beats both baselines",
        "  right, new        2 of 60 (1 of them exact), the base 0, few shot 7, nearest row 7: training"
        " does not demonstrably beat both baselines",
        "  right, benchmark  1 of 80 (0 of them exact), the base 0, few shot 7, nearest row 7: training"
        " does not demonstrably beat both baselines",
        "  loss              0.839, the base 3.010: better",
        "  right when run    5 of 71, the base 9: worse",
        "  card              results/tiny-r4/MODEL_CARD.md",
    ]
    assert terminal_summary.sweep_lines("results/tiny-sweep/sweep.json", files) == [
        "sweep: no run can be recommended: the intervals do not tell",
        "  results/tiny-sweep/SWEEP.md",
    ]


def harmed(base, tuned):
    """Counts of requests that asked only to read."""
    counts = {"base": {"count": base, "n": 226}, "tuned": {"count": tuned, "n": 226}}
    return counts | {"verdict": "more often" if tuned > base else "less often"}


@pytest.mark.parametrize(("tuned", "warned"), [(9, True), (1, False)])
def test_a_run_says_how_often_its_model_deletes_where_nobody_asked_for_it(tuned, warned):
    harms = {"deletes_unasked": {"own": harmed(4, 2), "strangers": harmed(2, tuned)}}
    lines = terminal_summary.safety_lines(harms)
    verdict = "more often" if warned else "less often"
    assert lines[-2:] == [
        "deletes unasked   2 of 226 requests to read, of its own test, the base 4: less often",
        f"deletes unasked   {tuned} of 226 requests to read, of strangers, the base 2: {verdict}",
    ]
    warning = "safety            it deletes more often than its base where nobody asked for it"
    assert (lines[0] == warning) is warned
    assert terminal_summary.safety_lines({}) == [], "a task without commands"


def test_a_run_shows_what_each_of_its_stages_was_to_take(files):
    path = "results/tiny-r4/memory/run.json"
    evaluated = judged(
        "evaluation", "GPU", 3 * 2**30, 2 * 2**30, "traced", change="evaluation: {batch_size: 8}"
    )
    written = judged("training", "disk", 30_723_277, 5 * 2**30, "computed")
    stages = [asdict(stage) for stage in (evaluated, written)]
    write_report(path, {"hours": {"line": "takes 2.0 hours"}, "stages": stages})
    lines = terminal_summary.run_lines("tiny-r4", [], terminal_summary.reader([*files, path]))
    assert "  hours             the run takes 2.0 hours" in lines
    begin = next(
        number for number, line in enumerate(lines) if line.split()[:2] == ["stage", "where"]
    )
    assert lines[begin : begin + 3] == [
        "    stage       where     needs       has  verdict",
        "    evaluation  GPU    3.00 GiB  2.00 GiB  does not fit  evaluation: {batch_size: 8}",
        "    training    disk   29.3 MiB  5.00 GiB  fits",
    ]


def test_what_the_command_did_not_ask_for_is_not_told(files):
    """An evaluation that lies there may be one of other settings."""
    read = terminal_summary.reader([path for path in files if "gate" in path])
    lines = terminal_summary.run_lines("tiny-r4", files[:2], read)
    assert lines == ["tiny-r4", "  gate              0.99 GiB needed: nothing to gate"]
    assert terminal_summary.run_lines("tiny-r4", files[:2], terminal_summary.reader([])) == []
    assert terminal_summary.sweep_lines(files[-1], []) == []
