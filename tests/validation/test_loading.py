"""Loading as events: what lives at the end, in which order it came, and which blocks remain; with published figures."""

from dataclasses import replace

import pytest
import torch

from dryfit.engine.allocator import EMPTY_CACHE, MIB
from dryfit.engine.model_tensors import quantization_state
from dryfit.engine.replay import replay
from dryfit.engine.report import alive_after
from dryfit.scenario.scenario import Scenario
from dryfit.step.model import build_model
from dryfit.tracing import loading
from dryfit.tracing.loaders import WeightLoader
from dryfit.tracing.loading import loading_history
from tests.dryfit.decoders import LLAMA_3_LAYERS
from validation.rows import read

ROWS = {row.id: row for row in read("t4")}


def model_of(row: str):
    scenario = ROWS[row].scenario
    return build_model(scenario, "meta", attention_implementation="eager"), scenario


def loader_of(row: str, **options) -> WeightLoader:
    return WeightLoader.of(
        transformers="5.17.0", peft="0.20.0", **options
    )  # as the rows of the sweep state


@pytest.fixture(scope="module")
def quantized():
    return model_of("t4-sweep-20")


def held_storages(model):
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [
        tensor
        for parameter in model.parameters()
        for tensor in quantization_state(parameter).values()
    ]
    return {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors
    }


@pytest.mark.parametrize("row", ["t4-sweep-21", "t4-sweep-27", "t4-sweep-31"])
def test_a_moved_model_holds_what_the_card_showed(row):
    model, scenario = model_of(row)
    events, *_ = loading_history(model, scenario, 1, loader_of(row, loaded_on_cpu_first=True))
    measured = ROWS[row].measured_bytes["resident"] / MIB
    assert replay(events).allocated_bytes / MIB == pytest.approx(
        measured, abs=0.006
    )  # published with two decimals


def test_a_quantized_model_holds_what_the_card_showed(quantized):
    events, *_ = loading_history(*quantized, 1, loader_of("t4-sweep-20"))
    measured = ROWS["t4-sweep-20"].measured_bytes["resident"] / MIB
    assert replay(events).allocated_bytes / MIB == pytest.approx(measured, abs=0.006)


@pytest.mark.parametrize("workers", [1, 4])
def test_every_storage_has_an_id_that_is_alive_with_its_size(quantized, workers):
    model, scenario = quantized
    events, ids, _ = loading_history(model, scenario, 1000, WeightLoader(workers=workers))
    alive = {}
    for identity, count in events:
        if identity > 0:
            assert identity >= 1000 and identity not in alive
            alive[identity] = count
        elif identity < 0:
            del alive[-identity]
    assert {key: alive[identity] for key, identity in ids.items()} == held_storages(model)
    assert sorted(ids.values()) == sorted(alive)  # nothing else remains


def test_weights_are_quantized_one_at_a_time(quantized):
    model, scenario = quantized
    alone = replay(loading_history(model, scenario, 1, WeightLoader())[0])
    dense = sum(
        p.quant_state.shape.numel() * 2 for p in model.parameters() if hasattr(p, "quant_state")
    )
    assert alone.peak_allocated_bytes < alone.allocated_bytes + dense / 2


