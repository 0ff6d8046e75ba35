"""Rules ``profile_adapters``, ``profile_full``: each scenario of the memory profile traced, estimated and compared."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dryfit.common.terminal import log
from dryfit.tracing import imports
from scripts.common.job import job
from scripts.memory import compare, trace
from scripts.runs.check_configuration import checked_configuration


def main(config: str, scenarios: Mapping[str, dict[str, Any]], folder: Path) -> None:
    """Write trace.json, estimate.json and compare.json of each scenario below ``folder``, in a folder of its name.

    ``config``: path of the ``config.json`` of the model that all of them are about. ``scenarios``: by name, in the
    scenario format, without a model.
    """
    for name, mapping in scenarios.items():
        log.info("%s:", name)
        paths = {
            kind: str(folder / name / f"{kind}.json") for kind in ("trace", "estimate", "compare")
        }
        trace.main(config, mapping, paths["trace"])
        compare.main(paths["trace"], None, paths["estimate"], paths["compare"])


if __name__ == "__main__":
    with job(snakemake):
        imports.ends_with_its_answer = True
        folder = Path(snakemake.output[0]).parents[1]
        main(checked_configuration(snakemake.input), snakemake.params.scenarios, folder)
