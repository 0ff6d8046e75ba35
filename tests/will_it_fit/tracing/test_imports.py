"""What a process that answers one question leaves out comes when a step needs it, and no answer differs by it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import json, sys
from will_it_fit.scenario.scenario import Scenario
from will_it_fit.tracing import imports

model = {"model_type": "qwen2", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 1000,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
step = Scenario.from_mapping({"model": model, "method": "lora", "sequence_length": 64})
imports.ends_with_its_answer = json.loads(sys.argv[1])
imports.import_quietly(step)
from will_it_fit.tracing.trace import trace
there = lambda: [name in sys.modules for name in ("torch._dynamo.convert_frame", "sympy")]
answers, before = [trace(step)], there()
answers += [*(trace(step.changed(**changes)) for changes in json.loads(sys.argv[2])), trace(step)]
print(json.dumps([before, there(), answers], sort_keys=True))
"""


def _answers(ends: bool, *changes: dict) -> tuple[list[bool], list[bool], list]:
    program = [sys.executable, "-c", PROGRAM, json.dumps(ends), json.dumps(changes)]
    made = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return tuple(json.loads(made.stdout.splitlines()[-1]))


def test_a_step_that_needs_what_was_left_out_is_traced_as_ever() -> None:
    changes = [{"parallel": {"strategy": strategy, "gpus": 2}} for strategy in ("fsdp2", "ddp")]
    if find_spec("triton"):
        changes.append({"compile": "layers"})
    left_out, then_there, answers = _answers(True, *changes)
    assert not any(left_out) and all(then_there)
    whole = _answers(False, *changes)
    assert all(whole[0]) and answers == whole[2]
    assert answers[0] == answers[-1] != answers[1]
