"""What a sweep comes to: beaten runs, recommendations that the intervals allow, and the documents of both kinds."""

import pytest

from dryfit.common.errors import UserError
from dryfit.common.files import read_report, write_report
from scripts.common.code_digests import ROOT
from scripts.common.statistics import wilson_interval
from scripts.sweep import draw, render
from scripts.sweep.summarize import summarize


def run(losses, peak, size=1000, *, right=0, fits=None):
    """A run whose answers lose ``losses`` nats a token, the first ``right`` of them exact."""
    answers = [
        {
            "exact": number < right,
            "answer_tokens": 2,
            "loss_sum": 2 * loss,
            "request": f"request {number}",
        }
        for number, loss in enumerate(losses)
    ]
    low, high = wilson_interval(right, len(losses))
    share = {
        "count": right,
        "high_95": high,
        "low_95": low,
        "n": len(losses),
        "share": right / len(losses),
    }
    return {
        "adapter_bytes": size,
        "answers": answers,
        "comparison": {
            "exact": {"verdict": "better"},
            "loss": {"verdict": "better"},
            "tuned": {"exact": share, "loss": sum(losses) / len(losses)},
        },
        "gate": {"fits": fits},
        "memory": {
            "measurement": {
                "device": {"name": "x86_64", "type": "cpu"},
                "peak_allocated_bytes": peak - 5,
                "trace_on_the_same_device": {"peak_allocated_bytes": peak - 5},
            },
            "trace": {"peak_allocated_bytes": peak, "required_bytes": peak + 10},
        },
        "training": {
            "times": {"tokens_per_second": 100.0, "train_wall_seconds": 9.0},
            "trainable_parameters": size // 4,
        },
    }


def spread(mean, wide=0.0, n=40):
    """Losses around a mean, alternating by ``wide``."""
    return [mean + (wide if number % 2 else -wide) for number in range(n)]


def swept(**runs):
    """The summary of runs that differ in rank: ``r4=run(...)``."""
    return summarize(runs, {name: {"lora.rank": int(name[1:])} for name in runs}, "A <b>base</b>")


def test_which_run_is_recommended():
    noisy = [1.0 + (0.5 if number % 2 else -0.501) for number in range(40)]
    summary = swept(r4=run(spread(3.0), 100), r8=run(spread(1.0), 200), r16=run(noisy, 300))
    chosen = summary["recommendation"]
    assert (
        chosen["best_loss"] == "r16"
        and chosen["alike"] == ["r8", "r16"]
        and chosen["worse"] == ["r4"]
    )
    assert chosen["run"] == "r8" and "takes the least" in chosen["reason"]
    summary = swept(r4=run(spread(3.0), 100), r16=run(spread(1.0), 300))
    assert summary["recommendation"]["run"] == "r16"
    summary = swept(r4=run(spread(1.01, 0.9), 100), r16=run(spread(1.0, -0.9), 300))
    chosen = summary["recommendation"]
    assert (
        chosen["run"] is None and chosen["cheapest"] == "r4" and "do not tell" in chosen["reason"]
    )
    assert swept(r4=run(spread(1.0), 100))["recommendation"]["run"] is None
    summary = swept(
        r4=run(spread(3.0), 100), r8=run(spread(2.0), 200), r16=run(spread(1.0), 300, fits=False)
    )
    assert summary["recommendation"]["does_not_fit"] == ["r16"]
    assert (
        summary["recommendation"]["run"] is None
        and "does not fit" in summary["recommendation"]["reason"]
    )
    summary = swept(r4=run(spread(1.001), 100, right=0), r8=run(spread(1.0), 200, right=20))
    assert summary["points"][0]["to_the_best"]["worse"] and summary["recommendation"]["run"] == "r8"
    alike = [1.0 + (0.5 if number % 2 else -0.5) for number in range(40)]
    worse = run(spread(3.0), 10, 10)
    summary = swept(
        r1=worse, r4=run(alike, 200, 500), r8=run(alike, 100, 1000), r16=run(alike, 100, 2000)
    )
    assert summary["recommendation"]["cheapest"] == summary["recommendation"]["run"] == "r8"


def test_runs_are_beaten_or_not_compared():
    summary = swept(
        r4=run(spread(2.0), 100, right=5),
        r8=run(spread(1.0), 200, right=9),
        r16=run(spread(1.0), 300, right=9),
        r32=run(spread(1.0), 400, right=10),
    )
    assert {point["run"]: point["beaten_by"] for point in summary["points"]} == {
        "r4": [],
        "r8": [],
        "r16": ["r8"],
        "r32": [],
    }
    with pytest.raises(UserError, match="did not answer the same requests"):
        swept(r4=run(spread(1.0, n=4), 100), r8=run(spread(1.0, n=5), 100))


@pytest.mark.thorough
def test_the_documents_say_what_the_summary_says(tmp_path):
    summary = swept(r4=run(spread(3.0), 100, right=3), r8=run(spread(1.0), 200, right=9))
    source = tmp_path / "sweep.json"
    write_report(source, summary)
    paths = {
        name: str(tmp_path / "figures" / f"{name}.png") for name in draw.figures(summary["points"])
    }
    draw.main(str(source), paths)
    documents = ("SWEEP.md", "sweep.html")
    templates = [str(ROOT / "config" / "templates" / f"{name}.j2") for name in documents]
    outputs = [str(tmp_path / name) for name in (*documents, "documents.json")]
    render.main(templates, str(source), list(paths.values()), outputs)
    numbers = read_report(outputs[-1], *outputs[:-1])["documents"]
    assert all(entry["from"] for listed in numbers.values() for entry in listed)
    for output in documents:
        text = (tmp_path / output).read_text()
        assert "Take" in text and "r8" in text and "lora.rank" in text
        for figure in ("3.000", "1.000", "7.5 %", "22.5 %"):
            assert figure in text
        assert "<b>" not in text, "a model's title is data"


def test_the_axis_is_the_number_where_one_is_varied_and_a_place_for_each_run_otherwise():
    ranks = swept(r16=run(spread(1.0), 1), r4=run(spread(2.0), 1))["points"]
    assert draw.axis(ranks) == ([1.0, 0.0], ["16", "4"], "rank")
    for point, modules in zip(ranks, ("all-linear", ["q_proj", "v_proj"]), strict=True):
        point["varied"] = {"lora.target_modules": modules}
    assert draw.axis(ranks) == (
        [0.0, 1.0],
        ["target modules all-linear", "target modules q_proj, v_proj"],
        "",
    )
