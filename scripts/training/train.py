"""Rule ``train_adapter``: LoRA or QLoRA, with the step that the trace predicted and the gate let through.

A killed run is resumed from its last checkpoint, which is found by the digest of everything that shaped it, so the
state of other settings is never taken up. The last step has a checkpoint too: what comes after it may fail and costs no
step. Checkpoints are no outputs of the rule, since Snakemake removes the outputs of a job that failed; and a finished
training is kept, for when its settings come back. What each process does: :mod:`scripts.training.train_process`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dryfit.common.device import set_allocator
from dryfit.common.files import (
    digest,
    read_folder,
    read_json,
    read_report,
    write_json,
    write_report,
)
from dryfit.scenario.scenario import Scenario, rows_in_a_step
from scripts.common.cache import ResultCache
from scripts.common.job import job
from scripts.common.machine import pick_device
from scripts.training.initial_adapter import remove_start
from scripts.training.loop_state import LoopState
from scripts.training.processes import launch
from scripts.training.train_process import TrainingJob, base_name, train


def name_base(description: Mapping[str, Any], report: Path, config: Path, *others: Path) -> None:
    """Let kept files name the base as it is described now: the same weights may come from elsewhere."""
    write_json(config, {**read_json(config), "base_model_name_or_path": base_name(description)})
    base = {"source": description["source"]}
    write_report(report, {**read_json(report), "base": base}, config, *others)


class Settings(NamedTuple):
    """What shapes an adapter beside the base and the data: a step without its model, the loop around it, the code."""

    scenario: dict[str, Any]
    loop: dict[str, Any]
    seed: int
    code: str


def main(
    base: Path,
    settings: Settings,
    inputs: dict[str, str],
    outputs: dict[str, str],
    threads: int,
    report_to: Sequence[str] = (),
) -> None:
    """Train and write the adapter, the curve and the report; or put back what was written for the same before."""
    loop = settings.loop
    read_folder(base / "description.json")
    data = read_report(inputs["encoded"], inputs["train"], inputs["validation"])
    scenario = Scenario.from_mapping(
        {**settings.scenario, "model": read_json(base / "config.json")}, where="training"
    )
    rows_in_a_step(scenario, loop)
    set_allocator(scenario.allocator.expandable_segments)
    gpus = scenario.parallel.gpus
    device = pick_device(loop["device"], gpus)
    state = {
        "code": settings.code,
        "data": {name: data["sha256"][Path(inputs[name]).name] for name in ("train", "validation")},
        "device": device,
        "loop": loop,
        "scenario": scenario.to_mapping(),
        "seed": settings.seed,
        "weights": read_report(inputs["weights"])["files"],
    }
    folder, report, curve_path = (Path(outputs[name]) for name in ("adapter", "report", "curve"))
    folder = folder.parent
    adapter = [folder / "adapter_config.json", folder / "adapter_model.safetensors"]
    kept = ResultCache(folder.parent / "kept", state, report, [*adapter, curve_path])
    if kept.restore():
        name_base(read_report(base / "description.json"), report, *adapter, curve_path)
        return
    read_folder(inputs["weights"])
    checkpoint = LoopState(folder.parent / "checkpoints" / digest(state))
    work = TrainingJob(
        base=str(base),
        checkpoint=str(checkpoint.folder),
        device=device,
        inputs={name: str(path) for name, path in inputs.items()},
        loop=loop,
        outputs={name: str(path) for name, path in outputs.items()},
        report_to=list(report_to),
        scenario=scenario.to_mapping(),
        seed=settings.seed,
        threads=max(1, threads // gpus) if device == "cpu" else threads,
    )
    if gpus == 1:
        train(work)
    else:
        resumed = (
            f"it resumes from the last checkpoint, saved every {loop['save_every_steps']} steps"
        )
        launch("scripts.training.train_process", work.to_mapping(), gpus, resumed)
    kept.store()
    checkpoint.remove()
    remove_start(checkpoint.folder)


if __name__ == "__main__":
    with job(snakemake):
        main(
            Path(snakemake.input.base),
            Settings(
                snakemake.params.scenario,
                snakemake.params.loop,
                snakemake.params.seed["seed"],
                snakemake.params.code,
            ),
            {
                "weights": f"{snakemake.input.base}/weights.json",
                **{
                    name: snakemake.input[name]
                    for name in ("encoded", "gate", "train", "validation")
                },
            },
            {name: snakemake.output[name] for name in ("adapter", "report", "curve")},
            snakemake.threads,
            [name for name in snakemake.resources.report_to.split(",") if name != "none"],
        )
