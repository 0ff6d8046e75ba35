"""Which GPUs of a group take other steps than the rest, and what each of them needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dryfit.common.text import size_text
from dryfit.engine.report import Report
from dryfit.scenario.scenario import Scenario
from dryfit.step.model import skeleton

_PACKED = "transformers.masking_utils:find_packed_sequence_indices"  # whether each row is one text


@dataclass(frozen=True)
class RankKind:
    """GPUs whose steps are alike."""

    rank: int  # the one that is followed
    ranks: tuple[int, ...]  # all of them, by their number in the group
    place: str = ""  # what sets them apart, such as `stage 1 of 4`, counted from 1; "" where all GPUs are alike
    # Whether the positions of a row follow each other there; None: transformers is not asked.
    one_text: bool | None = None
    stage: int = 0  # which of a pipeline's GPUs they are, from 0


def kinds_of_ranks(scenario: Scenario) -> tuple[RankKind, ...]:
    """A GPU of each kind.

    Stages of a pipeline all differ. Of GPUs that share a row's tokens the first and the last differ from those between,
    of which one is followed; each takes a part from the row's beginning and one from its end, and transformers makes a
    mask wherever the two don't touch, which is on all but the last. GPUs of tensor, expert and FSDP are alike; of
    ZeRO-1 and ZeRO-2 up to three are followed.
    """
    parallel = scenario.parallel
    everybody = tuple(range(parallel.gpus))
    if parallel.pipeline > 1:
        each = parallel.gpus // parallel.pipeline
        return tuple(
            RankKind(
                stage * each,
                everybody[stage * each : (stage + 1) * each],
                _stages(stage, scenario),
                stage=stage,
            )
            for stage in range(parallel.pipeline)
        )
    if parallel.context > 1:
        count, last = parallel.context, parallel.context - 1
        parts = sorted({0, 1, last}) if count > 2 else [0, 1]
        return tuple(
            RankKind(
                part,
                tuple(rank for rank in everybody if _same_part(rank % count, part, last)),
                f"part {part + 1} of {count} of each row's tokens"
                if part in (0, last)
                else "a part between",
                part == last,
            )
            for part in parts
        )
    if parallel.zero_stage in (1, 2):
        return tuple(RankKind(rank, (rank,)) for rank in _ranks_of_flat_parts(scenario))
    return (RankKind(0, everybody),)


def _ranks_of_flat_parts(scenario: Scenario) -> list[int]:
    """GPUs that may need most where ZeRO cuts all weights in equal parts, wherever a weight begins.

    The last one's gradients come first, while all activations are there, and the first one's last. A GPU keeps the
    whole gradient of a weight of which it has a part, so that the one with most of them needs more. Those of
    adapters are small.
    """
    gpus = scenario.parallel.gpus
    last = gpus - 1
    if scenario.method != "full":
        return [last]
    sizes = [
        parameter.numel()
        for parameter in skeleton(scenario).parameters()
        if parameter.requires_grad
    ]
    part = -(-sum(sizes) // gpus)
    held, start = [0] * gpus, 0
    for size in sizes:
        for rank in range(start // part, min((start + size - 1) // part, last) + 1):
            held[rank] += size
        start += size
    most = max(range(gpus), key=lambda rank: (held[rank], rank))
    return sorted({0, most, last}, reverse=True)


def _stages(place: int, scenario: Scenario) -> str:
    """The stages of one of a pipeline's GPUs in words."""
    parallel = scenario.parallel
    own = [str(number + 1) for number in range(place, parallel.stages, parallel.pipeline)]
    return f"stage{'s' * (len(own) > 1)} {' and '.join(own)} of {parallel.stages}"


def _same_part(part: int, followed: int, last: int) -> bool:
    return part == followed or (followed == 1 and 0 < part < last)


def answers_for(kind: RankKind) -> Mapping[str, bool]:
    """What transformers' own questions are answered on a GPU of a kind."""
    return {} if kind.one_text is None else {_PACKED: kind.one_text}


def add_ranks(answer: dict[str, Any], followed: Iterable[tuple[RankKind, Report]]) -> None:
    """Add ``ranks`` to an answer, which is that of the GPU that needs most: a row for each kind of GPU.

    A row has ``rank``, the one that was traced, ``ranks`` that are like it, ``place``, ``peak_allocated_bytes``,
    ``peak_phase``, ``required_bytes``, ``phases`` and ``components``. Where they differ, a note says so.
    """
    rows = [
        {
            "rank": kind.rank,
            "ranks": list(kind.ranks),
            "place": kind.place,
            "peak_allocated_bytes": report.peak_allocated_bytes,
            "peak_phase": report.peak_phase,
            "required_bytes": report.required_bytes,
            "phases": dict(report.phases),
            "components": dict(report.components),
        }
        for kind, report in followed
    ]
    answer["ranks"] = rows
    most = max(rows, key=lambda row: (row["required_bytes"] or 0, row["peak_allocated_bytes"]))
    others = sorted(
        (row for row in rows if row is not most), key=lambda row: -row["peak_allocated_bytes"]
    )
    if others:
        rest = "; ".join(
            f"{row['place']} {size_text(row['peak_allocated_bytes'])}" for row in others
        )
        answer["notes"] = [
            *answer["notes"],
            f"the figures are those of {most['place']}, which needs most: {size_text(most['peak_allocated_bytes'])}"
            f" allocated in {most['peak_phase']}, most of it {_largest(most['components'])}; {rest}",
        ]


def _largest(components: Mapping[str, int]) -> str:
    name = max(components, key=lambda each: components[each])
    return f"{name.replace('_', ' ')} ({size_text(components[name])})"
