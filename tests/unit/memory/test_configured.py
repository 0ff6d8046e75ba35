"""The scenarios of a configuration, and those that stop before any job starts."""

import copy

import pytest
import yaml
from snakemake.utils import update_config

from scripts.common.digests import ROOT
from scripts.common.errors import UserError
from scripts.memory import configured
from scripts.sweep.space import Runs


def run(**differences):
    """The settings of the default run with differences."""
    config = yaml.safe_load((ROOT / "config" / "config.yaml").read_text(encoding="utf-8"))
    update_config(config, copy.deepcopy(differences))
    return next(iter(Runs(config).named.values()))


def test_the_step_has_what_shapes_memory_and_the_loop_the_rest():
    settings = run()
    step, loop = configured.training_scenario(settings), configured.training_loop(settings)
    assert {"method", "precision", "sequence_length", "micro_batch", "lora", "packing"} <= step.keys()
    assert {"device", "epochs", "learning_rate", "max_steps", "weight_decay"} <= loop.keys()
    assert settings["training"].keys() - step.keys() == loop.keys()


def test_a_method_without_a_quantized_base_or_adapters_has_neither():
    scenarios = configured.profile_scenarios(run(memory={"scenarios": {"lora": {"method": "lora"}}}))
    assert list(scenarios) == ["full-fp32", "full-bf16", "lora", "qlora"]
    assert scenarios["full-bf16"]["lora"] is None and scenarios["lora"]["quantization"] is None
    assert scenarios["qlora"]["lora"]["rank"] == 16


def test_the_default_and_the_7b_configuration_pass():
    configured.check(run())
    configured.check(run(**yaml.safe_load((ROOT / "config" / "qwen2.5-coder-7b.yaml").read_text(encoding="utf-8"))))


@pytest.mark.parametrize(
    ("differences", "words"),
    [
        ({"memory": {"scenarios": {"qlora": None}}}, ["memory.scenarios.qlora", "qlora: {method: qlora}"]),
        ({"memory": {"scenarios": {"../../x": {"method": "lora"}}}}, ["'../../x'", "can't be used", "x: {}"]),
        ({"memory": {"scenarios": {"training": {"method": "lora"}}}}, ["'training'", "can't be used"]),
        ({"memory": {"scenarios": {"odd": {"method": "qlorra"}}}}, ["memory.scenarios.odd", "method: qlora"]),
        ({"memory": {"model": "nosuch"}}, ["memory.model", "qwen2.5-coder-7b", "model: "]),
        ({"memory": {"gpu": "nosuch"}}, ["memory.gpu", "'nosuch'", "rtx-4090", "gpu: "]),
        ({"memory": {"gate": {"gpu": "rtx4090"}}}, ["memory.gate.gpu", "gpu: rtx-4090"]),
        ({"scenario_defaults": {"foo": 1}}, ["foo", "scenario_defaults", "sequence_length"]),
        ({"scenario_defaults": {"optimizer": "adamw8bit"}}, ["optimizer: adamw_8bit"]),
        ({"lora": {"target_modules": ["nosuch_proj"]}}, ["nosuch_proj", "q_proj", "write:"]),
        ({"training": {"precision": "bf16-mixed"}}, ["training (and", "qlora", "precision: bf16"]),
        ({"run": {"name": "two\n"}}, ["run.name", "'two\\n'"]),
        ({"lora": {"rank": 16.0}}, ["lora.rank", "16.0", "a whole number", "rank: 16"]),
        ({"training": {"learning_rate": float("nan")}}, ["training.learning_rate", "nan", "learning_rate: 2.0e-04"]),
        ({"lora": {"dropout": float("inf")}}, ["lora.dropout", "inf", "less than 1"]),
        (
            {"dataset": {"split": {"train": 0.5, "validation": 0.1, "test": 0.1}}},
            ["dataset.split add up to 0.7", "test: 0.143, train: 0.714, validation: 0.143"],
        ),
        (
            {"dataset": {"sources": [{"type": "files", "license": "unknown", "paths": ["data/{x}.csv"]}]}},
            ["data/{x}.csv", "wildcard", "paths: [data/x.csv]"],
        ),
    ],
)
def test_a_wrong_setting_stops_at_the_start_with_the_line_to_write(differences, words):
    with pytest.raises(UserError) as error:
        configured.check(run(**differences))
    for word in words:
        assert word in str(error.value), str(error.value)


def test_the_rows_of_a_packed_step_are_given_and_those_of_another_follow():
    assert configured.effective_batch(run(training={"packing": "none", "rows_per_step": None, "micro_batch": 3})) == 3
    assert configured.effective_batch(run(training={"packing": "rows", "rows_per_step": 24})) == 24
    with pytest.raises(UserError, match="rows_per_step: 16"):
        configured.check(run(training={"packing": "rows", "rows_per_step": None}))
    with pytest.raises(UserError, match="rows_per_step: null"):
        configured.check(run(training={"packing": "none", "rows_per_step": 7}))
