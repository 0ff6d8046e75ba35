"""Families of 2025 and 2026 by transformers' own code: on the CPU a trace is the measurement, to the byte."""

import pytest

from tests.will_it_fit.families import FAMILIES, LORA_TARGETS
from tests.will_it_fit.tracing.test_measure import compare, scenario


def asked(family: str, method: str, **fields):
    lora = {"lora": {"rank": 4, "target_modules": LORA_TARGETS.get(family, "all-linear")}} if method != "full" else {}
    return scenario(FAMILIES[family], method=method, **lora, **fields)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("checkpointing", [True, False])
def test_full_fine_tuning_is_traced_to_the_byte(family, checkpointing):
    compare(asked(family, "full", gradient_checkpointing=checkpointing))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_adapters_are_traced_to_the_byte(family):
    compare(asked(family, "lora"))


@pytest.mark.parametrize("family", ["qwen3_5_text", "kimi_linear", "lfm2", "bamba", "gemma4_text", "deepseek_v4"])
def test_a_quantized_base_is_traced_to_the_byte(family):
    compare(asked(family, "qlora", attention_mask="padding", micro_batch=3, autocast="bf16"))
