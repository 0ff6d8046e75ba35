"""Rules ``render_sweep`` and ``render_sweep_page``: the sweep's document and page, from its summary and figures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts.common.files import read_report, write_text
from scripts.common.job import job, log
from scripts.documents.render import data_uri, link, render
from scripts.documents.validate import check_document
from scripts.sweep.draw import text


def context(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What the templates print, beside the figures."""
    shown = [
        {**point, "settings": [(key, text(value)) for key, value in point["varied"].items()]}
        for point in summary["points"]
    ]
    by_run = {point["run"]: point for point in shown}
    chosen = summary["recommendation"]
    named = {key: by_run[chosen[key]] if chosen[key] else None for key in ("run", "cheapest", "best_loss")}
    return {
        **{key: summary[key] for key in ("base", "requests", "varied")},
        "points": shown,
        "recommendation": {**chosen, **named},
        "unbeaten": [point["run"] for point in shown if not point["beaten_by"]],
    }


def main(template: str, summary: str, figures: list[str], output: str) -> None:
    page = output.endswith(".html")
    shown = {Path(path).stem: data_uri(path) if page else link(path, Path(output)) for path in figures}
    filled = render(Path(template), {**context(read_report(summary)), "figures": shown, "source": summary})
    check_document(filled, Path(output))
    write_text(output, filled)
    log.info("%s: %d words", output, len(filled.split()))


if __name__ == "__main__":
    with job(snakemake):
        main(snakemake.input.template, snakemake.input.summary, list(snakemake.input.figures), snakemake.output[0])
