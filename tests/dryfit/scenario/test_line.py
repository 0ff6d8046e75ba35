"""The line `for:` of an answer: every field stands in it, or in the named list of those that don't decide."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest

from dryfit.scenario.description import Field, said
from dryfit.scenario.fields import FIELDS, UNSAID, line
from dryfit.scenario.scenario import Scenario

MODEL = "qwen2.5-coder-7b"
PATHS = [
    path
    for field in FIELDS
    for path in ([f"{field.name}.{part.name}" for part in field.parts] or [field.name])
]
# Steps in which each field has its say.
STEPS = (
    {"model": MODEL},
    {
        "model": MODEL,
        "method": "lora",
        "gpu": "2xrtx-3090",
        "parallel": {"strategy": "fsdp2", "gpus": 2},
    },
    {"model": MODEL, "objective": "grpo", "micro_batch": 8},
    {
        "model": MODEL,
        "objective": "grpo",
        "micro_batch": 8,
        "method": "lora",
        "gpu": "h100-80gb",
        "generation": {"engine": "vllm"},
    },
    {
        "model": MODEL,
        "method": "full",
        "gpu": "2xh100-80gb",
        "gradient_accumulation": 2,
        "parallel": {"pipeline": 2, "gpus": 2},
    },
    {"model": MODEL, "adapter": {"peft_type": "IA3"}},
    {
        "model": MODEL,
        "method": "full",
        "precision": "bf16-mixed",
        "parallel": {"strategy": "zero3", "gpus": 2},
    },
)


def _steps() -> Iterator[dict[str, Any]]:
    for step in STEPS:
        mapping = Scenario.from_mapping(step).to_mapping()
        mapping["images"] = {"count": 1, "height": 448, "width": 448, "trained": "language"}
        yield mapping


def _others(field: Field, value: Any) -> list[Any]:
    """Other values that a field may have."""
    if field.words:
        return [word for word in field.words if word != value]
    if field.least is not None:
        return [(value or field.least) + 3]
    if field.below is not None:
        return [0.25]
    return (
        [["gate_proj"]] if "array" in field.types else [{"peft_type": "VERA"}, "other-7b", "0.42.0"]
    )


def _field(path: str) -> Field:
    first, _, part = path.partition(".")
    field = next(field for field in FIELDS if field.name == first)
    return next((one for one in field.parts if one.name == part), field)


def _changed(mapping: dict[str, Any], path: str, value: Any) -> dict[str, Any] | None:
    first, _, part = path.partition(".")
    changed = deepcopy(mapping)
    if not part:
        changed[first] = value
    elif isinstance(changed[first], dict):
        changed[first][part] = value
    else:
        return None
    return changed


def _lines(path: str) -> Iterator[tuple[str, str]]:
    for mapping in _steps():
        first, _, part = path.partition(".")
        now = (mapping[first] or {}).get(part) if part else mapping[first]
        for value in _others(_field(path), now):
            changed = _changed(mapping, path, value)
            if changed is not None and (path != "adapter" or isinstance(value, dict)):
                yield line(mapping), line(changed)


@pytest.mark.parametrize("path", [path for path in PATHS if path not in UNSAID])
def test_a_field_that_decides_is_in_the_line(path: str) -> None:
    assert any(before != after for before, after in _lines(path))


@pytest.mark.parametrize("path", sorted(UNSAID))
def test_what_the_line_leaves_out_is_named_with_its_reason(path: str) -> None:
    assert path in PATHS and UNSAID[path]
    if path != "model":  # whose name stands in the line
        assert all(before == after for before, after in _lines(path))


def test_a_field_that_is_new_is_in_the_line_by_its_name() -> None:
    new = Field("flash_mode", "New.", words=("none", "fast"))
    assert said(new, "fast", {}) == "flash_mode fast" and said(new, "none", {}) == ""


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ({"adapter": {"peft_type": "IA3"}, "method": "lora"}, "; IA3; "),
        ({"adapter": {"peft_type": "LORA", "r": 8, "use_dora": True}}, "QLoRA; bf16"),
        ({"adapter": {"peft_type": "LORA", "r": 8, "use_dora": True}}, "r 8, use_dora true"),
        (
            {"quantization": {"storage": "bf16", "compute": "fp16"}},
            "stored as bf16, computing in fp16",
        ),
        (
            {"parallel": {"strategy": "fsdp2", "gpus": 2, "offload": "cpu"}},
            "fsdp2 on 2 GPUs, offloaded to the CPU",
        ),
        ({"quantization": {"type": "int8"}}, "LoRA of rank 16 on all linear layers"),
        ({"versions": {"bitsandbytes": "0.42.0"}}, "bitsandbytes 0.42.0"),
        ({"model_name": "two\nlines"}, "two lines; "),
    ],
)
def test_the_words_of_the_line(step, words) -> None:
    assert words in line(Scenario.from_mapping({"model": MODEL, **step}).to_mapping())
