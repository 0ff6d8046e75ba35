"""What to turn where a reinforcement step and its server share a card, and how far: from the answer's own trace."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dryfit.cards.gpus import Gpu
from dryfit.common.errors import UserError
from dryfit.common.terminal import left_out_if_it_fails
from dryfit.planner.changes import written_out
from dryfit.planner.suggestions import Suggestion
from dryfit.scenario.scenario import Scenario
from dryfit.tracing.cycle import Cycle, cycle, share_of

LENGTH_STEP = 256  # tokens: the answer of :func:`longest_completion` is a multiple


@dataclass(frozen=True)
class Knob:
    """A change, what it saves at the cycle's peak, and what it costs."""

    changes: Mapping[str, Any]  # fields of a scenario with their new parts
    cost: str
    saves_bytes: int  # at the peak of the whole cycle; 0: another phase is as high
    required_bytes: int  # of the cycle with the change
    fits: bool
    more_seconds: float | None = (
        None  # Of the cycle with the change; below 0: it is faster. None: not timed.
    )

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            **vars(self),
            "changes": {name: dict(parts) for name, parts in self.changes.items()},
        }


def with_generation(known: Cycle, trace: Mapping[str, Any], **parts: Any) -> Cycle | None:
    """The cycle with other settings of its engine, which leave the trainer's trace as it is; None: no start."""
    changed = known.scenario.changed(generation={**vars(known.scenario.generation), **parts})
    try:
        return cycle(changed, trace, known.gpu)
    except UserError:
        return None


def largest_utilization(known: Cycle, trace: Mapping[str, Any]) -> float | None:
    """The largest share of the card, in hundredths, with which the cycle fits for sure; None: none does."""
    for hundredths in range(99, 0, -1):
        changed = with_generation(known, trace, utilization=hundredths / 100)
        if changed is not None and changed.fits:
            return hundredths / 100
    return None


def server_answers(known: Cycle, trace: Mapping[str, Any]) -> dict[str, Any]:
    """What people ask of a server beside a training.

    Returns ``largest_utilization``, as above. ``most_answers_at_once``: rows of prompt and answer that the cache holds.
    ``longest_row_tokens``: of a row, if all answers that run at once were so long.
    """
    server = known.server
    cache, (least, _) = server.cache(), server.cache_bytes()
    blocks = max(cache.blocks(least) - 1, 0)
    rows = blocks // cache.blocks_of_request(known.scenario.sequence_length, server.tokens_at_once)

    def too_many(tokens: int) -> bool:
        return server.requests * cache.blocks_of_request(tokens, server.tokens_at_once) > blocks

    return {
        "largest_utilization": largest_utilization(known, trace),
        "longest_row_tokens": bisect_left(range(1, server.longest + 1), True, key=too_many),
        "most_answers_at_once": rows,
    }


def knobs(known: Cycle, trace: Mapping[str, Any]) -> list[Knob]:
    """Changes of the engine alone, each by what it saves; those that save nothing are left out."""
    found = []
    for changes, cost in _turns(known):
        other = with_generation(known, trace, **changes)
        saves = known.peak.most_bytes - other.peak.most_bytes if other else 0
        if saves > 0:
            slower = other.time.whole - known.time.whole if other.time and known.time else None
            found.append(
                Knob(
                    {"generation": changes},
                    cost,
                    saves,
                    other.peak.most_bytes,
                    other.fits is True,
                    slower,
                )
            )
    return sorted(found, key=lambda knob: -knob.saves_bytes)


def _turns(known: Cycle) -> Iterator[tuple[dict[str, Any], str]]:
    own, server = known.scenario.generation, known.server
    if own.mode == "colocate" and not own.sleep_level:
        yield (
            {"sleep_level": 2},
            "weights are brought to vLLM again in each cycle, which TRL does anyway",
        )
    if own.mode == "colocate":
        yield (
            {"mode": "server", "sleep_level": 0},
            "another card, which waits while the model is trained",
        )
    if own.cuda_graphs:
        yield {"cuda_graphs": False}, "decoding is slower: kernels are launched one by one"
    rows = known.scenario.sequence_length
    longest = {} if own.max_model_length else {"max_model_length": rows}
    least = replace(server, longest=own.max_model_length or rows).least_budget_bytes()
    share = share_of(least, known.gpu.total_bytes)
    if share < own.utilization:
        yield (
            {"utilization": share, **longest},
            "the cache holds one row for sure, so answers wait for each other",
        )


