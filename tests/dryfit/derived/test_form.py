"""A record answers inside of what it was recorded for, and nothing else; one that can't be used says why, once."""

import json
import zipfile
from contextlib import suppress
from itertools import product
from pathlib import Path

import pytest

from dryfit.ask.answer import quick
from dryfit.ask.question import QuestionOptions, question
from dryfit.common.errors import UserError
from dryfit.data import data_path
from dryfit.derived import form
from dryfit.derived.families import FAMILIES, family_of, language_model_of
from dryfit.derived.form import NoRecord, Records, StepKey, composed_step, form_of, records_of
from dryfit.recorder.variants import METHODS, OPTIONS
from dryfit.scenario.scenario import Scenario

ROOT = Path(__file__).parents[3]
BASE = {"model": "qwen2.5-3b", "method": "qlora", "sequence_length": 512}


def scenario(**changes: object) -> Scenario:
    return Scenario.from_mapping({**BASE, **changes}, {})


def model(**changes: object) -> dict:
    return {**scenario().model, **changes}


def rewritten(tmp_path: Path, **changes: object) -> Path:
    """The record with other entries in its index."""
    path = tmp_path / "qwen2.zip"
    with (
        zipfile.ZipFile(data_path("records", "qwen2.zip")) as old,
        zipfile.ZipFile(path, "w") as new,
    ):
        for name in old.namelist():
            index = json.loads(old.read(name))
            new.writestr(name, json.dumps(index | changes if name == "record.json" else index))
    return path


def test_which_steps_of_the_catalogue_are_answered() -> None:
    (composed,) = composed_step(scenario())[1]
    assert composed.marks[-1][0] == "end"
    with pytest.raises(NoRecord):
        composed_step(scenario(), (7, 5))
    silent = model(
        sliding_window=4096, max_window_layers=28, torch_dtype="bfloat16", use_cache=False
    )
    assert StepKey.of(scenario(model=silent)).key() == StepKey.of(scenario()).key()
    usual = {**BASE, "model": "qwen3-30b-a3b", **OPTIONS["trl"], **METHODS["qlora"]}
    form_of(Scenario.from_mapping({**usual, "lora": {"rank": 16, "alpha": 32}}, {}))
    with pytest.raises(NoRecord):
        form_of(Scenario.from_mapping({**usual, "lora": {"rank": 32, "alpha": 32}}, {}))


# Models of the catalogue whose attention has a window, by the tokens from which on TRL's defaults alone answer them.
WINDOWS = {
    "phi-3-mini-4k": 2047,
    "mistral-7b-v0.1": 4096,
    "gemma-2-2b": 4096,
    "gemma-2-9b": 4096,
    "gemma-2-27b": 4096,
}
RECORDED = sorted(path.stem for path in data_path("records").glob("*.zip"))
OF_TRL_ALONE = {  # recorded with TRL's defaults alone
    *(
        "deepseek_v3",
        "deepseek_v32",
        "gemma4_text",
        "gemma4_text_experts",
        "glm4_moe_lite",
        "glm_moe_dsa",
        "gpt_oss",
    ),
    *(
        "lfm2",
        "llama4_text",
        "mimo_v2_flash",
        "nemotron_h",
        "phi",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_next",
    ),
    "starcoder2",
}
# Families without such a record: Mixtral's default has rows of up to 2,048 tokens.
LEFT_OUT = {
    "default": {"exaone4", "mixtral", *OF_TRL_ALONE},
    "not_checkpointed": {"exaone4", "olmo3", *OF_TRL_ALONE},
}


def unanswered(called: str, length: int) -> set[str]:
    """Models of the recorded families that no record answers with a method and one row of so many tokens."""
    found = set()
    left_out = LEFT_OUT.get(called, ())
    if called == "trl" and length > 2048:
        left_out = {"nemotron_h", "qwen3_next"}
    families = [family for family in RECORDED if family not in left_out]
    for name in (name for family in families for name in FAMILIES[family].catalogue()):
        for method, of_trl in METHODS.items():
            step = {
                **BASE,
                "model": name,
                "method": method,
                "sequence_length": length,
                **OPTIONS[called],
            }
            try:
                form_of(Scenario.from_mapping(step | (of_trl if called == "trl" else {}), {}))
            except NoRecord:
                found.add(name)
            except UserError:  # it has not so many positions
                continue
    return found


