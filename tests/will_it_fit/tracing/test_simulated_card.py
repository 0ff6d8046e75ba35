"""The card that is simulated is the scenario's, and a compiled step is followed on it."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.will_it_fit.decoders import DECODERS
from will_it_fit.cards.gpus import catalogue, find
from will_it_fit.common.errors import UserError
from will_it_fit.scenario.scenario import Scenario
from will_it_fit.tracing.measure import measure
from will_it_fit.tracing.simulated_card import card_of
from will_it_fit.tracing.trace import trace


def test_a_card_has_what_the_catalogue_says():
    card = card_of(find("rtx-4090"))
    assert (card.name, card.capability, card.multiprocessors) == ("NVIDIA GeForce RTX 4090", (8, 9), 128)
    assert card.memory_bytes == find("rtx-4090").total_bytes and card.l2_bytes == 75_497_472
    assert card.shared_memory_bytes == 99 * 1024
    assert card_of().capability == (8, 0)


def test_each_card_of_nvidias_can_be_simulated():
    for name, gpu in catalogue().items():
        if gpu.capability is not None:
            assert card_of(gpu).multiprocessors > 0, name


@pytest.mark.parametrize("gpu", ["mi300x", {"vram_gib": 24}])
def test_a_card_without_processors_is_named(gpu):
    with pytest.raises(UserError, match="how many processors") as caught:
        card_of(find(gpu))
    assert caught.value.write == "gpu: a100-80gb"


def scenario(**fields) -> Scenario:
    common = {"model": DECODERS["qwen2"], "precision": "bf16", "sequence_length": 256, "gpu": "rtx-4090"}
    return Scenario.from_mapping({**common, "gradient_checkpointing": False, **fields})


@pytest.mark.skipif(find_spec("triton") is None, reason="`make test-kernels` runs it")
@pytest.mark.parametrize("method", ["full", "qlora"])
@pytest.mark.parametrize("how", ["layers", "model"])
def test_a_compiled_scenario_is_followed(how, method):
    eager, compiled = (
        trace(scenario(compile=way, method=method), capability=(8, 9), timeline=False) for way in ("none", how)
    )
    assert compiled["compiled"]["graphs"] >= 2 and "compiled" not in eager
    assert compiled["compiled"]["breaks"] == {} and compiled["warnings"] == eager["warnings"]
    assert compiled["resident_bytes"] == eager["resident_bytes"]
    assert compiled["components"]["activations"] < eager["components"]["activations"]


@pytest.mark.skipif(find_spec("triton") is not None, reason="triton is installed")
def test_without_triton_a_compiled_scenario_says_what_to_install():
    with pytest.raises(UserError, match="needs the package triton") as caught:
        trace(scenario(compile="layers", method="full"))
    assert caught.value.write == "pip install -c constraints.txt -r requirements-kernels.txt"


def test_a_compiled_step_is_not_measured():
    with pytest.raises(UserError, match="isn't measured here") as caught:
        measure(scenario(compile="layers", method="full"), "cpu")
    assert caught.value.write == "compile: none"
