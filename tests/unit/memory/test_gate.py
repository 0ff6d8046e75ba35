"""The gate: a pass, a refusal with everything in it, an override that is recorded, and nothing to check."""

from dataclasses import replace

import pytest

from scripts.common.errors import UserError
from scripts.common.files import read_report, write_report
from scripts.memory import gate
from scripts.memory.gpus import find
from scripts.memory.trace import trace
from scripts.scenario.scenario import Scenario
from tests.unit.decoders import LLAMA_3_LAYERS


@pytest.fixture(scope="module")
def traced() -> dict:
    scenario = Scenario.from_mapping(
        {
            "model": LLAMA_3_LAYERS,
            "sequence_length": 256,
            "micro_batch": 8,
            "gradient_accumulation": 2,
            "gradient_checkpointing": False,
        }
    )
    return {"capability": None, "scenario": scenario.to_mapping(), "trace": trace(scenario, timeline=False)}


def card(usable: int):
    size = find({"vram_gib": 1})
    return replace(size, total_bytes=usable + size.context_bytes)


def test_fits(traced) -> None:
    need = traced["trace"]["required_bytes"]
    decision = gate.decide(traced, card(need + 5), override=False)
    assert (decision["fits"], decision["headroom_bytes"], decision["overridden"]) == (True, 5, False)
    assert decision["suggestions"] == []


def test_refusal_has_numbers_card_and_suggestions(traced) -> None:
    small = card(int(traced["trace"]["required_bytes"] * 0.7))
    decision = gate.decide(traced, small, override=False)
    assert decision["fits"] is False
    text = str(gate.refusal(decision))
    assert small.title in text
    assert "GiB" in text
    assert decision["suggestions"][0]["write"] in text
    assert "effective batch stays 16" in text
    assert "memory.gate.override" in text


def test_rule_fails_and_leaves_no_file(traced, tmp_path) -> None:
    write_report(tmp_path / "trace.json", traced)
    with pytest.raises(UserError, match="does not fit"):
        gate.main(
            str(tmp_path / "trace.json"), {"gpu": {"vram_gib": 0.6}, "override": False}, str(tmp_path / "gate.json")
        )
    assert not (tmp_path / "gate.json").exists()


def test_override_is_recorded(traced, tmp_path) -> None:
    write_report(tmp_path / "trace.json", traced)
    gate.main(str(tmp_path / "trace.json"), {"gpu": {"vram_gib": 0.6}, "override": True}, str(tmp_path / "gate.json"))
    decision = read_report(tmp_path / "gate.json")
    assert (decision["fits"], decision["override"], decision["overridden"]) == (False, True, True)
    assert decision["suggestions"]


def test_override_that_was_not_needed_is_not_one(traced) -> None:
    decision = gate.decide(traced, find("t4"), override=True)
    assert (decision["fits"], decision["overridden"]) == (True, False)


def test_nothing_to_gate_is_not_a_pass(traced) -> None:
    decision = gate.decide(traced, None, override=False)
    assert (decision["fits"], decision["gpu"], decision["reason"]) == (None, None, gate.NOTHING_TO_GATE)


def test_another_gpu_is_gated_by_a_trace_of_its_own_kernels() -> None:
    """Before compute capability 8.0 the attention of this step keeps its scores."""
    model = {**LLAMA_3_LAYERS, "num_key_value_heads": LLAMA_3_LAYERS["num_attention_heads"] // 2}
    fields = {"model": model, "precision": "fp16", "sequence_length": 1024, "gradient_checkpointing": False}
    scenario = Scenario.from_mapping(fields)
    known = {"capability": None, "scenario": scenario.to_mapping(), "trace": trace(scenario, timeline=False)}
    traced = trace(scenario, capability=(7, 5), timeline=False)
    assert traced["required_bytes"] > known["trace"]["required_bytes"]
    decision = gate.decide(known, find("t4"), override=False)
    assert {key: decision[key] for key in decision.keys() & traced.keys()} == {
        key: traced[key] for key in ("peak_allocated_bytes", "required_bytes")
    }
    assert gate.decide(known, find("a100-40gb"), override=False)["required_bytes"] == known["trace"]["required_bytes"]
    of_t4 = {**known, "capability": [7, 5], "trace": {**known["trace"], "required_bytes": 1}}
    assert gate.decide(of_t4, find("t4"), override=False)["required_bytes"] == 1


def test_named_card() -> None:
    assert gate.chosen_gpu("t4").name == "t4"
    with pytest.raises(UserError, match="catalogue"):
        gate.chosen_gpu("t5")