@pytest.mark.parametrize(
    ("called", "length"),
    [
        *(("trl", length) for length in (512, 1024, 2048, 4096)),
        ("default", 4096),
        ("not_checkpointed", 4096),
    ],
)
def test_the_usual_steps_of_the_catalogue_are_answered(called, length) -> None:
    windows = {name for name, window in WINDOWS.items() if length >= window and called != "trl"}
    others = (
        {"gemma-3-12b"} if called != "trl" else set()
    )  # its last layer looks back at all tokens
    as_wide = {"mixtral-8x22b"} if called != "default" else set()  # its experts, as its vocabulary
    assert unanswered(called, length) == windows | others | as_wide


STEPS = {  # of the table in docs/memory-core.md: the set of options, rows, and the compute capability
    "a scenario's defaults": ("default", 1, None),
    "the same without checkpointing": ("not_checkpointed", 1, None),
    "TRL's defaults": ("trl", 1, None),
    "the same with 2 rows": ("trl", 2, None),
    "the same with 8 rows": ("trl", 8, None),
    "TRL's defaults on a T4 or V100": ("trl", 1, (7, 5)),
}


@pytest.mark.thorough
@pytest.mark.parametrize("told", STEPS)
def test_the_documents_count_what_is_answered(told: str) -> None:
    called, rows, capability = STEPS[told]
    page = (ROOT / "docs" / "memory-core.md").read_text(encoding="utf-8")
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {told} |")]
    counts = []
    for length in (512, 1024, 2048, 4096):
        count = 0
        for path, method in product(data_path("models").glob("*.json"), METHODS):
            step = {
                "model": path.stem,
                "method": method,
                "sequence_length": length,
                "micro_batch": rows,
            }
            with suppress(NoRecord, UserError):
                of_trl = METHODS[method] if called == "trl" else {}
                form_of(Scenario.from_mapping(step | OPTIONS[called] | of_trl, {}), capability)
                count += 1
        counts.append(count)
    assert counts == [int(cell) for cell in line.split("|")[2:6]]


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw_8bit"},
        {"attention": "eager"},
        {"attention_mask": "padding"},
        {"gradient_checkpointing": "reentrant"},
        {"autocast": "bf16"},
        {"precision": "fp16"},
        {"kbit_preparation": "peft"},
        {"lora": {"dropout": 0.05}},
        {"lora": {"target_modules": ["q_proj", "v_proj"]}},
        {"lora": {"rank": 1024}},
        {"quantization": {"type": "fp4"}},
        {"quantization": {"double": False}},
        {"gradient_accumulation": 2},
        {"loss": "liger"},
        {"platform": "windows"},
        {"versions": {"bitsandbytes": "0.45"}},
        {"sequence_length": 8},
        {"micro_batch": 100},
        {"parallel": {"strategy": "ddp", "gpus": 2}},
        {"use_cache": True},
        {"packing": "rows"},
    ],
    ids=str,
)
def test_no_option_that_was_not_recorded_is_answered(changes) -> None:
    with pytest.raises(NoRecord):
        composed_step(scenario(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": True, "sliding_window": 256},
        {"hidden_act": "gelu"},
        {"attention_dropout": 0.1},
        {"head_dim": 320},
        {"head_dim": 100},
        {"num_hidden_layers": 3},
        {"a_key_of_tomorrow": 1},
        {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}},
        {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 128},
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128},
        {"vocab_size": 500_000},
        {"vocab_size": 1024, "intermediate_size": 1024},
        {"vocab_size": 2048, "intermediate_size": 1024},
        {"pad_token_id": 151_936},
    ],
    ids=str,
)
def test_no_model_that_was_not_recorded_is_answered(changes) -> None:
    with pytest.raises(NoRecord):
        composed_step(scenario(model=model(**changes)))


def test_an_order_of_layers_that_was_not_recorded_is_not_answered() -> None:
    with pytest.raises(NoRecord, match="order"):
        form_of(of_trl("gpt-oss-20b", layer_types=["full_attention"] * 24))


