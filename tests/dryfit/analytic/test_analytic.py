"""The analytic estimate: exact counts, sums that add up, more never needs less, and the trace within 3 %."""

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dryfit.analytic.decoder import NotDescribed
from dryfit.analytic.estimate import analytic_estimate
from dryfit.analytic.families import FAMILIES
from dryfit.analytic.setting import Setting, describe
from dryfit.common.errors import UserError
from dryfit.scenario.description import Field
from dryfit.scenario.fields import FIELDS as SCENARIO_FIELDS
from dryfit.scenario.model import MODELS
from dryfit.scenario.scenario import Scenario
from tests.repository import ROOT

SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 8000,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = {"n_embd": 512, "n_layer": 4, "n_head": 8, "vocab_size": 8000, "n_positions": 4096}


def model(kind: str = "qwen2", **sizes) -> dict:
    if kind == "gpt2":
        return {"model_type": kind, **GPT2, "bos_token_id": 1, "eos_token_id": 2, **sizes}
    own = {"head_dim": 64} if FAMILIES[kind].own_head_dim else {}
    return {"model_type": kind, **SIZES, **own, **sizes}


def make(kind: str = "qwen2", **fields) -> Scenario:
    return Scenario.from_mapping(
        {"model": model(kind), "sequence_length": 512, "micro_batch": 2, **fields}
    )


def peak(scenario: Scenario) -> int:
    return analytic_estimate(scenario)["peak_allocated_bytes"]


def requested(scenario: Scenario) -> int:
    return analytic_estimate(scenario, blocks=False)["peak_allocated_bytes"]


# --- counts -----------------------------------------------------------------------------------------------------------


def test_sizes_of_a_model_and_of_its_step() -> None:
    counts = describe(json.loads((MODELS / "qwen2.5-coder-7b.json").read_text())).parameter_counts()
    assert counts["total"] == 7_615_616_512
    assert counts["linear"] == 6_525_288_448
    assert counts["embeddings"] == counts["output_head"] == 152_064 * 3_584
    step = make(sequence_length=1030)
    symbols = Setting(describe(step.model), step, (8, 0)).symbols()
    assert [symbols[name] for name in ("s", "s8", "s32", "s128")] == [1030, 1032, 1056, 1152]
    # So that nobody has to think of the closed form to be answered rightly by it.
    new = Field("fused", "", words=(True, False), default=False)
    assert new.in_closed_form(False) and not new.in_closed_form(True)
    assert all(field.in_closed_form(field.default) for field in SCENARIO_FIELDS if not field.parts)


VARIATIONS = {
    "defaults": {"num_hidden_layers": 1},
    "tied": {"tie_word_embeddings": True, **SIZES},
    "untied, biases": {
        "tie_word_embeddings": False,
        "attention_bias": True,
        "mlp_bias": True,
        **SIZES,
    },
    "norms of queries, no bias": {"qk_layernorm": True, "use_bias": False, **SIZES},
    "own head size": {"head_dim": 32, **SIZES},
}


@pytest.mark.parametrize("variation", VARIATIONS.values(), ids=VARIATIONS)
@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_counts_are_those_of_the_built_model(kind, variation) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if kind == "gpt2" and len(variation) > 1:
        variation = {
            **GPT2,
            **{key: variation[key] for key in ("tie_word_embeddings",) if key in variation},
        }
    if kind in ("phi", "phi3", "starcoder2") and "head_dim" in variation:
        pytest.skip("these take their head size from the hidden size alone")
    mapping = {"model_type": kind, **variation}
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(AutoConfig.for_model(**mapping))
    assert describe(mapping).parameter_counts()["total"] == sum(
        p.numel() for p in built.parameters()
    )


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_sizes_left_out_are_those_of_the_configuration_class(kind) -> None:
    from transformers import AutoConfig

    config, decoder = AutoConfig.for_model(kind), describe({"model_type": kind})
    assert decoder.sizes["L"] == config.num_hidden_layers
    assert decoder.sizes["h"] == config.hidden_size
    assert decoder.sizes["V"] == config.vocab_size


