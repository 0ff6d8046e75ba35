"""Rule ``render_sweep``: the sweep's document and page, from its summary and figures."""

from collections.abc import Mapping, Sequence
from typing import Any

from dryfit.common.files import read_report
from scripts.common.job import job
from scripts.documents.render import write_documents
from scripts.documents.traced_values import sourced
from scripts.sweep.draw import text


def context(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What the templates print, beside the figures."""
    shown = [
        {**point, "settings": [(key, text(value)) for key, value in point["varied"].items()]}
        for point in summary["points"]
    ]
    by_run = {point["run"]: point for point in shown}
    chosen = summary["recommendation"]
    named = {
        key: by_run[chosen[key]] if chosen[key] else None
        for key in ("run", "cheapest", "best_loss")
    }
    return {
        **{key: summary[key] for key in ("base", "requests", "varied")},
        "points": shown,
        "recommendation": {**chosen, **named},
        "unbeaten": [point["run"] for point in shown if not point["beaten_by"]],
    }


def main(
    templates: Sequence[str], summary: str, figures: Sequence[str], outputs: Sequence[str]
) -> None:
    content = context(sourced(read_report(summary), summary))
    write_documents(templates, {**content, "source": sourced(summary, summary)}, figures, outputs)


if __name__ == "__main__":
    with job(snakemake):
        given = snakemake.input
        main(list(given.templates), given.summary, list(given.figures), list(snakemake.output))