def of_trl(name: str, length: int = 512, rows: int = 1, **changes: object) -> Scenario:
    """A step with TRL's defaults of a model of the catalogue with other keys."""
    step = {
        **BASE,
        "model": {**language_model_of(name), **changes},
        "sequence_length": length,
        "micro_batch": rows,
    }
    return Scenario.from_mapping({**step, **OPTIONS["trl"], **METHODS["qlora"]}, {})


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen3.5-9b", {}),
        ("nemotron-3-nano-30b-a3b", {"mamba_num_heads": 48}),
        ("lfm2-1.2b", {"length": 504, "block_auto_adjust_ff_dim": False}),
        ("gpt-oss-20b", {"length": 328, "sliding_window": 256}),
    ],
)
def test_a_hybrid_is_answered(name, changes) -> None:
    composed_step(of_trl(name, **changes))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen3.5-9b", {"length": 504}),  # the delta rule's loop has another number of turns
        ("qwen3.5-9b", {"linear_key_head_dim": 64}),
        ("qwen3.5-9b", {"full_attention_interval": 2, "layer_types": None}),
        ("nemotron-3-nano-30b-a3b", {"hybrid_override_pattern": "MEME**MEME"}),
        ("nemotron-3-nano-30b-a3b", {"mamba_num_heads": 36}),  # no multiple of the groups
        ("lfm2-1.2b", {"conv_L_cache": 4}),
        ("gpt-oss-20b", {"sliding_window": 2048}),
    ],
)
def test_what_was_not_recorded_of_a_hybrid_is_not_answered(name, changes) -> None:
    with pytest.raises(NoRecord):
        composed_step(of_trl(name, **changes))


@pytest.mark.parametrize(
    ("rows", "length"),
    [(1, 259), (1, 4096), (1, 16384), (2, 1024), (8, 1024), (2, 4096), (64, 100)],
)
@pytest.mark.parametrize("name", ["qwen2.5-7b", "qwen3-0.6b"])
def test_a_loss_in_any_number_of_chunks_is_answered(name, rows, length) -> None:
    composed_step(of_trl(name, length, rows))


@pytest.mark.parametrize("length", [264, 1032, 1096, 4096, 16384])
@pytest.mark.parametrize(
    "name",
    [
        *(
            "mistral-7b-v0.1",
            "gemma-2-2b",
            "gemma-3-4b",
            "phi-3-mini-4k",
            "qwen3-30b-a3b",
            "mixtral-8x7b",
        ),
        *("gpt-oss-20b", "glm-5", "glm-5.2", "deepseek-v3.2", "mimo-v2-flash"),
    ],
)
def test_one_row_of_any_length_is_answered(name, length) -> None:
    positions = language_model_of(name)["max_position_embeddings"]
    composed_step(of_trl(name, min(length, positions)))


@pytest.mark.parametrize(
    ("rows", "length"),
    [
        (1, 257),
        (1, 258),
        (2, 129),
        (1, 17000),
        (64, 512),
    ],  # one chunk, one token left over, more than 64 chunks
)
def test_chunks_that_were_not_recorded_are_not_answered(rows, length) -> None:
    with pytest.raises(NoRecord):
        composed_step(of_trl("qwen2.5-7b", length, rows))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("glm-5", {"index_topk": 1024}),
        ("glm-5", {"index_topk": None}),
        ("glm-5", {"length": 1028}),  # attention copies a mask whose rows are no multiple of 8
        (
            "glm-5.2",
            {"indexer_types": ["full"] * 2 + ["shared"] * 76},
        ),  # one of a layer with one MLP
        ("glm-5.2", {"index_topk_pattern": "FFFS"}),
        ("deepseek-v3.2", {"n_group": 4}),
        ("deepseek-v3.2", {"n_routed_experts": 252}),
        ("mimo-v2-flash", {"v_head_dim": 192}),
        ("mimo-v2-flash", {"num_key_value_heads": 32}),  # with a window as many keys as queries
        ("mimo-v2-flash", {"layer_types": ["sliding_attention"] * 48}),
        ("starcoder2-7b", {"attention_dropout": 0.0}),
        ("starcoder2-7b", {"residual_dropout": 0.2}),
    ],
)
def test_what_was_not_recorded_of_these_is_not_answered(name, changes) -> None:
    with pytest.raises(NoRecord):
        composed_step(of_trl(name, **{"length": 1032, **changes}))


@pytest.mark.parametrize("size", [4, 127, 128, None])
def test_the_window_of_mimo_is_what_its_class_makes_of_a_file(size) -> None:
    asked = StepKey.of(of_trl("mimo-v2-flash", 128, sliding_window_size=size, sliding_window=128))
    assert bool(asked.flags.get("windowed")) == (size != 128)


