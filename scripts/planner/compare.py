"""Rule ``compare_memory``: a scenario's answers side by side, the verdict for its GPU, and what would fit instead."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scripts.ask.readers.asked import LIKE, AskedStep, asked_for
from scripts.common.errors import UserError
from scripts.common.files import read_report, write_report
from scripts.common.job import job, log
from scripts.common.sizes import gib
from scripts.memory.analytic.decoder import NotDescribed
from scripts.memory.analytic.estimate import analytic_estimate
from scripts.memory.analytic.rule_of_thumb import rule_of_thumb
from scripts.memory.estimate import Estimated
from scripts.memory.gpus import EXPANDABLE_LINE, Gpu, Verdict, named, verdict
from scripts.memory.step_time import NO_SPEED
from scripts.memory.trace_step import Traced
from scripts.settings.scenario import Scenario

NOT_MEASURED = "not measured: the model is profiled by its configuration alone"
NO_GPU = "no GPU is named, and the time of a step depends on it"
NEARLY_FULL = 0.97  # share of a GPU's usable memory; measured steps with more of it reserved took up to a third longer
ANSWERS = ("rule_of_thumb", "analytic", "trace", "measurement")


@dataclass(frozen=True)
class Comparison:
    """The answers for a scenario.

    Attributes
    ----------
    answers
        By name, of :data:`ANSWERS`: each with ``peak_allocated_bytes`` and ``components``, or None.
    reasons
        By name why an answer is None.
    differences
        For each pair ``a_to_b`` the signed ``bytes`` (a - b) and ``share`` (a / b - 1).
    gpu, verdict
        The GPU that the scenario names, and whether the step fits it.
    """

    traced: Traced
    answers: Mapping[str, Mapping[str, Any] | None]
    reasons: Mapping[str, str]
    differences: Mapping[str, Mapping[str, float]]
    gpu: Gpu | None
    verdict: Verdict

    @property
    def allocators(self) -> dict[str, Any]:
        """What the step needs with expandable segments and without them, each with its verdict; what to type for it."""
        write = {"default": None, "expandable_segments": EXPANDABLE_LINE}
        return {
            name: {"required_bytes": size, "write": write[name], **verdict(size, self.gpu)._asdict()}
            for name, size in self.traced.trace.get("required_bytes_by_allocator", {}).items()
        }

    @property
    def warnings(self) -> list[str]:
        """What the trace warns of, and what makes the step slower on this GPU."""
        trace = self.traced.trace
        found = [*trace.get("warnings", ()), *(trace.get("time") or {}).get("warnings", ())]
        if self.gpu and self.verdict.fits and (full := nearly_full(trace, self.gpu)):
            found.append(full)
        return found

    def suggestions(self, watch: Callable[[str, int, Sequence[Any]], None] | None = None) -> list[dict[str, Any]]:
        """What to change where the step does not fit its GPU; ``watch`` hears of each search that begins."""
        if self.verdict.fits is not False:
            return []
        from scripts.planner.suggestions import suggest

        return [asdict(item) for item in suggest(self.traced.scenario, self.gpu, self.traced.trace, watch)]

    def to_mapping(self, suggested: bool = True) -> dict[str, Any]:
        """Plain values for JSON; the suggestions, which take traces of their own, only if they are asked for."""
        return {
            **self.answers,
            **self.verdict._asdict(),
            "allocators": self.allocators,
            "differences": self.differences,
            "gpu": self.gpu.to_mapping() if self.gpu else None,
            "reasons": self.reasons,
            "scenario": self.traced.scenario.to_mapping(),
            "suggestions": self.suggestions() if suggested else [],
            "time": self.traced.trace.get("time"),
            "versions": self.traced.versions,
            "warnings": self.warnings,
        }


def compare(
    estimated: Estimated,
    traced: Traced,
    measurement: Mapping[str, Any] | None = None,
    where: object = "scenario",
) -> Comparison:
    """Put together what the analytic estimate, the trace and, where there is one, the measurement say."""
    scenario, trace = traced.scenario, traced.trace
    answers = {
        "rule_of_thumb": estimated.rule_of_thumb or rule_of_thumb(scenario, trace["parameters"]),
        "analytic": estimated.analytic,
        "trace": trace,
        "measurement": dict(measurement) if measurement else None,
    }
    reasons = {"analytic": estimated.reason or "", "measurement": NOT_MEASURED}
    untimed = {} if trace.get("time") else {"time": untimed_because(scenario)}
    # A measurement on the CPU is compared with the trace of the same step on the CPU.
    own = (measurement or {}).get("trace_on_the_same_device")
    differences = {
        f"{name}_to_trace": difference(answer, own if own and name == "measurement" else trace)
        for name, answer in answers.items()
        if answer and name != "trace"
    }
    gpu = named(scenario.gpu, where)
    return Comparison(
        traced,
        answers,
        {name: reason for name, reason in reasons.items() if answers[name] is None} | untimed,
        differences,
        gpu,
        verdict(trace["required_bytes"], gpu),
    )


def untimed_because(scenario: Scenario) -> str:
    """Why the time of a step is not known."""
    if scenario.gpu is None:
        return NO_GPU
    if scenario.objective != "sft":
        return f"not known: only steps of supervised fine-tuning are timed, and this objective is {scenario.objective}"
    return NO_SPEED


def nearly_full(trace: Mapping[str, Any], gpu: Gpu) -> str | None:
    """A warning where a step that fits leaves hardly any of the GPU's memory; None where it leaves enough."""
    share = trace["peak_reserved_bytes"] / gpu.usable_bytes
    if share <= NEARLY_FULL:
        return None
    return (
        f"the step would reserve {share:.0%} of the GPU's memory. On a nearly full card the allocator gives memory back"
        " and asks for it again, which takes time: measured steps took up to a third longer than predicted"
    )


def difference(answer: Mapping[str, Any], to: Mapping[str, Any]) -> dict[str, float]:
    """Signed difference of two answers' peaks, in bytes and as a share of the second."""
    size, base = answer["peak_allocated_bytes"], to["peak_allocated_bytes"]
    return {"bytes": size - base, "share": round(size / base - 1, 6)}


def scripts_would_take(asked: AskedStep, where: object = "scenario") -> dict[str, int | None]:
    """The peak with the settings of each tool's scripts, by the analytic estimate; None: not described."""
    found: dict[str, int | None] = {}
    gpu = named(asked.scenario.gpu, where)
    for tool in LIKE if asked.like is None and asked.mapping else ():
        try:
            other = asked_for({**asked.mapping, "like": tool}, where).scenario
            form = analytic_estimate(other, where, capability=gpu.capability if gpu else None, blocks=False)
            found[tool] = form["peak_allocated_bytes"]
        except (NotDescribed, UserError):  # what was named does not go with the tool's settings
            found[tool] = None
    return found


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
