"""The stages of a run with what each needs and what there is: the one table of the terminal, the card and a refusal."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dryfit.common.text import aligned, size_text

FITS, TOO_SMALL, UNCHECKED = "fits", "does not fit", "not checked"
# It runs, but slowly, with a part elsewhere; the run's data never come to it; it is left out where there is no room.
IN_PART, NOT_REACHED, NOT_RUN = "in part", "not reached", "not run"


@dataclass(frozen=True)
class Stage:
    """A stage of a run in one place."""

    stage: str
    place: str  # ``GPU``, ``host memory`` or ``disk``
    # None where it is not known
    needs_bytes: int | None
    has_bytes: int | None
    basis: str  # ``traced``, ``computed`` or ``estimated``
    detail: str
    verdict: str
    change: str | None = None  # the smallest that would fit, ready to be written, or None
    processes: int = 1  # how many share the place
    seconds_at_most: float | None = (
        None  # how long an evaluation takes at most; None: not known, or another stage
    )


def judged(
    stage: str,
    place: str,
    needs_bytes: int | None,
    has_bytes: int | None,
    basis: str,
    detail: str = "",
    **more: Any,
) -> Stage:
    """A stage with the verdict that its sizes give; ``more``: other fields."""
    unknown = needs_bytes is None or has_bytes is None
    verdict = UNCHECKED if unknown else FITS if needs_bytes <= has_bytes else TOO_SMALL
    return Stage(
        stage, place, needs_bytes, has_bytes, basis, detail, **{"verdict": verdict, **more}
    )


def refused(stages: Sequence[Stage]) -> list[Stage]:
    return [stage for stage in stages if stage.verdict == TOO_SMALL]


def table(stages: Sequence[Stage]) -> list[str]:
    """Lines for a terminal: stage, needs, has, verdict, and the smallest change that fits."""
    rows = [
        (
            stage.stage,
            f"{stage.place}, {stage.processes} processes" if stage.processes > 1 else stage.place,
            *(
                "-" if size is None else size_text(size)
                for size in (stage.needs_bytes, stage.has_bytes)
            ),
            stage.verdict,
            stage.change or "",
        )
        for stage in stages
    ]
    return aligned([("stage", "where", "needs", "has", "verdict", ""), *rows], right=(2, 3))
