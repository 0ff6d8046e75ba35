"""The configuration: what is accepted, and what a person reads when it is not."""

import copy

import pytest
import yaml

from dryfit.common.errors import UserError
from scripts.common.code_digests import ROOT
from scripts.runs import configuration as settings
from scripts.runs.runs import Runs, shared_folders


@pytest.fixture
def config():
    return yaml.safe_load((ROOT / "config" / "config.yaml").read_text(encoding="utf-8"))


def change(config, path, value):
    """The configuration with one key changed, given as a.b.c."""
    changed = copy.deepcopy(config)
    section = changed
    *parents, key = path.split(".")
    for name in parents:
        section = section[name]
    section[key] = value
    return changed


def test_the_default_configuration_is_valid_in_any_order_of_its_keys(config):
    assert settings.check(config)["lora"]["rank"] == 16
    shuffled = {key: config[key] for key in reversed(config)}
    shuffled["lora"] = {key: config["lora"][key] for key in reversed(config["lora"])}
    shuffled["lora"]["dropout"] = 0  # for 0.0
    assert str(settings.check(shuffled)) == str(settings.check(config))
    swapped = copy.deepcopy(config)
    swapped["lora"].update(rank=config["lora"]["alpha"], alpha=config["lora"]["rank"])
    assert str(settings.check(swapped)["lora"]) != str(settings.check(config)["lora"])


def configurations() -> dict[str, dict]:
    """The configuration that each file below config/ makes over the default, by the file's name."""
    folder, found = ROOT / "config", {}
    files = [*folder.glob("*.yaml"), *(folder / "datasets").glob("*.yaml")]
    known = settings.read_schema()["properties"].keys()
    for path in sorted(files):
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
        if given.keys() <= known:
            found[path.relative_to(folder).as_posix()] = settings.with_defaults(given)
    return found


def test_each_configuration_has_a_run_of_its_own():
    files_of: dict[str, list[str]] = {}
    for file, config in configurations().items():
        files_of.setdefault(config["run"]["name"], []).append(file)
    assert len(files_of) >= 8
    assert {name: files for name, files in files_of.items() if len(files) > 1} == {}


def test_no_two_configurations_fill_one_folder_with_different_settings():
    """Else each would make the other's results outdated, and again when its turn comes."""
    seen: dict[str, tuple[str, dict]] = {}
    for file, config in configurations().items():
        for run in Runs(config).named.values():
            for folder, content in shared_folders(run).items():
                first, before = seen.setdefault(folder, (file, content))
                assert content == before, f"{folder} is filled by {first} and {file}"


@pytest.mark.parametrize("name", ["qwen2.5-coder-7b"])
def test_the_other_configurations_are_valid_over_the_default(config, name):
    from snakemake.utils import update_config

    update_config(
        config, yaml.safe_load((ROOT / "config" / f"{name}.yaml").read_text(encoding="utf-8"))
    )
    assert settings.check(config)["model"]["source"]["type"] == "hub"


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("lora.rank", 0, ["lora.rank", "0", "at least 1", "rank: 16"]),
        ("lora.rank", "8", ["lora.rank is text", "Take the quotes away", "rank: 8"]),
        ("lora.rank", 8.5, ["lora.rank", "8.5", "a whole number"]),
        (
            "lora.rnak",
            8,
            ["Unknown key: lora.rnak", "dropout, initialization, modules_to_save, rank", "rank: 8"],
        ),
        ("lora.dropout", 1.0, ["lora.dropout", "less than 1"]),
        (
            "training.learning_rate",
            "2e-4",
            ["training.learning_rate is text", "exponent", "learning_rate: 2.0e-04"],
        ),
        ("training.learning_rate", -1.0, ["training.learning_rate", "more than 0"]),
        (
            "training.validation_rows",
            0,
            ["training.validation_rows", "at least 1", "validation_rows: 100"],
        ),
        (
            "training.precision",
            "bfloat16",
            ["training.precision", "bfloat16", "fp32, fp16, bf16", "precision: bf16"],
        ),
        ("training.optimizer", "adamw8bit", ["training.optimizer", "optimizer: adamw_8bit"]),
        (
            "training.gradient_checkpointing",
            "yes",
            ["gradient_checkpointing", "true, false, reentrant"],
        ),
        ("training.max_steps", 0, ["training.max_steps", "at least 1"]),
        (
            "training.schedule",
            "cosine_with_restarts",
            ["training.schedule", "cosine, linear, constant, wsd", "schedule: cosine"],
        ),
        ("training.keep", "beast", ["training.keep", "best, last", "keep: best"]),
        ("training.decay_ratio", 0, ["training.decay_ratio", "more than 0"]),
        ("training.early_stopping_patience", 0, ["early_stopping_patience", "at least 1"]),
        ("model.name", "My Model", ["model.name", "My Model", "of the form"]),
        (
            "run.name",
            "a" * 101,
            ["run.name", "at most 100 characters"],
        ),  # files' names have 255 at the most
        ("run.name", 12, ["put it in quotes", "name: '12'"]),
        ("run.name", False, ["put it in quotes", "name: 'no'"]),
        ("model.license", 2.0, ["put it in quotes", "license: '2.0'"]),
        ("training", None, ["method, objective", "training: {method: qlora}"]),
        ("training.parallel", "ddp", ["strategy, gpus", "parallel: {strategy: fsdp2}"]),
        (
            "dataset.sources",
            [{"type": "files"}],
            ["sources.0.license", "  sources:\n               - license: unknown"],
        ),
        ("model.source.type", "huggingface", ["model.source.type", "wheel, hub, folder"]),
        ("model.source.sha256", "abc", ["model.source.sha256", "abc"]),
        ("prompt.system", "", ["prompt.system"]),
        ("evaluation.execution", "bubblewrap", ["dataset.benchmark: null", "execution: none"]),
        ("evaluation.requests", "all", ["evaluation.requests", "whole number or null"]),
        ("colour", "red", ["Unknown key: colour"]),
        ("trainning", {}, ["did you mean `training`", "training: {method: qlora}"]),
        ("run.seed", 2**64, ["run.seed", "at most 9223372036854775807", "seed: 42"]),
        ("training.weight_decay", 1e300, ["training.weight_decay", "at most 10"]),
        ("lora.rank", 1000000, ["lora.rank", "at most 8192"]),
    ],
)
def test_an_error_names_the_key_the_value_what_is_allowed_and_the_line(config, path, value, words):
    with pytest.raises(UserError) as error:
        settings.check(change(config, path, value))
    for word in words:
        assert word in str(error.value)


