"""``dryfit``: verdict, exit status, suggestions that can be pasted; each wrong question says what to write."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dryfit import Run
from dryfit.ask import answer, fit
from dryfit.ask.answer import predict
from dryfit.ask.command import _Progress, main
from dryfit.ask.explain_measurement import measured
from dryfit.ask.question import QuestionOptions, question
from dryfit.ask.run_cost import ranked
from dryfit.cards.gpus import GIB, find, known
from dryfit.cards.sentences import smallest
from dryfit.common import terminal
from dryfit.common.errors import UserError
from dryfit.common.terminal import working
from dryfit.hours.run_time import run_time
from dryfit.planner.compare import untimed_because
from dryfit.readers.request import parse_request
from dryfit.scenario.scenario import Scenario
from dryfit.tracing.trace import trace
from tests.dryfit.ask.conftest import TINY
from tests.warm import launchers

ROOT = Path(__file__).resolve().parents[3]
SMALL = "{vram_gib: 0.6, context_mib: 512}"


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    status = main(words)
    return status, capsys.readouterr().out


def test_the_verdict_comes_first_with_the_two_numbers_that_decide_it(model, capsys) -> None:
    status, text = run(capsys, model, "--gpu", "t4", "-s", "64")
    assert status == 0
    assert re.match(
        r"FITS  Tesla T4: needs [\d.]+ of 14\.42 GiB, [\d.]+ to spare$", text.splitlines()[0]
    )
    status, text = run(capsys, "explain", model, "--gpu", "t4", "-s", "64")
    first = text.splitlines()[0]
    assert status == 0
    assert re.match(
        r"FITS: the step needs [\d.]+ GiB, the Tesla T4 has 14.42 GiB usable; [\d.]+ GiB to spare$",
        first,
    )
    tools, about, of_trl, defaults = text.splitlines()[1:5]
    assert re.match(
        r"With each tool's defaults, estimated: TRL [\d.]+, PEFT [\d.]+, axolotl [\d.]+ GiB", tools
    )
    assert (
        of_trl.startswith("as TRL has it: precision fp32, autocast bf16, ")
        and "--like axolotl" in tools
    )
    assert about.startswith("for: tiny; QLoRA of rank 16 on all linear layers; ")
    assert defaults.startswith(
        "defaults used: 1 row a micro-batch, method qlora, kbit_preparation none, "
    )
    for name in ("rule of thumb", "analytic estimate", "trace of the step", "measurement"):
        assert name in text


def test_defaults_that_nobody_named_stand_in_a_line_of_their_own(model, tmp_path, capsys) -> None:
    _, text = run(capsys, "explain", model, "--gpu", "t4", "--quick")
    (defaults,) = (line for line in text.splitlines() if line.startswith("defaults used"))
    assert defaults.startswith("defaults used: 512 tokens a row, 1 row a micro-batch, method qlora")
    assert "lora {rank: 16" in defaults and "none" not in defaults.partition("lora")[0]
    path = tmp_path / "axolotl.yaml"
    path.write_text(f"base_model: {model}\nadapter: lora\nlora_r: 8\n", encoding="utf-8")
    _, text = run(capsys, "explain", str(path), "--gpu", "t4", "-b", "2")
    (defaults,) = (line for line in text.splitlines() if line.startswith("defaults "))
    assert (
        defaults.startswith("defaults of axolotl used: 512 tokens a row, ")
        and "micro-batch" not in defaults
    )


def test_json_is_predicts_object(model, capsys) -> None:
    status, text = run(capsys, model, "--gpu", "t4", "-s", "64", "--json")
    found = json.loads(text)
    fields = {"model": model, "gpu": "t4", "sequence_length": 64, "like": "trl"}
    scenario = parse_request(fields).scenario
    own = json.loads(json.dumps(predict(scenario)))
    assert status == 0 and set(own) <= set(found)
    same = ("trace", "verdict", "fits", "gpu", "margin")
    assert {key: found[key] for key in same} == {key: own[key] for key in same}
    assert found["verdict"] == "fits" and found["sentence"] == own["sentence"]


@pytest.mark.thorough
def test_suggestions_are_command_lines_that_fit(model, capsys) -> None:
    words = (
        model,
        "--gpu",
        "{vram_gib: 0.66, context_mib: 512}",
        "-s",
        "4096",
        "-b",
        "8",
        "--method",
        "lora",
    )
    status, text = run(capsys, *words)
    assert status == 1 and text.startswith("DOES NOT FIT  a GPU of 0.66 GiB: needs ")
    (line,) = re.findall(r"^fits with: (dryfit .*)$", text, re.MULTILINE)
    status, _ = run(capsys, *shlex.split(line)[1:])
    assert status == 0
    _, text = run(capsys, "explain", *words)
    assert text.startswith("DOES NOT FIT: the step needs ")
    lines = [found.strip() for found in text.splitlines() if found.startswith("  dryfit")]
    assert len(lines) > 1 and lines[0].replace("explain ", "") == line, "the cheapest first"


def _asked(*words: str, kept: Path | None = None, python: str = sys.executable) -> subprocess.Popen:
    program, environment = [python, "-m", "dryfit.ask", *words], dict(os.environ)
    if kept is not None:
        environment["DRYFIT_CACHE"] = str(kept)
    pipe = subprocess.PIPE
    return subprocess.Popen(program, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


TOO_LARGE = ("--gpu", "0.66GiB", "-s", "4096", "-b", "8", "--method", "lora")


@pytest.mark.thorough
def test_the_verdict_is_there_before_the_suggestions_and_survives_being_stopped(
    model, tmp_path
) -> None:
    asked = _asked(model, *TOO_LARGE, kept=tmp_path / "kept")
    first = asked.stdout.readline()
    assert first.startswith("DOES NOT FIT") and asked.poll() is None  # the searches go on
    asked.send_signal(signal.SIGINT)
    out, err = asked.stdout.read(), asked.stderr.read()
    assert asked.wait(60) == 1 and "Traceback" not in err and "stopped" in err
    assert "tiny" in out and "LoRA r16" in out
    assert not (tmp_path / "kept").exists()  # half an answer is no answer to show again


def test_an_interruption_that_python_drops_ends_the_searches_before_the_next(capsys) -> None:
    class Deleted:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    progress, before = _Progress(), signal.getsignal(signal.SIGINT)
    with progress.stoppable(), working("tracing the step"):
        progress("a_change", 2, [])
        assert (
            terminal._line.doing == "tracing alternatives: a change; 2 more to try (Ctrl-C stops)"
        )
        Deleted()  # the exception is dropped where it is raised
        with pytest.raises(KeyboardInterrupt):
            progress("another", 1, [])
    assert "Traceback" not in capsys.readouterr().err and signal.getsignal(signal.SIGINT) is before


@pytest.mark.thorough
def test_json_is_one_object_and_the_searches_are_heard_beside_it(model) -> None:
    asked = _asked(model, *TOO_LARGE, "--json", "--suggest", python=f"{launchers()}/python")
    out, err = asked.communicate(timeout=600)
    found = json.loads(out)
    assert asked.returncode == 1 and found["suggestions"]
    assert all(re.match(r"tracing .+ \(\d+ s\)$", line) for line in err.splitlines())
    changes = [
        item for item in found["suggestions"] if item["move"] not in ("more_gpus", "bigger_gpu")
    ]
    assert len(changes) <= 3


def test_the_scenario_to_keep_gives_the_same_answer(tmp_path, capsys) -> None:
    status, text = run(
        capsys, "Qwen/Qwen3-0.6B", "--gpu", "2x3090", "-s", "128", "--set", "lora.rank=4", "--yaml"
    )
    assert status == 0
    kept = yaml.safe_load(text)
    assert kept["model"] == "Qwen/Qwen3-0.6B" and kept["gpu"] == {"name": "rtx-3090", "count": 2}
    assert kept["parallel"]["strategy"] == "fsdp2" and kept["lora"]["rank"] == 4
    (tmp_path / "kept.yaml").write_text(text, encoding="utf-8")
    _, again = run(capsys, str(tmp_path / "kept.yaml"), "--yaml")
    assert yaml.safe_load(again)["parallel"] == kept["parallel"]


def test_quick_needs_no_torch_and_no_module_of_another_question() -> None:
    others = {
        "readers.axolotl",
        "readers.program",
        "recipes.trainers",
        "serving.vllm",
        "tracing.cycle",
    }
    heavy = {"torch", "transformers", "numpy", "huggingface_hub"} | {
        f"dryfit.{name}" for name in others
    }
    program = (
        "import sys\nfrom dryfit.ask.command import main\n"
        "main(['qwen2.5-0.5b', '--gpu', 't4', '--quick'])\n"
        f"assert not {heavy!r} & set(sys.modules), 'heavy'\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("FITS  ")


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("like", ["trl", "peft", "axolotl"])
def test_quick_answers_the_steps_that_tools_take_by_default(model, like, method, capsys) -> None:
    words = [
        model,
        "--gpu",
        "4090",
        "-b",
        "2",
        "-s",
        "64",
        "--quick",
        "--like",
        like,
        "--method",
        method,
    ]
    status, text = run(capsys, *words)
    assert status == 0 and text.startswith("FITS  RTX 4090: about ")


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ([], 0, "the estimate answers"),
        (["--json"], 0, "the estimate answers"),
        (["--rows", "9"], 3, "needs a trace"),
    ],
)
def test_without_torch_the_estimate_answers_and_names_what_to_install(
    model, words, status, said
) -> None:
    program = (
        "import sys\nsys.modules['torch'] = sys.modules['transformers'] = None\n"
        f"from dryfit.ask.command import main\nsys.exit(main([{model!r}, '--gpu', 't4', *{words!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status and "Traceback" not in done.stderr
    assert said in done.stderr and "dryfit[trace]" in done.stderr
    assert done.stdout.startswith({0: "{" if words else "FITS  "}.get(status, ""))


@pytest.mark.parametrize(
    "words",
    [["openai/whisper-large-v3", "--gpu", "t4"], ["run", "--yes", "--gpu", "t4", "train.py"]],
)
def test_without_torch_no_program_is_followed_and_the_package_is_named(words, tmp_path) -> None:
    (tmp_path / "train.py").write_text("import torch\n")
    program = (
        "import sys\nsys.modules['torch'] = sys.modules['transformers'] = None\n"
        f"sys.argv[1:] = {words!r}\nfrom dryfit.ask.command import run\nrun()"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DRYFIT_CACHE": ""}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout and "Traceback" not in done.stderr
    assert "some of them are not installed" in done.stderr and "dryfit[trace]" in done.stderr


@pytest.mark.thorough
def test_a_terminal_shows_the_estimate_while_the_step_is_traced(model, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main([model, "--gpu", "4090", "-s", "64"]) == 0
    seen = capsys.readouterr()
    assert seen.out.startswith("FITS") and seen.err.startswith("FITS: about")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    main([model, "--gpu", "4090", "-s", "64"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("gpu", "word", "status"),
    [("24GiB", "FITS", 0), ("10.6GiB", "TOO CLOSE", 1), ("4GiB", "DOES NOT", 1)],
)
def test_quick_says_where_it_can_not_decide(gpu, word, status, capsys) -> None:
    rows = ["-b", "2", "-s", "512"]  # which no record covers
    found, text = run(capsys, "qwen2.5-coder-7b", *rows, "--gpu", gpu, "--quick")
    assert text.startswith(word) and found == status


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["--gpu", "h100-80gb"], 1),
        (["--gpu", "b300"], 3),  # which holds the weights
        (["--gpu", "2xh100-80gb"], 3),
        (["--gpu", "h100-80gb", "--set", "experts.offload=host"], 3),
        (["--gpu", "h100-80gb", "--set", "experts.quantized=bitsandbytes"], 3),
        (["--gpu", "h100-80gb", "--method", "lora", "--set", "objective=reward"], 3),
    ],
    ids=str,
)
def test_a_step_that_is_not_described_does_not_fit_where_its_weights_alone_do_not(
    words, status, capsys
) -> None:
    assert main(["deepseek-v4-flash", *words, "--quick", "--json"]) == status
    out, error = capsys.readouterr()
    assert "the weights of its 284.33 billion parameters alone take" in (
        out if status == 1 else error
    )
    if status == 1:
        found = json.loads(out)
        assert (
            found["analytic"] is None
            and found["verdict"] == "does_not_fit"
            and found["headroom_bytes"] < 0
        )
        assert found["sentence"].startswith("DOES NOT FIT: the weights alone take 132.40 GiB")
    else:
        assert error.startswith("NO ANSWER")


@pytest.mark.thorough
def test_the_longest_sequence_is_one_that_fits(model, capsys) -> None:
    status, text = run(capsys, "longest", model, "--gpu", SMALL, "--method", "full", "--json")
    found = json.loads(text)
    assert status == 0 and found["verified"] and found["headroom_bytes"] >= 0
    assert run(capsys, model, "--gpu", SMALL, "--method", "full", "-s", str(found["value"]))[0] == 0
    assert found["with_other_allocator"] > 0
    lines = run(capsys, "longest", model, "--gpu", SMALL, "--method", "full")[1].splitlines()
    assert (
        lines[1]
        == f"{found['with_other_allocator']:,} tokens with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
    )
    assert (
        found["limited_by_positions"]
        or "everything below fits as well; more tokens may fit by chance" in lines[3]
    )


@pytest.mark.thorough
def test_the_largest_batch_is_one_that_is_confirmed(model, capsys) -> None:
    """Rows of a batch are padded and carry a mask, which a row alone does not: the search has it too."""
    words = (model, "--gpu", SMALL, "--like", "trl", "-s", "512", "--set", "loss=full")
    status, text = run(capsys, "batch", *words, "--json")
    rows = json.loads(text)["value"]
    assert status == 0 and rows > 1

    def fits(rows: int) -> bool:
        asked = question(
            [model], QuestionOptions("0.6GiB", None, 512, rows, settings=["loss=full"], like="trl")
        )
        assert asked.scenario.attention_mask == ("padding" if rows > 1 else "none")
        return trace(asked.scenario, timeline=False)["required_bytes"] <= asked.gpu.usable_bytes

    assert fits(rows) and not fits(rows + 1)


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_the_time_of_another_objective_has_its_own_reason(objective) -> None:
    scenario = Scenario.from_mapping(
        {
            "model": TINY,
            "gpu": "rtx-4090",
            "objective": objective,
            "micro_batch": 8,
            "sequence_length": 64,
        }
    )
    assert untimed_because(scenario).endswith(f"this objective is {objective}")
    assert "no speed of this GPU" in untimed_because(
        Scenario.from_mapping({"model": TINY, "gpu": "24GiB"})
    )


def test_the_smallest_gpu_is_the_smallest_of_all_that_are_known() -> None:
    assert known()[re.search(r"--gpu ([\w-]+)", smallest(6.75 * GIB))[1]].usable_bytes < 8 * GIB
    replayed = [card for card in known().values() if card.is_modelled and not card.pool_bytes]
    sizes = sorted(card.usable_bytes for card in replayed)
    for size in sizes:
        name = re.search(r"--gpu ([\w-]+)", smallest(size))[1]
        assert known()[name].usable_bytes == size


@pytest.mark.thorough
def test_all_gpus_are_answered(model, capsys) -> None:
    status, text = run(capsys, "gpus", model, "-s", "64")
    assert status == 0 and text.startswith("FITS 26 of 26 GPUs") and "rtx-4090" in text


@pytest.mark.thorough
def test_cards_that_records_know_are_not_traced(monkeypatch) -> None:
    """And their rows are those of the trace."""
    asked = question(["qwen3-0.6b"], QuestionOptions(sequence_length=512))
    with monkeypatch.context() as patched:
        patched.setattr(
            "dryfit.tracing.trace.trace", lambda *_, **__: pytest.fail("records know every card")
        )
        rows = answer.on_all_gpus(asked)
    monkeypatch.setattr(answer, "if_recorded", lambda *_: None)
    assert all(row.pop("recorded") for row in rows)
    traced = answer.on_all_gpus(asked)
    assert not any(row.pop("recorded") for row in traced) and traced == rows and len(rows) == 26


def test_of_layers_without_an_estimate_records_answer_and_say_where_they_end(capsys) -> None:
    status, text = run(capsys, "gpus", "lfm2-1.2b", "--quick")
    rows = {line.split()[0]: line for line in text.splitlines()[1:]}
    assert status == 0 and text.startswith("FITS 23 of 26 GPUs: ")
    assert (
        "no record of" in rows["t4"]
        and "ask without --quick" in rows["t4"]
        and "fits" in rows["l4"]
    )
    status, text = run(capsys, "longest", "qwen3.5-9b", "--gpu", "4090", "--quick")
    assert status == 0 and text.startswith(
        "4,096 tokens fit the NVIDIA GeForce RTX 4090 by a record of its trace"
    )
    assert "more tokens have no record; ask without --quick for them" in text
    status, found = run(capsys, "longest", "qwen3.5-9b", "--gpu", "4090", "--quick", "--json")
    assert (found := json.loads(found))["recorded_to"] == found["value"] == 4096 and not found[
        "limited_by_positions"
    ]


@pytest.mark.parametrize("words", [[], ["gpus"], ["longest"], ["batch"]], ids=str)
def test_where_neither_an_estimate_nor_a_record_knows_a_step_the_line_that_traces_it_is_named(
    words,
) -> None:
    card = [] if words == ["gpus"] else ["--gpu", "4090"]
    asked = [*words, "qwen3.5-9b", *card, "--quick", "--set", "optimizer=adamw_8bit"]
    program = (
        "import sys\nsys.modules['torch'] = sys.modules['transformers'] = None\n"
        f"sys.argv[1:] = {asked!r}\nfrom dryfit.ask.command import run\nrun()"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DRYFIT_CACHE": ""}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode in (2, 3) and not done.stdout and "Traceback" not in done.stderr
    assert "the layers of qwen3_5_text, whose steps are traced" in done.stderr
    assert "8.95 billion parameters" in done.stderr and "dryfit[trace]" in done.stderr


def test_a_run_has_hours_cost_energy_and_its_bounds(model, capsys) -> None:
    words = (
        model,
        "--gpu",
        "a100-80gb",
        "-s",
        "64",
        "--rows",
        "50,000",
        "--epochs",
        "3",
        "--price",
        "A100 80GB=2",
        "--deadline",
        "30d",
        "--grams-per-kwh",
        "400",
    )
    status, text = run(capsys, *words)
    assert status == 0 and "150,000 steps" in text and "ends by the deadline of 720 hours" in text
    assert "each row counts as 64 tokens, the longest" in text and "kg of CO2" in text
    assert "on each of" not in text  # there is one GPU
    _, found = run(capsys, *words, "--json")
    answer = json.loads(found)
    hours = 150_000 * answer["time"]["seconds_per_step"] / 3600
    assert answer["run"]["hours"] == pytest.approx(hours) and answer["run"][
        "cost"
    ] == pytest.approx(2 * hours)


@pytest.mark.thorough
def test_a_price_without_a_name_is_that_of_the_card_named(model, capsys) -> None:
    words = (model, "--gpu", "a100-80gb", "-s", "64", "--rows", "50,000", "--json")
    named, plain = (
        json.loads(run(capsys, *words, "--price", price)[1])["run"]
        for price in ("a100-80gb=1.29", "1.29")
    )
    assert plain == named and plain["cost"] > 0


@pytest.mark.thorough
def test_a_mean_length_takes_less_than_the_longest(model, capsys) -> None:
    words = (model, "--gpu", "t4", "-s", "2048", "-b", "8", "--rows", "50000")
    _, text = run(capsys, *words, "--tokens-per-row", "64")
    assert "each row counts as 64 tokens, on average, without padding" in text
    assert "cost: not known, since no price of t4 was given (--price t4=1.29)" in text
    mean, longest = (
        fit(
            model,
            gpu="t4",
            sequence_length=2048,
            micro_batch=8,
            run=Run(50_000, tokens_per_row=tokens),
        ).run
        for tokens in (64, None)
    )
    assert mean.hours < longest.hours and mean.steps == longest.steps and longest.longest


@pytest.mark.thorough
def test_a_deadline_that_a_card_does_not_meet_fails(model, capsys) -> None:
    status, text = run(
        capsys, model, "--gpu", "t4", "-s", "64", "--rows", "50000", "--deadline", "1min"
    )
    assert status == 1 and text.startswith("FITS") and "DOES NOT END BY THE DEADLINE" in text
    assert "rate of fp32" in text  # bf16 on a T4
    first, price = text[
        text.index("what would end in time, the mildest change first:") :
    ].splitlines()[1:3]
    assert first.startswith("  dryfit") and first.endswith("-b 64")
    assert "learning rate" in price and "hours" in price


def test_a_card_of_unknown_speed_answers_memory_and_says_what_to_add(model, capsys) -> None:
    words = (model, "--gpu", "10GiB", "-s", "64")
    status, text = run(capsys, *words, "--rows", "50000")
    assert status == 0 and text.startswith("FITS") and "hours and cost: not known" in text
    _, text = run(capsys, "explain", *words)
    assert "add under `speeds`" in text


@pytest.mark.thorough
def test_cards_are_ranked_by_cost_among_those_that_end_in_time(model, tmp_path, capsys) -> None:
    prices = tmp_path / "prices.yaml"
    prices.write_text("a100-80gb: 2\nrtx-4090: 0.3\n", encoding="utf-8")
    words = ("gpus", model, "-s", "64", "--rows", "1000", "--price", str(prices))
    status, text = run(capsys, *words)
    lines = text.splitlines()
    assert status == 0 and [line.split()[0] for line in lines[1:3]] == ["rtx-4090", "a100-80gb"]
    assert (
        lines[-2].startswith("the cheapest: rtx-4090")
        and "No step was measured on this GPU" in lines[-2]
    )
    assert lines[-1].startswith("of GPUs with measured steps: a100-80gb")


def test_a_deadline_that_no_card_meets_names_the_nearest() -> None:
    scenario = Scenario.from_mapping({"model": "smollm2-135m"})
    asked, rows = Run(100, deadline_hours=1e-4), []
    for gpu, seconds in (("t4", 9.0), ("l4", 3.6)):
        found = run_time({"seconds_per_step": seconds, "range": None}, find(gpu), scenario, asked)
        rows.append({"gpu": gpu, "fits": True, "run": found.to_mapping(), "warnings": ["slow"]})
    nearest = "NO GPU that fits ends by the deadline. The nearest is l4: 0.1 hours"
    assert ranked(rows) == ["  t4, l4: slow", nearest]


# --- what goes wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says", "write"),
    [
        (
            ["qwen2.5-coder-7b", "--gup", "4090"],
            "no option `--gup`",
            "dryfit qwen2.5-coder-7b --gpu 4090",
        ),
        (
            ["qwen2.5-coder-7b", "-s", "0"],
            "takes a whole number",
            "dryfit qwen2.5-coder-7b -s 2048",
        ),
        (["qwen2.5-coder-7b", "--gpu", "x"], "not known", "--gpu 12GiB"),
        (["qwen2.5-coder-7b", "--gpu", "A100"], "may mean 2 GPUs", "--gpu a100-40gb"),
        (["qwen3-9b"], "neither the name", "dryfit qwen3.5-9b"),
        (
            ["qwen2.5-coder-7b", "--set", "lora.rang=4"],
            "did you mean `lora.rank`",
            "--set lora.rank=4",
        ),
        (
            ["qwen2.5-coder-7b", "--set", "sequence=4"],
            "doesn't have: sequence",
            "dryfit qwen2.5-coder-7b -s 4",
        ),
        (["qwen2.5-coder-7b", "--set", "rank"], "field=value", "--set lora.rank=64"),
        (["qwen2.5-coder-7b", "-s", "99999"], "beyond the 32768 positions", "-s 32768"),
        (["qwen2.5-coder-7b", "--strategy", "fsdp2"], "for several GPUs", "--gpu 2xrtx-3090"),
        (
            ["divide", "qwen2.5-coder-7b", "--gpu", "2xt4", "--quick"],
            "does not use --quick; fit, longest,",
            "--gpu 2xt4",
        ),
        (
            ["gpus", "qwen2.5-coder-7b", "--gpu", "t4"],
            "does not use --gpu",
            "dryfit gpus qwen2.5-coder-7b",
        ),
        (
            ["qwen2.5-coder-7b", "--method", "full", "--set", "quantization.double=true"],
            "don't go together",
            "--method",
        ),
        (["qwen2.5-coder-7b", "--epochs", "3"], "--epochs needs --rows", "--epochs 3 --rows 50000"),
        (["qwen2.5-coder-7b", "--rows", "9"], "--rows needs --gpu", "--rows 9 --gpu a100-80gb"),
        (["qwen2.5-coder-7b", "--tokens-per-row", "9"], "needs --rows", "--rows 50000"),
        (
            [
                "qwen2.5-coder-7b",
                "--rows",
                "9",
                "--gpu",
                "t4",
                "-s",
                "64",
                "--tokens-per-row",
                "65",
            ],
            "larger than the sequence length",
            "--tokens-per-row 64",
        ),
        (["qwen2.5-coder-7b", "--rows", "9", "--gpu", "t4", "--quick"], "contradict", "--rows"),
        (
            ["qwen2.5-coder-7b", "--rows", "9", "--gpu", "t4", "--price", "t4=0"],
            "above 0",
            "--price t4=1.29",
        ),
        (
            ["qwen2.5-coder-7b", "--rows", "9", "--gpu", "t4", "--price", "A100=1"],
            "2 GPUs",
            "--price a100-40gb=",
        ),
        (
            ["qwen2.5-coder-7b", "--rows", "9", "--gpu", "t4", "--price", "2xt4=1"],
            "for one GPU",
            "--price t4=1.29",
        ),
        (
            ["qwen2.5-coder-7b", "--rows", "9", "--gpu", "t4", "--price", "no.yaml"],
            "or a file",
            "--price a100-80gb=1.29",
        ),
        (
            ["qwen2.5-coder-7b", "--rows", "9", "--gpu", "t4", "--deadline", "soon"],
            "above 0",
            "--deadline 24h",
        ),
        (
            ["gpus", "qwen2.5-coder-7b", "--rows", "9", "--price", "1.29"],
            "names no GPU",
            "--price a100-80gb=1.29",
        ),
        (
            ["qwen2.5-coder-7b", "--rows", "9", "--gpu", "t4", "--price", "-1"],
            "above 0",
            "--price 1.29",
        ),
        (["serve", "qwen2.5-coder-7b", "--weights", "q9"], "not known", "--weights q4_k_m"),
        (
            ["serve", "qwen2.5-coder-7b", "--method", "full"],
            "does not use --method",
            "serve qwen2.5-coder-7b",
        ),
    ],
)
def test_a_wrong_question_says_what_to_write(words, says, write) -> None:
    with pytest.raises(UserError) as caught:
        main(words)
    assert says in str(caught.value) and write in caught.value.write


def test_a_wrong_option_is_answered_before_anything_is_imported() -> None:
    program = (
        "import sys\nfrom dryfit.ask.command import run\nsys.argv = ['dryfit', 'x', '--gup']\nrun()"
    )
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "no option `--gup`" in done.stderr
    assert not {"torch", "transformers", "numpy", "huggingface_hub"} & set(
        re.findall(r"\\| +(\\w+)$", done.stderr, re.M)
    )


# --- serving, differences, Python ----------------------------------------------------------------------------------


def test_serving_is_weights_keys_values_and_a_step(capsys) -> None:
    status, text = run(
        capsys, "serve", "llama-3.1-8b", "--gpu", "24GiB", "--requests", "4", "-s", "512", "--json"
    )
    found = json.loads(text)
    assert found["weights_bytes"] == 2 * 8_030_261_248
    assert found["cache_bytes"] == 4 * 512 * 32 * 2 * 8 * 128 * 2
    assert found["step_bytes"] > 0 and found["step_is"].startswith("traced")
    assert status == 0 and found["total_bytes"] == sum(
        found[f"{part}_bytes"] for part in ("weights", "cache", "step")
    )
    _, packed = run(capsys, "serve", "llama-3.1-8b", "-s", "512", "--weights", "q4_k_m")
    assert packed.startswith("Serving needs ")


def test_a_served_prompt_is_read_in_16_bits_without_whole_scores(model: str, capsys) -> None:
    sizes = [
        json.loads(run(capsys, "serve", model, "--gpu", "24GiB", "-s", tokens, "--json")[1])[
            "step_bytes"
        ]
        for tokens in ("1024", "4096")
    ]
    assert sizes[1] < 5 * sizes[0]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("nvidia-smi=14.2GiB", ("nvidia-smi", round(14.2 * GIB))),
        ("allocated=9543MiB", ("allocated", 9543 * 2**20)),
        ("14.2GiB", ("nvidia-smi", round(14.2 * GIB))),
        ("reserved=10 GB", ("reserved", 10**10)),
        ("nvidia-smi=14540", ("nvidia-smi", 14540 * 2**20)),
    ],
)
def test_a_figure_and_its_size(text, found) -> None:
    assert measured(text) == found


@pytest.mark.parametrize("text", ["nvidia-smi=", "nvidia-smi=lots", "gpu=14GiB", "reserved=4TB"])
def test_figures_that_say_nothing(text) -> None:
    with pytest.raises(UserError, match="takes a size"):
        measured(text)


@pytest.mark.thorough
def test_a_difference_is_put_into_causes_that_make_as_much(model, capsys) -> None:
    _, text = run(capsys, model, "--gpu", "t4", "-s", "256", "--json")
    own = json.loads(text)["trace"]["peak_reserved_bytes"]
    _, wider = run(capsys, model, "--gpu", "t4", "-s", "2048", "-b", "2", "--json")
    _, text = run(
        capsys,
        "compare",
        model,
        "--gpu",
        "t4",
        "-s",
        "2048",
        "--measured",
        f"reserved={json.loads(wider)['trace']['peak_reserved_bytes'] / 2**20:.3f}MiB",
    )
    likeliest = text.split("the likeliest first:\n")[1].splitlines()
    assert "batch" in likeliest[0] and "try: -" in likeliest[1]
    _, text = run(
        capsys,
        "compare",
        model,
        "--gpu",
        "t4",
        "-s",
        "256",
        "--measured",
        f"reserved={own / 2**20:.3f}MiB",
    )
    assert "That explains it" in text


@pytest.mark.thorough
def test_the_answer_in_python_is_typed_and_shows_itself(model, capsys) -> None:
    answer = fit(model, gpu="t4", sequence_length=64, lora={"rank": 4})
    assert answer.fits and answer.required_bytes > answer.components["weights_4bit"] > 0
    assert answer.details["scenario"]["lora"]["rank"] == 4 and str(answer).startswith("FITS")
    assert "<b>FITS" in answer._repr_html_()
    tight = fit(model, gpu="0.66GiB", sequence_length=4096, micro_batch=8, method="lora")
    assert tight.fits is False and tight.headroom_bytes < 0
    program, *words = shlex.split(tight.suggestions[0].command)
    status, _ = run(capsys, *words)
    assert program == "dryfit" and status == 0, "the command has the whole question, changed"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"method": "full"}, True),
        ({"method": "full", "optimizer_state_precision": "fp32"}, True),
        ({"method": "full", "precision": "bf16-mixed"}, False),
        ({"method": "full", "precision": "fp32"}, False),
        ({"method": "lora"}, False),
        (
            {"method": "full", "parallel": {"strategy": "zero3", "gpus": 8}, "autocast": "bf16"},
            False,
        ),
    ],
)
def test_full_fine_tuning_in_16_bits_says_that_it_keeps_no_fp32_weights(fields, said) -> None:
    from dryfit.ask.answer import without_masters

    texts = without_masters(Scenario.from_mapping({"model": "llama-3.1-8b", **fields}))
    assert bool(texts) == said
    if (
        said
    ):  # 8.03 billion weights, gradients and two states in fp32, with 16-bit copies and activations
        assert float(texts[0].partition("about ")[2].partition(" GiB")[0]) > 4 * 4 * 8.03e9 / 2**30
        assert "--set precision=bf16-mixed" in texts[0]
        wide = "optimizer_state_precision" in fields
        assert ("the optimizer's states in fp32" in texts[0]) == wide


def test_a_file_that_names_its_gpu_needs_no_option(model: str, tmp_path, capsys) -> None:
    file = tmp_path / "step.yaml"
    file.write_text(f"model: {model}\nsequence_length: 256\ngpu: rtx-4090\n")
    assert main(["batch", str(file), "--quick"]) == 0
    assert "fit the NVIDIA GeForce RTX 4090" in capsys.readouterr().out
    file.write_text(f"model: {model}\nsequence_length: 256\n")
    with pytest.raises(UserError, match="needs a GPU, and the file names none"):
        main(["batch", str(file), "--quick"])


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (["longest", "--gpu", "1GiB"], "sequence_length"),
        (["batch", "-s", "2048", "--gpu", "0.7GiB"], "micro_batch"),
    ],
)
def test_the_estimate_brackets_the_largest_step_that_fits(
    words: list[str], field: str, model: str, capsys
) -> None:
    line = [*words, model, "--method", "lora", "--json"]
    assert main(line) == 0
    traced = json.loads(capsys.readouterr().out)
    assert main([*line, "--quick"]) == 0
    quick = json.loads(capsys.readouterr().out)
    assert quick["field"] == field and quick["verified"] is False
    assert 0 < quick["value"] <= traced["value"] and (quick["too_large"] or 10**9) > traced["value"]
    assert main([*line[:-1], "--quick"]) == 0
    assert f"{quick['value']:,} " in capsys.readouterr().out


def test_every_gpu_has_an_estimate(capsys) -> None:
    assert main(["gpus", "qwen2.5-coder-7b", "-s", "2048", "--quick", "--json"]) == 0
    rows = {row["gpu"]: row for row in json.loads(capsys.readouterr().out)}
    assert main(["qwen2.5-coder-7b", "-s", "2048", "--gpu", "rtx-4090", "--quick", "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert (rows["rtx-4090"]["verdict"], rows["rtx-4090"]["headroom_bytes"]) == (
        one["verdict"],
        one["headroom_bytes"],
    )
    with pytest.raises(UserError, match="does not describe") as error:
        main(["gpus", "qwen2.5-coder-7b", "--set", "optimizer=galore", "--quick"])
    assert error.value.write == "the same line without --quick"
