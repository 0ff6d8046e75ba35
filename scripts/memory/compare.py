"""Rule ``compare_memory``: what estimate, trace and measurement say about a scenario, side by side."""

from dryfit.analytic.estimate import estimate
from dryfit.common.files import read_report, write_report
from dryfit.common.terminal import log
from dryfit.common.text import gib
from dryfit.planner.compare import ANSWERS, compare
from dryfit.tracing.scenario_trace import Traced
from scripts.common.job import job


def main(trace: str, measurement: str | None, estimate_output: str, output: str) -> None:
    """Estimate the step that was traced, from its model's configuration alone, and write both answers."""
    where = "the configuration"
    traced = Traced.read(trace)
    estimated = estimate(traced.scenario, where)
    write_report(estimate_output, estimated.to_mapping())
    measured = read_report(measurement) if measurement else {}
    measured.pop("sha256", None)
    if "not_measured" in measured:
        measured = {}
    comparison = compare(estimated, traced, measured, where).to_mapping()
    write_report(output, comparison)
    for name in ANSWERS:
        size = (comparison[name] or {}).get("peak_allocated_bytes")
        log.info(
            "%-14s %s", name.replace("_", " "), gib(size) if size else comparison["reasons"][name]
        )


if __name__ == "__main__":
    with job(snakemake):
        main(
            snakemake.input.trace,
            snakemake.input.measure or None,
            snakemake.output.estimate,
            snakemake.output.comparison,
        )
