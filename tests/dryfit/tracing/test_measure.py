"""On the CPU the trace and the measurement of one step are the same to the byte."""

import pytest

from dryfit.common.errors import UserError
from dryfit.scenario.scenario import Scenario
from dryfit.tracing.measure import measure
from dryfit.tracing.trace import trace
from tests.dryfit.decoders import DECODERS

QWEN2 = DECODERS["qwen2"]
GPT_OSS = {**DECODERS["mixtral"], "model_type": "gpt_oss", "head_dim": 16, "sliding_window": 32}
SETTINGS = [
    {},
    {"attention": "eager", "method": "full"},
    {"adapter_precision": "fp16", "precision": "fp16", "gradient_checkpointing": False},
    {"gradient_accumulation": 2, "loop": "manual"},
    {"kbit_preparation": "peft", "precision": "fp16"},
    {"loss": "chunked", "micro_batch": 6},
    {"method": "full", "optimizer": "adamw_fused"},
    {"method": "full", "precision": "bf16-mixed"},
    {"method": "full", "optimizer_state_precision": "fp32"},
    {
        "attention": "eager",
        "method": "lora",
        "precision": "bf16-mixed",
        "gradient_checkpointing": False,
    },
    {"method": "full", "loss": "chunked", "micro_batch": 6, "precision": "fp16-mixed"},
    {"quantization": {"type": "nf4", "double": False}},
    {"attention_mask": "padding", "gradient_checkpointing": False},
    {"attention_mask": "padding", "attention": "eager", "method": "full"},
    {"attention_mask": "padding", "loss": "chunked", "micro_batch": 6},
    {"use_cache": True, "gradient_checkpointing": False},
    {
        "use_cache": True,
        "method": "full",
        "gradient_checkpointing": False,
        "attention_mask": "padding",
    },
    {"loop": "manual", "previous_sequence_length": 96, "gradient_checkpointing": False},
    {
        "loop": "manual",
        "previous_sequence_length": 32,
        "use_cache": True,
        "gradient_checkpointing": False,
    },
    {"gradient_checkpointing": "reentrant"},
    {"gradient_checkpointing": "reentrant", "method": "full"},
    {"gradient_checkpointing": "reentrant", "method": "lora", "autocast": "bf16"},
    {"autocast": "bf16", "method": "full", "gradient_checkpointing": False},
    # What `precision: auto` makes of the default run's step on a processor that is fast in bf16.
    {
        "precision": "bf16",
        "autocast": "bf16",
        "optimizer": "adamw_fused",
        "packing": "shared_prefix",
        "loss": "chunked",
        "gradient_checkpointing": False,
    },
    {"autocast": "bf16", "kbit_preparation": "peft"},
    {"autocast": "bf16", "kbit_preparation": "trl"},
    {"adapter_precision": "base"},
    {"quantization": {"storage": "bf16"}},
    {"quantization": {"type": "fp4", "compute": "fp32"}},
    {"quantization": {"type": "int8"}},
    {
        "quantization": {"type": "int8"},
        "gradient_checkpointing": False,
        "kbit_preparation": "peft",
        "autocast": "bf16",
    },
    {"quantization": {"type": "int8"}, "gradient_checkpointing": "reentrant", "precision": "fp32"},
    {"quantization": {"type": "int8"}, "adapter_precision": "base", "gradient_accumulation": 2},
    {"loss": "liger"},
    {"loss": "liger", "method": "full", "autocast": "bf16"},
    {"loss": "liger", "method": "full", "precision": "bf16-mixed"},
    {"lora": {"rank": 4, "alpha": 8, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}},
]


def scenario(model: dict, **fields) -> Scenario:
    fields = {
        "method": "qlora",
        "precision": "bf16",
        "sequence_length": 64,
        "micro_batch": 2,
        **fields,
    }
    return Scenario.from_mapping({"model": model, **fields})


def compare(asked: Scenario) -> None:
    """The trace is the measurement, to the byte: in all, in each phase, and what each byte is for."""
    predicted, measured = trace(asked, "cpu", timeline=False), measure(asked, "cpu", timeline=False)
    # PyTorch's own autocast doesn't say which of its copies are of weights: the measurement counts them as activations.
    predicted["components"]["activations"] += predicted["components"].pop("weight_casts", 0)
    for field in ("parameters", "resident_bytes", "phases", "peak_allocated_bytes", "components"):
        assert predicted[field] == measured[field], field


@pytest.mark.few(1)
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_methods_are_traced_to_the_byte(method, precision):
    compare(scenario(QWEN2, method=method, precision=precision))


@pytest.mark.few(4, 14)
@pytest.mark.parametrize("fields", SETTINGS, ids=str)
def test_settings_are_traced_to_the_byte(fields):
    compare(scenario(QWEN2, **fields))


def one_of_two(names, values) -> list:
    """Each name with one of two values in each run, its neighbours with the other; with both each night."""
    return [
        pytest.param(name, value, marks=() if place == number % 2 else pytest.mark.nightly)
        for number, name in enumerate(names)
        for place, value in enumerate(values)
    ]


@pytest.mark.few(4, 6)
@pytest.mark.parametrize(("name", "method"), one_of_two(DECODERS, ("full", "qlora")))
def test_architectures_are_traced_to_the_byte(name, method):
    compare(scenario(DECODERS[name], method=method))


