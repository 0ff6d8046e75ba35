"""The grammar: each wrong word of a line gets the nearest right one, and the line to paste is understood."""

import json
import shlex
import shutil
import subprocess
import sys

import pytest

from dryfit.ask import options
from dryfit.ask.command import main, read
from dryfit.ask.options import COMMANDS, OPTIONS, own_parser, parser, whole_number
from dryfit.ask.words import meant, parse, suggested
from dryfit.common.errors import UserError

MODEL = "qwen2.5-coder-7b"


def corrected(line: str) -> str:
    """What an error says to write instead of a line."""
    with pytest.raises(UserError) as caught:
        main(shlex.split(line))
    return caught.value.write


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--gpu 4090 --method=qlroa -b 2", "--gpu 4090 --method qlora -b 2"),
        ("--max_seq_length=2048 --gpu 4090", "-s 2048 --gpu 4090"),
        ("--gpu 4090 --lora-r 64 -s 1024", "--gpu 4090 --set lora.rank=64 -s 1024"),
        ("--gpu 4090 --precision fp16", "--gpu 4090 --set precision=fp16"),
        ("--gpu 'MacBook Pro M3 Max' -s 2048", "--gpu apple-32gb -s 2048"),
        ("--gpu colab -s 2048", "--gpu t4 -s 2048"),
        ("--gup 4090 -s 64", "--gpu 4090 -s 64"),
        ("--gpu 4900 -s 64", "--gpu rtx-4090 -s 64"),
        ("--set lora.rnak=64 -s 64", "--set lora.rank=64 -s 64"),
        ("--set attention=flsh -s 64", "--set attention=flash -s 64"),
        ("--set sequence_length=0100 --gpu 4090", "-s 100 --gpu 4090"),
        ("--gpu 3090 --strategy ddp -s 64", "--gpu 2xrtx-3090 --strategy ddp -s 64"),
        ("--gpu", "--gpu 4090"),
        ("-s 99999 --gpu 4090", "-s 32768 --gpu 4090"),
        (
            "--gpu 4090 --grad-accumulation 8 --optim adamw_8bit",
            "--gpu 4090 --set gradient_accumulation=8 --set optimizer=adamw_8bit",
        ),
        ("--gpu 4090 --count 3", "--gpu 4090"),
        (
            "--gup 4090 --seq-len 2x --method lroa --lora-rank 8 --set atention=sdpa",
            "--gpu 4090 -s 2048 --method lora --set lora.rank=8 --set attention=sdpa",
        ),
    ],
)
def test_one_line_has_all_that_was_wrong_put_right(typed: str, meant: str) -> None:
    assert corrected(f"{MODEL} {typed}") == f"dryfit {MODEL} {meant}"
    assert main([MODEL, *shlex.split(meant), "--yaml"]) == 0


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("batch --gpu 4090 qwen3-9b", "batch --gpu 4090 qwen3.5-9b"),
        ("batch qwen3 9b --gpu 4090", "batch qwen3.5-9b --gpu 4090"),
        ("Qwen3-8B-Instruct --gpu 4090", "qwen3-8b --gpu 4090"),
        ("gpus qwen3-8b --gpu 4090 --json", "gpus qwen3-8b --json"),
        ("divide qwen3-8b --fewest", "divide qwen3-8b --fewest --gpu 24GiB"),
        ("compare qwen3-8b --gpu 4090", "compare qwen3-8b --gpu 4090 --measured 14.2GiB"),
        ("explain --gpu 4090", f"explain {MODEL} --gpu 4090"),
        ("--gpu 4090 -s 2048", f"{MODEL} --gpu 4090 -s 2048"),
        ("nothere.yaml --gpu 4090", f"{MODEL} --gpu 4090"),
    ],
)
def test_a_command_refuses_what_it_does_not_use_and_asks_for_what_it_needs(
    typed: str, meant: str
) -> None:
    assert corrected(typed) == f"dryfit {meant}"
    assert read(shlex.split(meant)).question.scenario


def test_all_errors_of_a_line_are_named_and_numbers_are_those_of_files() -> None:
    with pytest.raises(UserError) as caught:
        main([MODEL, "--seq-len", "2x", "--lora-r", "8", "--method", "lroa", "--gpu", "4900"])
    found = ["--seq-len 2x", "--lora-r 8", "--method lroa", "-s 2x", "4900"]
    assert [part.found for part in caught.value.parts] == found
    assert str(caught.value).count("dryfit qwen2.5-coder-7b") == 1
    for text in ("sequence_length=0100", "sequence_length=1:30", "lora.rank=010"):
        with pytest.raises(UserError, match="YAML reads"):
            main([MODEL, "--set", text, "--yaml"])


