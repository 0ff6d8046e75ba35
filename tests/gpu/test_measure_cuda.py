"""On a card: the model is the one of the other devices, and the trace foretells the allocator's statistics."""

import pytest

from dryfit.scenario.scenario import Scenario

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MODEL = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "max_position_embeddings": 4096,
    "model_type": "qwen2",
    "num_attention_heads": 16,
    "num_hidden_layers": 8,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
SETTINGS = [
    {},
    {"method": "full", "precision": "bf16"},
    {"method": "lora"},
    {"attention": "eager"},
    {"attention": "mem_efficient", "precision": "fp16"},
    {"attention": "flash"},
    {"gradient_checkpointing": False},
    {"kbit_preparation": "peft", "precision": "fp16"},
    {"loss": "chunked"},
    {"optimizer": "adamw_8bit"},
    {"optimizer": "paged_adamw_8bit"},
    {"method": "full", "optimizer": "adamw_fused"},
    {"method": "full", "precision": "bf16-mixed"},
    {"gradient_accumulation": 2, "loop": "manual"},
]


def scenario(**fields) -> Scenario:
    fields = {
        "method": "qlora",
        "precision": "bf16",
        "sequence_length": 1024,
        "micro_batch": 2,
        **fields,
    }
    return Scenario.from_mapping({"model": MODEL, **fields})


def needs_ampere(fields: dict) -> bool:
    return fields.get("attention") == "flash" or fields.get("precision", "bf16").startswith("bf16")


@pytest.mark.parametrize("fields", SETTINGS, ids=str)
def test_trace_against_the_allocator(fields):
    from dryfit.tracing.measure import measure
    from dryfit.tracing.trace import trace

    capability = torch.cuda.get_device_capability()
    if needs_ampere(fields) and capability < (8, 0):
        pytest.skip("needs compute capability 8.0")
    measured = measure(scenario(**fields), "cuda")
    predicted = trace(scenario(**fields), capability=capability, timeline=False)
    assert predicted["parameters"] == measured["parameters"]
    assert predicted["peak_allocated_bytes"] == pytest.approx(
        measured["peak_allocated_bytes"], rel=0.01
    )
    assert predicted["resident_bytes"] == pytest.approx(measured["resident_bytes"], rel=0.01)
    assert predicted["peak_reserved_bytes"] == pytest.approx(
        measured["peak_reserved_bytes"], rel=0.05
    )


def test_context_and_reserved_memory_are_measured():
    from dryfit.tracing.measure import measure

    measured = measure(scenario(precision="fp16", sequence_length=64), "cuda")
    assert 0 < measured["context_bytes"] < measured["device"]["total_bytes"]
    assert measured["peak_reserved_bytes"] >= measured["peak_allocated_bytes"]


def test_model_on_the_card_is_the_model_on_meta():
    from dryfit.step.model import build_model
    from dryfit.step.quantized import assert_quantized

    asked = scenario()
    card, meta = build_model(asked, "cuda"), build_model(asked, "meta")
    assert assert_quantized(card, asked) == assert_quantized(meta, asked)
    layout = [
        [(n, p.shape, p.dtype, p.requires_grad) for n, p in m.named_parameters()]
        for m in (card, meta)
    ]
    assert layout[0] == layout[1]


def test_training_on_the_card_learns():
    from dryfit.step.model import build_model
    from dryfit.step.optimizers import build_optimizer
    from dryfit.step.step import forward_backward, optimizer_step, random_batch

    asked = scenario(precision="fp16", sequence_length=64)
    model = build_model(asked, "cuda")
    optimizer = build_optimizer(model, asked, learning_rate=1e-3)
    batch = random_batch(asked, "cuda", MODEL["vocab_size"])
    losses = []
    for _ in range(10):
        losses.append(float(forward_backward(model, batch, asked)))
        optimizer_step(model, optimizer, asked, max_grad_norm=1.0)
    assert losses[-1] < losses[0]
