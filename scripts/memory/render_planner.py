"""Rule ``render_planner``: the planner as a page, one file that works without a network."""

from scripts.common.job import job
from will_it_fit.common.files import read_report, write_text
from will_it_fit.common.terminal import log
from will_it_fit.planner.page import page


def main(data: str, output: str) -> None:
    text = page(read_report(data))
    write_text(output, text)
    log.info("%s: %.1f MB", output, len(text) / 1e6)


if __name__ == "__main__":
    with job(snakemake):
        main(snakemake.input.planner, snakemake.output[0])
