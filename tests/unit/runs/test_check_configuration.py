"""The scenarios of a configuration, and those that stop before any job starts."""

import copy
import json

import pytest
import yaml
from snakemake.utils import update_config

from dryfit.common.errors import UserError
from dryfit.scenario.scenario import Scenario, rows_in_a_step
from scripts.common.code_digests import ROOT
from scripts.runs import check_configuration, run_scenarios, training_backends
from scripts.runs.runs import Runs
from scripts.runs.training_backends import refuse_missing_trl
from tests.dryfit.decoders import DECODERS


def run(**differences):
    """The settings of the default run with differences."""
    config = yaml.safe_load((ROOT / "config" / "config.yaml").read_text(encoding="utf-8"))
    update_config(config, copy.deepcopy(differences))
    return next(iter(Runs(config).named.values()))


def rows(settings):
    """Rows of an optimizer step of the settings' training."""
    step = {**run_scenarios.training_scenario(settings), "model": {"model_type": "any"}}
    return rows_in_a_step(Scenario.from_mapping(step, {}), run_scenarios.training_loop(settings))


def test_what_step_loop_and_profile_have_of_a_valid_configuration():
    settings = run()
    step, loop = run_scenarios.training_scenario(settings), run_scenarios.training_loop(settings)
    assert {
        "method",
        "precision",
        "sequence_length",
        "micro_batch",
        "lora",
        "packing",
    } <= step.keys()
    assert {"device", "epochs", "learning_rate", "max_steps", "weight_decay"} <= loop.keys()
    assert settings["training"].keys() - step.keys() == loop.keys() | {"report_to", "threads"}
    scenarios = run_scenarios.profile_scenarios(
        run(memory={"scenarios": {"lora": {"method": "lora"}}})
    )
    assert list(scenarios) == [
        "full-fp32",
        "full-bf16-mixed",
        "full-bf16-fp32-states",
        "full-bf16",
        "lora",
        "qlora",
    ]
    assert scenarios["full-bf16"]["lora"] is None and scenarios["lora"]["quantization"] is None
    assert scenarios["qlora"]["lora"]["rank"] == 16
    check_configuration.check(run())
    check_configuration.check(
        run(
            **yaml.safe_load(
                (ROOT / "config" / "qwen2.5-coder-7b.yaml").read_text(encoding="utf-8")
            )
        )
    )


@pytest.mark.few(10)
@pytest.mark.parametrize(
    ("differences", "words"),
    [
        (
            {"memory": {"scenarios": {"qlora": None}}},
            ["memory.scenarios.qlora", "qlora: {method: qlora}"],
        ),
        (
            {"memory": {"scenarios": {"../../x": {"method": "lora"}}}},
            ["'../../x'", "can't be used", "x: {}"],
        ),
        (
            {"memory": {"scenarios": {"training": {"method": "lora"}}}},
            ["'training'", "can't be used"],
        ),
        (
            {"memory": {"scenarios": {"odd": {"method": "qlorra"}}}},
            ["memory.scenarios.odd", "method: qlora"],
        ),
        ({"memory": {"model": "nosuch"}}, ["memory.model", "qwen2.5-coder-7b", "model: "]),
        ({"memory": {"gpu": "nosuch"}}, ["memory.gpu", "'nosuch'", "rtx-4090", "gpu: "]),
        ({"memory": {"gate": {"gpu": "rtx-4091"}}}, ["memory.gate.gpu", "gpu: rtx-4090"]),
        *(
            (
                {
                    "memory": {"gate": {"gpu": gpu}},
                    "training": {
                        "device": "cuda",
                        "on_out_of_memory": "stop",
                        "parallel": {"strategy": "ddp", "gpus": 8},
                    },
                },
                ["`parallel.gpus: 8` is more than `gpu` has", "count: 8"],
            )
            for gpu in ({"name": "rtx-3090", "count": 2}, "2xrtx-3090", "rtx-3090 x 2")
        ),
        ({"scenario_defaults": {"foo": 1}}, ["foo", "scenario_defaults", "sequence_length"]),
        ({"scenario_defaults": {"optimizer": "adamw8bit"}}, ["optimizer: adamw_8bit"]),
        ({"lora": {"target_modules": ["nosuch_proj"]}}, ["nosuch_proj", "q_proj", "write:"]),
        ({"training": {"precision": "bf16-mixed"}}, ["training (and", "qlora", "precision: bf16"]),
        ({"run": {"name": "two\n"}}, ["run.name", "'two\\n'"]),
        ({"lora": {"rank": 16.0}}, ["lora.rank", "16.0", "a whole number", "rank: 16"]),
        (
            {"training": {"learning_rate": float("nan")}},
            ["training.learning_rate", "nan", "learning_rate: 2.0e-04"],
        ),
        ({"lora": {"dropout": float("inf")}}, ["lora.dropout", "inf", "less than 1"]),
        (
            {"dataset": {"split": {"train": 0.5, "validation": 0.1, "test": 0.1}}},
            ["dataset.split add up to 0.7", "train: 0.714, validation: 0.143, test: 0.143"],
        ),
        (
            {
                "dataset": {
                    "sources": [{"type": "files", "license": "unknown", "paths": ["data/{x}.csv"]}]
                }
            },
            ["data/{x}.csv", "wildcard", "paths: [data/x.csv]"],
        ),
    ],
)
def test_a_wrong_setting_stops_at_the_start_with_the_line_to_write(differences, words):
    with pytest.raises(UserError) as error:
        check_configuration.check(run(**differences))
    for word in words:
        assert word in str(error.value), str(error.value)


