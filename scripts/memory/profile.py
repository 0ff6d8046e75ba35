"""Rules ``profile_adapters``, ``profile_full``: scenarios of the memory profile, each traced and compared."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts.common.job import job
from scripts.memory import compare, trace
from scripts.runs.check_configuration import checked_configuration
from will_it_fit.common.terminal import log


def main(config: str, scenarios: Mapping[str, dict[str, Any]], place: Path) -> None:
    """Write the answers for each scenario into a folder of its name below ``place``."""
    for name, mapping in scenarios.items():
        log.info("%s:", name)
        paths = {kind: str(place / name / f"{kind}.json") for kind in ("trace", "estimate", "compare")}
        trace.main(config, mapping, paths["trace"])
        compare.main(paths["trace"], None, paths["estimate"], paths["compare"])


if __name__ == "__main__":
    with job(snakemake):
        place = Path(snakemake.output[0]).parents[1]
        main(checked_configuration(snakemake.input), snakemake.params.scenarios, place)
