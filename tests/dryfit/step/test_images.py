"""Images in the rows: a vision-language model's step is traced as a CPU measures it, to the byte in every phase."""

import pytest

from dryfit.analytic.estimate import estimate
from dryfit.common.errors import UserError
from dryfit.scenario.contradictions import TRAINING, contradictions
from dryfit.scenario.scenario import Scenario
from dryfit.step.adapters import outside_language
from dryfit.step.model import build_model
from dryfit.tracing.measure import measure
from dryfit.tracing.trace import trace

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
TURNED = {"rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
GRID = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
}
MODELS = {
    "gemma3": {
        "text_config": TEXT | {"model_type": "gemma3_text", "sliding_window": 16},
        "vision_config": TOWER | {"model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
        "image_token_index": 290,
    },
    "llava": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": TOWER | {"model_type": "clip_vision_model", "projection_dim": 32},
        "image_token_index": 290,
    },
    "qwen2_vl": {
        "text_config": TEXT | TURNED | {"model_type": "qwen2_vl_text"},
        "vision_config": {
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 64,
            "mlp_ratio": 2,
            "num_heads": 2,
        },
        "image_token_id": 290,
    },
    "qwen2_5_vl": {
        "text_config": TEXT | TURNED | {"model_type": "qwen2_5_vl_text"},
        "vision_config": GRID | {"window_size": 56, "fullatt_block_indexes": [1]},
        "image_token_id": 290,
    },
    "qwen3_vl": {
        "text_config": TEXT | TURNED | {"model_type": "qwen3_vl_text"},
        "vision_config": GRID
        | {"deepstack_visual_indexes": [0], "num_position_embeddings": 64, "patch_size": 14},
        "image_token_id": 290,
    },
    "gemma4": {
        "text_config": TEXT
        | {
            "model_type": "gemma4_text",
            "num_attention_heads": 4,
            "global_head_dim": 32,
            "num_global_key_value_heads": 1,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 16,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "enable_moe_block": False,
            "attention_k_eq_v": True,
        },
        "vision_config": {
            "model_type": "gemma4_vision",
            "hidden_size": 32,
            "intermediate_size": 48,
            "head_dim": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "patch_size": 14,
            "global_head_dim": 16,
            "pooling_kernel_size": 2,
            "position_embedding_size": 64,
        },
        "audio_config": None,
        "vision_soft_tokens_per_image": 9,
        "image_token_id": 290,
    },
}


def scenario(kind="gemma3", *, model=None, images=None, **fields):
    images = {"count": 2, "height": 56, "width": 56, **(images or {})}
    step = {
        "method": "lora",
        "precision": "bf16",
        "sequence_length": 48,
        "micro_batch": 2,
        **fields,
    }
    return Scenario.from_mapping(
        {"model": {"model_type": kind} | (model or MODELS[kind]), "images": images, **step}
    )


CASES = {
    **{f"{kind}, adapters on the language model": (kind, {}) for kind in MODELS},
    "gemma3, adapters everywhere": (
        "gemma3",
        {"images": {"trained": "all"}, "gradient_checkpointing": False},
    ),
    "gemma3, a 4-bit base": ("gemma3", {"method": "qlora", "autocast": "bf16"}),
    "llava, all weights": ("llava", {"method": "full", "images": {"trained": "all"}}),
    "qwen2_5_vl, the language model's weights": (
        "qwen2_5_vl",
        {"method": "full", "images": {"width": 84}},
    ),
}


@pytest.mark.few(1, 3)
@pytest.mark.parametrize(("kind", "fields"), CASES.values(), ids=CASES)
def test_a_step_with_images_is_traced_to_the_byte(kind, fields):
    asked = scenario(kind, **fields)
    predicted, measured = trace(asked, "cpu", timeline=False), measure(asked, "cpu", timeline=False)
    assert predicted["phases"] == measured["phases"]
    if not asked.autocast:  # the casts of weights are labelled in a trace alone
        assert predicted["components"] == measured["components"]


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", MODELS)
def test_what_is_trained_is_what_was_asked_for(kind):
    def trained(**fields):
        model = build_model(scenario(kind, **fields), "meta")
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    everywhere = {"images": {"trained": "all"}}
    for method in ("lora", "full"):
        language, everything = trained(method=method), trained(method=method, **everywhere)
        assert language < everything
        assert all("language_model" in name or "lm_head" in name for name in language)
        assert any("vis" in name for name in everything - language)
    towers = outside_language(build_model(scenario(kind, method="full", **everywhere), "meta"))
    assert towers and not any("language_model" in name for name in towers)


