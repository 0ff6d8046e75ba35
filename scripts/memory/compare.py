"""Set the answers of a scenario side by side, with differences:
rule of thumb, analytic estimate, trace, measurement."""

from collections.abc import Mapping
from typing import Any

from scripts.common.files import read_json, write_json
from scripts.common.job import job, log
from scripts.memory.gpus import find, verdict
from scripts.scenario.scenario import Scenario

NOT_MEASURED = "not measured: the model is profiled by its configuration alone"
ANSWERS = ("rule_of_thumb", "analytic", "trace", "measurement")


def compare(
    estimate: Mapping[str, Any], traced: Mapping[str, Any], measurement: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Put together what the rules before this one wrote.

    Returns
    -------
    dict
        ``rule_of_thumb``, ``analytic``, ``trace``, ``measurement``: each with ``peak_allocated_bytes`` and
        ``components``, or a ``reason`` why there is none; ``differences``: for each pair ``a_to_b`` the signed
        ``bytes`` (a - b) and ``share`` (a / b - 1); ``scenario``, ``versions``; the verdict for the scenario's card:
        ``gpu``, ``fits``, ``headroom_bytes``, ``suggestions``.
    """
    answers: dict[str, Any] = {
        "rule_of_thumb": estimate["rule_of_thumb"],
        "analytic": estimate["analytic"],
        "trace": traced["trace"],
        "measurement": dict(measurement) if measurement else {"peak_allocated_bytes": None, "reason": NOT_MEASURED},
    }
    # A measurement on the CPU is compared with the trace of the same step on the CPU.
    peaks = {name: (answers[name] or {}).get("peak_allocated_bytes") for name in ANSWERS}
    differences = {
        f"{name}_to_trace": difference(peaks[name], peaks["trace"])
        for name in ANSWERS
        if name != "trace" and peaks[name]
    }
    own = (measurement or {}).get("trace_on_the_same_device")
    if own and peaks["measurement"]:
        differences["measurement_to_trace"] = difference(peaks["measurement"], own["peak_allocated_bytes"])
    return {
        **answers,
        "differences": differences,
        "fits": None,
        "gpu": None,
        "headroom_bytes": None,
        "scenario": traced["scenario"],
        "suggestions": [],
        "versions": traced["versions"],
    }


def difference(size: int, to: int) -> dict[str, float]:
    """Signed difference of two sizes, in bytes and as a share of the second."""
    return {"bytes": size - to, "share": round(size / to - 1, 6)}


def judge(compared: dict[str, Any], where: object = "the configuration") -> dict[str, Any]:
    """The verdict for the card that the scenario names, with suggestions if it does not fit."""
    scenario = Scenario.from_mapping(compared["scenario"], defaults={}, where=where)
    if scenario.gpu is None:
        return compared
    gpu = find(scenario.gpu, where)
    answer = verdict(compared["trace"]["required_bytes"], gpu)
    suggestions = []
    if not answer["fits"]:
        from scripts.memory.planner import suggest

        suggestions = suggest(scenario, gpu, compared["trace"])
    return {**compared, **answer, "gpu": gpu.to_mapping(), "suggestions": suggestions}


def main(estimate: str, traced: str, measurement: str | None, output: str) -> None:
    compared = judge(compare(read_json(estimate), read_json(traced), read_json(measurement) if measurement else None))
    write_json(output, compared)
    for name in ANSWERS:
        size = (compared[name] or {}).get("peak_allocated_bytes")
        log.info("%-14s %s", name.replace("_", " "), f"{size / 1e9:9.3f} GB" if size else "none")


if __name__ == "__main__":
    with job(snakemake):
        main(
            snakemake.input.estimate,
            snakemake.input.trace,
            snakemake.input.get("measure"),
            snakemake.output.comparison,
        )