def test_rows_and_threads_of_a_step():
    assert rows(run(training={"packing": "none", "rows_per_step": None, "micro_batch": 3})) == 3
    assert rows(run(training={"packing": "rows", "rows_per_step": 24})) == 24
    with pytest.raises(UserError, match="rows_per_step: 16"):
        check_configuration.check(run(training={"packing": "rows", "rows_per_step": None}))
    with pytest.raises(UserError, match="rows_per_step: null"):
        check_configuration.check(run(training={"packing": "none", "rows_per_step": 7}))
    several = {
        "packing": "none",
        "rows_per_step": None,
        "micro_batch": 3,
        "parallel": {"strategy": "ddp", "gpus": 4},
    }
    assert rows(run(training=several)) == 12
    assert run_scenarios.training_scenario(run(training=several))["parallel"]["gpus"] == 4
    assert (
        run_scenarios.gpus_of_training(run(training=several)) == 4
        and run_scenarios.gpus_of_training(run()) == 1
    )
    assert run_scenarios.training_threads(run(training={**several, "threads": 1})) == 4
    assert run_scenarios.training_threads(run()) == 8
    assert run_scenarios.training_threads(run(training={"threads": 2})) == 2
    assert run_scenarios.training_loop(run(training={"threads": 3})) == run_scenarios.training_loop(
        run()
    )


PLAIN = {"loss": "full", "packing": "none", "rows_per_step": None, "method": "lora"}


