"""Greedy answers of exported models, by a real llama.cpp, beside those of the merged model by transformers.

    npm install node-llama-cpp@3.22          # in any folder: prebuilt binaries of llama.cpp
    python -m tests.benchmarks.compare_llama_cpp --node FOLDER --model results/RUN/merged \\
        --requests results/dataset/embedded/splits/test.jsonl results/RUN/export/*/model.gguf

The reference computes in the dtype of the merged weights. Tokens of the prompts are compared as well.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from itertools import islice
from pathlib import Path
from typing import Any

from dryfit.common.chat import render_prompt
from dryfit.common.errors import UserError
from dryfit.common.files import read_jsonl
from dryfit.common.terminal import command, progress

SCRIPT = Path(__file__).with_name("llama_cpp_answers.mjs")


def reference(
    model: Any, tokenizer: Any, prompts: list[str], limit: int
) -> list[tuple[list[int], list[int]]]:
    """Tokens of each prompt and of its greedy answer, by transformers."""
    import torch

    found = []
    for prompt in progress(prompts, "transformers", unit="answer"):
        tokens = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(
                **tokens, do_sample=False, max_new_tokens=limit, pad_token_id=tokenizer.eos_token_id
            )
        start = tokens["input_ids"].shape[1]
        found.append((output[0, :start].tolist(), output[0, start:].tolist()))
    return found


def by_llama_cpp(node: Path, gguf: Path, asked: dict[str, Any]) -> list[dict[str, list[int]]]:
    """The same by llama.cpp."""
    process = subprocess.run(
        ["node", str(SCRIPT), str(gguf.resolve())],
        input=json.dumps(asked),
        cwd=node,
        capture_output=True,
        text=True,
    )
    if process.returncode:
        raise UserError("llama.cpp did not answer.", where=gguf, found=process.stderr[-1000:])
    return json.loads(process.stdout.splitlines()[-1])


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.compare_llama_cpp", description=__doc__
    )
    parser.add_argument("gguf", nargs="+", type=Path)
    parser.add_argument(
        "--node", required=True, type=Path, metavar="DIR", help="where node-llama-cpp is installed"
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="the merged model")
    parser.add_argument(
        "--requests", required=True, metavar="FILE", help='JSON lines with "request"'
    )
    parser.add_argument("--system", default="Answer with one safe Bash command and nothing else.")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--limit", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    requests = [row["request"] for row in islice(read_jsonl(options.requests), options.count)]
    prompts = [render_prompt(tokenizer, options.system, request) for request in requests]
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto").eval()
    expected = reference(model, tokenizer, prompts, options.limit)
    del model
    asked = {"prompts": prompts, "limit": options.limit, "threads": options.threads}
    for gguf in options.gguf:
        found = by_llama_cpp(options.node, gguf, asked)
        pairs = list(zip(found, expected, strict=True))
        read = sum(ours["tokens"] == tokens for ours, (tokens, _) in pairs)
        same = sum(ours["answer"] == answer for ours, (_, answer) in pairs)
        print(
            f"{gguf}: prompts read alike {read}, answers alike {same}, of {len(pairs)}", flush=True
        )
        for number, (ours, (_, answer)) in enumerate(pairs):
            if ours["answer"] != answer:
                print(
                    f"  {number}: {tokenizer.decode(ours['answer'])!r} for {tokenizer.decode(answer)!r}"
                )
    return 0


if __name__ == "__main__":
    command(main)
