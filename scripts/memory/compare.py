"""Rule ``compare_memory``: what estimate, trace and measurement say about a scenario, side by side."""

from scripts.common.job import job
from will_it_fit.analytic.estimate import Estimated
from will_it_fit.common.files import read_report, write_report
from will_it_fit.common.sizes import gib
from will_it_fit.common.terminal import log
from will_it_fit.planner.compare import ANSWERS, compare
from will_it_fit.tracing.scenario_trace import Traced


def main(estimate: str, trace: str, measurement: str | None, output: str) -> None:
    traced, estimated = Traced.read(trace), read_report(estimate)
    measured = read_report(measurement) if measurement else {}
    measured.pop("sha256", None)
    known = {name: estimated[name] for name in ("analytic", "rule_of_thumb", "reason")}
    found = compare(Estimated(traced.scenario, **known), traced, measured, "the configuration").to_mapping()
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