@pytest.mark.few(6)
@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"parallel": {"strategy": "ddp", "gpus": 9}}, ["8 rows", "9 GPUs", "rows_per_step: 9"]),
        (
            {"parallel": {"strategy": "none", "gpus": 2}},
            ["uses one GPU", "strategy: fsdp2, gpus: 2"],
        ),
        (
            {"parallel": {"strategy": "fsdp1", "gpus": 2}, "loss": "full", "method": "lora"},
            ["FSDP1", "training.parallel", "strategy: fsdp2, gpus: 2"],
        ),
        (
            {"parallel": {"strategy": "zero3", "gpus": 2}, "loss": "full"},
            ["ZeRO", "can be predicted", "training.parallel", "strategy: fsdp2, gpus: 2"],
        ),
        (
            {"parallel": {"strategy": "fsdp2", "gpus": 2, "offload": "cpu"}, "loss": "full"},
            ["offload: cpu", "not trained yet", "parallel: {strategy: fsdp2, gpus: 2}"],
        ),
        (
            {
                "parallel": {"strategy": "fsdp2", "gpus": 2},
                "loss": "full",
                "method": "lora",
                "precision": "fp16-mixed",
            },
            ["fp16", "precision: bf16-mixed"],
        ),
        (
            {"parallel": {"strategy": "fsdp2", "gpus": 2}, "loss": "full", "autocast": "fp16"},
            ["fp16", "training.autocast", "autocast: bf16"],
        ),
        (
            {"parallel": {"strategy": "ddp", "gpus": 2}, "on_out_of_memory": "halve"},
            ["already waiting", "on_out_of_memory: stop"],
        ),
        (
            {"parallel": {"strategy": "none", "gpus": 2, "tensor": 2}, **PLAIN, "method": "qlora"},
            ["without rows", "method: lora"],
        ),
        (
            {
                "parallel": {"strategy": "fsdp2", "gpus": 2, "context": 2},
                **PLAIN,
                "packing": "rows",
            },
            ["`packing: rows` and a mesh", "packing: none"],
        ),
        (
            {
                "parallel": {"strategy": "none", "gpus": 2, "tensor": 2},
                **PLAIN,
                "on_out_of_memory": "halve",
            },
            ["already waiting", "on_out_of_memory: stop"],
        ),
        (
            {"parallel": {"strategy": "fsdp2", "gpus": 4, "expert": 2}, **PLAIN},
            ["this model has none", "expert: 1"],
        ),
        (
            {"device": "cpu", "optimizer": "paged_adamw_8bit"},
            ["no kernel", "training.optimizer", "optimizer: adamw"],
        ),
        (
            {"validate_every_steps": None},
            ["training.keep", "the last step is all", "allowed: last", "validate_every_steps: 50"],
        ),
        (
            {"validate_every_steps": None, "keep": "last", "early_stopping_patience": 3},
            ["training.early_stopping_patience", "when to stop", "validate_every_steps: 50"],
        ),
        (
            {"keep": "averaged", "early_stopping_patience": 3},
            ["training.early_stopping_patience", "whose mean is kept", "keep: best"],
        ),
    ],
)
def test_what_no_training_can_do_stops_at_the_start(training, words, tmp_path, monkeypatch):
    """No earlier run's model is known here."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        check_configuration.check(run(training=training))
    for word in words:
        assert word in str(error.value), str(error.value)


@pytest.mark.parametrize(
    ("training", "expandable"),
    [
        ({"device": "cuda"}, True),
        ({"device": "cpu"}, False),
        ({"device": "cuda", "allocator": {"expandable_segments": False}}, False),
    ],
)
def test_training_on_cuda_and_its_gate_have_expandable_segments_and_nobody_else(
    training, expandable, monkeypatch
):
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    settings = run(training=training)
    for made in (run_scenarios.training_scenario, run_scenarios.training_step_as_gated):
        step = Scenario.from_mapping({**made(settings), "model": {"model_type": "any"}}, {})
        assert step.allocator.expandable_segments == expandable
    profiled = run_scenarios.profile_scenarios(settings).values()
    assert not any(scenario["allocator"]["expandable_segments"] for scenario in profiled)


def test_a_profile_that_needs_an_optional_package_stops_at_the_start(monkeypatch):
    divided = {
        "method": "full",
        "precision": "bf16-mixed",
        "parallel": {"strategy": "zero3", "gpus": 2, "ulysses": 2},
    }
    scenarios = {"memory": {"scenarios": {"divided": divided}}}
    monkeypatch.setattr("dryfit.scenario.scenario.find_spec", lambda name: None)
    with pytest.raises(UserError, match="deepspeed, which is not installed") as error:
        check_configuration.check(run(**scenarios))
    assert (
        "memory.scenarios.divided" in str(error.value) and "dryfit[deepspeed]" in error.value.write
    )
    monkeypatch.setattr("dryfit.scenario.scenario.find_spec", lambda name: object())
    check_configuration.check(run(**scenarios))


def test_a_models_folder_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = {
        "name": "own",
        "title": "Own",
        "license": "mit",
        "source": {"type": "folder", "path": "model"},
    }
    for exists in (False, True):
        with pytest.raises(UserError, match=r"There is no .*folder model") as error:
            check_configuration.check(run(model=model))
        assert "model.source.path" in str(error.value)
        (tmp_path / "model").mkdir(exist_ok=True)
        assert exists == ("config.json in the" in str(error.value))
    (tmp_path / "model" / "config.json").write_text("{}")
    check_configuration.check(run(model=model))


@pytest.mark.parametrize(
    ("training", "faster", "made"),
    [
        ({"device": "cpu"}, True, ("bf16", "bf16")),
        ({"device": "cpu"}, False, ("fp32", None)),
        ({"device": "cuda"}, True, ("fp32", None)),
        ({"device": "cpu", "autocast": "fp16"}, True, ("fp32", "fp16")),  # what is named stays
        ({"device": "cpu", "precision": "bf16-mixed"}, False, ("bf16-mixed", None)),
    ],
)
def test_precision_auto_is_bf16_where_the_processor_is_faster_in_it(
    training, faster, made, monkeypatch
):
    monkeypatch.setattr(run_scenarios, "multiplies_bf16", lambda: faster)
    step = run_scenarios.training_scenario(run(training=training))
    assert (step["precision"], step.get("autocast")) == made


DENSE = {"method": "lora"}
WRONG_ADAPTERS = {
    "PiSSA on 4 bits": ({"initialization": "pissa"}, {}, "floating point alone", "olora"),
    "DoRA on 8 bits": (
        {"dora": True},
        {"quantization": {"type": "int8"}},
        "`lora.dora` and `quantization.type: int8`",
        "nf4",
    ),
    "OLoRA and DoRA": (
        {"initialization": "olora", "dora": True},
        {},
        "drops DoRA's lengths",
        "initialization: default",
    ),
    "PiSSA and a whole head": (
        {"initialization": "pissa", "modules_to_save": ["lm_head"]},
        DENSE,
        "`lora.modules_to_save` don't go together",
        "initialization: default",
    ),
    "scales that can't be converted": (
        {"initialization": "olora", "rslora": True, "alpha_pattern": {"q_proj": 4}},
        {},
        "`lora.rslora with alpha_pattern`",
        "initialization: default",
    ),
    "PiSSA on two GPUs": (
        {"initialization": "pissa"},
        {**DENSE, "parallel": {"strategy": "ddp", "gpus": 2}},
        "on one GPU alone",
        "initialization: default",
    ),
    "an unknown start": (
        {"initialization": "pizza"},
        DENSE,
        "no `lora.initialization: pizza`",
        "pissa",
    ),
    "no layer of that name": ({"rank_pattern": {"q_prj": 4}}, {}, "matches no layer", "q_proj: 4"),
    "no module of that name": ({"modules_to_save": ["lm_haed"]}, {}, "no such module", "lm_head"),
}


@pytest.mark.parametrize(
    ("lora", "training", "says", "write"), WRONG_ADAPTERS.values(), ids=WRONG_ADAPTERS
)
def test_an_adapter_that_can_not_be_trained_stops_before_any_job(
    lora, training, says, write, tmp_path, monkeypatch
):
    """The model's layers are known here, as after a first run."""
    settings = run(lora=lora, training=training, model={"name": "small"})
    config = tmp_path / "results" / "models" / "small" / "config.json"
    config.parent.mkdir(parents=True)
    config.write_text(json.dumps(DECODERS["qwen2"]))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        check_configuration.check(settings)
    assert says in str(caught.value) and write in str(caught.value)


