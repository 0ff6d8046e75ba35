"""Rule ``summarize_sweep``: what each run of a sweep came to, which no other beats, and which one to take, if any.

Runs are told apart by differences over the same held-out requests, with intervals. Where the intervals reach over
zero the summary says so instead of naming a winner.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dryfit.common.errors import UserError
from dryfit.common.files import read_jsonl, read_report, sha256_file, write_report
from dryfit.common.terminal import log
from scripts.common.job import job
from scripts.common.requests import BENCHMARK
from scripts.common.statistics import paired_bootstrap_interval
from scripts.documents.terminal_summary import device_name

# What counts for "beaten": +1 where more is better. Time is left out: on one machine chance decides small differences.
ORDER = {"exact": 1, "loss": -1, "predicted_peak_bytes": -1, "adapter_bytes": -1}


def summarize(
    runs: Mapping[str, Mapping[str, Any]], varied: Mapping[str, Mapping[str, Any]], base: str
) -> dict[str, Any]:
    """Compare the runs of a sweep.

    Parameters
    ----------
    runs
        By name: ``answers`` (a row for each request, in one order), ``comparison`` with the base, ``training``, the
        training step's ``memory``, its ``gate``, and ``adapter_bytes``.
    varied
        By name: the settings in which the run differs, dotted, with their values.
    base
        Title of the first run's base model.

    Returns
    -------
    dict
        ``points``: a row for each run, in the order given. ``recommendation``: ``run`` (None when the intervals name
        none), ``reason``, ``cheapest`` (of those not shown to be worse than the best) and what it rests on.

    Raises
    ------
    UserError
        When two runs did not answer the same requests.
    """
    names = list(runs)
    asked = [row["request"] for row in runs[names[0]]["answers"]]
    for name in names:
        if [row["request"] for row in runs[name]["answers"]] != asked:
            raise UserError(
                f"{names[0]} and {name} did not answer the same requests.", where="sweep"
            )
    points = [outcome(name, runs[name], varied[name]) for name in names]
    best = min(points, key=lambda point: point["loss"]["mean"])
    for point in points:
        point["beaten_by"] = [other["run"] for other in points if _beats(other, point)]
        if point is not best:
            point["to_the_best"] = difference(
                runs[point["run"]]["answers"], runs[best["run"]]["answers"]
            )
    return {
        "base": base,
        "points": points,
        "recommendation": _recommend(points, best),
        "requests": len(asked),
        "varied": sorted({key for settings in varied.values() for key in settings}),
    }


def read_outcome(paths: Mapping[str, str | Path]) -> dict[str, Any]:
    """What the files of a run say that :func:`summarize` compares; each must be what its step wrote."""
    read_report(paths["metrics"], paths["answers"])
    return {
        "adapter_bytes": Path(paths["adapter"]).stat().st_size,
        "answers": [row for row in read_jsonl(paths["answers"]) if row["test"] != BENCHMARK],
        **{name: read_report(paths[name]) for name in ("comparison", "gate", "memory", "training")},
    }


def outcome(name: str, run: Mapping[str, Any], varied: Mapping[str, Any]) -> dict[str, Any]:
    """What a run came to: quality with 95 % intervals, memory in bytes, time in seconds."""
    tuned, training, memory = run["comparison"]["tuned"], run["training"], run["memory"]
    tokens = [row["answer_tokens"] for row in run["answers"]]
    low, high = paired_bootstrap_interval(
        [row["loss_sum"] / count for row, count in zip(run["answers"], tokens, strict=True)], tokens
    )
    measured = memory["measurement"]
    # A CPU runs other kernels than the GPU that the trace is about; the measurement is held against its own trace.
    there = (measured or {}).get("trace_on_the_same_device")
    return {
        "adapter_bytes": run["adapter_bytes"],
        "exact": tuned["exact"],
        "fits": run["gate"]["fits"],
        "loss": {"high_95": high, "low_95": low, "mean": tuned["loss"]},
        "measured_on": device_name(measured["device"]) if measured else None,
        "measured_peak_bytes": measured["peak_allocated_bytes"] if measured else None,
        "predicted_for_the_measured_bytes": there["peak_allocated_bytes"] if there else None,
        "predicted_peak_bytes": memory["trace"]["peak_allocated_bytes"],
        "predicted_required_bytes": memory["trace"]["required_bytes"],
        "run": name,
        "to_the_best": None,
        "tokens_per_second": training["times"]["tokens_per_second"],
        "train_wall_seconds": training["times"]["train_wall_seconds"],
        "trainable_parameters": training["trainable_parameters"],
        "varied": dict(varied),
        "verdict_to_the_base": {
            key: run["comparison"][key]["verdict"] for key in ("exact", "loss")
        },
    }


def _value(point: Mapping[str, Any], key: str) -> float:
    value = point[key]
    return value if not isinstance(value, Mapping) else value["share" if key == "exact" else "mean"]


def _beats(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether one run is at least as good in all that counts, and better in some of it."""
    gains = [sign * (_value(one, key) - _value(other, key)) for key, sign in ORDER.items()]
    return min(gains) >= 0 and max(gains) > 0


