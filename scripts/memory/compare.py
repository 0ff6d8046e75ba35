"""Rule ``compare_memory``: the answers for a scenario side by side, with differences and the verdict for its GPU."""

from collections.abc import Mapping
from typing import Any

from scripts.common.files import read_report, write_report
from scripts.common.job import job, log
from scripts.memory.analytic.rule_of_thumb import rule_of_thumb
from scripts.memory.gpus import named, verdict
from scripts.settings.scenario import Scenario

NOT_MEASURED = "not measured: the model is profiled by its configuration alone"
ANSWERS = ("rule_of_thumb", "analytic", "trace", "measurement")


def compare(
    estimate: Mapping[str, Any],
    traced: Mapping[str, Any],
    measurement: Mapping[str, Any] | None = None,
    where: object = "scenario",
) -> dict[str, Any]:
    """Put together what :func:`~scripts.memory.estimate.estimate` and :func:`~scripts.memory.trace_step.traced` say.

    Returns
    -------
    dict
        ``rule_of_thumb``, ``analytic``, ``trace``, ``measurement``: each with ``peak_allocated_bytes`` and
        ``components``, or None; ``reasons``: by name why an answer is None; ``differences``: for each pair ``a_to_b``
        the signed ``bytes`` (a - b) and ``share`` (a / b - 1); ``scenario``, ``versions``; the verdict for the GPU that
        the scenario names: ``gpu``, ``fits``, ``headroom_bytes`` (all None without a GPU) and ``suggestions``, what to
        change if it does not fit.
    """
    scenario = Scenario.from_mapping(traced["scenario"], {}, where)
    trace = traced["trace"]
    answers: dict[str, Any] = {
        "rule_of_thumb": estimate["rule_of_thumb"] or rule_of_thumb(scenario, trace["parameters"]),
        "analytic": estimate["analytic"],
        "trace": trace,
        "measurement": dict(measurement) if measurement else None,
    }
    reasons = {"analytic": estimate["reason"], "measurement": NOT_MEASURED}
    # A measurement on the CPU is compared with the trace of the same step on the CPU.
    own = (measurement or {}).get("trace_on_the_same_device")
    differences = {
        f"{name}_to_trace": difference(answer, own if own and name == "measurement" else trace)
        for name, answer in answers.items()
        if answer and name != "trace"
    }
    gpu = named(scenario.gpu, where)
    judged = verdict(trace["required_bytes"], gpu) if gpu else {"fits": None, "headroom_bytes": None}
    suggestions: list[dict[str, Any]] = []
    if judged["fits"] is False:
        from scripts.planner.search import suggest

        suggestions = suggest(scenario, gpu, trace)
    return {
        **answers,
        **judged,
        "differences": differences,
        "gpu": gpu.to_mapping() if gpu else None,
        "reasons": {name: reason for name, reason in reasons.items() if answers[name] is None},
        "scenario": traced["scenario"],
        "suggestions": suggestions,
        "versions": traced["versions"],
        "warnings": list(trace.get("warnings", [])),
    }


def difference(answer: Mapping[str, Any], to: Mapping[str, Any]) -> dict[str, float]:
    """Signed difference of two answers' peaks, in bytes and as a share of the second."""
    size, base = answer["peak_allocated_bytes"], to["peak_allocated_bytes"]
    return {"bytes": size - base, "share": round(size / base - 1, 6)}


def main(estimate: str, traced: str, measurement: str | None, output: str) -> None:
    measured = read_report(measurement) if measurement else {}
    measured.pop("sha256", None)
    compared = compare(read_report(estimate), read_report(traced), measured, "the configuration")
    write_report(output, compared)
    for name in ANSWERS:
        size = (compared[name] or {}).get("peak_allocated_bytes")
        log.info("%-14s %s", name.replace("_", " "), f"{size / 1e9:9.3f} GB" if size else compared["reasons"][name])


if __name__ == "__main__":
    with job(snakemake):
        main(
            snakemake.input.estimate,
            snakemake.input.trace,
            snakemake.input.get("measure"),
            snakemake.output.comparison,
        )
