"""Rule ``compare_memory``: a scenario's answers side by side, the verdict for its GPU, and what would fit instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dryfit.analytic.estimate import Estimated, rule_of_thumb
from dryfit.cards import sentences
from dryfit.cards.beside import Process
from dryfit.cards.gpus import EXPANDABLE_LINE, Gpu, named, what_limits
from dryfit.cards.verdict import Verdict, Word, verdict, verdicts_by_allocator
from dryfit.common.text import gib
from dryfit.evidence.nearest import evidence
from dryfit.hours.step_time import NO_SPEED
from dryfit.scenario.scenario import Scenario
from dryfit.tracing.scenario_trace import Traced

if TYPE_CHECKING:
    from dryfit.tracing.cycle import Cycle

NOT_MEASURED = "not measured: the model is profiled by its configuration alone"
NO_GPU = "no GPU is named, and the time of a step depends on it"
NEARLY_FULL = 0.97  # share of a GPU's usable memory; measured steps with more of it reserved took up to a third longer
BY_LUCK = "it fits this very size, {}, and not every larger one: free memory lies in fragments; from {} on all fit"
ANSWERS = ("rule_of_thumb", "analytic", "trace", "measurement")


@dataclass(frozen=True)
class Comparison:
    """The answers for a scenario."""

    traced: Traced
    # By name, of :data:`ANSWERS`: each with ``peak_allocated_bytes`` and ``components``, or None
    answers: Mapping[str, Mapping[str, Any] | None]
    reasons: Mapping[str, str]  # by name why an answer is None
    # For each pair ``a_to_b`` the signed ``bytes`` (a - b) and ``share`` (a / b - 1)
    differences: Mapping[str, Mapping[str, float]]
    # The GPU that the scenario names, and whether the step fits it; with an engine beside, whether the cycle does
    gpu: Gpu | None
    verdict: Verdict
    cycle: Cycle | None = (
        None  # of a step that generates, on that GPU; None: of another step, or without a GPU
    )

    @property
    def allocators(self) -> dict[str, Any]:
        """What the step needs with expandable segments and without them, each with its verdict; what to type for it."""
        write = {"default": None, "expandable_segments": EXPANDABLE_LINE}
        verdicts = verdicts_by_allocator(
            self.traced.trace, self.gpu, Process.of(self.traced.scenario)
        )
        return {name: {"write": write[name], **values} for name, values in verdicts.items()}

    @property
    def warnings(self) -> list[str]:
        """What is particular about this GPU, what the trace warns of, what makes the step slower, and luck."""
        trace = self.traced.trace
        texts = what_limits(trace, self.gpu) if self.gpu else []
        texts += self.cycle.warnings if self.cycle else []
        texts += [*trace.get("warnings", ()), *(trace.get("time") or {}).get("warnings", ())]
        if (
            self.gpu
            and (self.verdict.headroom_bytes or 0) > self.gpu.usable_bytes - trace["required_bytes"]
        ):
            texts.append(BY_LUCK.format(gib(self.gpu.usable_bytes), gib(trace["required_bytes"])))
        if self.gpu and self.verdict.fits and (full := nearly_full(trace, self.gpu)):
            texts.append(full)
        return texts

    @property
    def time(self) -> Mapping[str, Any] | None:
        """Of a step; of a step that generates, an update's with its share of the cycle."""
        timed = self.cycle.time if self.cycle else None
        return timed.of_an_update() if timed else self.traced.trace.get("time")

    def _of_cycle(self) -> dict[str, Any] | None:
        """The cycle's phases, and beside a server what to turn."""
        if self.cycle is None:
            return None
        answer, trace = self.cycle.to_mapping(), self.traced.trace
        if self.cycle.server:
            from dryfit.planner.cycle import knobs, server_answers

            answer |= server_answers(self.cycle, trace)
            answer["knobs"] = [knob.to_mapping() for knob in knobs(self.cycle, trace)]
        return answer

    def suggestions(
        self,
        watch: Callable[[str, int, Sequence[Any]], None] | None = None,
        failed: list[str] | None = None,
    ) -> list[dict[str, Any]]:
        """What to change where the step does not fit its GPU for sure.

        ``watch`` hears of each search that begins; ``failed`` gets the names of those that failed.
        """
        unclear = self.verdict.word in (Word.TOO_CLOSE, Word.DOES_NOT_FIT)
        if (
            not unclear or not self.gpu.is_modelled or self.verdict.is_lower_bound
        ):  # nothing could be said to fit
            return []
        if self.cycle and self.cycle.server:
            from dryfit.planner.cycle import suggest_for_cycle

            return [
                asdict(item) for item in suggest_for_cycle(self.cycle, self.traced.trace, failed)
            ]
        from dryfit.planner.suggestions import suggest

        scenario, trace = self.traced.scenario, self.traced.trace
        return [asdict(item) for item in suggest(scenario, self.gpu, trace, watch, failed=failed)]

    def to_mapping(self, suggested: bool = True) -> dict[str, Any]:
        """Plain values for JSON; the suggestions, which take traces of their own, only if they are asked for."""
        mapping = {
            **self.answers,
            **self.verdict.to_mapping(),
            "allocators": self.allocators,
            "differences": self.differences,
            "evidence": evidence(self.traced.scenario, self.gpu).to_mapping(),
            "gpu": self.gpu.to_mapping() if self.gpu else None,
            "phases_of_cycle": self._of_cycle(),
            "reasons": self.reasons,
            "scenario": self.traced.scenario.to_mapping(),
            "suggestions": self.suggestions() if suggested else [],
            "time": self.time,
            "versions": self.traced.versions,
            "warnings": self.warnings,
        }
        return mapping | {"sentence": sentences.of_step(mapping)}


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
    # A measurement on the CPU is compared with the trace of the same step on the CPU.
    own = (measurement or {}).get("trace_on_the_same_device")
    differences = {
        f"{name}_to_trace": difference(answer, own if own and name == "measurement" else trace)
        for name, answer in answers.items()
        if answer and name != "trace"
    }
    gpu = named(scenario.gpu, where)
    of_cycle = None
    if gpu and scenario.aim.generates:
        from dryfit.tracing.cycle import cycle

        of_cycle = cycle(scenario, traced.on(gpu), gpu)
    if of_cycle and of_cycle.server:
        judged = of_cycle.verdict
    else:
        judged = verdict(traced.on(gpu), gpu, Process.of(scenario))
    timed = trace.get("time") or (of_cycle and of_cycle.time)
    untimed = {} if timed else {"time": untimed_because(scenario)}
    return Comparison(
        traced,
        answers,
        {name: reason for name, reason in reasons.items() if answers[name] is None} | untimed,
        differences,
        gpu,
        judged,
        of_cycle,
    )


def untimed_because(scenario: Scenario) -> str:
    """Why the time of a step is not known."""
    if scenario.gpu is None:
        return NO_GPU
    if scenario.aim.trainer and not scenario.aim.generates:
        return (
            "not known: steps of supervised fine-tuning and cycles that generate are timed, and this objective is"
            f" {scenario.objective}"
        )
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