def test_a_slip_in_an_option_beside_a_file_is_one_of_the_command_line(tmp_path) -> None:
    path = tmp_path / "step.yaml"
    path.write_text(json.dumps({"model": MODEL, "lora": {"rank": 8}}), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        main([str(path), "--set", "lora.alhpa=16", "--gpu", "t4"])
    assert caught.value.where == "the command line"
    assert caught.value.write == f"dryfit {path} --set lora.alpha=16 --gpu t4"
    path.write_text(json.dumps({"model": MODEL, "lora": {"rnak": 8}}), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        main([str(path), "--gpu", "t4"])
    assert caught.value.where == str(path) and caught.value.write == "lora:\n  rank: 8"


def test_what_is_right_is_left_alone() -> None:
    options = parse(
        ["batch", MODEL, "-s2,048", "--gpu=4090", "--set", "lora.rank=4", "--set=loss=full"]
    )
    assert (options.command, options.sequence_length, options.gpu) == ("batch", 2048, "4090")
    assert (
        parse([MODEL, "-s", "2k", "--rows", "10k"]).sequence_length == 2048
        and whole_number("10k") == 10_000
    )
    assert (
        options.set == ["lora.rank=4", "loss=full"]
        and options.micro_batch is None
        and options.yaml is None
    )


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if command.takes])
def test_each_command_has_help_and_examples_that_it_understands(name: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and f"usage: dryfit {name}" in text
    for example in COMMANDS[name].examples:
        assert f"dryfit {example}" in text
        words = shlex.split(example)
        parse(words[: words.index("--")] if "--" in words else words)
    assert {
        option for option in OPTIONS if option in own_parser(name)._option_string_actions
    } == set(COMMANDS[name].takes)


@pytest.mark.parametrize(
    ("name", "word"), [("run", "may use:"), ("diff", "--most"), ("check", "FILE"), ("mcp", "mcp")]
)
def test_commands_about_programs_and_files_have_help_before_they_are_imported(
    name: str, word: str
) -> None:
    module = {"run": "run_program", "mcp": "mcp_server"}.get(name, "diff")
    program = f"""
import sys
from dryfit.ask.command import main
try:
    main([{name!r}, "--help"])
finally:
    assert "dryfit.ask.{module}" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (
        done.returncode == 0 and word in done.stdout and f"usage: dryfit {name}" in done.stdout
    ), done.stderr


def test_help_names_each_command_and_version_what_is_installed(capsys) -> None:
    assert main(["--help"]) == 0 and main([]) == 2
    text = capsys.readouterr().out
    assert all(f"    {name} " in text for name in COMMANDS) and parser().format_help() in text
    assert main(["--version"]) == 0
    assert "torch 2." in (line := capsys.readouterr().out) and "GPUs as of 20" in line


def test_the_fields_of_set_are_listed(capsys) -> None:
    from dryfit.scenario.fields import BY_NAME

    assert main(["--set", "list"]) == main(["longest", MODEL, "--set", "list"]) == 0
    text = capsys.readouterr().out
    assert (
        all(f"\n{name}" in f"\n{text}" for name in BY_NAME) and "\nlora.rank: such as 16\n" in text
    )


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            "longest llama-3.1-70b --gpu t4 --quick",
            "for what would fit: dryfit llama-3.1-70b --gpu t4\n",
        ),
        (
            "batch qwen2.5-vl-7b --gpu 3090 --quick",
            "  warning: the answer covers the language model alone",
        ),
        (
            "unsloth/Qwen3-8B-bnb-4bit --gpu t4 --quick",
            "  note: the id is of Unsloth's account: --like unsloth asks",
        ),
    ],
)
def test_an_answer_says_where_to_go_on_and_what_it_leaves_out(line: str, says: str, capsys) -> None:
    main(shlex.split(line))
    assert says in capsys.readouterr().out


def test_help_is_printed_before_anything_heavy_is_imported() -> None:
    program = (
        "import sys\nfrom dryfit.ask.command import main\nmain(['--help'])\n"
        "heavy = {'torch', 'transformers', 'numpy', 'huggingface_hub', 'yaml', 'jsonschema', 'importlib.metadata',\n"
        "         'dryfit.readers', 'dryfit.scenario', 'dryfit.cards'}\n"
        "assert not heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("typed", "changes", "meant"),
    [
        ("m --gpu=t4 -s 64", {"gpu": "l4"}, "m --gpu l4 -s 64"),
        ("batch m --sequence-length 64 -b 2", {"sequence_length": 32}, "batch m -s 32 -b 2"),
        ("longest m --json", {"model": "n"}, "longest n --json"),
        (
            "m --set lora.rank=4 -b 2",
            {"lora": {"rank": 2, "alpha": None}},
            "m --set lora.rank=2 -b 2",
        ),
        ("m --set quantization.double=true", {"quantization": None}, "m"),
        ("m -b 2", {"autocast": None}, "m -b 2 --set autocast=null"),
        ("m --set autocast=fp16", {"autocast": None}, "m"),
        ("m --set parallel.gpus=3", {"parallel": {"gpus": 2}}, "m --set parallel.gpus=2"),
        ("m -b 2", {"parallel": {"tensor": 2}}, "m -b 2 --set parallel.tensor=2"),
        ("m", {"--rows": 5}, "m --rows 5"),
    ],
)
def test_a_change_stands_where_what_it_replaces_stood(typed, changes, meant) -> None:
    assert suggested(typed.split(), changes) == f"dryfit {meant}"


def test_the_words_of_options_are_those_of_the_modules_that_know_them() -> None:
    from dryfit import readers
    from dryfit.readers import request
    from dryfit.scenario import strategies
    from dryfit.scenario.fields import BY_NAME

    assert (options.TOOLS, options.LIKE) == (readers.TOOLS, request.LIKE)
    assert (
        BY_NAME["method"].words == options.METHODS
        and tuple(strategies.STRATEGIES) == options.STRATEGIES
    )


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands_options_models_and_gpus(shell: str, capsys, tmp_path) -> None:
    pytest.importorskip("shtab")
    assert main(["--print-completion", shell]) == 0
    text = capsys.readouterr().out
    assert all(
        word in text
        for word in ("longest", "micro-batch", "qlora", "rtx-4090", "llama-factory", "all-gpus")
    )
    if shell == "fish":
        return
    assert "qwen2.5-coder-7b" in text
    (tmp_path / "dryfit").write_text(text)
    if shutil.which(shell):
        subprocess.run([shell, "-n", str(tmp_path / "dryfit")], check=True)


def test_completion_says_what_it_needs(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(UserError, match="shtab is not installed") as error:
        main(["--print-completion", "bash"])
    assert error.value.write == 'pip install "dryfit[completion]"'


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--gpu 4090 --no-gradient-checkpointing", "--gpu 4090 --set gradient_checkpointing=false"),
        ("--gpu h100 --full", "--gpu h100 --method full"),
        ("a100-80gb", "--gpu a100-80gb"),
        ("lora 2x3090 -s 2048", "--method lora --gpu 2x3090 -s 2048"),
    ],
)
def test_a_correction_means_what_was_typed(words: str, line: str) -> None:
    assert meant(["qwen2.5-coder-7b", *words.split()])[0] == ["qwen2.5-coder-7b", *line.split()]


def test_what_a_question_was_read_as_stands_in_its_answer(capsys) -> None:
    assert (
        main(["can i train qwen3 8b with qlora on a 3090", "--like", "none", "--quick", "--json"])
        == 0
    )
    line = "dryfit qwen3-8b --method qlora --gpu rtx-3090 --like none --quick --json"
    answer = json.loads(capsys.readouterr().out)
    assert answer["read_as"] == line and answer["fits"] is True
    assert main(shlex.split(line)[1:]) == 0
    assert json.loads(capsys.readouterr().out) == {
        name: value for name, value in answer.items() if name != "read_as"
    }


@pytest.mark.thorough
def test_a_list_for_programs_stays_one_and_its_reading_stands_beside_it(capsys) -> None:
    assert main("smallest gpu for qwen3 8b --quick --json".split()) == 0
    rows, told = capsys.readouterr()
    assert json.loads(rows)[0]["gpu"] and told.startswith(
        "Read as: dryfit gpus qwen3-8b --quick --json\n"
    )


def test_a_question_in_quotes_is_several_words_and_a_correction_says_what_it_leaves_out() -> None:
    asked = "can i train qwen3 8b on a 4090 " + "please " * 50
    assert meant([asked])[0] == ["qwen3-8b", "--gpu", "4090"]
    for path in ("my files/axolotl.yaml", "./my model", ""):
        assert meant([path, "--gpu", "4090"])[0] == [path, "--gpu", "4090"]
    typed = ["qwen2.5-coder-7b", "--gpu", "4090", "--zzz", "0.7"]
    line, (error,) = meant(typed)
    assert line == typed[:3]
    assert error.problem == "dryfit has no option `--zzz`, and the line below leaves it out."
