"""Where a training reports its curve beside its own files: TensorBoard, Weights & Biases, MLflow or Trackio.

``training.report_to`` names them, and each is a package of the user's own. What a tracker is told shapes no adapter, so
another one trains nothing again. A tracker that fails while a training runs ends no training: the curve stands in
training.jsonl whatever it says.
"""

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dryfit.common.terminal import log
from scripts.common.machine import refuse_missing_trackers

PROJECT = "securecli-tuner"
Report = Callable[[int, Mapping[str, float]], None]  # step, figures by name


class Trackers:
    """The trackers of one training.

    Parameters
    ----------
    names
        ``tensorboard``, ``wandb``, ``mlflow``, ``trackio``.
    folder
        Of the run. TensorBoard writes into ``tensorboard/`` in it; the others where their own settings say.
    settings
        What each is told of the run: text, numbers, lists and mappings of them.
    """

    def __init__(self, names: Sequence[str], folder: Path, settings: Mapping[str, Any]) -> None:
        refuse_missing_trackers(names)
        begin = {"tensorboard": _tensorboard, "mlflow": _mlflow}
        self._open: dict[str, tuple[Report, Callable[[], None]]] = {}
        for name in names:
            self._try(
                name,
                lambda name=name: self._begin(
                    name, begin.get(name, _runs_of(name)), folder, settings
                ),
            )

    def report(self, step: int, figures: Mapping[str, float]) -> None:
        """Tell each tracker the figures of a step, by name; those that are None are left out."""
        told = {name: value for name, value in figures.items() if isinstance(value, int | float)}
        for name, (report, _) in list(self._open.items()):
            self._try(name, lambda report=report: report(step, told))

    def end(self) -> None:
        for name, (_, end) in list(self._open.items()):
            self._try(name, end)

    def _begin(self, name: str, begin: Callable, folder: Path, settings: Mapping[str, Any]) -> None:
        self._open[name] = begin(folder, settings)

    def _try(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # a service of its own, which may be out of reach
            self._open.pop(name, None)
            log.warning(
                "%s takes no more of this training: %s: %s", name, type(error).__name__, error
            )


def _tensorboard(folder: Path, settings: Mapping[str, Any]) -> tuple[Report, Callable[[], None]]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(os.fspath(folder / "tensorboard"))
    writer.add_text(
        "settings", "\n".join(f"    {key}: {value}" for key, value in sorted(settings.items()))
    )

    def report(step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)

    return report, writer.close


def _mlflow(folder: Path, settings: Mapping[str, Any]) -> tuple[Report, Callable[[], None]]:
    mlflow = importlib.import_module(
        "mlflow"
    )  # by name, as the others: no environment of the project has it
    mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
    mlflow.start_run(run_name=folder.name)
    mlflow.log_params({key: str(value)[:500] for key, value in settings.items()})
    return lambda step, figures: mlflow.log_metrics(dict(figures), step=step), mlflow.end_run


def _runs_of(name: str) -> Callable:
    """Weights & Biases, and Trackio, which has the same functions."""

    def begin(folder: Path, settings: Mapping[str, Any]) -> tuple[Report, Callable[[], None]]:
        module = importlib.import_module(name)
        module.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.name,
            config=dict(settings),
        )
        return lambda step, figures: module.log(dict(figures), step=step), module.finish

    return begin
