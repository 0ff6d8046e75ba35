"""bitsandbytes' layers on ``meta``: 8-bit products against its own on the CPU, and layers of earlier versions."""

import sys

import bitsandbytes
import pytest
import torch
from bitsandbytes.nn import Linear8bitLt

from dryfit.common.errors import UserError
from dryfit.engine import Options, on_meta, quantize_8bit, trace_step
from dryfit.engine.bitsandbytes_layers import _product, _quantized_rows, int8_products, layers_of
from dryfit.engine.bitsandbytes_rules import packed, packing
from dryfit.engine.errors import TraceError
from dryfit.scenario.contradictions import TRAINING, contradictions
from dryfit.scenario.scenario import Scenario
from dryfit.step.model import build_model
from dryfit.step.step import forward_backward, random_batch
from dryfit.tracing.measure import measure
from dryfit.tracing.trace import trace
from tests.dryfit.decoders import DECODERS

ROWS, INNER, OUTPUTS = 48, 64, 32


def layout(tensors) -> list[tuple]:
    return [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]


def test_stand_ins_return_what_bitsandbytes_returns_where_no_input_is_large():
    inputs, weight = (
        torch.rand(ROWS, INNER, dtype=torch.float16),
        torch.rand(OUTPUTS, INNER, dtype=torch.float16),
    )
    packed, scales, none = bitsandbytes.functional.int8_vectorwise_quant(inputs, 6.0)
    real = [packed, scales, none]
    stood_in = _quantized_rows(inputs.to("meta"), 6.0)
    assert layout(real) == layout(stood_in) and none.numel() == 0
    weight_packed, weight_scales, _ = bitsandbytes.functional.int8_vectorwise_quant(weight)
    arguments = (inputs, packed, weight_packed, scales, weight_scales, none)
    real = torch.ops.bitsandbytes.int8_mixed_scaled_mm(*arguments)
    assert layout(real) == layout(_product(*(tensor.to("meta") for tensor in arguments)))


def test_what_a_layer_allocates_is_worked_out_by_hand():
    with on_meta():
        layer = Linear8bitLt(INNER, OUTPUTS, bias=False, has_fp16_weights=False, threshold=6.0)
        inputs = torch.empty(ROWS, INNER, dtype=torch.bfloat16, requires_grad=True)
    quantize_8bit(layer)

    def step() -> None:
        layer(inputs)

    report = trace_step(layer, None, step, options=Options(steps=1, timeline=False))
    assert report.components["weights_8bit"] == OUTPUTS * INNER
    assert report.components["quantization_state"] == OUTPUTS * 4
    element = ROWS * INNER
    # In `int8_vectorwise_quant`: bf16 inputs, their fp16 copy; scales, bytes; magnitudes while they are compared.
    quantizing = element * (2 + 2 + 1 + 2 + 1) + ROWS * 4
    # In `int8_mm_dequant`: inputs, bytes and scales; 32-bit sums, fp16, bf16.
    multiplying = element * (2 + 1) + ROWS * 4 + ROWS * OUTPUTS * (4 + 2 + 2)
    held = report.components["weights_8bit"] + report.components["quantization_state"]
    peak = report.peak_allocated_bytes - report.components.get("allocator_rounding", 0)
    assert peak - held in (quantizing, multiplying)


def test_nothing_is_exchanged_for_programs_without_bitsandbytes(monkeypatch):
    monkeypatch.delitem(__import__("sys").modules, "bitsandbytes")
    assert int8_products("cuda") == int8_products("cpu") == []


@pytest.mark.parametrize(
    ("target", "place", "name"),
    [
        ("cuda", "bitsandbytes.functional", "int8_vectorwise_quant"),
        ("cpu", "bitsandbytes.autograd._functions", "MatMul8bitFp"),
    ],
)
def test_an_older_bitsandbytes_costs_its_8_bit_layers_and_nothing_else(
    monkeypatch, target, place, name
):
    """As 0.43.3, which the A100's rows were measured with: every trace ended in an AttributeError."""
    monkeypatch.delattr(sys.modules[place], name)
    with on_meta():
        model = torch.nn.Linear(INNER, OUTPUTS)
        inputs = torch.empty(ROWS, INNER)
        layer = Linear8bitLt(INNER, OUTPUTS, bias=False, has_fp16_weights=False, threshold=6.0)
    quantize_8bit(layer)
    options = Options(target=target, steps=1)
    assert trace_step(
        model, None, lambda: model(inputs).sum().backward(), options=options
    ).peak_allocated_bytes
    with pytest.raises(TraceError, match="8-bit layers of bitsandbytes"):
        trace_step(layer, None, lambda: layer(inputs), options=options)


# --- 4-bit layers of earlier versions: what they kept, to the byte, and the same numbers ---


def scenario(version: str | None, **fields) -> Scenario:
    fields = {
        "method": "qlora",
        "precision": "bf16",
        "sequence_length": 64,
        "micro_batch": 2,
        **fields,
    }
    versions = {"bitsandbytes": version}
    return Scenario.from_mapping(
        {
            "model": DECODERS["qwen2"],
            "gradient_checkpointing": False,
            "versions": versions,
            **fields,
        }
    )


@pytest.mark.few(1)
@pytest.mark.parametrize("version", ["0.42.0", "0.43.1"])
def test_a_step_is_traced_to_the_byte(version):
    asked = scenario(version)
    assert (
        trace(asked, "cpu", timeline=False)["phases"]
        == measure(asked, "cpu", timeline=False)["phases"]
    )


def test_inputs_live_as_long_as_the_graph_before_0_43_2():
    kept, freed, installed = (
        trace(scenario(version), timeline=False)["phases"] for version in ("0.43.1", "0.43.2", None)
    )
    assert freed == installed
    tokens, layers = 2 * 64, 2
    inputs = (
        layers * tokens * (3 * 64 + 96) * 2
    )  # of q, k and v together, o, gate and up together, down: the last 96
    assert kept["forward"] - freed["forward"] > 0.5 * inputs


def test_the_gradients_are_the_same():
    asked, found = scenario(None, precision="fp32"), []
    for version in ("0.43.1", None):
        with layers_of(version):
            model = build_model(asked, "cpu")
            loss = forward_backward(
                model, random_batch(asked, "cpu", asked.size("vocab_size")), asked
            )
        found.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
    for old, new in zip(*found, strict=True):
        torch.testing.assert_close(old, new)


def test_what_is_no_version_is_refused():
    with pytest.raises(TraceError, match="'old' is no version"), layers_of("old"):
        pass
    with pytest.raises(UserError, match="is no version"):
        scenario("old")
    with pytest.raises(UserError, match="only 4-bit layers differ"):
        scenario("0.42.0", method="lora")
    (problem,) = contradictions(
        scenario("0.42.0"), "training", TRAINING, {"on_out_of_memory": "stop"}
    )
    assert "is installed" in str(problem)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("in_place", [True, False])
def test_packing_leaves_what_a_packed_weight_is(nested, in_place) -> None:
    how = {"nested": nested, "block": 128, "storage": 2}
    alive: dict[str, int] = {}
    for name, size in packing(100_003, **how, in_place=in_place):
        assert (name in alive) == (size == 0), name
        if size:
            alive[name] = size
        else:
            del alive[name]
    shared = alive.pop("map", None)
    kept = {name: width * count for name, (width, count) in packed(100_003, **how).items()}
    if nested and in_place:  # one map serves all weights
        assert kept.pop("nested_code") == shared
    assert alive == kept
