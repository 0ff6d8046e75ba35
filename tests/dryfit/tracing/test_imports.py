"""What a process that answers one question leaves out comes when a step needs it, and no answer differs by it."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

from dryfit.scenario.scenario import Scenario
from dryfit.tracing import imports
from dryfit.tracing.trace import trace
from tests.repository import ROOT

MODEL = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "vocab_size": 1000,
}
MODEL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
ASKED = {"model": MODEL, "method": "lora", "sequence_length": 64}
LEFT_OUT = ("torch._dynamo.convert_frame", "sympy")
PROGRAM = """
import json, sys
from dryfit.scenario.scenario import Scenario
from dryfit.tracing import imports

asked, names, changes = map(json.loads, sys.argv[1:])
step = Scenario.from_mapping(asked)
imports.ends_with_its_answer = True
imports.import_quietly(step)
from dryfit.tracing.trace import trace
there = lambda: [name in sys.modules for name in names]
answers, before = [trace(step)], there()
answers += [*(trace(step.changed(**each)) for each in changes), trace(step)]
print(json.dumps([before, there(), answers]))
"""


@pytest.mark.nightly
def test_a_step_that_needs_what_was_left_out_is_traced_as_ever() -> None:
    """This process, whose tests need all of it, has left nothing out."""
    changes = [{"parallel": {"strategy": strategy, "gpus": 2}} for strategy in ("fsdp2", "ddp")]
    if find_spec("triton"):
        changes.append({"compile": "layers"})
    program = [sys.executable, "-c", PROGRAM, *map(json.dumps, (ASKED, LEFT_OUT, changes))]
    made = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    left_out, then_there, answers = json.loads(made.stdout.splitlines()[-1])
    assert not any(left_out) and all(then_there)
    step = Scenario.from_mapping(ASKED)
    imports.import_quietly(step)
    assert not any(isinstance(sys.modules.get(name), imports._StandIn) for name in LEFT_OUT)
    whole = [trace(step), *(trace(step.changed(**each)) for each in changes), trace(step)]
    assert answers == json.loads(json.dumps(whole))
    assert answers[0] == answers[-1] != answers[1]


def test_the_compilers_decorators_leave_a_function_as_it_is() -> None:
    """Named, called, or called with options."""
    compiler = imports._StandIn(imports.COMPILER, "nowhere")
    assert compiler.disable(len) is len and compiler.disable(recursive=False)(len) is len
    assert compiler._decorated == [("disable", len)] * 2
