"""Rule ``compare_memory``: a scenario's answers side by side, and what would fit where the step does not."""

from dataclasses import asdict
from typing import Any

from scripts.common.files import read_report, write_report
from scripts.common.job import job, log
from scripts.common.sizes import gib
from scripts.memory.compare import ANSWERS, Comparison, compare
from scripts.memory.estimate import Estimated
from scripts.memory.trace_step import Traced


def answer(compared: Comparison) -> dict[str, Any]:
    """The comparison as JSON has it, with ``suggestions``: what to change where the step does not fit its GPU."""
    suggestions = []
    if compared.verdict.fits is False:
        from scripts.planner.suggestions import suggest

        traced = compared.traced
        suggestions = [asdict(item) for item in suggest(traced.scenario, compared.gpu, traced.trace)]
    return {**compared.to_mapping(), "suggestions": suggestions}


def main(estimate: str, trace: str, measurement: str | None, output: str) -> None:
    traced, estimated = Traced.read(trace), read_report(estimate)
    measured = read_report(measurement) if measurement else {}
    measured.pop("sha256", None)
    known = {name: estimated[name] for name in ("analytic", "rule_of_thumb", "reason")}
    found = answer(compare(Estimated(traced.scenario, **known), traced, measured, "the configuration"))
    write_report(output, found)
    for name in ANSWERS:
        size = (found[name] or {}).get("peak_allocated_bytes")
        log.info("%-14s %s", name.replace("_", " "), gib(size) if size else found["reasons"][name])


if __name__ == "__main__":
    with job(snakemake):
        main(
            snakemake.input.estimate,
            snakemake.input.trace,
            snakemake.input.get("measure"),
            snakemake.output.comparison,
        )