@pytest.mark.thorough
def test_larger_images_and_more_of_them_take_more():
    peaks = [
        trace(scenario("qwen2_5_vl", images=images, sequence_length=200), timeline=False)["phases"][
            "forward"
        ]
        for images in ({"count": 1}, {"count": 2}, {"count": 2, "height": 112, "width": 224})
    ]
    assert peaks == sorted(set(peaks))


def test_a_row_longer_than_what_keeps_its_values_is_traced_too():
    model = MODELS["llava"] | {
        "text_config": TEXT | {"model_type": "llama", "num_hidden_layers": 1}
    }
    asked = scenario("llava", model=model, micro_batch=9, sequence_length=8192)
    assert trace(asked, timeline=False)["peak_allocated_bytes"] > 0


BAD = {
    "a language model": (
        {"model": {"model_type": "qwen2", **TEXT}},
        "no part for them",
        "images: null",
    ),
    "another family": (
        {
            "model": {
                "model_type": "idefics3",
                "text_config": TEXT | {"model_type": "llama"},
                "vision_config": TOWER,
            }
        },
        "images of this family are not known here",
        "images: null",
    ),
    "another size": (
        {"images": {"height": 60}},
        "takes no images of this size",
        "height: 56, width: 56",
    ),
    "no room": ({"images": {"count": 20}}, "no room for the images", "sequence_length: 101"),
    "a chunked loss": ({"loss": "chunked"}, "don't go together", "loss: full"),
    "packed rows": ({"packing": "rows"}, "packed rows hold text", "packing: none"),
    "another objective": ({"objective": "dpo"}, "TRL's trainers would prepare", "objective: sft"),
    "several GPUs": (
        {"parallel": {"strategy": "ddp", "gpus": 2}},
        "not predicted together",
        "strategy: none",
    ),
    "a tower that can't be left out": (
        {"adapter": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}},
        "can't leave the vision tower out",
        "peft_type: LORA",
    ),
}


@pytest.mark.parametrize(("fields", "problem", "write"), BAD.values(), ids=BAD)
def test_what_can_not_be_is_said_in_words(fields, problem, write):
    with pytest.raises(UserError, match=problem) as caught:
        build_model(
            scenario(**fields)
            if "model" not in fields
            else Scenario.from_mapping({"images": {"height": 56, "width": 56}, **fields}),
            "meta",
        )
    assert write in (caught.value.write or str(caught.value))


def test_a_size_that_is_missing_and_a_training():
    with pytest.raises(UserError, match="needs width"):
        Scenario.from_mapping(
            {"model": {"model_type": "gemma3"} | MODELS["gemma3"], "images": {"height": 56}}
        )
    asked = scenario()
    assert Scenario.from_mapping(asked.to_mapping()) == asked
    assert estimate(asked).analytic is None
    (problem,) = contradictions(asked, "training", TRAINING, {"on_out_of_memory": "stop"})
    assert problem.write == "images: null"


def test_gemma_4_takes_as_many_tokens_as_its_processor_leaves():
    """Patches are filled up to the most tokens times pool x pool; what is larger is made smaller before."""
    asked = scenario("gemma4", images={"count": 1})
    assert asked.images.tokens(asked.model) == 4 and asked.images.pixels(asked.model, 2) == (
        2,
        9 * 4,
        3 * 14 * 14,
    )
    with pytest.raises(UserError, match="makes them smaller") as caught:
        scenario("gemma4", images={"count": 1, "height": 28 * 4, "width": 28 * 3})
    assert "at most 9 tokens of 28 x 28 pixels" in caught.value.allowed


@pytest.mark.parametrize("name", ["qwen2.5-vl-7b", "qwen3-vl-4b", "gemma-4-31b", "qwen3.5-9b"])
@pytest.mark.parametrize("place", ["name", "folder", "file"])
def test_without_images_the_answer_says_so_and_gives_the_line(name, place, tmp_path):
    """Qwen2.5-VL's rotary positions of three axes load, and become those of text."""
    from dryfit.ask.question import QuestionOptions, question
    from dryfit.scenario.hub import MODELS

    file = tmp_path / name / "config.json"
    file.parent.mkdir()
    file.write_text((MODELS / f"{name}.json").read_text())
    what = {"name": name, "folder": str(file.parent), "file": str(file)}[place]
    asked = question([what], QuestionOptions(sequence_length=2048))
    (warning,) = asked.asked.warnings
    assert "the language model alone" in warning and "images: {count: 1, height: 4" in warning
    line = warning.partition("--set '")[2].partition("'")[0]
    whole = question([what], QuestionOptions(sequence_length=2048, settings=[line]))
    assert whole.scenario.images and not whole.asked.warnings
