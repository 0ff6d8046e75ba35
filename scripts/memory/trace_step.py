"""Rule ``trace_memory``: a scenario's training step on the meta device, with the timeline for a figure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from scripts.common.files import read_report, write_report
from scripts.common.job import job, log
from scripts.common.packages import versions
from scripts.common.sizes import gib
from scripts.engine.cuda_rules import DEFAULT_CAPABILITY
from scripts.memory.check_run import checked_configuration
from scripts.memory.gpus import Gpu, named, was_asked
from scripts.memory.step_time import speeds
from scripts.settings.scenario import Scenario


@dataclass(frozen=True)
class Traced:
    """The trace of a scenario's step.

    Attributes
    ----------
    trace
        What :func:`scripts.memory.trace.trace` returns.
    capability
        Of the GPU that it is for; None: the default's.
    versions
        Of what decides the answer.
    """

    scenario: Scenario
    trace: Mapping[str, Any]
    capability: tuple[int, int] | None = None
    versions: Mapping[str, str | None] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str) -> "Traced":
        """What rule ``trace_memory`` wrote."""
        found = read_report(path)
        capability = found["capability"] and tuple(found["capability"])
        scenario = Scenario.from_mapping(found["scenario"], {}, where="the configuration")
        return cls(scenario, found["trace"], capability, found["versions"])

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**vars(self), "scenario": self.scenario.to_mapping()}

    def on(self, gpu: Gpu | None) -> Mapping[str, Any]:
        """The trace for a GPU: this one, or another where kernels differ or its size was not asked about."""
        alike = gpu is None or (gpu.capability or DEFAULT_CAPABILITY) == (self.capability or DEFAULT_CAPABILITY)
        if alike and (gpu is None or was_asked(self.trace, gpu)):
            return self.trace
        from scripts.memory.trace import trace

        return trace(self.scenario, capability=gpu.capability, timeline=False, sizes=[gpu.usable_bytes])


def traced(scenario: Scenario, where: object = "scenario", *, timeline: bool = False) -> Traced:
    """Trace a scenario's step for the GPU that it names."""
    from scripts.memory.trace import trace

    gpu = named(scenario.gpu, where)
    capability = gpu.capability if gpu else None
    timed_on = speeds([gpu] if gpu else [])
    answer = trace(
        scenario,
        capability=capability,
        timeline=timeline,
        timed_on=timed_on,
        both_allocators=True,
        sizes=[gpu.usable_bytes] if gpu else (),
    )
    if gpu:
        answer["time"] = answer.pop("times")[gpu.name]
    return Traced(scenario, answer, capability, versions())


def main(config: str, mapping: dict[str, Any], output: str) -> None:
    where = "the configuration"
    answer = traced(Scenario.from_mapping({**mapping, "model": config}, {}, where), where, timeline=True)
    write_report(output, answer.to_mapping())
    log.info(
        "peak %s in the %s; the GPU must have at least %s",
        gib(answer.trace["peak_allocated_bytes"]),
        answer.trace["peak_phase"],
        gib(answer.trace["required_bytes"]),
    )


if __name__ == "__main__":
    with job(snakemake):
        main(checked_configuration(snakemake.input), snakemake.params.scenario, snakemake.output.trace)
