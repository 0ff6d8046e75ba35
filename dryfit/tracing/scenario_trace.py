"""The trace of a scenario's step as a value, on the GPU that the scenario names."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dryfit.cards.gpus import Gpu, named, was_asked
from dryfit.common.files import read_report
from dryfit.common.versions import versions
from dryfit.engine.cuda_rules import DEFAULT_CAPABILITY
from dryfit.hours.step_time import node_of, speeds
from dryfit.scenario.scenario import Scenario


@dataclass(frozen=True)
class Traced:
    """The trace of a scenario's step."""

    scenario: Scenario
    trace: Mapping[str, Any]  # what `trace` returns
    capability: tuple[int, int] | None = None  # of the GPU that it is for; None: the default's
    versions: Mapping[str, str | None] = field(default_factory=dict)  # of what decides the answer
    _others: dict[tuple, Mapping[str, Any]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def read(cls, path: str) -> "Traced":
        """What rule ``trace_memory`` wrote."""
        content = read_report(path)
        capability = content["capability"] and tuple(content["capability"])
        scenario = Scenario.from_mapping(content["scenario"], {}, where="the configuration")
        return cls(scenario, content["trace"], capability, content["versions"])

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = {name: value for name, value in vars(self).items() if name != "_others"}
        return {**plain, "scenario": self.scenario.to_mapping()}

    def on(self, gpu: Gpu | None) -> Mapping[str, Any]:
        """The trace for a GPU: this one, or another where kernels differ or its size was not asked about.

        Another is made once for each GPU.
        """
        alike = gpu is None or (gpu.capability or DEFAULT_CAPABILITY) == (
            self.capability or DEFAULT_CAPABILITY
        )
        if alike and (gpu is None or was_asked(self.trace, gpu)):
            return self.trace
        if (known := (gpu.capability, gpu.usable_bytes)) not in self._others:
            from dryfit.tracing.trace import trace

            how = {"capability": gpu.capability, "sizes": [gpu.usable_bytes]}
            self._others[known] = trace(self.scenario, timeline=False, **how)
        return self._others[known]


def traced(scenario: Scenario, where: object = "scenario", *, timeline: bool = False) -> Traced:
    """Trace a scenario's step for the GPU that it names."""
    from dryfit.tracing.imports import import_quietly

    import_quietly(scenario)  # before the trace's module, which imports transformers whole
    from dryfit.tracing.trace import trace

    gpu = named(scenario.gpu, where)
    capability = gpu.capability if gpu else None
    timed_on = speeds([gpu] if gpu else [], scenario)
    answer = trace(
        scenario,
        capability=capability,
        timeline=timeline,
        timed_on=timed_on,
        both_allocators=True,
        sizes=[gpu.usable_bytes] if gpu else (),
    )
    if scenario.parallel.gpus > 1:
        from dryfit.tracing.checkpoints import checkpoint
        from dryfit.tracing.hosts import host_of

        beside = checkpoint(scenario)
        if beside is not None:
            answer["checkpoint"] = beside.to_mapping()
        host = host_of(scenario, node_of(gpu and gpu.name)["gpus"], beside and beside.saved_bytes)
        answer["host"] = host.to_mapping()
    if gpu:
        answer["time"] = answer.pop("times")[gpu.name]
        if "phase_seconds" in answer:
            answer["phase_seconds"] = answer["phase_seconds"].get(gpu.name)
    return Traced(scenario, answer, capability, versions())
