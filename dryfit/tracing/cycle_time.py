"""How long a reinforcement step's cycle takes: the trainer's phases by its trace, an engine's by the roofline.

Each kernel of the trainer is timed as those of any step are (:mod:`dryfit.hours.step_time`). vLLM generates by
:mod:`dryfit.serving.roofline`, over the same shares of the same datasheet. No cycle was measured, so there is no
range.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dryfit.hours.step_time import Speed, simulate
from dryfit.scenario.scenario import Scenario
from dryfit.serving.roofline import Generating, Rates, generating
from dryfit.serving.vllm import Server

if TYPE_CHECKING:
    from dryfit.engine.costs import CostRecorder

NOT_COUNTED = "functions that judge on the host, vLLM's scheduler and sampler, memory that is mapped and unmapped"
# Bytes a second that pinned copies reach over PCIe 3, 4 and 5 x16: assumed, four fifths of what the lanes carry.
_HOST_LINK = {7: 12.5e9, 8: 25e9, 9: 50e9}
# PEFT's merge and unmerge of a layer: an fp32 product written, read, scaled and added to its weights, twice.
_MERGED_BYTES = 2 * (4 + 4 + 4 + 4 + 2 + 2)


@dataclass(frozen=True)
class CycleTime:
    """Seconds of a cycle by phase."""

    seconds: Mapping[str, float]  # by the names of `Phase`
    updates: float  # of the optimizer in a cycle; below 1 where an update has several generations
    tokens: int  # of the answers in a cycle; 0: they come from elsewhere
    basis: str
    generated: Generating | None = None  # by vLLM; None: by another engine

    @property
    def whole(self) -> float:
        """Seconds of a cycle."""
        return sum(self.seconds.values())

    @property
    def longest(self) -> str:
        """The phase that takes the most, in words."""
        return max(self.seconds, key=lambda phase: self.seconds[phase])

    def limits(self) -> str:
        """What most of the time goes into, in words."""
        if self.longest == "generate" and self.generated is not None:
            waits = "memory" if self.generated.reads_memory else "products or launches"
            return f"generating, which waits for {waits}"
        return f"the phase {self.longest}"

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for JSON."""
        made = self.generated
        rate = (
            self.tokens / self.seconds["generate"]
            if self.tokens and self.seconds.get("generate")
            else None
        )
        return {
            "seconds_by_phase": dict(self.seconds),
            "seconds_per_cycle": self.whole,
            "updates_per_cycle": self.updates,
            "answer_tokens_per_cycle": self.tokens,
            "answer_tokens_per_second_of_generation": rate,
            "waves": made.waves if made else None,
            "basis": self.basis,
            "not_counted": NOT_COUNTED,
        }

    def of_an_update(self) -> dict[str, Any]:
        """As the time of a step is told: of an update, with its share of generating."""
        seconds, whole = self.whole / self.updates, self.whole
        return {
            "seconds_per_step": seconds,
            "range": None,
            "limited_by": self.limits(),
            "shares": {phase: round(each / whole, 4) for phase, each in self.seconds.items()},
            "tokens_per_second": self.tokens / whole,
            "basis": self.basis,
            "warnings": [],
            "seconds_per_micro_batch": seconds,
        }


def trainer_seconds(
    costs: CostRecorder, speed: Speed, scenario: Scenario, taken: Any
) -> dict[str, float]:
    """Seconds of the trainer's phases in a whole cycle, from the launches of a short ``train()``.

    ``taken``: what that took of the cycle (:class:`dryfit.step.reinforcement.CycleSteps`).

    Returns ``generate``, ``old_log_probabilities``, ``reference_log_probabilities``, ``rewards`` and ``teacher``, where
    there are such, and ``update``.
    """
    parts = [(phase, simulate(own, speed)[0]) for phase, own in costs.in_phases()]
    total: dict[str, float] = {}
    for phase, seconds in parts:
        total[phase] = total.get(phase, 0.0) + seconds
    micro_batches = taken.updates * taken.accumulation
    generations = -(-micro_batches // (taken.steps * taken.iterations))
    steps, iterations = scenario.steps_per_generation, scenario.generation.iterations
    found = {}
    if "generation" in total:
        more = (scenario.completion_length - 1) * total.get("last_token", 0.0)
        found["generate"] = (total["generation"] + more) / generations * steps / taken.steps
    for phase in ("old_log_probabilities", "reference_log_probabilities", "rewards", "teacher"):
        if phase in total:
            found[phase] = total[phase] / generations * steps / taken.steps
    passes = (
        sum(total.get(name, 0.0) for name in ("forward", "backward", "between", "inputs"))
        / micro_batches
    )
    optimizer = next(seconds for phase, seconds in reversed(parts) if phase == "optimizer")
    of_cycle = steps * iterations
    found["update"] = of_cycle * passes + of_cycle / scenario.gradient_accumulation * optimizer
    return found


def cycle_time(
    scenario: Scenario,
    trainer: Mapping[str, float],
    speed: Speed,
    server: Server | None,
    capability: tuple[int, int],
) -> CycleTime:
    """The whole cycle's time on a card.

    ``trainer``: of the trainer's phases (:func:`trainer_seconds`). ``server``: the engine; None: another than vLLM.
    """
    own, steps, rows = scenario.generation, scenario.steps_per_generation, scenario.answers_at_once
    updates = steps * own.iterations / scenario.gradient_accumulation
    seconds = {
        name.replace("_", " ").replace("log p", "log-p"): each for name, each in trainer.items()
    }
    tokens, made = rows * scenario.completion_length, None
    if server is not None:
        rates = rates_of(speed, capability)
        together = rows * (own.tensor_parallel if own.mode == "colocate" else 1)
        prompts = -(-together // scenario.answers_to_a_prompt)
        shared = -(-together // own.servers)
        made = generating(
            server,
            rates,
            rows=shared,
            prompts=-(-prompts // own.servers),
            prompt=scenario.sequence_length - scenario.completion_length,
            answer=scenario.completion_length,
        )
        of_server = {"weight sync": _synced(scenario, server, rates), "generate": made.seconds}
        if own.sleep_level == 1:
            of_server["sleep"] = (
                2 * server.weights() / rates.host_bytes
            )  # to the host, and back when it wakes
        seconds = of_server | seconds
    return CycleTime(seconds, updates, tokens, speed.basis, made)


def rates_of(speed: Speed, capability: tuple[int, int]) -> Rates:
    """What kernels reach on a card, of its datasheet."""
    return Rates(
        flops=speed.peak_flops["float16"] * speed.product,
        memory_bytes=speed.memory_bytes_per_second,
        copied_bytes=speed.memory_bytes_per_second * speed.memory,
        link_bytes=speed.link_bytes_per_second * speed.link,
        host_bytes=_HOST_LINK[min(max(capability[0], 7), 9)],
        launch_seconds=speed.launch_seconds,
    )


def _synced(scenario: Scenario, server: Server, rates: Rates) -> float:
    """Adapters are merged and taken out again; then each weight is copied on the card, or sent to another one."""
    merged = 0.0
    if scenario.method != "full" and not server.lora_rank:
        merged = _MERGED_BYTES * server.parameters / rates.copied_bytes
    if scenario.generation.mode == "server":
        return merged + server.weights() * server.tensor_parallel / rates.link_bytes
    return merged + 2 * server.weights() / rates.copied_bytes