@pytest.mark.parametrize(
    "capability", [(8, 6), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1), (7, 5), (7, 0)]
)
@pytest.mark.parametrize("name", ["qwen2.5-7b", "llama-3.2-3b"])
def test_a_gpu_of_another_compute_capability_is_answered(name, capability) -> None:
    composed_step(of_trl(name), capability)


@pytest.mark.parametrize(
    ("name", "family"), [("gemma-4-31b", "gemma4_text"), ("gemma-4-26b-a4b", "gemma4_text_experts")]
)
def test_models_of_one_code_with_experts_and_without_are_two_families(name, family) -> None:
    assert name in FAMILIES[family].catalogue()
    assert family_of(language_model_of(name)) is FAMILIES[family]


# An adapter of experts whose scaling is 1: PyTorch leaves its factor out, and so a temporary of the backward pass.


@pytest.mark.parametrize(
    "changes",
    [{"lora": {"alpha": 64}}, {"gpu": "rtx-4090"}, {"allocator": {"expandable_segments": True}}],
    ids=str,
)
def test_what_only_replays_the_events_has_the_same_record(changes) -> None:
    assert StepKey.of(scenario(**changes)).key() == StepKey.of(scenario()).key()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": 0}, "format 0"),
        (
            {"versions": {**records_of("qwen2").versions, "transformers": "4.57.0"}},
            "transformers 4.57.0",
        ),
        ({"code": {"models/qwen2/modeling_qwen2.py": "0"}}, "modeling_qwen2.py is not the one"),
    ],
    ids=str,
)
def test_a_record_of_something_else_is_not_used(tmp_path, changes, said) -> None:
    with pytest.raises(NoRecord, match=said) as raised:
        Records(rewritten(tmp_path, **changes))
    assert raised.value.is_unusable


@pytest.mark.parametrize("cut", [0, 1000])
def test_a_damaged_record_is_not_used(tmp_path, cut) -> None:
    path = tmp_path / "qwen2.zip"
    path.write_bytes(data_path("records", "qwen2.zip").read_bytes()[:cut])
    with pytest.raises(NoRecord, match="damaged") as raised:
        Records(path)
    assert raised.value.is_unusable


@pytest.mark.parametrize("first", [200, 20_000, 60_000])
def test_a_damaged_variant_is_not_used(tmp_path, first) -> None:
    whole = data_path("records", "qwen2.zip").read_bytes()
    path = tmp_path / "qwen2.zip"
    path.write_bytes(whole[:first] + bytes(400) + whole[first + 400 :])
    with pytest.raises(NoRecord, match="damaged"):
        for key in records_of("qwen2")._members:
            Records(path).form(key)


def test_the_answer_says_once_that_a_record_is_not_used(tmp_path, monkeypatch) -> None:
    path = rewritten(tmp_path, format=0)
    monkeypatch.setattr(form, "data_path", lambda *parts: path)
    form._opened.cache_clear()
    (tmp_path / "step.yaml").write_text(json.dumps(BASE))
    answer = quick(question([tmp_path / "step.yaml"], QuestionOptions()), others=False)
    form._opened.cache_clear()
    assert "bound" in answer["analytic"]
    assert [text for text in answer["warnings"] if "format 0" in text] == answer["warnings"][:1]


@pytest.mark.parametrize("name", ["qwen2.5-coder-0.5b", "qwen2.5-coder-7b"])  # tied, and not
def test_16_bit_weights_with_fp32_states_have_a_record(name) -> None:
    """Equal to the trace; and where fp32 is trained the field changes no key."""
    from dryfit.analytic.estimate import estimate
    from dryfit.tracing.trace import trace

    step = {"model": name, "method": "full", "sequence_length": 512, "precision": "bf16"}
    wide = Scenario.from_mapping({**step, "optimizer_state_precision": "fp32"}, {})
    found, traced = estimate(wide).analytic, trace(wide, timeline=False)
    assert found["recorded_with"]
    for field in ("peak_allocated_bytes", "phases"):
        assert found[field] == traced[field], field
    told = {**step, "method": "qlora", "optimizer_state_precision": "fp32"}
    untold = {**step, "method": "qlora"}
    assert StepKey.of(Scenario.from_mapping(told, {})) == StepKey.of(
        Scenario.from_mapping(untold, {})
    )
