"""The tools for assistants without the protocol: fields, refusals, the missing package (tests/mcp has the protocol)."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from dryfit.ask import answer
from dryfit.ask.mcp_server import TOOLS, called
from dryfit.common.schema import problems
from tests.dryfit.decoders import LLAMA_3_LAYERS

ROOT = Path(__file__).resolve().parents[3]
STEP = {"model": "smollm2-135m", "sequence_length": 128}


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("dryfit", {}, "A key is missing: model"),
        ("dryfit", STEP | {"seq_len": 5}, "Unknown key: seq_len"),
        ("dryfit", STEP | {"settings": "rank"}, "Wrong value for settings"),
        ("dryfit", {"model": "no-such-model-at-all"}, "neither the name of a known configuration"),
        (
            "explain_difference",
            {"before": STEP, "after": STEP | {"gup": 1}},
            "Unknown key: after.gup",
        ),
        (
            "explain_difference",
            {"before": STEP, "after": STEP, "measured": "oom=1GiB"},
            "a second step",
        ),
        ("explain_difference", {"before": STEP, "measured": "much"}, "`--measured` takes a size"),
        ("train", {}, "There is no such tool"),
    ],
)
def test_a_wrong_call_is_refused_with_what_to_write(name: str, arguments: dict, said: str) -> None:
    found, refused = called(name, arguments)
    assert refused and found["next"]
    first = found["refused"][0]
    assert said in first["problem"] and (first["write"] or first["allowed"])


@pytest.mark.thorough
def test_an_answer_is_of_the_form_that_the_tool_states(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_LAYERS), encoding="utf-8")
    step = STEP | {"model": str(tmp_path)}
    for name, arguments in (
        ("dryfit", step | {"gpu": "t4"}),
        ("explain_difference", {"before": step, "measured": "oom=2GiB"}),
        ("explain_difference", {"before": step, "after": step | {"settings": {"lora.rank": 64}}}),
    ):
        found, refused = called(name, arguments)
        assert not refused and problems(found, TOOLS[name][2], name) == []


def test_a_change_comes_with_the_command_of_the_very_step(monkeypatch) -> None:
    change = {"changes": {"micro_batch": 2}, "cost": "more passes", "headroom_bytes": 1}
    monkeypatch.setattr(answer, "traced", lambda asked: {"fits": False, "suggestions": [change]})
    asked = {"gpu": "2x3090", "method": "lora", "micro_batch": 4, "settings": {"lora.rank": 64}}
    found, refused = called("what_fits", STEP | asked)
    assert not refused
    assert found["changes"][0]["command"] == (
        "dryfit smollm2-135m --gpu 2x3090 --method lora -s 128 -b 2 --set lora.rank=64"
    )


@pytest.mark.skipif(find_spec("mcp") is not None, reason="the package is here")
def test_without_the_package_the_command_says_what_to_install() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dryfit.ask", "mcp"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and 'pip install "dryfit[mcp]"' in done.stderr