def suggest_for_cycle(
    known: Cycle, trace: Mapping[str, Any], failed: list[str] | None = None
) -> list[Suggestion]:
    """What makes a cycle fit its card: settings of the engine, then changes of the trainer, each traced anew.

    ``failed`` gets the names of what could not be traced.
    """
    found = []
    for knob in knobs(known, trace):
        if knob.fits:
            own = {**vars(known.scenario.generation), **knob.changes["generation"]}
            changed = known.scenario.changed(generation=own)
            found.append(
                _suggestion(cycle(changed, trace, known.gpu), trace, knob.changes, knob.cost)
            )
    for changes, cost in _trainers_turns(known.scenario):
        with left_out_if_it_fails(", ".join(changes), failed):
            changed, own_trace = _traced(known, changes)
            if changed is not None and changed.fits:
                found.append(_suggestion(changed, own_trace, changes, cost))
    return found


def _traced(known: Cycle, changes: Mapping[str, Any]) -> tuple[Cycle | None, Mapping[str, Any]]:
    """The cycle of another trainer; None where its server can't start."""
    from dryfit.tracing.trace import trace

    parts = {
        name: {**vars(getattr(known.scenario, name)), **value} if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    changed, gpu = known.scenario.changed(**parts), known.gpu
    own = trace(changed, capability=gpu.capability, timeline=False, sizes=[gpu.usable_bytes])
    try:
        return cycle(changed, own, gpu), own
    except UserError:
        return None, own


def _trainers_turns(scenario: Scenario) -> Iterator[tuple[dict[str, Any], str]]:
    if scenario.micro_batch % 2 == 0:
        rows = {
            "micro_batch": scenario.micro_batch // 2,
            "gradient_accumulation": 2 * scenario.gradient_accumulation,
        }
        steps = scenario.generation.steps_per_generation
        more = {"generation": {"steps_per_generation": 2 * steps}} if steps else {}
        yield rows | more, "twice as many passes of half the rows"
    if not scenario.gradient_checkpointing:
        yield (
            {"gradient_checkpointing": True},
            "about a third more time: activations are computed again",
        )
    if scenario.preference.reference:
        yield (
            {"preference": {"reference": None}},
            "nothing keeps the model near where it began (beta 0)",
        )


def _suggestion(
    found: Cycle, trace: Mapping[str, Any], changes: Mapping[str, Any], cost: str
) -> Suggestion:
    plain = {
        name: dict(value) if isinstance(value, Mapping) else value
        for name, value in changes.items()
    }
    required = found.peak.most_bytes
    return Suggestion(
        "+".join(
            part
            for name, value in plain.items()
            for part in (value if isinstance(value, dict) else [name])
        ),
        plain,
        written_out(plain, "\n"),
        cost,
        trace["peak_allocated_bytes"],
        required,
        found.usable_bytes - required,
    )


def longest_completion(scenario: Scenario, gpu: Gpu, most: int) -> int | None:
    """The longest answer with which the cycle fits, after the prompt as long as it is; traced. None: not even one."""
    from dryfit.tracing.trace import trace

    prompt = scenario.sequence_length - scenario.completion_length

    def fits(tokens: int) -> bool:
        rows = {"sequence_length": prompt + tokens}
        own = {**vars(scenario.generation)}
        if own["max_model_length"]:
            own["max_model_length"] = max(own["max_model_length"], prompt + tokens)
        preference = {**vars(scenario.preference), "completion_length": tokens}
        changed = scenario.changed(**rows, preference=preference, generation=own)
        try:
            own_trace = trace(
                changed, capability=gpu.capability, timeline=False, sizes=[gpu.usable_bytes]
            )
            return cycle(changed, own_trace, gpu).fits is True
        except UserError:
            return False

    step = LENGTH_STEP if most >= LENGTH_STEP else 1
    return (
        step * bisect_left(range(step, most + 1, step), True, key=lambda tokens: not fits(tokens))
        or None
    )
