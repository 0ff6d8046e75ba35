"""A reinforcement step's whole cycle: what each phase holds of each card, and whose it is.

The trainer's part is its trace. An engine's is vLLM's own arithmetic (:mod:`dryfit.serving.vllm`). In the order of
a cycle: load, weight sync, generate, sleep, old and reference log-probabilities, rewards, update. TRL syncs and wakes
in one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dryfit.cards.beside import Process, beside
from dryfit.cards.gpus import Gpu
from dryfit.cards.verdict import Omission, Verdict
from dryfit.common.errors import UserError
from dryfit.common.text import gib
from dryfit.engine.components import OPTIMIZER_STATES
from dryfit.engine.cuda_rules import DEFAULT_CAPABILITY
from dryfit.hours.step_time import speed_of
from dryfit.scenario.scenario import Scenario
from dryfit.serving.vllm import (
    NEWEST,
    NON_TORCH_BYTES,
    SENDING_BYTES,
    Range,
    Server,
    merging_bytes,
    nf4_bytes,
    release,
)
from dryfit.tracing.cycle_time import CycleTime, cycle_time

TRAINER, SERVER = "trainer", "server"  # the cards
# The trainer's phases by the trace's names, in a cycle's order.
_TRACED = {
    "generation": "generate",
    "old_log_probabilities": "old log-probabilities",
    "reference_log_probabilities": "reference log-probabilities",
    "rewards": "rewards",
    "teacher": "teacher",
}
_UPDATE = ("forward", "backward", "optimizer")
_STAYS = ("weights_", "quantization_state", "adapters", OPTIMIZER_STATES, "workspaces")


@dataclass(frozen=True)
class Phase:
    """What lies on a card in a phase, by owner; each figure lowest and highest."""

    name: str
    card: str
    # `trainer`: its allocator. `server weights`, `server cache`: vLLM's pools. `server activations`, `CUDA graphs`,
    # `CUDA context`: of each process.
    owners: Mapping[str, Range]

    @property
    def least_bytes(self) -> int:
        """All owners together, where vLLM measures in favour."""
        return sum(low for low, _ in self.owners.values())

    @property
    def most_bytes(self) -> int:
        """All owners together, where it doesn't."""
        return sum(high for _, high in self.owners.values())

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for JSON."""
        owners = {
            f"{name.replace(' ', '_')}_bytes": list(size) for name, size in self.owners.items()
        }
        return {
            "phase": self.name,
            "card": self.card,
            "owners": owners,
            "least_bytes": self.least_bytes,
            "most_bytes": self.most_bytes,
        }


@dataclass(frozen=True)
class Cycle:
    """All phases of a cycle, and what a server's cache holds; ``server`` is None without vLLM.

    ``time``: None where the trace was not timed on the card.
    """

    scenario: Scenario
    gpu: Gpu
    phases: tuple[Phase, ...]
    server: Server | None
    time: CycleTime | None = None

    @property
    def peak(self) -> Phase:
        """The phase that needs the most of a card."""
        return max(self.phases, key=lambda phase: phase.most_bytes)

    @property
    def owner(self) -> str:
        """Who has the most of it."""
        return max(self.peak.owners, key=lambda name: self.peak.owners[name][1])

    @property
    def usable_bytes(self) -> int:
        """Of the card, contexts included."""
        return self.gpu.total_bytes - self.gpu.held_bytes

    @property
    def verdict(self) -> Verdict:
        """Whether every phase fits, with what is beside the trainer; what vLLM measures at its start may decide."""
        most = self.peak.most_bytes
        unsure = most - max(phase.least_bytes for phase in self.phases)
        measured = (Omission("what vLLM measures", too_high_bytes=unsure),) if unsure else ()
        trainer = self.peak.owners.get(TRAINER, (0, 0))[1]
        own = beside(Process.of(self.scenario), self.gpu)
        return Verdict(self.usable_bytes - most, trainer, own, measured)

    @property
    def fits(self) -> bool | None:
        """True: every phase fits; None: too close to call."""
        return self.verdict.fits

    @property
    def warnings(self) -> list[str]:
        """What of the server's version, and of several trainings, the figures leave out."""
        return [*self._of_version(), *self._of_trainings()]

    def _of_trainings(self) -> list[str]:
        trainings = trainings_of(self.scenario)
        if trainings == 1:
            return []
        return [
            f"each of the {trainings} cards trains a copy of the model (DDP): the buckets of its gradients, as large as"
            " these, are not counted, and neither is what NCCL holds"
        ]

    def _of_version(self) -> list[str]:
        if not (self.server and self.scenario.generation.sleep_level) or release(
            self.server.version
        ) > (0, 26):
            return []
        return [
            "before 0.27 vLLM misjudges its weights where sleep mode is on: one card ended 4 GiB above its share"
            " (a newer vLLM, or a lower utilization)"
        ]

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for JSON."""
        answer: dict[str, Any] = {
            "phases": [phase.to_mapping() for phase in self.phases],
            "peak_phase": self.peak.name,
            "peak_owner": self.owner,
            "peak_card": self.peak.card,
            "required_bytes": self.peak.most_bytes,
            "usable_bytes": self.usable_bytes,
            **self.verdict.fields(),
            "time": self.time.to_mapping() if self.time else None,
        }
        if self.server:
            rows, server = self.scenario.sequence_length, self.server
            answer["server"] = {
                "budget_bytes": server.budget_bytes,
                "cache_bytes": list(server.cache_bytes()),
                "rows_at_once": list(server.concurrent(rows)),
                "row_tokens": rows,
                "groups": [
                    [group.layer.kind, group.layers, group.block_tokens, group.page_bytes]
                    for group in server.cache().groups
                ],
                "cuda_graphs": server.graphs(),
            }
        return answer


def trainings_of(scenario: Scenario) -> int:
    """Trainings whose answers one engine generates: with a model that is divided among their cards, all of them."""
    own = scenario.generation
    return own.tensor_parallel if own.mode == "colocate" else 1


def server_of(scenario: Scenario, gpu: Gpu, parameters: int) -> Server | None:
    """vLLM as TRL starts it for a scenario; None with another engine."""
    own = scenario.generation
    if own.engine != "vllm":
        return None
    rank = scenario.lora.rank if scenario.lora else int((scenario.adapter or {}).get("r", 0))
    packed = (
        nf4_bytes(scenario.model, parameters) // own.tensor_parallel
        if scenario.method == "qlora"
        else None
    )
    longest = (
        own.max_model_length or scenario.size("max_position_embeddings") or scenario.sequence_length
    )
    return Server(
        scenario.model,
        parameters,
        gpu.total_bytes,
        own.utilization,
        own.completions or scenario.answers_at_once * trainings_of(scenario),
        longest,
        own.batched_tokens,
        own.cache_dtype,
        own.block_tokens,
        own.tensor_parallel,
        own.cuda_graphs,
        own.lora_slots * rank,
        packed,
        version=scenario.versions.vllm or NEWEST,
        packed=packed is not None,
    )


def cycle(scenario: Scenario, trace: Mapping[str, Any], gpu: Gpu) -> Cycle:
    """A scenario's cycle on a card.

    ``trace``: of the scenario, for this card (:func:`dryfit.tracing.trace.trace`).

    Raises :class:`UserError` if the server can't start: its share leaves no block, or more than the trainer leaves.
    """
    server = server_of(scenario, gpu, trace["parameters"])
    if server is not None:
        _refuse_a_start(scenario, gpu, server, trace["phases"]["load"])
    time, speed, seconds = None, speed_of(gpu.name), trace.get("phase_seconds")
    if speed and seconds:
        time = cycle_time(scenario, seconds, speed, server, gpu.capability or DEFAULT_CAPABILITY)
    return Cycle(scenario, gpu, tuple(_phases(scenario, trace, gpu, server)), server, time)


def _phases(
    scenario: Scenario, trace: Mapping[str, Any], gpu: Gpu, server: Server | None
) -> Iterator[Phase]:
    peaks = trace["phases"]
    # What the allocator needs beyond its tensors where the trace is highest.
    unused = max((trace["required_bytes"] or 0) - trace["peak_allocated_bytes"], 0)
    parts = trace["components_by_phase"]["optimizer"]
    stays = sum(size for name, size in parts.items() if name.startswith(_STAYS))
    level, beside = (
        scenario.generation.sleep_level,
        server is not None and scenario.generation.mode == "colocate",
    )
    context = (gpu.context_bytes, gpu.context_bytes)

    def on_card(name: str, trainer: int, *, awake: str = "all", computes: bool = False) -> Phase:
        owners = {TRAINER: (trainer, trainer), "CUDA context": context}
        if beside:
            owners |= _of_server(server, awake if level else "all", computes=computes)
        return Phase(name, TRAINER, owners)

    yield on_card("load", peaks["load"], computes=True)
    if server is not None:
        sends = SENDING_BYTES if scenario.generation.mode == "server" else 0
        sends += (
            merging_bytes(scenario.model)
            if scenario.method != "full" and not server.lora_rank
            else 0
        )
        yield on_card("weight sync", stays + sends, awake="weights")
        yield on_card("generate", stays, computes=True)
        if beside and level:
            yield on_card("sleep", stays, awake="none")
    for name, title in _TRACED.items():
        if name in peaks:
            yield on_card(title, peaks[name] + unused, awake="none")
    update = max(peaks[name] for name in _UPDATE if name in peaks) + answers_left_out(scenario)
    yield on_card("update", update + unused, awake="none")
    if server is not None and not beside:
        for name, computes in (("load", True), ("weight sync", False), ("generate", True)):
            yield Phase(
                name,
                SERVER,
                {"CUDA context": context, **_of_server(server, "all", computes=computes)},
            )


def answers_left_out(scenario: Scenario) -> int:
    """Bytes that TRL keeps through the update of micro-batches that a trace leaves out.

    Of each token its id and its mask, in int64; of each token of an answer its log-probability, beside vLLM also the
    trainer's own, and the reference's; of each answer its advantage, and beside vLLM a ratio (TRL 1.16,
    ``GRPOTrainer._buffered_inputs``).
    """
    if scenario.objective != "grpo" or scenario.generation.engine == "transformers":
        return 0
    from dryfit.step.reinforcement import CycleSteps  # imports torch

    whole, taken = (CycleSteps.of(scenario, whole=whole).steps for whole in (True, False))
    beside = scenario.generation.engine == "vllm"
    kept = 1 + beside + (scenario.preference.reference is not None)
    row = 16 * scenario.sequence_length + 4 * scenario.completion_length * kept + 4 * (1 + beside)
    return max(whole - taken, 0) * scenario.micro_batch * row


def _of_server(server: Server, awake: str, *, computes: bool) -> dict[str, Range]:
    """What vLLM holds; asleep its graphs alone. ``awake``: ``all``, ``weights`` or ``none``."""
    low, high = server.graph_bytes()
    owners: dict[str, Range] = {
        "CUDA graphs": (low, high + (NON_TORCH_BYTES if server.graphs() else 0))
    }
    if awake != "none":
        owners["server weights"] = (server.weights(),) * 2
    if awake == "all":
        owners["server cache"] = server.cache_bytes()
    if computes:
        owners["server activations"] = (server.activations(),) * 2
    return owners


def _refuse_a_start(scenario: Scenario, gpu: Gpu, server: Server, loaded: int) -> None:
    """vLLM's own two refusals at its start, and what to write."""
    least = server.least_budget_bytes()
    share = share_of(least, gpu.total_bytes)
    beside = (
        loaded + gpu.context_bytes if scenario.generation.mode == "colocate" else gpu.context_bytes
    )
    free = gpu.total_bytes - gpu.held_bytes - beside
    if server.budget_bytes < least:
        shorter = {"max_model_length": scenario.sequence_length}
        fewer = replace(server, longest=scenario.sequence_length).least_budget_bytes()
        change = {"utilization": share} if least <= free else shorter
        raise UserError(
            f"vLLM can't start: `utilization: {server.utilization:g}` is {gib(server.budget_bytes)} of this card. Its"
            f" weights, a profile run, CUDA graphs and the cache of one row of {server.longest:,} tokens need"
            f" {gib(least)}, {gib(least - server.budget_bytes)} more. The phase load fails.",
            where="generation.utilization",
            found=server.utilization,
            allowed=f"{share:g} or more; with max_model_length {scenario.sequence_length}"
            f" {share_of(fewer, gpu.total_bytes):g} or more",
            change={"generation": {"engine": "vllm", **change}},
        )
    if server.budget_bytes > free:
        most = int(100 * free / gpu.total_bytes) / 100
        raise UserError(
            f"vLLM can't start: `utilization: {server.utilization:g}` asks for {gib(server.budget_bytes)}, and beside"
            f" the trainer and the CUDA context {gib(max(free, 0))} are free, {gib(server.budget_bytes - free)} less."
            " The phase load fails.",
            where="generation.utilization",
            found=server.utilization,
            allowed=f"at most {most:g}",
            change={"generation": {"engine": "vllm", "utilization": max(most, 0.01)}},
        )


def share_of(size: int, total: int) -> float:
    """The share of a card that is so much, in hundredths, rounded up."""
    return -(-100 * size // total) / 100
