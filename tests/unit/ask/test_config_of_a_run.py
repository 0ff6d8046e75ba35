"""``config --for pipeline``: the run's own settings, read back and checked by the schema."""

from itertools import islice
from pathlib import Path

import pytest
import yaml

from dryfit import readers
from dryfit.ask.command import main
from dryfit.common.errors import UserError
from scripts.ask.__main__ import step_of_a_run
from scripts.runs.configuration import check, with_defaults
from tests.dryfit.ask import conftest
from tests.dryfit.ask.test_configure import MODELS, goal, read_back, rendered, ways

model = conftest.model


def test_each_way_is_read_as_it_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "step_of_a_run", step_of_a_run)
    for name in MODELS[:2]:
        chosen = goal(name, "pipeline", settings=["lora.rank=8"])
        for way in islice(ways(chosen), 0, None, 3):
            settings = check(with_defaults(yaml.safe_load(text := rendered(chosen, way, 2))))
            step = read_back(text, "pipeline", tmp_path, "4090")
            assert (step.micro_batch, step.gradient_accumulation, step.sequence_length) == (
                2,
                8,
                512,
            )
            assert (step.method, step.lora.rank, step.optimizer) == (
                way["method"],
                8,
                way["optimizer"],
            )
            assert (step.attention, step.loss) == (way["attention"], way["loss"])
            assert bool(step.gradient_checkpointing) == (way["checkpointing"] == "on")
            assert (
                settings["memory"]["gate"]["gpu"] == "rtx-4090"
                and settings["model"]["source"]["type"] == "hub"
            )


@pytest.mark.thorough
def test_what_is_printed_is_what_the_written_file_has(
    model: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(readers, "step_of_a_run", step_of_a_run)
    path = tmp_path / "written.yaml"
    words = [
        "config",
        model,
        "--gpu",
        "2GiB",
        "-s",
        "256",
        "-b",
        "2",
        "--for",
        "pipeline",
        "--method",
        "lora",
    ]
    assert main([*words, "--output", str(path)]) == 0
    text = capsys.readouterr().out
    assert "start: snakemake --cores 4 --configfile pipeline.yaml" in text
    assert main(["explain", str(path), "--gpu", "2GiB", "--fresh"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == text.splitlines()[0].removeprefix("# ")


def test_without_the_pipeline_the_message_says_where_it_is(model: str, monkeypatch) -> None:
    monkeypatch.setattr(readers, "step_of_a_run", None)
    with pytest.raises(UserError, match=r"python -m scripts\.ask") as error:
        main(["config", model, "--gpu", "4090", "--for", "pipeline"])
    assert "--for axolotl" in error.value.write