def test_threads_load_in_orders_of_chance_that_a_seed_repeats(quantized):
    threads = WeightLoader(workers=4)
    orders = [loading_history(*quantized, 1, replace(threads, seed=seed))[0] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_the_cache_is_emptied_after_the_preparation_where_peft_does(quantized):
    assert (
        EMPTY_CACHE
        in loading_history(*quantized, 1, WeightLoader.of(transformers="5.17.0", peft="0.20.0"))[0]
    )
    assert (
        EMPTY_CACHE
        not in loading_history(*quantized, 1, WeightLoader.of(transformers="5.0.0", peft="0.19.1"))[
            0
        ]
    )


def test_the_first_block_is_as_large_as_the_model(quantized):
    model, scenario = quantized
    (first, count), (freed, _) = loading_history(model, scenario, 1, WeightLoader())[0][:2]
    assert (first, freed) == (1, -1)
    quantized_weights = sum(
        p.quant_state.shape.numel() // 2 for p in model.parameters() if hasattr(p, "quant_state")
    )
    assert quantized_weights < count < held_bytes_before_preparation(model)
    assert loading_history(model, scenario, 1, WeightLoader(warmup=False))[0][0][1] < count


def held_bytes_before_preparation(model) -> int:
    """Everything at most: packed weights and statistics, and the rest in 16 bits (it is fp32 in the finished model)."""
    return sum(held_storages(model).values())


@pytest.mark.parametrize(
    "transformers, peft, workers, empties",
    [("5.0.0", "0.19.1", 4, False), ("5.24.0", "0.21.2", 1, True)],
)
def test_versions_load_in_their_own_way(transformers, peft, workers, empties):
    loader = WeightLoader.of(transformers=transformers, peft=peft)
    assert (loader.workers, loader.empties_cache) == (workers, empties)


def test_older_versions_quantize_with_fewer_temporaries():
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    scenario = Scenario.from_mapping({"model": {"model_type": "llama", **sizes}, "method": "qlora"})
    model = build_model(scenario, "meta", attention_implementation="eager")
    older = WeightLoader.of(transformers="4.48.1", peft="0.13.2", bitsandbytes="0.43.3")
    assert (older.warmup, older.workers, older.centres_in_place) == (False, 1, True)
    events, ids, _ = loading_history(model, scenario, 1, older)
    newer, *_ = loading_history(model, scenario, 1, replace(older, centres_in_place=False))
    codes = [p.quant_state.state2.code for p in model.parameters() if hasattr(p, "quant_state")]
    assert len(codes) == 14
    assert (
        len({ids[code.untyped_storage()._cdata] for code in codes}) == 1
    )  # one map of 8-bit values for all
    allocated = [sum(identity > 0 for identity, _ in each) for each in (events, newer)]
    assert allocated[1] - allocated[0] == 2 * len(
        codes
    )  # the centred statistics, and each layer's own map


def test_with_double_quantization_only_the_map_of_8_bit_values_is_left_over():
    fields = {"model": LLAMA_3_LAYERS, "method": "qlora", "sequence_length": 64}
    fields["quantization"] = {"type": "nf4", "double": True}
    scenario = Scenario.from_mapping(fields)
    model = build_model(scenario, "meta", attention_implementation="eager")
    for workers in (1, 4):
        events, ids, left = loading_history(model, scenario, 1, WeightLoader(workers=workers))
        alive = alive_after(events)
        assert set(left) == alive.keys() - set(ids.values()) and [
            alive[identity] for identity in left
        ] == [1024]
        assert {key: alive[identity] for key, identity in ids.items()} == held_storages(model)
    assert WeightLoader(workers=4).order_is_random(model, scenario) and not WeightLoader(
        workers=1
    ).order_is_random(model, scenario)


def test_a_copy_exists_before_the_original_goes():
    device, tensor = loading._Device(1), torch.empty(4, device="meta")
    device.place(tensor, 8)
    device.replace(tensor, 16)
    assert device.events == [(1, 8), (2, 16), (-1, 0)]


def test_layers_come_in_the_order_of_their_numbers():
    names = ["layers.10.q", "layers.2.q", "layers.2.k1", "layers.2.k", "lm_head"]
    assert sorted(names, key=loading._natural_key) == [
        "layers.2.k",
        "layers.2.k1",
        "layers.2.q",
        "layers.10.q",
        "lm_head",
    ]
    scenario = Scenario.from_mapping(
        {"model": {**LLAMA_3_LAYERS, "num_hidden_layers": 11}, "method": "full"}
    )
    model = build_model(scenario, "meta", attention_implementation="eager")
    ids = loading_history(model, scenario, 1, WeightLoader()).ids
    came = [ids[layer.mlp.up_proj.weight.untyped_storage()._cdata] for layer in model.model.layers]
    assert came == sorted(came)


def test_what_lies_on_the_host_while_a_model_loads():
    """All weights where the model is built there and moved, the largest where they come one by one."""
    common = {"model": LLAMA_3_LAYERS, "sequence_length": 64, "precision": "bf16"}
    moved = Scenario.from_mapping({**common, "method": "lora"})
    model = build_model(moved, "meta")
    base = [tensor for name, tensor in model.named_parameters() if "lora_" not in name]
    weights = 2 * sum(tensor.numel() for tensor in base)
    largest = 2 * max(tensor.numel() for tensor in base)
    assert loading.host_copy_bytes(model, moved) == weights
    assert loading.host_copy_bytes(model, moved.changed(loads="device")) == largest
    quantized = Scenario.from_mapping({**common, "method": "qlora"})
    assert loading.host_copy_bytes(build_model(quantized, "meta"), quantized) == largest
