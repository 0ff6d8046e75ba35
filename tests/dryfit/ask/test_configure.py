"""``config``: what is written is what is read, and what is read is what is answered."""

import ast
import json
from itertools import product
from pathlib import Path

import pytest
import yaml

from dryfit.ask.answer import quick
from dryfit.ask.command import main
from dryfit.ask.configure import MICRO_BATCHES, configure, rendered, wanted, ways, writers
from dryfit.ask.options import FILES
from dryfit.ask.question import QuestionOptions, question
from dryfit.common.errors import UserError
from dryfit.scenario.scenario import Scenario

MODELS = (
    "qwen2.5-coder-7b",
    "qwen3-8b",
    "llama-3.1-8b",
    "mistral-7b-v0.3",
    "gemma-2-9b",
    "phi-3-mini-4k",
    "smollm2-135m",
    "qwen2.5-coder-0.5b",
    "qwen3-0.6b",
    "llama-3.2-1b",
)
CARDS = ("t4", "4090", "a100-80gb")
NO_FILE = {("torchtune", "smollm2-135m")}  # torchtune builds no Llama whose embeddings are its head


def goal(model: str, tool: str, **options):
    asking = QuestionOptions(**{"gpu": "4090", "sequence_length": 512, **options})
    return wanted(question([model], asking), tool, asking, None)


LIBRARY = tuple(
    tool for tool in FILES if tool != "pipeline"
)  # tests/unit/ask/test_config_of_a_run.py has that one


def read_back(text: str, tool: str, folder: Path, gpu: str) -> Scenario:
    """The step that our reader makes of a file."""
    path = folder / writers()[tool]["file"]
    path.write_text(text, encoding="utf-8")
    return question([path], QuestionOptions(gpu=gpu)).scenario


def test_tools_have_a_writer_and_a_model_without_a_builder_gets_another() -> None:
    assert tuple(writers()) == FILES
    with pytest.raises(UserError, match="no builder for this model") as error:
        main(["config", "smollm2-135m", "--gpu", "4090", "--for", "torchtune"])
    assert error.value.write.endswith("--for axolotl")


@pytest.mark.few(1, 1)
@pytest.mark.parametrize("tool", LIBRARY)
def test_each_way_of_each_file_is_read_as_it_is_meant(tool: str, tmp_path: Path) -> None:
    """Ten models and three cards; each way of the first model, then one of each other."""
    for model, card in product(MODELS, CARDS):
        if (tool, model) in NO_FILE:
            continue
        chosen = goal(model, tool, gpu=card, settings=["lora.rank=8"])
        for way in [*ways(chosen)][: None if model == MODELS[0] else 1]:
            step = read_back(rendered(chosen, way, 2), tool, tmp_path, card)
            assert (step.micro_batch, step.gradient_accumulation, step.sequence_length) == (
                2,
                8,
                512,
            )
            assert step.method == way["method"] and step.lora.rank == 8
            assert bool(step.gradient_checkpointing) == (way["checkpointing"] != "off")
            assert step.optimizer == way["optimizer"]
            half = "fp16" if card == "t4" else "bf16"
            if tool == "torchtune":  # no mask, no autocast, no choice of kernels
                assert (
                    step.precision == ("fp32" if card == "t4" else "bf16")
                    and step.attention_mask == "none"
                )
                continue
            # flash takes lengths instead of a mask, and Unsloth drops it
            pads = way["packing"] == "off" and way.get("attention") != "flash" and tool != "unsloth"
            assert step.attention_mask == ("padding" if pads else "none")
            assert step.attention == way.get(
                "attention", "mem_efficient" if tool == "unsloth" else "sdpa"
            )
            if tool != "unsloth":
                assert step.kernels == way["kernels"]
                assert half in (step.autocast, step.autocast_precision)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("tool", "model", "card"),
    [
        pytest.param(*case, marks=() if number % 53 == 0 else pytest.mark.nightly)
        for number, case in enumerate(product(LIBRARY, MODELS, CARDS))
        if case[:2] not in NO_FILE
    ],
)
def test_the_written_file_has_the_same_step_and_verdict(
    tool: str, model: str, card: str, tmp_path: Path
) -> None:
    """Round trip: the search by the estimate, its file on the disk, and that file asked about as anybody would."""
    chosen = goal(model, tool, gpu=card, sequence_length=1024)
    found = configure(chosen, is_traced=False)
    path = tmp_path / writers()[tool]["file"]
    path.write_text(found.text(), encoding="utf-8")
    asked = question([path], QuestionOptions(gpu=card))
    answer = quick(asked, others=False)
    assert asked.scenario == found.best.asked.scenario
    assert (asked.scenario.micro_batch, asked.scenario.method) == (
        found.best.micro_batch,
        found.best.way["method"],
    )
    same = ("verdict", "fits", "headroom_bytes", "sentence")
    assert {name: answer[name] for name in same} == {name: found.best.answer[name] for name in same}


