"""``like: trl | peft | axolotl | unsloth``: what it sets, what wins over it, and who decided what of a scenario."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dryfit.ask.question import QuestionOptions, question
from dryfit.common.errors import UserError
from dryfit.planner.tools import by_tool, other_verdicts, tool_lines
from dryfit.readers import axolotl, trl
from dryfit.readers.request import LIKE, like_fields, parse_request
from dryfit.scenario.fields import scenario_defaults
from dryfit.scenario.objectives import OBJECTIVES

STEP = {"model": "qwen2.5-coder-0.5b", "gpu": "t4"}


# What `like` leaves to the file: how large a step is, and what it is a step of.
LEFT_TO_THE_FILE = {
    "model",
    "method",
    "sequence_length",
    "micro_batch",
    "gradient_accumulation",
    "lora",
    "adapter",
    "objective",
    "preference",
    "generation",
}


def said_by_reader(tool: str, method: str, rows: int, objective: str) -> dict[str, Any]:
    """What a tool's reader says of a file that names the method and the rows alone."""
    quantized = method == "qlora"
    if tool == "axolotl":
        adapter = None if method == "full" else method
        file = {
            "base_model": "-",
            "adapter": adapter,
            "load_in_4bit": quantized,
            "micro_batch_size": rows,
        }
        fields = axolotl.read(file, Path(tool)).fields
    else:
        file = {"model_name_or_path": "-", "use_peft": method != "full", "load_in_4bit": quantized}
        file |= {"per_device_train_batch_size": rows}
        if (
            tool == "peft"
        ):  # PEFT's scripts set these two; a file has no key for `prepare_model_for_kbit_training`
            file |= {"dtype": "auto", "bf16": True, "gradient_checkpointing": quantized}
        trainer = "transformers" if tool == "peft" else {"orpo": "dpo"}.get(objective, objective)
        fields = trl.read(file, Path(tool), trainer=trainer).fields
        fields |= {"kbit_preparation": "peft"} if tool == "peft" and quantized else {}
    if objective != "sft":
        fields.pop("adapter_precision", None)  # this trainer casts adapters itself
    return {name: value for name, value in fields.items() if name not in LEFT_TO_THE_FILE}


@pytest.mark.parametrize(("card", "precision"), [("t4", "fp16"), ("4090", "bf16")])
def test_unsloth_takes_fp16_on_a_card_without_bf16(card, precision) -> None:
    asked = question(
        ["qwen2.5-coder-0.5b"], QuestionOptions(gpu=card, like="unsloth", sequence_length=512)
    ).scenario
    assert (asked.precision, asked.autocast, asked.attention) == (
        precision,
        precision,
        "mem_efficient",
    )


@pytest.mark.parametrize(("card", "attention"), [("h100", "flash"), ("t4", "mem_efficient")])
def test_unsloths_flex_attention_keeps_no_scores(card, attention) -> None:
    asked = question(
        ["gpt-oss-20b"], QuestionOptions(gpu=card, like="unsloth", method="lora")
    ).scenario
    assert asked.attention == attention


OF_FILES = tuple(
    tool for tool in LIKE if tool != "unsloth"
)  # whose settings stand in files; Unsloth's in programs


