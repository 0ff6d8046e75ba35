"""What the command prints, to the byte: a change of it is seen here, and is meant or is none.

``python -m tests.dryfit.ask.test_golden`` writes the outputs of today; ``git diff`` shows what changed. A JSON object
stands as its SHA-256, since its values are tested elsewhere.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from dryfit.ask.command import main
from dryfit.common.errors import UserError
from tests.dryfit.ask.conftest import TINY

_MESSAGES = "-- standard error\n"
GOLDEN = Path(__file__).with_name("golden.txt")
FILES = {
    "tiny/config.json": json.dumps(TINY),
    "step.yaml": "model: tiny/config.json\nmethod: lora\nlora: {rank: 8}\nsequence_length: 256\ngpu: t4\n",
    "wrong.yaml": "model: tiny/config.json\nlora: {rnak: 8}\nsequence_length: 256\n",
    "axolotl.yaml": "base_model: Qwen/Qwen2.5-Coder-7B\nadapter: qlora\nload_in_4bit: true\nsequence_len: 2048\n"
    "micro_batch_size: 2\nlora_r: 16\nlora_target_linear: true\ngradient_checkpointing: true\nbf16: true\n",
    "broken.yaml": "a: [1\n",
}
LINES = """
qwen2.5-coder-7b --gpu 4090 --quick
qwen2.5-coder-7b --gpu 4090 --quick --json
qwen2.5-coder-7b --gpu 4090 --method full --quick
qwen3-8b --quick
llama-3.1-70b --gpu 8xh100-80gb --method full --strategy zero3 --quick
llama-3.1-8b --gpu 24GiB --method lora -s 4096 -b 2 --set lora.rank=64 --quick
axolotl.yaml --gpu 24GiB --quick
qwen2.5-coder-7b --gpu 4090 --yaml --method lora
step.yaml --quick
longest qwen3-8b --gpu 4090 --quick
batch qwen3-8b --gpu 4090 -s 1024 --quick --json
config qwen2.5-coder-7b --gpu 4090 --for torchtune --quick -s 2048
check --gpu 4090 axolotl.yaml
wrong.yaml --quick
nothere.yaml --gpu 4090
qwen2.5-coder-7b --seq-len 2x --lora-r 8 --method lroa --gpu 4900
qwen2.5-coder-7b --gpu 4090 --set loss=whole
Llama-3.1-8B-Instruct --gpu a100
mistral-7b-v0.1-awq --gpu 3090
does llama-3.1-8b fit on 24GB --quick
'can I finetune qwen 7b on a 4090 with qlora' --quick
'can I finetune qwen 7b on a 4090 with qlora' --quick --json
'can I finetune qwen 7b on a 4090 with qlora' --yaml
'is 12gb of vram enough for mistral 7b at 2k context and batch size 2?' --quick
what is the max batch size for https://huggingface.co/Qwen/Qwen3-8B with lora on an L4 --quick
torchtune config for qwen2.5 coder 7b on a 4090 --quick
serve llama 3.1 8b in 4 bit on a 3090 with 8k context
axolotl.yaml on a 3090 --quick
can i run qwen3 8b on a 4090
can i train a 7b model on a 4090
how long does it take to train qwen3 8b on a 4090
cheapest gpu for qwen3 8b
qwen 14b qlora 4090
qwen3 8b qlroa 4090
qwen3 8b dora on a 4090
llama 3.1 8b lora on an a100
mistral 7b awq on a 3090
qwen3 8b lora and full finetune on a 4090
qwen3 8b on a 4090 --lora-r 8
longst qwen3-8b --gpu 4090
longest qwen3-8b
longest qwen3-8b --gpu 4090 -s 512
openai/whisper-large-v3 --gpu 3060
nosuchmodel --gpu 4090
serve llama-3.1-8b -b 4 --method full
serve llama-3.1-8b --gpu 2x4090
config qwen2.5-coder-7b --gpu 4090 --for axolotl --set loss=full
qwen3-8b --rows 100 --quick --gpu 4090
qwen3-8b --rows 100 --gpu 4090 --deadline never
check --gpu 4090 axolotl.yaml broken.yaml nothere.yaml
measure step.yaml --gpu 4090
run nothere.py
run --memory lots step.yaml
qwen2.5-coder-7b --gpu 3090 --strategy ddp
""".strip().splitlines()


@contextlib.contextmanager
def beside_the_files() -> Iterator[None]:
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        for name, text in FILES.items():
            path = Path(folder, name)
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def printed(line: str) -> str:
    """A line with its status and all that it prints, as the console script does."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(shlex.split(line))
        except UserError as error:
            print(error, file=err)
            status = 2
    text = out.getvalue()
    if text.startswith("{"):
        text = f"JSON, {hashlib.sha256(text.encode()).hexdigest()}\n"
    messages = re.sub(
        r"^.* \(\d+ s\)\n", "", err.getvalue(), flags=re.MULTILINE
    )  # progress of a slow machine
    return f"$ dryfit {line}\nstatus {status}\n{text}{_MESSAGES if messages else ''}{messages}".rstrip()


def known() -> dict[str, str]:
    parts = re.split(r"\n\n(?=\$ dryfit )", GOLDEN.read_text(encoding="utf-8").rstrip())
    return {part.partition("\n")[0].removeprefix("$ dryfit "): part for part in parts}


@pytest.mark.parametrize("line", LINES)
def test_a_line_prints_what_it_printed(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with beside_the_files():
        assert printed(line) == known()[line]


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "DRYFIT_CACHE": ""}
    with beside_the_files():
        answers = [printed(line) for line in LINES]
    GOLDEN.write_text("\n\n".join(answers) + "\n", encoding="utf-8")
    sys.stdout.write(f"{len(answers)} lines\n")
