"""A rule's script alone, in this process: an editor or ``python -m pdb`` stops in it, which in a job nothing can.

    python -m scripts.runs.alone results/tiny-r4/training.json --configfile config/test.yaml
    python -m pdb -m scripts.runs.alone results/tiny-r4/training.json --configfile config/test.yaml

It runs in the working directory of a run whose inputs are there, with what Snakemake would give the job that makes the
file. Outputs go to a folder of their own, so the run stays as it was.
"""

import argparse
import contextlib
import io
import runpy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dryfit.common.errors import UserError
from dryfit.common.terminal import command


def jobs(*configurations: Path, cores: int = 1) -> Iterator[Any]:
    """The jobs with a script of the workflow in the working directory, as Snakemake resolves them."""
    from snakemake.api import SnakemakeApi
    from snakemake.settings.types import ConfigSettings, OutputSettings, Quietness, ResourceSettings

    with SnakemakeApi(OutputSettings(quiet={Quietness.ALL})) as api:
        workflow = api.workflow(
            resource_settings=ResourceSettings(cores=cores),
            config_settings=ConfigSettings(configfiles=list(configurations)),
            snakefile=Path("Snakefile"),
        )
        with contextlib.redirect_stdout(io.StringIO()):
            workflow.dag().summary()
        yield from (job for job in workflow._workflow.dag.jobs if job.is_script)


def script_of(job: Any) -> Path:
    return Path("rules", job.rule.script).resolve()


def given_to(job: Any, folder: Path, log: Sequence[str]) -> SimpleNamespace:
    """What a job's script finds under the name ``snakemake``, with outputs in another folder."""
    return SimpleNamespace(
        input=job.input,
        log=log,
        output=_elsewhere(job.output, folder),
        params=job.params,
        resources=job.resources,
        rule=job.rule.name,
        threads=job.threads,
        wildcards=job.wildcards,
    )


def _elsewhere(outputs: Any, folder: Path) -> Any:
    from snakemake.iocontainers import Namedlist

    moved = Namedlist([str(folder / path) for path in outputs])
    for name, (first, end) in outputs._get_names():
        moved._set_name(name, first, end=end)
    return moved


def run(job: Any, folder: Path, log: Sequence[str] = ()) -> None:
    """Run a job's script in this process; without a log what it prints stays on the terminal."""
    given = given_to(job, folder, log)
    for path in given.output:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    runpy.run_path(str(script_of(job)), init_globals={"snakemake": given}, run_name="__main__")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.runs.alone",
        description="Run the script of the job that makes a file.",
    )
    parser.add_argument("file", help="an output of the job, such as results/tiny-r4/training.json")
    parser.add_argument(
        "--configfile", nargs="+", type=Path, default=[Path("config/config.yaml")], metavar="FILE"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("alone"), metavar="DIR", help="default: alone/"
    )
    options = parser.parse_args()
    known = list(jobs(*options.configfile))
    found = [job for job in known if options.file in job.output]
    if not found:
        raise UserError(
            "No job of this configuration makes this file.",
            where=options.file,
            allowed=", ".join(sorted({job.rule.name for job in known})) + ": one of their outputs",
        )
    sys.path.insert(0, str(script_of(found[0]).parent))
    run(found[0], options.output)
    print(f"{found[0].rule.name}: {options.output}/")
    return 0


if __name__ == "__main__":
    command(main)