@pytest.mark.parametrize(("method", "quantized"), [("lora", None), ("qlora", True)])
def test_unsloth_sets_what_a_program_of_its_own_says(method, quantized, tmp_path) -> None:
    """``use_gradient_checkpointing="unsloth"``, and what it does unasked."""
    text = f"""
from unsloth import FastLanguageModel
model, tokenizer = FastLanguageModel.from_pretrained("{STEP["model"]}", load_in_4bit={bool(quantized)})
model = FastLanguageModel.get_peft_model(model, r=16, use_gradient_checkpointing="unsloth")
trainer = SFTTrainer(model=model, args=SFTConfig(per_device_train_batch_size=4, optim="adamw_8bit", bf16=True))
"""
    (tmp_path / "train.py").write_text(text)
    own = question([tmp_path / "train.py"], QuestionOptions()).scenario
    like = parse_request({**STEP, "like": "unsloth", "method": method, "micro_batch": 4}).scenario
    for name in (
        "kernels",
        "loss",
        "attention",
        "attention_mask",
        "gradient_checkpointing",
        "activation_offload",
        "optimizer",
        "method",
        "precision",
        "autocast",
    ):
        assert getattr(like, name) == getattr(own, name), name


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("tool", OF_FILES)
def test_a_tool_sets_what_its_own_reader_says_of_an_empty_file(
    tool, rows, method, objective
) -> None:
    named = {"method": method, "micro_batch": rows, "objective": objective}
    fields, said = like_fields(tool, named), said_by_reader(tool, method, rows, objective)
    if method == "qlora":
        said["quantization"] = {**scenario_defaults()["quantization"], **said["quantization"]}
    assert fields == said


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("tool", LIKE)
def test_what_a_tool_sets_is_in_the_scenario_and_named_as_the_tools(tool, rows, method) -> None:
    request = parse_request({**STEP, "like": tool, "method": method, "micro_batch": rows})
    mapping = request.scenario.to_mapping()
    assert request.like == tool and request.set_by_like
    assert {name: mapping[name] for name in request.set_by_like} == request.set_by_like
    assert request.scenario.attention_mask == (
        "padding" if rows > 1 and tool in OF_FILES else "none"
    )
    assert set(request.set_by_like).isdisjoint(request.assumed)


def test_another_aim_takes_that_trainers_loss_and_answers_to_a_prompt_are_a_micro_batch() -> None:
    for objective in ("dpo", "orpo", "kto", "grpo", "reward"):
        found = parse_request({**STEP, "like": "trl", "objective": objective, "micro_batch": 8})
        assert found.scenario.objective == objective and found.scenario.loss == "full"
    step = {name: value for name, value in STEP.items() if name != "micro_batch"}
    for preference, rows in (({}, 8), ({"generations": 4}, 4)):
        found = parse_request(
            {**step, "like": "trl", "objective": "grpo", "preference": preference}
        )
        assert found.scenario.micro_batch == rows and found.assumed["micro_batch"] == rows
    with pytest.raises(UserError, match="`micro_batch: 1` are a default"):
        parse_request({**step, "objective": "grpo", "gradient_accumulation": 4})


def test_what_tools_set_and_what_a_line_says_of_them() -> None:
    peft, of_trl = (parse_request({**STEP, "like": tool}).scenario for tool in ("peft", "trl"))
    assert (peft.kbit_preparation, peft.autocast, peft.adapter_precision, peft.loss) == (
        "peft",
        "bf16",
        "fp32",
        "full",
    )
    assert (of_trl.loss, of_trl.adapter_precision, of_trl.precision) == ("chunked", "bf16", "fp32")
    tools = _tools(trl=(2**30, None, None), peft=(2**31, None, None), axolotl=(None, None, None))
    line = "With each tool's defaults, estimated: TRL 1.00, PEFT 2.00 GiB at the peak (--like peft)"
    assert list(tool_lines({"tools": tools}, "--like ")) == [line]
    assert list(tool_lines({"tools": _tools(trl=(None, None, None))}, "like: ")) == []
    request = parse_request(
        {"model": "qwen2.5-coder-7b", "gpu": "rtx-4080", "sequence_length": 2048, "like": "trl"}
    )
    rows = {
        row["tool"]: row for row in by_tool(replace(request, like_is_default=True), verdict="fits")
    }
    assert [rows[tool]["verdict"] for tool in ("trl", "axolotl")] == ["fits", "does_not_fit"]
    assert (rows["trl"]["decides"], rows["axolotl"]["decides"]) == (None, "no checkpointing")
    assert by_tool(request) == []  # the asker chose the tool