@pytest.mark.few(1)
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_ligers_kernels_are_traced_to_the_byte(family, checkpointing):
    compare(
        scenario(
            DECODERS[family], loss="liger", kernels="liger", gradient_checkpointing=checkpointing
        )
    )


@pytest.mark.parametrize(
    ("kernels", "more"), [("unsloth", {}), ("packages", {"packages": ["fla"]})]
)
def test_kernels_that_cannot_run_here_are_not_measured(kernels, more):
    with pytest.raises(UserError, match="isn't measured here"):
        measure(scenario(QWEN2, kernels=kernels, **more), "cpu")


EXPERTS = [
    ("mixtral", {"precision": "bf16-mixed", "method": "full"}),
    ("mixtral", {"precision": "fp32"}),
    ("gpt_oss", {"precision": "bf16-mixed", "method": "lora"}),
    ("gpt_oss", {"precision": "fp32", "method": "full"}),
]


@pytest.mark.few(1)
@pytest.mark.parametrize(("name", "fields"), EXPERTS, ids=str)
def test_experts_are_traced_to_the_byte_in_every_dtype(name, fields):
    """Autocast leaves their product alone: with fp32 weights it runs in fp32, under autocast too."""
    compare(scenario(DECODERS.get(name, GPT_OSS), **fields))


PACKED = [
    (DECODERS["mixtral"], {"experts": {"quantized": "bitsandbytes"}}),
    (DECODERS["mixtral"], {"experts": {"quantized": "bitsandbytes", "offload": "host"}}),
    (DECODERS["mixtral"], {"experts": {"offload": "host"}, "method": "lora"}),
    (
        DECODERS["mixtral"],
        {
            "experts": {"quantized": "bitsandbytes"},
            "quantization": {"type": "fp4", "double": False},
        },
    ),
    (
        DECODERS["mixtral"],
        {"experts": {"quantized": "bitsandbytes"}, "quantization": {"type": "int8"}},
    ),
    (GPT_OSS, {"experts": {"quantized": "bitsandbytes"}}),
    (GPT_OSS, {"experts": {"quantized": "mxfp4"}, "method": "lora"}),
]


@pytest.mark.few(1)
@pytest.mark.parametrize(("number", "checkpointing"), one_of_two(range(len(PACKED)), (True, False)))
def test_packed_experts_are_traced_to_the_byte(number, checkpointing):
    """bitsandbytes' own packing and transformers' own unpacking run here, in the measurement."""
    model, fields = PACKED[number]
    lora = {"rank": 4, "target_modules": ["q_proj", "v_proj"]}
    compare(scenario(model, lora=lora, gradient_checkpointing=checkpointing, **fields))


ADAPTED = {
    "peft_type": "LORA",
    "r": 4,
    "target_modules": ["q_proj"],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}


@pytest.mark.thorough
def test_experts_and_layers_of_llm_int8_keep_what_they_should():
    """PEFT's `target_parameters`, which axolotl calls `lora_target_parameters`."""
    asked = scenario(DECODERS["mixtral"], adapter=ADAPTED)
    compare(asked)
    attention = scenario(DECODERS["mixtral"], lora={"rank": 4, "target_modules": ["q_proj"]})
    trained = [
        trace(one, "cpu", timeline=False)["trainable_parameters"] for one in (asked, attention)
    ]
    assert trained[0] > 2 * trained[1]
    # bitsandbytes' function holds its inputs itself, outside of what autograd saves: on the CPU measured so.
    kept = {}
    for kind in ("nf4", "int8"):
        for checkpointing in (True, "reentrant"):
            asked = scenario(
                QWEN2,
                quantization={"type": kind},
                gradient_checkpointing=checkpointing,
                precision="fp32",
            )
            kept[kind, checkpointing] = measure(asked, "cpu", timeline=False)["components"][
                "activations"
            ]
    assert (
        kept["nf4", True] < kept["nf4", "reentrant"]
        and kept["int8", True] > kept["int8", "reentrant"]
    )


def test_a_measurement_says_where_and_refuses_what_it_can_not():
    measured = measure(scenario(QWEN2), "cpu")
    assert measured["device"]["type"] == "cpu"
    assert measured["peak_resident_set_bytes"] > measured["peak_allocated_bytes"]
    assert sum(measured["components"].values()) == measured["peak_allocated_bytes"]
    assert max(measured["timeline"]["allocated_bytes"]) == measured["peak_allocated_bytes"]
    assert set(measured["versions"]) == {"bitsandbytes", "peft", "python", "torch", "transformers"}
    # PEFT 0.21.2 runs the first forward pass and fails in the second, without a tracer too.
    asked = scenario(DECODERS["mixtral"], adapter=ADAPTED, experts={"quantized": "bitsandbytes"})
    with pytest.raises(UserError, match="can't train adapters of packed experts") as caught:
        trace(asked, "cpu", timeline=False)
    assert "PEFT 0.19" in caught.value.allowed


def test_cuda_without_a_card_is_refused():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a card")
    with pytest.raises(UserError, match="No CUDA device"):
        measure(scenario(QWEN2), "cuda")