def test_the_line_to_write_is_valid(config):
    """What a message tells a person to write is accepted when they write it."""
    with pytest.raises(UserError) as error:
        settings.check(change(config, "training.learning_rate", "2e-4"))
    correction = yaml.safe_load(error.value.write)
    assert correction == {"training": {"learning_rate": 0.0002}}
    settings.check(
        change(config, "training.learning_rate", correction["training"]["learning_rate"])
    )
    entry = {"type": "files", "license": "x", "paths": ["a.csv"], "colums": {"request": "a"}}
    with pytest.raises(UserError) as error:
        settings.check(change(config, "dataset.sources", [entry]))
    assert yaml.safe_load(error.value.write) == {
        "dataset": {"sources": [{"columns": {"request": "a"}}]}
    }


def test_two_repositories_of_a_kind_are_not_the_same(config):
    config["publish"] |= {
        "adapter": "a/b",
        "dataset": "a/b",
    }  # a model and a dataset have addresses of their own
    settings.check(config)
    with pytest.raises(UserError, match="are one repository"):
        settings.check(change(config, "publish.merged", "a/b"))


def test_a_missing_key_is_named(config):
    del config["lora"]["rank"]
    with pytest.raises(UserError, match=r"A key is missing: lora\.rank"):
        settings.check(config)


def test_a_source_names_the_key_it_lacks(config):
    config["model"]["source"]["type"] = "hub"
    with pytest.raises(UserError, match=r"model\.source\.repository is missing"):
        settings.check(config)


@pytest.mark.parametrize(
    ("model", "kept"),
    [
        ({"source": {"type": "folder", "path": "mymodel"}}, "name, model.title, model.license"),
        ({"name": "own", "source": {"type": "folder", "path": "mymodel"}}, "title, model.license"),
        (
            {
                "name": "own",
                "license": "mit",
                "source": {"type": "hub", "repository": "a/b", "revision": "x"},
            },
            "title",
        ),
        (
            {
                "name": "own",
                "title": "Own",
                "source": {"type": "hub", "repository": "a/b", "revision": "x"},
            },
            None,
        ),
        (
            {
                "name": "own",
                "title": "Own",
                "license": "mit",
                "source": {"type": "folder", "path": "mymodel"},
            },
            None,
        ),
        (
            {
                "source": {
                    "type": "hub",
                    "repository": "HuggingFaceTB/SmolLM2-135M-Instruct",
                    "revision": "main",
                }
            },
            None,
        ),
        ({"source": {"type": "folder", "path": "/models/SmolLM2-135M-Instruct"}}, None),
        ({"title": "Another title"}, None),
    ],
)
def test_a_part_of_a_model_makes_no_card_of_the_default_model(model, kept):
    whole = settings.with_defaults({"model": model})
    if kept is None:
        settings.check(whole)
        return
    with pytest.raises(UserError, match="would be that one's") as caught:
        settings.check(whole)
    assert f"model.{kept} would be" in str(caught.value)


def test_keys_of_another_source_rerun_nothing(config):
    config["model"] |= {"name": "b", "title": "B", "license": "mit"}
    config["model"]["source"] |= {"type": "hub", "repository": "a/b", "revision": "main"}
    assert set(settings.model_source(settings.check(config))) == {
        "type",
        "dtype",
        "repository",
        "revision",
    }


def test_the_reference_is_up_to_date_and_every_key_has_a_description():
    assert settings.REFERENCE.read_text(encoding="utf-8") == settings.reference(), (
        "config/README.md is stale: python -m scripts.runs.configuration --write-reference"
    )

    def walk(schema, path):
        for name, inner in schema.get("properties", {}).items():
            assert inner.get("description"), f"{path}{name} has no description"
            walk(inner, f"{path}{name}.")

    walk(settings.read_schema(), "")


def test_every_number_has_a_most():
    """A slip of the finger is a number as well: none is so large that only hours of computing show it."""

    def walk(schema, path):
        kinds = schema.get("type", [])
        if {"integer", "number"} & set([kinds] if isinstance(kinds, str) else kinds):
            assert "maximum" in schema or "exclusiveMaximum" in schema, f"{path} has no maximum"
        for name, inner in schema.get("properties", {}).items():
            walk(inner, f"{path}.{name}")
        if "items" in schema:
            walk(schema["items"], f"{path}[]")

    walk(settings.read_schema(), "")
