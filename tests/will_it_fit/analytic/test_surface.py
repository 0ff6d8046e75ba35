"""The estimate as a surface: the engine's number at every length and micro-batch, to the byte."""

import random

import pytest

from will_it_fit.analytic.decoder import NotDescribed
from will_it_fit.analytic.estimate import analytic_estimate
from will_it_fit.analytic.surface import LONGEST, evaluate, kernels_of, surface
from will_it_fit.cards.gpus import catalogue
from will_it_fit.engine.components import grouped
from will_it_fit.scenario.scenario import Scenario

STEPS = [
    ({"model": "qwen2.5-coder-7b"}, None),
    ({"model": "qwen2.5-coder-0.5b", "method": "full", "precision": "fp32"}, (7, 5)),  # tied, memory-efficient kernel
    ({"model": "mistral-7b-v0.1", "method": "lora", "precision": "fp16"}, (8, 6)),  # a window of 4,096 tokens
    ({"model": "qwen2.5-coder-1.5b", "loss": "chunked"}, (9, 0)),
    ({"model": "qwen2.5-coder-3b", "method": "lora", "attention": "eager", "gradient_checkpointing": False}, (8, 0)),
]


@pytest.mark.parametrize(("fields", "capability"), STEPS, ids=str)
def test_the_surface_is_the_engine_to_the_byte(fields, capability) -> None:
    scenario = Scenario.from_mapping(fields)
    form = surface(scenario, capability=capability)
    chance = random.Random(13)
    places = [(int(2 ** chance.uniform(0, 15)), int(2 ** chance.uniform(0, 9))) for _ in range(60)]
    for length, rows in [*places, (4095, 1), (4096, 1), (4097, 3), (257, 1), (258, 1), (3072, 1), (3073, 1)]:
        step = scenario.changed(sequence_length=length, micro_batch=rows)
        engine = analytic_estimate(step, capability=capability, blocks=False)
        found = evaluate(form, length, rows)
        assert found["peak_allocated_bytes"] == engine["peak_allocated_bytes"], (length, rows)
        assert sum(found["groups"].values()) == found["peak_allocated_bytes"]
        if found["phase"] == engine["phase"]:  # moments may be equally large
            groups = grouped(engine["components"], adapters=scenario.method != "full")
            assert {group: size for group, size in found["groups"].items() if size} == groups


def test_surfaces_are_alike_where_kernels_are() -> None:
    scenario = Scenario.from_mapping({"model": "mistral-7b-v0.1", "precision": "fp16"})
    by_kernels: dict = {}
    for capability in {gpu.capability for gpu in catalogue().values()}:
        kernels, form = kernels_of(scenario, capability), surface(scenario, capability=capability)
        assert by_kernels.setdefault(kernels, form) == form
    assert len(by_kernels) > 2


@pytest.mark.parametrize(("field", "value"), [("use_cache", True), ("packing", "rows")])
def test_what_is_not_described_has_no_surface(field, value) -> None:
    with pytest.raises(NotDescribed, match=field):
        surface(Scenario.from_mapping({"model": "qwen2.5-coder-7b", field: value}))


def test_a_model_that_does_not_say_how_long_a_row_may_be_goes_as_far_as_a_search() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    step = Scenario.from_mapping({"model": {"model_type": "llama", "vocab_size": 1000, **sizes}, "method": "lora"})
    form = surface(step)
    for length in (131_072, 200_001, LONGEST):
        engine = analytic_estimate(step.changed(sequence_length=length), blocks=False)
        assert evaluate(form, length, 1)["peak_allocated_bytes"] == engine["peak_allocated_bytes"], length
