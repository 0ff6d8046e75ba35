"""The analytic estimate on several GPUs, against the trace of the same step."""

import pytest

from dryfit.analytic.decoder import NotDescribed
from dryfit.analytic.estimate import analytic_estimate
from dryfit.scenario.scenario import Scenario
from dryfit.tracing.trace import trace
from tests.dryfit.decoders import LLAMA_3_LAYERS

WIDE = {**LLAMA_3_LAYERS, "hidden_size": 512, "intermediate_size": 1536, "vocab_size": 4096}
FSDP2, DDP = {"strategy": "fsdp2", "gpus": 2}, {"strategy": "ddp", "gpus": 2}
STEPS = [
    {"method": "full", "parallel": FSDP2},
    {
        "method": "full",
        "parallel": {**FSDP2, "gpus": 8},
        "model": {**WIDE, "tie_word_embeddings": True},
    },
    {
        "method": "full",
        "parallel": {**FSDP2, "reshard_after_forward": False},
        "gradient_accumulation": 2,
    },
    {"method": "lora", "parallel": {**FSDP2, "gpus": 4}},
    {"method": "qlora", "parallel": FSDP2},
    {"method": "qlora", "parallel": FSDP2, "quantization": {"storage": "bf16"}},
    {"method": "full", "parallel": DDP},
    {"method": "lora", "parallel": DDP},
]


def make(**fields) -> Scenario:
    return Scenario.from_mapping(
        {"model": WIDE, "sequence_length": 256, "micro_batch": 2, **fields}
    )


@pytest.mark.few(1, 3)
@pytest.mark.parametrize("fields", STEPS, ids=str)
def test_the_estimate_is_near_the_trace(fields) -> None:
    scenario = make(**fields)
    traced = trace(scenario, timeline=False)
    # A free block that is too small to be split is given whole: the estimate does not know how far it is too large, and
    # of a model as small as this one it may be a thirtieth.
    unsplit = traced["components"]["allocator_rounding"]
    for blocks in (True, False):
        found = analytic_estimate(scenario, blocks=blocks)
        assert 0.97 * traced["peak_allocated_bytes"] - unsplit < found["peak_allocated_bytes"]
        assert found["peak_allocated_bytes"] < 1.03 * traced["peak_allocated_bytes"]
    found = analytic_estimate(scenario)
    assert found["resident_bytes"] == pytest.approx(traced["resident_bytes"], rel=0.03)
    phases = ("forward", "backward", "optimizer")
    assert all(
        found["phases"][phase] == pytest.approx(traced["phases"][phase], rel=0.06)
        for phase in phases
    )


def test_embeddings_of_a_divided_model() -> None:
    """Its gradients wait for each other when all layers are done: the peak, with one buffer on its way and not two."""
    model = {**WIDE, "tie_word_embeddings": True, "vocab_size": 32768}
    step = make(
        method="full", precision="fp32", parallel={**FSDP2, "gpus": 4}, model=model, micro_batch=1
    )
    found, traced = analytic_estimate(step), trace(step, timeline=False)
    assert found["phase"] == traced["peak_phase"] == "backward"
    assert found["components"]["collective_buffers"] == pytest.approx(
        traced["components"]["collective_buffers"], rel=0.001
    )
    assert found["peak_allocated_bytes"] == pytest.approx(traced["peak_allocated_bytes"], rel=0.02)
    model = {**WIDE, "vocab_size": 32768}
    step = make(
        method="full", parallel={**FSDP2, "gpus": 8}, model=model, micro_batch=1, sequence_length=32
    )
    found, traced = analytic_estimate(step), trace(step, timeline=False)
    assert found["peak_allocated_bytes"] == pytest.approx(traced["peak_allocated_bytes"], rel=0.01)


def test_more_gpus_need_less_of_each_and_ddp_needs_more() -> None:
    peak = lambda **fields: analytic_estimate(make(method="full", **fields))["peak_allocated_bytes"]  # noqa: E731
    alone = peak()
    sharded = [peak(parallel={**FSDP2, "gpus": gpus}) for gpus in (2, 4, 8)]
    assert alone > sharded[0] > sharded[1] > sharded[2]
    assert peak(parallel=DDP) > alone


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            {"parallel": {"strategy": "fsdp1", "gpus": 2}, "method": "lora"},
            "parallel.strategy: fsdp1",
        ),
        ({"parallel": {**FSDP2, "offload": "cpu"}}, "parallel.offload: cpu"),
        ({"parallel": FSDP2, "method": "lora", "autocast": "bf16"}, "FSDP2 under autocast"),
    ],
)
def test_what_is_not_described_says_so(fields, reason) -> None:
    with pytest.raises(NotDescribed, match=reason):
        analytic_estimate(make(**fields))