@pytest.mark.few(1, 1)
@pytest.mark.parametrize("tool", LIBRARY)
def test_the_file_that_is_printed_has_the_verdict_that_is_printed(
    tool: str, model: str, tmp_path, capsys
) -> None:
    path = tmp_path / f"written-{writers()[tool]['file']}"
    words = [
        "config",
        model,
        "--gpu",
        "2GiB",
        "-s",
        "256",
        "-b",
        "2",
        "--for",
        tool,
        "--method",
        "lora",
    ]
    assert main([*words, "--output", str(path)]) == 0
    text = capsys.readouterr().out
    assert path.read_text(encoding="utf-8").rstrip() == text.rstrip() and text.startswith(
        "# FITS: "
    )
    assert (
        f"start: {writers()[tool]['start'].split()[0]}" in text
        and "No speed of this GPU is known" in text
    )
    assert main(["explain", str(path), "--gpu", "2GiB", "--fresh"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == text.splitlines()[0].removeprefix("# ")
    with pytest.raises(UserError, match="there already"):
        main([*words, "--output", str(path)])


@pytest.mark.thorough
def test_nothing_fits_is_the_nearest_with_what_is_missing(model: str, capsys) -> None:
    assert (
        main(
            ["config", model, "--gpu", "0.5GiB", "-s", "4096", "-b", "16", "--for", "trl", "--json"]
        )
        == 1
    )
    found = json.loads(capsys.readouterr().out)
    assert found["answer"]["fits"] is not True and found["text"].startswith("# DOES NOT FIT: ")


@pytest.mark.thorough
def test_ways_are_ranked_by_time_where_the_cards_speed_is_known(model: str) -> None:
    chosen = goal(model, "axolotl", gpu="a100-80gb", method="lora")
    found = configure(chosen)
    rates = [one.tokens_per_second(chosen.fill) for one in (found.best, *found.others)]
    assert (
        found.is_timed
        and rates == sorted(rates, reverse=True)
        and found.best.micro_batch == max(MICRO_BATCHES)
    )


def test_files_are_what_their_tools_can_parse(model: str, tmp_path: Path) -> None:
    """YAML and Python by their parsers, and TRL's by TRL's own."""
    for tool in LIBRARY:
        chosen = goal(model, tool)
        for way in ways(chosen):
            text = rendered(chosen, way, 1)
            ast.parse(text) if tool in ("trl-script", "unsloth") else yaml.safe_load(text)
    trl = pytest.importorskip("trl")
    chosen = goal(model, "trl")
    path = tmp_path / "trl.yaml"
    for way in ways(chosen):
        path.write_text(
            rendered(chosen, way, 1).replace("bf16: true", "bf16: false"), encoding="utf-8"
        )  # no GPU here
        parser = trl.TrlParser((trl.ScriptArguments, trl.SFTConfig, trl.ModelConfig))
        *_, settings, loaded = parser.parse_args_and_config(["--config", str(path)])
        assert settings.max_length == 512 and settings.packing == (way["packing"] == "on")
        assert loaded.load_in_4bit == (way["method"] == "qlora") and loaded.lora_r == 16


@pytest.mark.parametrize(
    ("words", "said", "write"),
    [
        (["--for", "axolotl", "--set", "neftune=5"], "doesn't have: neftune", "--for axolotl"),
        (
            ["--for", "axolotl", "--set", "micro_batch=5"],
            "chooses the settings itself",
            "--for axolotl",
        ),
        (["--for", "unsloth", "--method", "full"], "no file for method full", "--method qlora"),
        (["--for", "axolotel"], "does not take axolotel", "--for axolotl"),
        ([], "needs --for", "--for axolotl"),
    ],
)
def test_what_config_can_not_write_is_refused(model: str, words, said, write) -> None:
    with pytest.raises(UserError) as error:
        main(["config", model, "--gpu", "4090", *words])
    assert said in str(error.value) and write in error.value.write


def test_what_is_set_is_kept_or_the_next_best_is_said(model: str, capsys) -> None:
    words = ["config", model, "--gpu", "24GiB", "-s", "256", "--quick", "--json", "--for"]
    assert main([*words, "trl", "--set", "optimizer=adamw_8bit", "--set", "packing=none"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["optimizer"] == "adamw_8bit" and found["settings"]["packing"] == "off"
    assert (
        main([*words, "torchtune", "--set", "attention=flash", "--set", "optimizer=lion_8bit"]) == 0
    )
    text = json.loads(capsys.readouterr().out)["text"]
    assert "torchtune's file can't say attention=flash here; chosen from its own way" in text
    assert "can't say optimizer=lion_8bit here; chosen from adamw_fused, adamw_8bit" in text


def test_without_a_trace_the_estimate_ranks_and_the_file_says_so(model: str, capsys) -> None:
    assert (
        main(["config", model, "--gpu", "a100-80gb", "-s", "256", "--for", "axolotl", "--quick"])
        == 0
    )
    text = capsys.readouterr().out
    assert text.startswith("# FITS: ") and "Estimated, not traced: ranked by rules of thumb" in text


@pytest.mark.parametrize("tool", ["trl-script", "unsloth", "ms-swift", "torchtune"])
def test_the_start_line_for_several_gpus_names_the_processes_that_the_verdict_counts(
    tool: str, tmp_path: Path
) -> None:
    asked, options = (
        question(["qwen3-8b"], QuestionOptions(gpu="2x4090")),
        QuestionOptions(gpu="2x4090"),
    )
    goal, form = wanted(asked, tool, options, None), writers()[tool]
    way = next(way for way in ways(goal) if way["method"] == "lora")
    (tmp_path / form["file"]).write_text(rendered(goal, way, 1), encoding="utf-8")
    start = form["start_several"].format(file=form["file"], gpus=2, trains="lora")
    script = tmp_path / "start.sh"
    script.write_text(start + "\n", encoding="utf-8")
    steps = [
        question([path], asked_for).scenario
        for path, asked_for in (
            (tmp_path / form["file"], options),
            (script, QuestionOptions(gpu=None)),
        )
    ]
    assert [step.parallel.gpus for step in steps] == [2, 2]
    assert steps[0].parallel.strategy == steps[1].parallel.strategy