@pytest.mark.parametrize(
    "own",
    [
        {"gradient_checkpointing": False, "optimizer": "adamw_8bit"},
        {"method": "full", "precision": "fp16-mixed"},
        {"method": "lora", "autocast": "fp16", "precision": "fp16"},
        {"attention": "flash", "micro_batch": 4},
        {"packing": "rows", "micro_batch": 2},
        {"parallel": {"strategy": "fsdp2", "gpus": 2}},
        {"kbit_preparation": "none", "quantization": {"double": True}},
    ],
    ids=lambda own: "-".join(own),
)
@pytest.mark.parametrize("tool", LIKE)
def test_what_is_named_wins(tool, own) -> None:
    found = parse_request({**STEP, "gpu": None, "like": tool, **own})
    for name, value in own.items():
        mine = found.scenario.to_mapping()[name]
        assert mine == value or value.items() <= mine.items()
    assert set(own).isdisjoint(found.set_by_like)


def test_a_tool_that_is_not_known_is_named_with_what_is() -> None:
    with pytest.raises(UserError) as error:
        parse_request({**STEP, "like": "axolot"}, "mine.yaml")
    for words in ("mine.yaml", "'axolot'", "trl, peft, axolotl, unsloth", "like: axolotl"):
        assert words in str(error.value)


def test_a_count_of_gpus_is_all_of_them_unless_the_file_says_how() -> None:
    two = {**STEP, "gpu": {"name": "rtx-3090", "count": 2}}
    found = parse_request(two)
    assert (found.scenario.parallel.strategy, found.scenario.parallel.gpus) == ("fsdp2", 2)
    assert found.assumed["parallel"]["strategy"] == "fsdp2"
    ddp = parse_request({**two, "parallel": {"strategy": "ddp", "gpus": 2}})
    assert ddp.scenario.parallel.strategy == "ddp" and "parallel" not in ddp.assumed
    assert "parallel" not in parse_request(STEP).assumed
    two = {"model": "qwen2.5-coder-7b", "method": "lora", "gpu": {"name": "rtx-3090", "count": 2}}
    assert parse_request({**two, "parallel": {"tensor": 2}}).scenario.parallel.strategy == "none"
    with pytest.raises(UserError, match=r"tensor"):
        parse_request({**two, "parallel": {"tensor": None}})


@pytest.mark.parametrize(
    ("gpu", "settings", "gpus"),
    [("4090", (), 1), ("2x3090", (), 1), ("2xh100", ("parallel.tensor=2",), 2)],
)
def test_no_strategy_is_one_gpu_unless_a_mesh_has_a_place_for_each(gpu, settings, gpus) -> None:
    options = QuestionOptions(gpu=gpu, method="lora", strategy="none", settings=list(settings))
    parallel = question(["qwen2.5-coder-7b"], options).scenario.parallel
    assert (parallel.strategy, parallel.gpus, parallel.tensor) == ("none", gpus, gpus)


def _tools(**peaks: Any) -> list[dict[str, Any]]:
    return [
        {"tool": tool, "peak_allocated_bytes": peak, "verdict": word, "decides": why}
        for tool, (peak, word, why) in peaks.items()
    ]


@pytest.mark.parametrize(
    ("verdict", "trl", "axolotl", "end"),
    [
        ("fits", "fits", "fits", ""),
        (
            "fits",
            "fits",
            "does_not_fit",
            "; so with TRL's defaults, but not with axolotl's (20.50 GiB: no checkpointing)",
        ),
        (
            "does_not_fit",
            "does_not_fit",
            "fits",
            "; so with TRL's defaults, but it fits with axolotl's (20.50 GiB: no checkpointing)",
        ),
        ("fits", "fits", "too_close", ""),
        (
            "too_close",
            "fits",
            "does_not_fit",
            "; so with TRL's defaults, but it fits with TRL's (10.00 GiB),"
            " not with axolotl's (20.50 GiB: no checkpointing)",
        ),
    ],
)
def test_the_first_line_says_where_tools_differ(
    verdict: str, trl: str, axolotl: str, end: str
) -> None:
    tools = _tools(
        trl=(10 * 2**30, trl, None), axolotl=(int(20.5 * 2**30), axolotl, "no checkpointing")
    )
    assert other_verdicts({"verdict": verdict, "tools": tools, "like": {"tool": "trl"}}) == end
