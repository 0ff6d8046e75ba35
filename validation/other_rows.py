"""Other people's steps, traced once by programs that are not here: the results at the first try and later.

    python -m validation.other_rows     the tables of docs/memory-validation.md

``validation/data/unread-others.csv`` has a line for each try. These rows say how steps come out that nobody here
had thought of; since their programs were not kept, nothing computes them again.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from dryfit.common.terminal import command
from validation.tables import markdown, rows_of

TABLE = "unread-others.csv"
TITLES = {
    "flux": "L40S, diffusion: FLUX.2-klein with PEFT's methods",
    "cogvideox": "A100, diffusion: LoRA of CogVideoX",
    "cogvideosft": "A100, diffusion: all weights of CogVideoX",
    "bert": "V100, BERT-large in torch 1.10",
    "torchao": "RTX 4070 Ti SUPER, ViT-giant in bf16",
    "canifinetune": "RTX 4080 on Windows, canifinetune",
}
TRIES = {"first": "first try", "second": "second try"}


@dataclass(frozen=True)
class TriedRow:
    """One try at one figure of a row; ``error_percent``: None where it could not be traced."""

    id: str
    source: str
    licence: str
    gpu: str
    settings: str
    what: str
    unit: str
    measured: str
    predicted: str
    attempt: str
    note: str

    @property
    def group(self) -> str:
        """Which of :data:`TITLES` it belongs to."""
        return self.id.partition("-")[0]

    @property
    def error_percent(self) -> float | None:
        return 100 * (float(self.predicted) / float(self.measured) - 1) if self.predicted else None


def read() -> list[TriedRow]:
    """All tries, in the order of the file."""
    return [TriedRow(**row) for row in rows_of(TABLE)]


def overview(tries: Iterable[TriedRow]) -> str:
    """Median and worst error of each group, figure and try, as Markdown."""
    groups: dict[tuple[str, str, str], list[TriedRow]] = {}
    for tried in tries:
        groups.setdefault((tried.group, tried.what, tried.attempt), []).append(tried)
    cells = []
    for (group, what, attempt), rows in groups.items():
        errors = {tried.id: error for tried in rows if (error := tried.error_percent) is not None}
        worst = max(errors, key=lambda name: abs(errors[name]))
        median = statistics.median(map(abs, errors.values()))
        of_all = f"{len(errors)} of {len(rows)}", f"{median:.2f} %"
        furthest = f"{errors[worst]:+.2f} % ({worst.removeprefix(f'{group}-')})"
        cells.append((TITLES[group], what, TRIES[attempt], *of_all, furthest))
    return markdown(("measured on", "figure", "", "rows:", "median error:", "worst"), cells) + "\n"


def table(tries: Iterable[TriedRow], group: str) -> str:
    """The rows of a group, each with its tries, as Markdown."""
    rows: dict[tuple[str, str], dict[str, TriedRow]] = {}
    for tried in tries:
        if tried.group == group:
            rows.setdefault((tried.id, tried.what), {})[tried.attempt] = tried
    shown = []
    for (identity, what), errors in rows.items():
        first = errors["first"]
        name = first.settings or identity
        shown.append(
            [
                name,
                what,
                f"{first.measured} {first.unit}",
                *_cells(first),
                *_cells(errors.get("second")),
            ]
        )
    columns = ("row", "figure", "measured:", "first try:", "error:", "second try:", "error:")
    return markdown(columns, shown) + "\n"


def _cells(tried: TriedRow | None) -> Iterator[str]:
    if tried is None:
        yield from ("", "")
    elif tried.error_percent is None:
        yield from ("not traced", "")
    else:
        yield from (tried.predicted, f"{tried.error_percent:+.2f} %")


def main() -> None:
    tries = read()
    print(overview(tries))
    for group, title in TITLES.items():
        print(f"### {title}\n\n{table(tries, group)}")


if __name__ == "__main__":
    command(main)
