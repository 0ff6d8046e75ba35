"""The runs that a configuration describes, by name: one, or those of a sweep.

``lora.rank`` may be a list, and ``sweep`` varies any other setting: as a mapping from settings to the values that are
crossed with each other, or as a list of differences, one for each point::

    lora: {rank: [4, 8, 16]}
    sweep: {training.learning_rate: [1.0e-3, 2.0e-3]}               # six runs
    sweep: [{lora: {alpha: 8}}, {lora: {alpha: 16}, training: {epochs: 2}}]

Each run has complete settings of its own and a folder named after what it varies. Snakemake's Paramspace would name
the folders too, but it holds plain columns (here a value may be a list of modules or null, several levels down) and
wants pandas beside Snakemake. Standard library only, besides what checks the configuration.
"""

import copy
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from dryfit.common.errors import UserError
from dryfit.common.text import closest
from dryfit.scenario.hub import profiled
from scripts.runs import configuration

WHERE = "the configuration"
RUN = re.compile(r"(?P<stem>[a-z0-9][a-z0-9._-]*)-r(?P<rank>[1-9]\d*)")
LONGEST_LABEL = 80  # characters of a folder's name; longer ones are told apart by a digest


class Runs:
    """The runs of a configuration.

    Attributes
    ----------
    name
        ``run.name``.
    named
        Settings of each run by its name, ``<name>-r<rank>`` or ``<name>-<what it varies>-r<rank>``, in order.
    varied
        For each run, the settings that the sweep varies, dotted, with the run's values. Empty without a sweep.
    swept
        Whether the configuration asks for a sweep.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Check a configuration and each run that it describes.

        UserError: for a wrong setting, a sweep that is too large, or two runs that would land in one folder.
        """
        checked = configuration.check(config)
        self.name: str = checked["run"]["name"]
        ranks, sweep = checked["lora"]["rank"], checked["sweep"]
        self.swept = isinstance(ranks, list) or bool(sweep)
        points = list(_points(checked))
        if isinstance(ranks, list):
            points = [{"lora.rank": rank, **point} for point in points for rank in ranks]
        self.named: dict[str, dict[str, Any]] = {}
        self.varied: dict[str, dict[str, Any]] = {}
        labels = _labels({key for point in points for key in point})
        for point in points:
            settings = _with(checked, point)
            parts = [
                f"{labels[key]}-{_slug(value)}"
                for key, value in point.items()
                if key != "lora.rank"
            ]
            label = "-".join(parts)
            if len(label) > LONGEST_LABEL:
                label = (
                    f"{labels[next(key for key in point if key != 'lora.rank')]}-{_digest(point)}"
                )
            name = "-".join(
                part for part in (self.name, label, f"r{settings['lora']['rank']}") if part
            )
            if name in self.named:
                raise UserError(
                    f"Two runs of the sweep land in one folder: results/{name}.",
                    where="sweep in the configuration",
                    found=[self.varied[name], point],
                    allowed="points whose values differ, in more than capital letters and signs",
                    write="nothing twice: remove one of the two",
                )
            self.named[name], self.varied[name] = settings, point
        self._refuse_shared_folders()

    def of_run(self, name: str) -> dict[str, Any]:
        """The settings of a run: one of the configuration, or one of its runs with the rank that the name ends in."""
        if name in self.named:
            return self.named[name]
        match = RUN.fullmatch(name)
        for known, settings in self.named.items():
            if match and RUN.fullmatch(known)["stem"] == match["stem"]:
                return {**settings, "lora": {**settings["lora"], "rank": int(match["rank"])}}
        raise UserError(
            f"The configuration has no run of this name: {name}.",
            where="the path asked for",
            found=f"results/{name}/",
            allowed=f"{', '.join(self.named)}; or another rank behind -r",
            write="--configfile with the run's own file, or\nrun:\n  name: "
            + (match["stem"] if match else name),
        )

    def having(self, **names: str) -> dict[str, Any]:
        """The settings of the first run with these names of what runs share: ``dataset``, ``model``, ``profiled``."""
        picks = {
            "dataset": lambda settings: settings["dataset"]["name"],
            "model": lambda settings: settings["model"]["name"],
            "profiled": lambda settings: profiled(settings["memory"]["model"])[0],
        }
        for settings in self.named.values():
            if all(picks[kind](settings) == name for kind, name in names.items()):
                return settings
        known = {
            kind: sorted({picks[kind](settings) for settings in self.named.values()})
            for kind in names
        }
        keys = {"dataset": "dataset.name", "model": "model.name", "profiled": "memory.model"}
        raise UserError(
            f"The configuration has no {' with '.join(f'{kind} {name}' for kind, name in names.items())}.",
            where="the path asked for",
            found=", ".join(names.values()),
            allowed="; ".join(
                f"{keys[kind]}: {', '.join(values)}" for kind, values in known.items()
            ),
            write="--configfile with the file that names it",
        )

    def _refuse_shared_folders(self) -> None:
        """What several runs share must be the same in each of them: a folder has one content."""
        seen: dict[str, dict[str, Any]] = {}
        for name, settings in self.named.items():
            for folder, content in shared_folders(settings).items():
                other = seen.setdefault(folder, content)
                differing = [key for key in content if content[key] != other[key]]
                if differing:
                    raise UserError(
                        f"Two runs of the sweep land in one folder with different settings: {folder}.",
                        where="sweep in the configuration",
                        found=f"{name} and another run differ in {', '.join(differing)}",
                        allowed="settings of training, lora and run; a dataset or model with a name of its own, as in"
                        " sweep: [{dataset: {name: small, ...}}, {dataset: {name: large, ...}}]",
                        write=f"sweep: [{{{differing[0]}: {{name: one-of-its-own, ...}}}}, ...]"
                        if differing[0] in ("dataset", "model")
                        else f"nothing for {differing[0]} in sweep: a second --configfile with another dataset.name",
                    )


