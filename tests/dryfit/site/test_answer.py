"""The calculator's answers, as the browser gets them: those of ``--quick``, and a sentence for each slip."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typing_extensions

from dryfit.analytic import certainty, estimate
from dryfit.ask import answer, fit
from dryfit.ask.options import parsed
from dryfit.ask.run_cost import parse_run_options
from dryfit.hours.run_time import Run
from dryfit.scenario.hub import MODELS
from dryfit.site.answer import reply
from dryfit.site.python import archive

CHOICE = {
    "ask": "answer",
    "model": "qwen2.5-coder-7b",
    "gpu": "rtx-4090",
    "sequence_length": 2048,
    "micro_batch": 1,
}
AXOLOTL = "base_model: Qwen/Qwen3-8B\nadapter: lora\nlora_r: 16\nlora_target_linear: true\nsequence_len: 1024\n"
CONFIG = (MODELS / "qwen3-0.6b.json").read_text(encoding="utf-8")


def ask(**choice) -> dict:
    return json.loads(reply(json.dumps({**CHOICE, **choice})))


def pasted(text: str, name: str = "", **more) -> dict:
    return ask(model="", file={"name": name, "text": text}, **more)


def test_it_is_the_answer_of_the_command_line(monkeypatch) -> None:
    for module in (
        estimate,
        answer,
        certainty,
    ):  # a browser has no records, whose replay takes it seconds
        monkeypatch.setattr(module, "if_recorded", lambda *_: None)
    found = ask(settings={"lora.rank": 64})
    same = fit(
        "qwen2.5-coder-7b",
        gpu="rtx-4090",
        sequence_length=2048,
        micro_batch=1,
        quick=True,
        lora={"rank": 64},
    )
    details = json.loads(json.dumps(same.details))
    others = details.pop(
        "scripts_would_take"
    )  # asked for apart, since each takes an estimate of its own
    details.pop("tools")
    assert found["answer"] == details
    (line,) = ask(ask="others", settings={"lora.rank": 64})["others"]
    assert all(
        f"{tool} {size / 2**30:.2f}" in line.lower() for tool, size in others.items() if size
    )
    assert (
        f"says {same.details['rule_of_thumb']['peak_allocated_bytes'] / 2**30:.2f} GiB"
        in found["rule"]
    )
    assert (
        found["command"] == "dryfit qwen2.5-coder-7b --gpu rtx-4090 -s 2048 -b 1 --set lora.rank=64"
    )
    assert found["verdict"].startswith("FITS: about ")
    small = 2**20  # what is smaller has no row
    assert sum(part["bytes"] for part in found["parts"]) == sum(
        size for size in same.components.values() if size >= small
    )


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("choice", "state"),
    [
        ({"gpu": "t4", "method": "full"}, "too-large"),
        ({"gpu": "", "method": "lora"}, "size"),
        ({"gpu": "12GiB", "sequence_length": 3072}, "close"),
        ({"gpu": "rtx-3090", "gpus": 4, "method": "lora", "strategy": "fsdp2"}, "fits"),
        ({"model": "qwen3.5-9b", "micro_batch": 2}, "unknown"),
    ],
)
def test_a_verdict_has_its_two_numbers(choice: dict, state: str) -> None:
    found = ask(**choice)
    assert found["state"] == state, found
    numbers = found["verdict"].replace("12 GiB", "").count("GiB")  # which is that GPU's name
    assert numbers == {"unknown": 1, "size": 1}.get(state, 2)  # a lower bound; a size


@pytest.mark.thorough
def test_every_gpu_and_the_longest_rows_agree_with_the_answer() -> None:
    cards = {card["name"]: card for card in ask(ask="gpus")["gpus"]}
    assert cards["rtx-4090"]["peak"] in ask()["verdict"] and cards["rtx-4090"]["state"] == "fits"
    longest = ask(ask="longest", rows=4)["longest"]
    assert ask(micro_batch=4, sequence_length=longest["fits"])["state"] == "fits"
    assert ask(micro_batch=4, sequence_length=longest["may_fit"])["state"] in (
        "close",
        "too-large",
    )  # by the peak alone
    assert ask(micro_batch=4, sequence_length=longest["may_fit"] + 64)["state"] == "too-large"


def test_each_method_has_its_peak_and_the_smallest_card_that_should_hold_it() -> None:
    rows = {row["method"]: row for row in ask(ask="methods")["methods"]}
    assert list(rows) == ["full", "lora", "qlora"] and [row["chosen"] for row in rows.values()] == [
        False,
        False,
        True,
    ]
    for method, row in rows.items():
        assert row["peak"] in ask(method=method)["verdict"] or row["state"] == "close"
        cards = {card["name"]: card for card in ask(ask="gpus", method=method, gpu="")["gpus"]}
        least = cards[row["least"]["name"]]
        holding = [
            float(card["usable"].split()[0]) for card in cards.values() if card["state"] == "fits"
        ]
        assert least["state"] == "fits" and float(least["usable"].split()[0]) == min(holding)
    assert ask(ask="methods", model="llama-3.1-70b")["methods"][0]["least"] is None
    assert ask(ask="methods", gpu="")["methods"][0]["state"] == "size"


def test_what_is_not_described_is_counted_as_what_comes_nearest_and_says_so() -> None:
    found = ask(settings={"loss": "liger"})
    assert found["state"] == "unknown" and found["answer"]["analytic"] is None
    assert "loss: chunked in place of liger" in found["verdict"]
    assert found["peak_bytes"] == ask(settings={"loss": "chunked"})["peak_bytes"]
    assert (
        found["verdict"].count("GiB") == 2
        and "liger" in found["command"]
        and "liger" in found["yaml"]
    )
    assert (
        ask(settings={"loop": "manual", "attention_mask": "padding"}, model="mimo-v2-flash")[
            "peak_bytes"
        ]
        is None
    )


def test_weights_that_are_too_large_alone_are_a_verdict() -> None:
    found = ask(model="deepseek-v4-flash", gpu="h100-80gb")
    assert found["state"] == "too-large" and found["verdict"].startswith(
        "DOES NOT FIT: the weights alone take 132.40"
    )


@pytest.mark.thorough
def test_hours_come_from_the_command_that_traces_and_what_is_known_without_it_is_told() -> None:
    assert "Fill in the rows of your data" in ask()["hours"]
    asked = {
        "rows": "50000",
        "epochs": "3",
        "price": "0.35",
        "deadline": "24h",
        "grams_per_kwh": "380",
    }
    found = ask(gpu="l40s", micro_batch=4, run=asked)
    options = parsed(shlex.split(found["command"])[1:])
    assert parse_run_options(options) == Run(50000, 3.0, {"l40s": 0.35}, 24.0, 380.0)
    assert (
        "37,500 steps" in found["hours"] and "no longer than 2.3 s" in found["hours"]
    )  # 86,400 s / 37,500
    assert (
        "0.35 kWh in an hour" in found["hours"] and "measured steps on this GPU" in found["hours"]
    )
    assert "No step was measured on this GPU" in ask(run=asked)["hours"]
    assert "no speed of" in ask(gpu="24GiB", run=asked)["hours"]
    assert "choose one" in ask(gpu="")["hours"]


@pytest.mark.parametrize(
    ("run", "gpu", "words"),
    [
        ({"epochs": "3"}, "l4", "--epochs needs --rows"),
        ({"rows": "50000", "deadline": "soon"}, "l4", "--deadline takes a number"),
        ({"rows": "50000", "price": "1.29"}, "", "A price needs a GPU"),
        ({"rows": "0"}, "l4", "whole number of at least 1"),
    ],
)
def test_a_slip_about_the_run_is_a_sentence(run: dict, gpu: str, words: str) -> None:
    (error,) = ask(gpu=gpu, run=run)["error"]
    assert words in error["problem"] and error["write"]


def test_what_would_fit_is_a_choice_that_fits() -> None:
    changes = ask(ask="changes", gpu="t4", method="lora")["changes"]
    assert changes
    for change in changes:
        found = ask(**change["choice"])
        assert found["state"] == "fits"
        assert sorted(found["command"].split()) == sorted(change["command"].split())
    assert not ask(ask="changes", gpu="")["changes"]


@pytest.mark.thorough
def test_a_file_is_read_and_named_in_the_command() -> None:
    found = pasted(AXOLOTL, "my axolotl.yaml", over=["method"], method="qlora")
    assert found["command"] == "dryfit my-axolotl.yaml --gpu rtx-4090 --method qlora -b 1"
    assert (
        found["answer"]["scenario"]["lora"]["rank"] == 16 and "read as axolotl" in found["read"][0]
    )
    assert "/tmp" not in json.dumps(found)
    assert pasted(CONFIG)["command"].startswith("dryfit config.json ")
    program = "from trl import SFTConfig, SFTTrainer\nmodel = AutoModelForCausalLM.from_pretrained('Qwen/Qwen3-8B')\n"
    program += "SFTTrainer(model, args=SFTConfig(max_length=512)).train()\n"
    assert pasted(program, sequence_length=None)["answer"]["scenario"]["sequence_length"] == 512


LLAMA_FACTORY = (
    "model_name_or_path: Qwen/Qwen3-8B\nstage: sft\nfinetuning_type: lora\n"
    "cutoff_len: 51974\nlora_rank: 8\n"
)


def test_a_pasted_file_wins_over_the_form_and_the_page_lists_what_the_form_added() -> None:
    found = pasted(LLAMA_FACTORY, settings={"lora.rank": 64, "loss": "chunked"})
    scenario = found["answer"]["scenario"]
    assert (scenario["sequence_length"], scenario["micro_batch"], scenario["lora"]["rank"]) == (
        51974,
        1,
        8,
    )
    assert found["command"] == "dryfit config.yaml --gpu rtx-4090 -b 1 --set loss=chunked"
    assert found["added"] == [
        "the form adds gpu: rtx-4090",
        "the file says cutoff_len: 51974, and the form's sequence_length: 2048 is left aside",
        "the form adds micro_batch: 1",
        "the file says lora_rank: 8, and the form's lora.rank: 64 is left aside",
        "the form adds loss: chunked",
    ]
    assert ask()["added"] == []


@pytest.mark.thorough
def test_what_the_page_offers_wins_over_a_file() -> None:
    (change, *_) = pasted(LLAMA_FACTORY, ask="changes")["changes"]
    assert change["fields"] == ["sequence_length"]
    choice = {name: value for name, value in change["choice"].items() if name != "model"}
    found = pasted(LLAMA_FACTORY, over=change["fields"], **choice)
    assert found["answer"]["scenario"]["sequence_length"] == change["choice"]["sequence_length"]
    assert not found["tight"] and pasted(LLAMA_FACTORY)["tight"]


@pytest.mark.thorough
def test_changes_are_offered_only_where_the_step_does_not_surely_fit() -> None:
    assert not pasted(LLAMA_FACTORY.replace("51974", "512"))["tight"] and not ask()["tight"]
    assert ask(gpu="t4", method="full")["tight"] and not ask(gpu="")["tight"]


def test_the_browser_fetches_what_is_not_listed() -> None:
    place = ask(model="somebody/model@v2")["fetch"]
    assert place == {"id": "somebody/model@v2", "path": "somebody/model/resolve/v2/config.json"}
    fetched = {"somebody/model@main": {"status": 200, "code": None, "text": CONFIG}}
    found = ask(model="somebody/model", fetched=fetched)
    assert (
        found["command"].startswith("dryfit somebody/model ")
        and found["answer"]["scenario"]["model_name"] == "model"
    )
    assert (
        pasted(AXOLOTL.replace("Qwen/Qwen3-8B", "somebody/model"))["fetch"]["id"]
        == "somebody/model@main"
    )


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"status": 401, "code": "GatedRepo"}, "gated"),
        ({"status": 401, "code": "RepoNotFound"}, "no such model"),
        ({"status": 404, "code": "EntryNotFound"}, "no config.json"),
        ({"status": 404, "code": "RevisionNotFound"}, "no such revision"),
        ({"status": 429, "code": None}, "too often"),
        ({"status": 500, "code": None}, "an error (500)"),
        ({"status": 0}, "can't be reached"),
        ({"status": 200, "text": "<html>"}, "not JSON"),
        ({"status": 200, "text": '{"model_type": "unheard-of", "hidden_size": 8}'}, "unheard-of"),
    ],
)
def test_what_the_hub_refuses_is_a_sentence(answer: dict, words: str) -> None:
    found = ask(model="some/model", fetched={"some/model@main": answer})
    text = found["error"][0]["problem"] if "error" in found else found["verdict"]
    assert words in text
    assert "answer" not in found or found["state"] == "unknown"


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"model": ""}, "No model is named"),
        ({"model": "qwen2.5-codr-7b"}, "neither the name of a known configuration"),
        ({"gpu": "rtx-40900"}, "gpu"),
        ({"sequence_length": 0}, "sequence_length"),
        ({"settings": {"lora.rank": -1}}, "lora.rank"),
        ({"model": "", "file": {"text": "a: [1"}}, "YAML"),
        ({"model": "", "file": {"text": "hello"}}, "no configuration"),
        ({"model": "", "file": {"text": "unknown_tool: 1"}}, "No tool is known"),
    ],
)
def test_a_slip_is_a_sentence_that_says_what_to_write(choice: dict, words: str) -> None:
    (error, *_) = ask(**choice)["error"]
    assert words in error["problem"] and "/tmp" not in json.dumps(error)
    assert {"allowed", "write", "where"} & {*error}


@pytest.mark.thorough
def test_the_archive_answers_with_nothing_but_the_standard_library(tmp_path: Path) -> None:
    packed = tmp_path / "project.zip"
    packed.write_bytes(archive())
    assert packed.read_bytes() == archive() and packed.stat().st_size < 1.1 * 10**6
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / "typing_extensions.py").symlink_to(
        typing_extensions.__file__
    )  # which Python 3.13 has no use for
    code = (
        "import sys, zipfile; zipfile.ZipFile(sys.argv[1]).extractall(sys.argv[2]); sys.path.insert(0, sys.argv[2]);"
        "from dryfit.site.answer import reply; print(reply(sys.argv[3]))"
    )
    command = [
        sys.executable,
        "-I",
        "-S",
        "-c",
        code,
        str(packed),
        str(tmp_path / "it"),
        json.dumps(CHOICE),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == reply(json.dumps(CHOICE))