def test_an_adapter_s_parameters_are_counted_for_the_disk():
    def counted(**lora):
        step = {"model": DECODERS["qwen2"], "method": "lora", "lora": {"rank": 8, **lora}}
        scenario = Scenario.from_mapping(step)
        return check_configuration.trained_parameters(scenario.model, scenario.lora)

    model = DECODERS["qwen2"]
    assert counted(rank_pattern={"q_proj": 16}) == 2 * counted()
    assert counted(initialization="pissa") == 2 * counted()
    table = model["hidden_size"] * model["vocab_size"]
    assert counted(modules_to_save=["lm_head"]) == counted() + table


FOR_TRL = {
    "backend": "trl",
    "packing": "none",
    "rows_per_step": None,
    "attention_mask": "padding",
    "loss": "chunked",
    "adapter_precision": "bf16",
}
PACKED = {"packing": "rows", "attention_mask": "none"}
NOT_WITH_TRL = {
    "packing": ({**PACKED, "rows_per_step": 8}, "TRL packs with flash attention", "none"),
    "rows of a step": ({**PACKED, "rows_per_step": 8}, "micro_batch x", "rows_per_step:"),
    "no mask": ({"attention_mask": "none"}, "a mask", "attention_mask: padding"),
    "another loss": ({"loss": "full"}, "a few tokens at a time", "loss: chunked"),
    "a loop by hand": ({"loop": "manual"}, "TRL's trainer is the loop", "loop: trainer"),
    "adapters in fp32": ({"adapter_precision": "fp32"}, "in bf16", "adapter_precision: bf16"),
    "two GPUs": ({"parallel": {"strategy": "ddp", "gpus": 2}}, "one process", "gpus: 1"),
    "a mean": ({"keep": "averaged"}, "no mean of the weights", "keep: best"),
    "half a batch": ({"on_out_of_memory": "halve"}, "smaller parts", "on_out_of_memory: stop"),
}


@pytest.mark.parametrize(("changes", "says", "write"), NOT_WITH_TRL.values(), ids=NOT_WITH_TRL)
def test_what_trl_can_not_do_stops_before_any_job(changes, says, write):
    check_configuration.check(run(training=FOR_TRL))
    with pytest.raises(UserError) as caught:
        check_configuration.check(run(training={**FOR_TRL, **changes}))
    assert says in str(caught.value) and write in str(caught.value)


def test_trl_s_lengths_in_fp32_are_not_promised():
    with pytest.raises(UserError, match="lengths in fp32"):
        check_configuration.check(run(training=FOR_TRL, lora={"dora": True}))


def test_trl_has_to_be_where_the_training_runs(monkeypatch):
    refuse_missing_trl({"backend": "ours"}, own_packages=False)
    refuse_missing_trl({"backend": "trl"}, own_packages=True)
    with pytest.raises(UserError, match="conda environments of the rules have none"):
        refuse_missing_trl({"backend": "trl"}, own_packages=False)
    monkeypatch.setattr(training_backends.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="which is not installed") as caught:
        refuse_missing_trl({"backend": "trl"}, own_packages=True)
    assert caught.value.write == "python3 envs/install.py .venv --extra trl"