def shared_folders(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The folders that do not carry a run's name, each with the settings that shape its content."""
    dataset, model = settings["dataset"]["name"], settings["model"]["name"]
    profile = {key: value for key, value in settings["memory"].items() if key != "gate"}
    return {
        f"results/dataset/{dataset}": {"dataset": settings["dataset"], "task": settings["task"]},
        f"results/models/{model}": {"model": settings["model"]},
        f"results/dataset/{dataset}/encoded/{model}": {"prompt": settings["prompt"]},
        f"results/evaluation/{dataset}/{model}": {
            "evaluation": settings["evaluation"],
            "training.device": settings["training"]["device"],
        },
        f"results/memory/{profiled(settings['memory']['model'])[0]}": {
            "memory": profile,
            "scenario_defaults": settings["scenario_defaults"],
        },
    }


def _points(checked: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What each run varies, as dotted settings with their values; one empty point without a sweep."""
    sweep, ranks, limit = checked["sweep"], checked["lora"]["rank"], checked["run"]["max_runs"]
    if isinstance(sweep, list):
        axes, points = {}, [dict(_leaves(point)) for point in sweep]
        keys = {key for point in points for key in point}
    else:
        axes = dict(_leaves(sweep))
        points, keys = [], set(axes)
        for key, values in axes.items():
            if not isinstance(values, list) or not values:
                raise UserError(
                    f"sweep has no values for {key}.",
                    where="sweep in the configuration",
                    found=values,
                    allowed="a list of at least one value",
                    write=f"sweep:\n  {key}: [{'...' if values == [] else values}]",
                )
    count = math.prod(map(len, axes.values())) * max(1, len(points))
    count *= len(ranks) if isinstance(ranks, list) else 1
    if count > limit:
        raise UserError(
            f"The sweep has {count:,} runs, and each trains, merges and evaluates a model.",
            where="sweep (and lora.rank) in the configuration",
            allowed=f"at most run.max_runs, {limit}; allow more if you mean it",
            write=f"run:\n  max_runs: {count}",
        )
    for key in keys:
        _refuse_key(key, checked)
    if "lora.rank" in keys and isinstance(ranks, list):
        raise UserError(
            "The rank is swept twice: lora.rank is a list, and sweep varies it too.",
            where="sweep in the configuration",
            allowed="one of the two",
            write=f"lora:\n  rank: {ranks[0]}",
        )
    yield from points or (
        dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())
    )


def _leaves(value: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """A mapping's leaves under their dotted names; keys may be dotted already."""
    for key, inner in value.items():
        name = f"{path}{key}"
        if isinstance(inner, Mapping):
            yield from _leaves(inner, f"{name}.")
        else:
            yield name, inner


def _refuse_key(key: str, checked: Mapping[str, Any]) -> None:
    """A setting that the configuration does not have, or that makes no sense to vary."""
    known = {name for name, _ in _leaves({k: v for k, v in checked.items() if k != "sweep"})}
    known -= {"run.name", "run.max_runs"}
    if key in known or key.startswith(("model.source.", "memory.scenarios.")):
        return
    close = closest(key, known)
    raise UserError(
        f"sweep can't vary this: {key}.",
        where="sweep in the configuration",
        found=key,
        allowed="settings of the configuration, such as training.learning_rate, lora.alpha, lora.target_modules",
        write=f"sweep:\n  {close}: [...]"
        if close
        else "sweep:\n  training.learning_rate: [1.0e-03, 2.0e-03]",
    )


def _with(checked: Mapping[str, Any], point: Mapping[str, Any]) -> dict[str, Any]:
    settings = copy.deepcopy({**checked, "sweep": {}})
    for path, value in point.items():
        *parents, key = path.split(".")
        section = settings
        for name in parents:
            section = section.setdefault(name, {})
        section[key] = value
    try:
        settings = configuration.check(settings) if point else settings
        if isinstance(settings["lora"]["rank"], list):
            raise UserError(
                "A point of the sweep has one rank.",
                found=settings["lora"]["rank"],
                allowed="a whole number",
            )
    except UserError as error:
        where = "sweep in the configuration, " + ", ".join(
            f"{key}: {value}" for key, value in point.items()
        )
        raise error.at(where) from None
    del (
        settings["sweep"],
        settings["run"]["max_runs"],
    )  # how many other runs there are is not this one's concern
    return settings


def _labels(keys: set[str]) -> dict[str, str]:
    """The shortest ends of the dotted names that tell them apart."""
    labels = {}
    for key in keys:
        parts = key.split(".")
        for length in range(1, len(parts) + 1):
            label = ".".join(parts[-length:])
            if sum(other == label or other.endswith(f".{label}") for other in keys) == 1:
                break
        labels[key] = label
    return labels


def _slug(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: "none"}[value]
    if isinstance(value, int | float):
        return f"{value:g}".replace("+", "") if isinstance(value, float) else str(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "_".join(map(_slug, value))
    if isinstance(value, str):
        return re.sub(r"[^a-z0-9._-]+", "_", value.lower()).strip("_") or "empty"
    return _digest(value)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]