def difference(
    rows: Sequence[Mapping[str, Any]], best: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """A run against the best one over the same requests: loss (nats per token) and share of exact answers."""
    tokens = [row["answer_tokens"] for row in rows]
    loss = [
        (a["loss_sum"] - b["loss_sum"]) / count
        for a, b, count in zip(rows, best, tokens, strict=True)
    ]
    exact = [float(a["exact"]) - float(b["exact"]) for a, b in zip(rows, best, strict=True)]
    low, high = paired_bootstrap_interval(loss, tokens)
    low_exact, high_exact = paired_bootstrap_interval(exact)
    return {
        "exact": {
            "difference": sum(exact) / len(exact),
            "high_95": high_exact,
            "low_95": low_exact,
        },
        "loss": {
            "difference": sum(d * count for d, count in zip(loss, tokens, strict=True))
            / sum(tokens),
            "high_95": high,
            "low_95": low,
        },
        "worse": low > 0 or high_exact < 0,
    }


def _recommend(points: Sequence[Mapping[str, Any]], best: Mapping[str, Any]) -> dict[str, Any]:
    """The cheapest run that is not shown to be worse than the one with the lowest loss; none if that is every run."""
    possible = [point for point in points if point["fits"] is not False]
    alike = [point for point in possible if point is best or not point["to_the_best"]["worse"]]
    worse = [point["run"] for point in possible if point not in alike]
    cheapest = min(
        alike or points,
        key=lambda point: (
            point["predicted_peak_bytes"],
            point["adapter_bytes"],
            point["train_wall_seconds"],
        ),
    )
    if len(points) == 1:
        run, reason = None, "one run alone has nothing to be compared with"
    elif not alike:
        run, reason = None, "the best run does not fit its GPU, and every other run is worse"
    elif not worse:
        run, reason = None, "the intervals do not tell the runs apart"
    elif len(alike) == 1:
        run, reason = (
            best["run"],
            "every other run is worse, by more than the interval of the difference",
        )
    else:
        run, reason = (
            cheapest["run"],
            "it takes the least of those that the intervals do not tell from the best",
        )
    return {
        "alike": [point["run"] for point in alike],
        "best_loss": best["run"],
        "cheapest": cheapest["run"],
        "does_not_fit": [point["run"] for point in points if point["fits"] is False],
        "reason": reason,
        "run": run,
        "worse": worse,
    }


def main(
    inputs: Mapping[str, Sequence[str]],
    varied: Mapping[str, Mapping[str, Any]],
    base: str,
    output: str,
) -> None:
    """The rule's work: ``inputs`` has a path for each run by kind, ``base`` is the title of the first run's model."""
    runs, read = {}, {}
    for number, name in enumerate(varied):
        paths = {key: values[number] for key, values in inputs.items()}
        runs[name] = read_outcome(paths)
        read |= {path: {"sha256": sha256_file(path)} for path in paths.values()}
    summary = summarize(runs, varied, base)
    write_report(output, {**summary, "inputs": read})
    chosen = summary["recommendation"]
    log.info("recommended: %s (%s)", chosen["run"] or "none", chosen["reason"])


if __name__ == "__main__":
    with job(snakemake):
        main(
            dict(snakemake.input.items()),
            snakemake.params.runs,
            snakemake.params.base["title"],
            snakemake.output.summary,
        )
