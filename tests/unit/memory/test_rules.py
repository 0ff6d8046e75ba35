"""The rules of rules/memory.smk say what the library's command says."""

import json

import pytest

from dryfit.ask.answer import predict
from dryfit.common.errors import UserError
from dryfit.common.files import read_json, read_report
from dryfit.scenario.model import MODELS
from dryfit.scenario.scenario import Scenario
from dryfit.tracing.measure import TOO_SMALL
from scripts.memory import compare, measure, profile, trace
from tests.dryfit.decoders import DECODERS, T4, TINY

EXPERTS = {
    **TINY,
    "model_type": "qwen3_moe",
    "head_dim": 32,
    "moe_intermediate_size": 64,
    "num_experts": 8,
}
# A real model's shapes, and two of its layers: too large for the card, with changes that fit.
SHALLOW = json.loads((MODELS / "qwen2.5-coder-7b.json").read_text()) | {"num_hidden_layers": 2}
BOTH = [
    {**T4, "model": SHALLOW, "micro_batch": 8},
    {"model": TINY},
    {"model": TINY, "gpu": "t4", "precision": "fp16", "gradient_checkpointing": False},
    {"model": TINY, "gpu": "t4", "precision": "bf16"},
    {"model": TINY, "gpu": "rtx-4090", "attention": "mem_efficient"},
    {"model": TINY, "gpu": "h100-80gb", "method": "full", "precision": "bf16-mixed"},
    {
        "model": TINY,
        "gpu": {"vram_gib": 0.5, "context_mib": 384},  # does not fit, with changes that do
        "method": "full",
        "precision": "fp32",
        "micro_batch": 64,
    },
    {"model": TINY, "method": "lora", "loss": "chunked", "gradient_accumulation": 2},
    {"model": {**TINY, "model_type": "bloom"}, "gpu": "l4", "method": "full"},
    {"model": EXPERTS, "gpu": "a100-80gb"},
    {"model": EXPERTS, "gpu": "t4", "method": "full"},
]


@pytest.mark.few(1, 3)
@pytest.mark.parametrize(
    "fields", BOTH, ids=lambda fields: "-".join(str(v) for k, v in fields.items() if k != "model")
)
def test_rules_and_command_say_the_same(fields, tmp_path) -> None:
    """The rules write files and read each other's; the command hands values on."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(Scenario.from_mapping({"sequence_length": 128, **fields}).model))
    scenario = Scenario.from_mapping({"sequence_length": 128, **fields, "model": str(config)})
    mapping = {key: value for key, value in scenario.to_mapping().items() if key != "model"}
    profile.main(str(config), {"own": mapping}, tmp_path)
    by_rule = read_json(tmp_path / "own" / "compare.json")
    assert read_json(tmp_path / "own" / "estimate.json")["analytic"] == by_rule["analytic"]
    del by_rule["trace"]["timeline"], by_rule["sha256"]  # the rule's alone: the timeline, the seal
    assert by_rule == json.loads(json.dumps(predict(scenario)))


def test_rule_writes_measurement_and_trace(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(DECODERS["qwen2"]))
    mapping = {"method": "qlora", "precision": "fp32", "sequence_length": 32}
    measure.main(
        {**mapping, "model": str(tmp_path / "config.json")},
        "cpu",
        str(tmp_path / "measure.json"),
        1,
    )
    written = json.loads((tmp_path / "measure.json").read_text())
    assert (
        written["trace_on_the_same_device"]["peak_allocated_bytes"]
        == written["peak_allocated_bytes"]
    )
    assert written["scenario"]["model"]["model_type"] == "qwen2"
    time = written["time"]
    assert time["difference"] == pytest.approx(
        time["predicted_seconds"] / time["taken_seconds"] - 1
    )
    assert (
        written["processor"]["unpacked_bytes_per_second"] > 0
        and len(written["taken_seconds"]) == time["steps"]
    )


def test_a_step_that_the_card_can_not_hold_is_not_measured_and_ends_no_run(tmp_path, monkeypatch):
    """The training may have gone on with its longest real batch, or with micro-batches of half the size."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    mapping = {"method": "lora", "precision": "fp32", "sequence_length": 16, "lora": {"rank": 2}}

    def too_small(*args, **named):
        raise UserError(f"{TOO_SMALL}: CUDA out of memory.")

    monkeypatch.setattr(measure, "measure", too_small)
    paths = {
        name: str(tmp_path / f"{name}.json") for name in ("trace", "measure", "estimate", "compare")
    }
    measure.main({**mapping, "model": str(tmp_path / "config.json")}, "cpu", paths["measure"], 1)
    assert read_report(paths["measure"])["not_measured"].endswith("out of memory.")
    trace.main(str(tmp_path / "config.json"), mapping, paths["trace"])
    compare.main(paths["trace"], paths["measure"], paths["estimate"], paths["compare"])
    assert read_report(paths["compare"])["measurement"] is None
