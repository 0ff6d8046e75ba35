"""``like: trl | peft | axolotl``: what it sets, what wins over it, and who decided what of a scenario."""

from __future__ import annotations

from pathlib import Path

import pytest

from will_it_fit.common.errors import UserError
from will_it_fit.readers import axolotl, trl
from will_it_fit.readers.request import LIKE, SETS, parse_request

STEP = {"model": "qwen2.5-coder-0.5b", "gpu": "t4"}


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("tool", LIKE)
def test_a_tool_sets_what_its_own_reader_says_of_an_empty_file(tool, rows, method) -> None:
    found = parse_request({**STEP, "like": tool, "method": method, "micro_batch": rows})
    assert found.like == tool and found.set_by_like and set(found.set_by_like) <= set(SETS)
    mapping = found.scenario.to_mapping()
    for name, value in found.set_by_like.items():
        assert mapping[name] == value
    assert found.scenario.attention_mask == ("padding" if rows > 1 else "none")
    assert set(found.set_by_like).isdisjoint(found.assumed)
    read = (axolotl if tool == "axolotl" else trl).read
    named = {"base_model": "-"} if tool == "axolotl" else {"model_name_or_path": "-"}
    if tool == "trl" and method == "full":
        assert read(named, Path("empty")).fields["optimizer"] == found.scenario.optimizer


def test_another_aim_takes_that_trainers_loss() -> None:
    for objective in ("dpo", "orpo", "kto", "grpo", "reward"):
        found = parse_request({**STEP, "like": "trl", "objective": objective, "micro_batch": 8})
        assert found.scenario.objective == objective and found.scenario.loss == "full"


def test_peft_prepares_and_trl_computes_the_loss_in_chunks() -> None:
    peft, of_trl = (parse_request({**STEP, "like": tool}).scenario for tool in ("peft", "trl"))
    assert (peft.kbit_preparation, peft.autocast, peft.adapter_precision, peft.loss) == ("peft", "bf16", "fp32", "full")
    assert (of_trl.loss, of_trl.adapter_precision, of_trl.precision) == ("chunked", "bf16", "fp32")


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
    for words in ("mine.yaml", "'axolot'", "trl, peft, axolotl", "like: axolotl"):
        assert words in str(error.value)


def test_a_count_of_gpus_is_all_of_them_unless_the_file_says_how() -> None:
    two = {**STEP, "gpu": {"name": "rtx-3090", "count": 2}}
    found = parse_request(two)
    assert (found.scenario.parallel.strategy, found.scenario.parallel.gpus) == ("fsdp2", 2)
    assert found.assumed["parallel"]["strategy"] == "fsdp2"
    ddp = parse_request({**two, "parallel": {"strategy": "ddp", "gpus": 2}})
    assert ddp.scenario.parallel.strategy == "ddp" and "parallel" not in ddp.assumed
    assert "parallel" not in parse_request(STEP).assumed
