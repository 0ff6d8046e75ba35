"""From a configuration to runs: which there are, what their folders are called, and what is refused."""

import copy

import pytest
import yaml
from snakemake.utils import update_config

from dryfit.common.errors import UserError
from scripts.common.code_digests import ROOT
from scripts.runs.runs import Runs

DEFAULT = yaml.safe_load((ROOT / "config" / "config.yaml").read_text(encoding="utf-8"))


def runs(**differences):
    """The runs of the default configuration with differences."""
    config = copy.deepcopy(DEFAULT)
    update_config(config, differences)
    return Runs(config)


def test_a_rank_a_list_of_ranks_and_a_list_of_differences():
    alone = runs()
    assert list(alone.named) == ["smollm2-135m-r16"] and not alone.swept
    assert alone.named["smollm2-135m-r16"]["lora"]["rank"] == 16
    sweep = runs(lora={"rank": [4, 8, 16]})
    assert (
        list(sweep.named) == ["smollm2-135m-r4", "smollm2-135m-r8", "smollm2-135m-r16"]
        and sweep.swept
    )
    assert sweep.named["smollm2-135m-r16"] == runs().named["smollm2-135m-r16"], (
        "so a list reruns nothing"
    )
    assert sweep.varied["smollm2-135m-r8"] == {"lora.rank": 8}
    sweep = runs(sweep=[{"lora": {"rank": 8, "alpha": 16}}, {"lora": {"rank": 16, "alpha": 32}}])
    assert list(sweep.named) == ["smollm2-135m-alpha-16-r8", "smollm2-135m-alpha-32-r16"]
    assert sweep.named["smollm2-135m-alpha-16-r8"]["lora"] == {
        **DEFAULT["lora"],
        "rank": 8,
        "alpha": 16,
    }
    assert len(runs(lora={"rank": [4, 8]}, sweep={"run.seed": [1, 2, 3]}).named) == 6


@pytest.mark.parametrize(
    "sweep",
    [
        {
            "training.learning_rate": [1e-3, 2e-3],
            "lora.target_modules": ["all-linear", ["q_proj", "v_proj"]],
        },
        {
            "training": {"learning_rate": [1e-3, 2e-3]},
            "lora": {"target_modules": ["all-linear", ["q_proj", "v_proj"]]},
        },
    ],
    ids=["dotted", "nested"],
)
def test_values_of_several_settings_are_crossed(sweep):
    assert list(runs(sweep=sweep).named) == [
        "smollm2-135m-target_modules-all-linear-learning_rate-0.001-r16",
        "smollm2-135m-target_modules-all-linear-learning_rate-0.002-r16",
        "smollm2-135m-target_modules-q_proj_v_proj-learning_rate-0.001-r16",
        "smollm2-135m-target_modules-q_proj_v_proj-learning_rate-0.002-r16",
    ], "sorted, so that the order of the keys in the file moves no folder"


def test_names_of_runs_and_datasets():
    small = {
        "name": "small",
        "sources": [{"type": "embedded", "license": "MIT", "seed": 1, "pairs": 9}],
    }
    sweep = runs(sweep=[{"dataset": small}, {"training": {"epochs": 2}}])
    assert sweep.having(dataset="small")["dataset"]["sources"][0]["pairs"] == 9
    assert (
        sweep.having(dataset="embedded")["dataset"] == runs().having(dataset="embedded")["dataset"]
    )
    modules = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(30)]
    names = list(runs(sweep={"lora.target_modules": [modules, modules[1:]]}).named)
    assert len(set(names)) == 2 and all(len(name) < 60 for name in names)
    assert runs().of_run("smollm2-135m-r64")["lora"]["rank"] == 64
    learning = runs(sweep={"training.learning_rate": [1e-3, 2e-3]})
    assert (
        learning.of_run("smollm2-135m-learning_rate-0.002-r4")["training"]["learning_rate"] == 2e-3
    )


@pytest.mark.parametrize(
    "name", ["another-r16", "smollm2-135m-r0", "smollm2-135m-r016", "smollm2-135m"]
)
def test_a_name_that_the_configuration_does_not_know_is_an_error_that_shows_what_it_knows(name):
    with pytest.raises(UserError, match="smollm2-135m-r16"):
        runs().of_run(name)
    with pytest.raises(UserError, match=r"dataset\.name: embedded"):
        runs().having(dataset="another")


@pytest.mark.parametrize(
    ("differences", "words"),
    [
        ({"lora": {"rank": [4, 8, 4]}}, ["lora.rank names 4 twice", "rank: [4, 8]"]),
        ({"sweep": {"run.name": ["a", "b"]}}, ["can't vary this: run.name", "run.seed: [...]"]),
        ({"lora": {"rank": [4, 0]}}, ["lora.rank.1", "at least 1", "rank: [4, 16]"]),
        ({"lora": {"rank": [4, "16"]}}, ["lora.rank.1 is text", "rank: [4, 16]"]),
        ({"lora": {"rank": []}}, ["lora.rank is an empty list", "rank: [4, 8, 16, 32, 64]"]),
        ({"sweep": {"training.learning_rate": []}}, ["no values for training.learning_rate"]),
        ({"sweep": {"training.learning_rate": 1e-3}}, ["training.learning_rate: [0.001]"]),
        ({"sweep": []}, ["sweep is an empty list"]),
        ({"sweep": [{}]}, ["sweep.0"]),
        (
            {"sweep": {"training.learning_rat": [1e-3]}},
            ["training.learning_rat", "training.learning_rate: [...]"],
        ),
        (
            {"sweep": {"training.learning_rate": [-1.0]}},
            ["training.learning_rate", "more than 0", "sweep in"],
        ),
        ({"sweep": {"run.name": ["a", "b"]}}, ["run.name"]),
        ({"lora": {"rank": [4, 8]}, "sweep": {"lora.rank": [4, 8]}}, ["swept twice", "rank: 4"]),
        (
            {"sweep": {"training.learning_rate": [1e-3, 0.001]}},
            ["one folder", "learning_rate-0.001"],
        ),
        (
            {"sweep": {"lora.target_modules": [["q_proj"], ["Q_proj"]]}},
            ["one folder", "target_modules-q_proj"],
        ),
        (
            {"sweep": {"dataset.split.seed": [1, 2]}},
            ["one folder", "results/dataset/embedded", "name: one-of-its-own"],
        ),
        (
            {"sweep": {"prompt.system": ["a", "b"]}},
            ["one folder", "results/dataset/embedded/encoded"],
        ),
        ({"sweep": {"run.seed": list(range(10_000))}}, ["10,000 runs", "max_runs: 10000"]),
        ({"sweep": [{"lora": {"rank": [4, 8]}}]}, ["one rank"]),
    ],
)
def test_a_wrong_sweep_stops_with_the_line_to_write(differences, words):
    with pytest.raises(UserError) as error:
        runs(**differences)
    for word in words:
        assert word in str(error.value)


@pytest.mark.thorough
def test_many_runs_are_allowed_when_they_are_asked_for():
    assert len(runs(run={"max_runs": 40}, sweep={"run.seed": list(range(40))}).named) == 40
    with pytest.raises(UserError, match="max_runs: 40"):
        runs(run={"max_runs": 39}, sweep={"run.seed": list(range(40))})