@pytest.mark.parametrize("kind", ["qwen2", "phi3", "gpt2", "gemma2", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("targets", ["all-linear", "first"])
def test_adapters_are_those_that_peft_makes(kind, targets) -> None:
    from dryfit.step.model import build_model

    names = [describe(model(kind)).matrices[0].name] if targets == "first" else targets
    scenario = make(kind, method="lora", lora={"rank": 4, "target_modules": names})
    built = build_model(scenario, "meta")
    trainable = sum(p.numel() for p in built.parameters() if p.requires_grad)
    assert describe(scenario.model).adapter_parameters(scenario.lora) == trainable


def test_what_the_closed_form_does_not_describe_or_refuses() -> None:
    with pytest.raises(NotDescribed, match="bloom"):
        analytic_estimate(make().changed(model={"model_type": "bloom", "hidden_size": 64}))
    with pytest.raises(NotDescribed, match="some layers only"):
        describe(model("qwen3_moe", decoder_sparse_step=2))
    with pytest.raises(UserError, match="no dropout"):
        analytic_estimate(make("qwen3_moe", lora={"dropout": 0.1}))
    with pytest.raises(UserError, match="both or none"):
        analytic_estimate(make("mixtral", lora={"target_modules": ["w1", "w2"]}))
    scenario = make(lora={"target_modules": ["query_proj", "value_proj"]})
    with pytest.raises(UserError) as caught:
        analytic_estimate(scenario, "mine.yaml")
    assert "mine.yaml" in str(caught.value)
    assert "q_proj" in caught.value.allowed
    assert caught.value.write.startswith("lora: {target_modules: ")
    scenario = Scenario.from_mapping({"model": {"model_type": "gpt2"}, "sequence_length": 2048})
    with pytest.raises(UserError, match="1024 positions"):
        analytic_estimate(scenario)


UNDESCRIBED = {
    "adapter": {"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []},
    "previous_sequence_length": 64,
    "keeps_outputs": True,
    "use_cache": True,
    "loss": "liger",
    "compile": "layers",
    "quantization": {"compute": "fp32"},
}


@pytest.mark.parametrize("field", UNDESCRIBED)
def test_a_setting_that_is_not_described_is_named(field) -> None:
    fields = {field: UNDESCRIBED[field]}
    if field in ("previous_sequence_length", "keeps_outputs"):
        fields["loop"] = "manual"
    if field == "use_cache":
        fields["gradient_checkpointing"] = False
    with pytest.raises(NotDescribed, match=field):
        analytic_estimate(make(**fields))


def test_what_windows_masks_and_segments_cost() -> None:
    plain, windows = (
        peak(make(platform=platform, sequence_length=2048)) for platform in ("linux", "windows")
    )
    assert windows > plain
    lora = {"rank": 8, "target_modules": "all-linear"}
    without = peak(make(lora=lora, gradient_checkpointing=False))
    assert peak(make(lora={**lora, "dropout": 0.1}, gradient_checkpointing=False)) > without
    step = make(sequence_length=1000)
    grown = step.changed(allocator={"expandable_segments": True})
    assert peak(grown) < peak(step)
    rough = analytic_estimate(grown, blocks=False)["peak_allocated_bytes"]
    assert rough == pytest.approx(peak(grown), rel=0.01)


@pytest.mark.parametrize("names", [["q_proj", "lm_head"], ["model.embed_tokens"]])
def test_adapters_outside_of_the_layers_are_not_described(names) -> None:
    """They were counted as nothing once: the trace of a 7B model with rank 512 has 15 % more."""
    with pytest.raises(NotDescribed, match=names[-1].rsplit(".", 1)[-1]):
        analytic_estimate(
            Scenario.from_mapping({"model": "qwen2.5-coder-7b", "lora": {"target_modules": names}})
        )


@pytest.mark.thorough
def test_needs_no_torch() -> None:
    code = (
        "import sys; from dryfit.scenario.scenario import Scenario;"
        "from dryfit.analytic.estimate import analytic_estimate;"
        "analytic_estimate(Scenario.from_mapping({'model': 'qwen2.5-coder-7b'}));"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# --- sums and order -----------------------------------------------------------------------------------------------


FIELDS = st.fixed_dictionaries(
    {
        "method": st.sampled_from(["full", "lora", "qlora"]),
        "precision": st.sampled_from(["fp32", "fp16", "bf16"]),
        "gradient_checkpointing": st.sampled_from([True, False, "reentrant"]),
        "attention": st.sampled_from(["eager", "sdpa", "mem_efficient"]),
        "optimizer": st.sampled_from(["adamw", "adamw_fused", "adamw_8bit", "lion_8bit"]),
        "loss": st.sampled_from(["full", "chunked"]),
        "sequence_length": st.integers(8, 2048),
        "micro_batch": st.integers(1, 8),
    }
)
KINDS = st.sampled_from(sorted(FAMILIES))


@settings(max_examples=25, deadline=None)
@given(kind=KINDS, fields=FIELDS)
def test_components_add_up_to_the_peak(kind, fields) -> None:
    form = analytic_estimate(make(kind, **fields))
    assert sum(form["components"].values()) == form["peak_allocated_bytes"]
    assert sum(term["bytes"] for term in form["terms"]) == form["peak_allocated_bytes"]
    assert all(term["bytes"] > 0 for term in form["terms"])
    assert form["peak_allocated_bytes"] == max(
        form["phases"][p] for p in ("forward", "backward", "optimizer")
    )
    assert form["resident_bytes"] <= form["phases"]["load"]


@settings(max_examples=25, deadline=None)
@given(kind=KINDS, fields=FIELDS)
def test_more_never_needs_less(kind, fields) -> None:
    peak = requested  # blocks may happen to fit larger tensors better
    scenario = make(kind, **fields)
    base = peak(scenario)
    assert peak(scenario.changed(micro_batch=scenario.micro_batch + 1)) >= base
    assert peak(scenario.changed(sequence_length=scenario.sequence_length * 2)) >= base
    key = "n_layer" if kind == "gpt2" else "num_hidden_layers"
    deeper = {**scenario.model, key: scenario.model[key] + 1}
    assert peak(scenario.changed(model=deeper)) >= base
    if scenario.lora:
        wider = {**scenario.to_mapping()["lora"], "rank": scenario.lora.rank * 2}
        assert peak(scenario.changed(lora=wider)) >= base


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("checkpointing", [True, False, "reentrant"])
def test_layers_that_are_not_run_count_like_those_that_are(layers, checkpointing) -> None:
    """From four layers on only three are run: peaks must go on growing by the same amount."""
    peaks = [
        requested(make(model=model(num_hidden_layers=n), gradient_checkpointing=checkpointing))
        for n in (layers, layers + 1, layers + 2)
    ]
    first, second = peaks[1] - peaks[0], peaks[2] - peaks[1]
    assert second == pytest.approx(first, rel=0.02) or layers < 3


def test_accumulation_keeps_gradients_through_the_forward_pass() -> None:
    once, often = (
        analytic_estimate(make(method="full", gradient_accumulation=n), blocks=False)
        for n in (1, 4)
    )
    weights = once["parameters"]["total"] * 2
    assert often["phases"]["forward"] - once["phases"]["forward"] == pytest.approx(
        weights, rel=0.05
    )


# --- against the trace ------------------------------------------------------------------------------------------------

ALIKE = [
    ("qwen2", {}),
    ("qwen2", {"method": "full"}),
    ("qwen2", {"method": "full", "gradient_checkpointing": False, "precision": "fp32"}),
    ("qwen2", {"method": "full", "precision": "bf16-mixed"}),
    ("qwen2", {"method": "full", "gradient_accumulation": 3, "optimizer": "adamw_fused"}),
    ("qwen2", {"method": "lora", "gradient_checkpointing": False}),
    ("qwen2", {"method": "lora", "precision": "fp16-mixed", "gradient_checkpointing": False}),
    ("qwen2", {"method": "lora", "attention": "eager", "precision": "fp16"}),
    ("qwen2", {"gradient_checkpointing": False, "attention": "mem_efficient"}),
    (
        "qwen2",
        {"gradient_checkpointing": False, "attention": "flash", "optimizer": "paged_adamw_8bit"},
    ),
    ("qwen2", {"loss": "chunked", "gradient_checkpointing": False}),
    ("qwen2", {"loop": "manual"}),
    ("qwen2", {"method": "full", "optimizer": "lion_8bit"}),
    ("qwen2", {"allocator": {"expandable_segments": True}}),
    ("qwen2", {"kbit_preparation": "peft", "precision": "fp16", "attention": "mem_efficient"}),
    ("qwen2", {"quantization": {"double": False}, "adapter_precision": "bf16"}),
    ("qwen2", {"lora": {"rank": 64, "target_modules": ["q_proj", "v_proj"]}}),
    ("llama", {"gradient_checkpointing": False}),
    ("mistral", {"method": "full"}),
    ("qwen3", {"gradient_checkpointing": False}),
    ("gemma", {"method": "lora"}),
    ("gemma2", {"method": "lora", "gradient_checkpointing": False}),
    ("gemma3_text", {"method": "full"}),
    ("phi", {"gradient_checkpointing": False}),
    ("phi3", {}),
    ("gpt2", {"method": "lora"}),
    ("gpt2", {"method": "full", "gradient_checkpointing": False}),
    ("smollm3", {}),
    ("starcoder2", {"method": "full"}),
    ("qwen2", {"autocast": "bf16", "gradient_checkpointing": False}),
    ("qwen2", {"autocast": "bf16", "method": "full"}),
    ("llama", {"kbit_preparation": "trl", "autocast": "bf16"}),
    ("gemma", {"kbit_preparation": "trl", "gradient_checkpointing": False}),
    ("qwen2", {"adapter_precision": "base", "method": "lora"}),
    ("gpt2", {"precision": "bf16-mixed", "method": "lora", "gradient_checkpointing": False}),
    ("qwen3_moe", {"gradient_checkpointing": False}),
    ("qwen3_moe", {"method": "full"}),
    ("qwen3_moe", {"method": "lora", "lora": {"target_modules": ["q_proj", "v_proj"]}}),
    (
        "mixtral",
        {
            "method": "lora",
            "lora": {"target_modules": ["w1", "w3", "gate"]},
            "gradient_checkpointing": False,
        },
    ),
    ("mixtral", {}),
    ("qwen2", {"packing": "shared_prefix", "gradient_checkpointing": False}),
    ("qwen2", {"packing": "rows", "method": "full", "attention": "eager"}),
    (
        "qwen2",
        {
            "packing": "rows",
            "method": "full",
            "sequence_length": 501,
            "gradient_checkpointing": False,
        },
    ),
    ("llama", {"packing": "rows", "kbit_preparation": "peft", "sequence_length": 2048}),
    ("mistral", {"packing": "rows", "method": "lora", "sequence_length": 2048, "loss": "chunked"}),
    ("gemma2", {"packing": "rows", "method": "lora"}),
    ("gpt2", {"packing": "rows", "method": "lora"}),
    ("phi3", {"packing": "rows", "autocast": "bf16"}),
    ("qwen2", {"attention_mask": "padding", "gradient_checkpointing": False}),
    ("llama", {"attention_mask": "padding", "method": "full", "sequence_length": 1001}),
    ("gemma2", {"attention_mask": "padding", "method": "lora", "attention": "eager"}),
    (
        "gpt2",
        {"attention_mask": "padding", "method": "lora", "gradient_checkpointing": "reentrant"},
    ),
    ("qwen2", {"gradient_checkpointing": "reentrant"}),
    ("llama", {"gradient_checkpointing": "reentrant", "autocast": "bf16"}),
    ("qwen3", {"gradient_checkpointing": "reentrant", "method": "lora", "sequence_length": 2048}),
    ("gemma2", {"gradient_checkpointing": "reentrant", "method": "full"}),
    ("gpt2", {"gradient_checkpointing": "reentrant", "method": "full", "precision": "bf16-mixed"}),
    ("phi", {"gradient_checkpointing": "reentrant", "method": "lora", "precision": "bf16-mixed"}),
    (
        "mixtral",
        {"gradient_checkpointing": "reentrant", "method": "full", "gradient_accumulation": 2},
    ),
    ("starcoder2", {"gradient_checkpointing": "reentrant", "loss": "chunked"}),
]


@pytest.mark.few(4, 14)
@pytest.mark.parametrize(
    ("kind", "fields"), ALIKE, ids=[f"{k}-{'-'.join(map(str, f.values()))}" for k, f in ALIKE]
)
def test_trace_within_three_per_cent(kind, fields) -> None:
    from dryfit.tracing.trace import trace

    scenario = make(kind, **fields)
    assert peak(scenario) == pytest.approx(
        trace(scenario, timeline=False)["peak_allocated_bytes"], rel=0.03
    )


@pytest.mark.thorough
def test_a_pack_brings_positions_and_a_mask_of_the_queries_dtype() -> None:
    """Compared alone: of a step's peak they are little."""
    from dryfit.tracing.trace import trace

    for kind, fields in (
        ("qwen2", {}),
        ("qwen2", {"kbit_preparation": "peft"}),
        ("gemma2", {"method": "lora"}),
    ):
        step = make(kind, packing="rows", sequence_length=1024, **fields)
        traced = trace(step, timeline=False)["components_by_phase"]["forward"]["inputs"]
        terms = [term for term in analytic_estimate(step)["terms"] if term["component"] == "inputs"]
        assert sum(term["bytes"] for term in terms) == traced
    windowed = model(use_sliding_window=True, sliding_window=64, max_window_layers=3)
    with pytest.raises(NotDescribed, match="some layers have a window"):
        analytic_estimate(make(packing="rows").changed(model=windowed))


def test_trace_of_an_older_card_within_three_per_cent() -> None:
    """Before compute capability 8.0 grouped attention in 16 bits runs by formula."""
    from dryfit.tracing.trace import trace

    scenario = make(gradient_checkpointing=False)
    traced = trace(scenario, capability=(7, 5), timeline=False)["peak_allocated_bytes"]
    assert analytic_estimate(scenario, capability=(7, 5))["peak_allocated_bytes"] == pytest.approx(
        traced, rel=0.03
    )


@pytest.mark.nightly
def test_fp32_states_of_16_bit_weights_take_8_bytes_a_weight() -> None:
    """Two fp32 numbers for each. Trace and allocator agree with the closed form."""
    from dryfit.analytic.allocations import form_events
    from dryfit.engine.capacities import capacities
    from dryfit.tracing.trace import trace

    for kind in ("qwen2", "gemma2"):
        scenario = make(kind, method="full", optimizer_state_precision="fp32")
        found, traced = analytic_estimate(scenario), trace(scenario, timeline=False)
        assert found["components"]["optimizer_states"] == 8 * found["parameters"]["total"]
        assert found["phases"] == pytest.approx(traced["phases"], rel=0.03)
        required = capacities(form_events(scenario), expandable_segments=False).required_bytes
        assert required == pytest.approx(traced["required_bytes"], rel=0.05)


def test_target_model_within_three_per_cent() -> None:
    from dryfit.tracing.trace import trace

    for fields in ({"method": "full", "precision": "fp32"}, {"method": "full"}, {}):
        scenario = Scenario.from_mapping({"model": "qwen2.5-coder-7b", **fields})
        traced = trace(scenario, timeline=False)["peak_allocated_bytes"]
        assert peak(scenario) == pytest.approx(traced, rel=0.03)


def states(fields: dict, **sizes) -> tuple[int, int]:
    """Optimizer states as the estimate holds them, in blocks, and as the trace counts them, in bytes."""
    from dryfit.tracing.trace import trace

    step = make(method="full", sequence_length=16, **fields).changed(
        model=model(num_hidden_layers=2, **sizes)
    )
    return tuple(
        found["components"]["optimizer_states"] for found in (analytic_estimate(step), trace(step))
    )


@pytest.mark.parametrize(
    ("optimizer", "sizes"),
    [
        # Norms and a bias of exactly 4,096 elements, the fewest whose states have 8 bits.
        (
            "adamw_8bit",
            {
                "hidden_size": 4096,
                "num_attention_heads": 32,
                "intermediate_size": 64,
                "vocab_size": 64,
            },
        ),
        # Embeddings of exactly 100,000 elements, the fewest whose states are paged.
        (
            "paged_adamw_8bit",
            {
                "hidden_size": 1000,
                "num_attention_heads": 10,
                "intermediate_size": 64,
                "vocab_size": 100,
            },
        ),
    ],
)
def test_states_of_8_bits_and_paged_ones_begin_where_bitsandbytes_has_them(
    optimizer, sizes
) -> None:
    estimated, traced = states({"optimizer": optimizer}, **sizes)
    tensors = (
        27  # 2 x 12 of the layers, embeddings, head and final norm; two moments with scales of each
    )
    assert 0 <= estimated - traced < 512 * 4 * tensors


def test_each_tensor_of_fused_adamw_has_a_step_counter() -> None:
    sizes = {
        "hidden_size": 512,
        "intermediate_size": 512,
        "vocab_size": 512,
        "num_attention_heads": 2,
    }
    estimated, traced = states({"optimizer": "adamw_fused"}, **sizes)
    assert estimated - traced == 27 * (512 - 4)


@pytest.mark.thorough
def test_cublaslt_has_a_workspace_for_autograds_thread_where_it_recomputes() -> None:
    from dryfit.tracing.trace import trace

    for checkpointing, threads in ((True, 2), (False, 1)):
        step = make(method="lora", gradient_checkpointing=checkpointing)
        found = [
            made["components"]["workspaces"] for made in (analytic_estimate(step), trace(step))
        ]
        assert found == [2 * 8_519_680 + threads * 2**20] * 2
