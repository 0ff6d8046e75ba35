"""Hybrid models: whose code runs linear attention, state spaces and short convolutions, and what that changes."""

import json
import os
import subprocess
from functools import cache
from importlib.util import find_spec

import pytest

from dryfit.ask.answer import whole_answer
from dryfit.ask.text import other_kernels
from dryfit.cards.gpus import find
from dryfit.cards.sentences import of_step
from dryfit.cards.verdict import Word, verdict
from dryfit.common.errors import UserError
from dryfit.readers.request import parse_request
from dryfit.scenario.scenario import Scenario
from dryfit.step.kernel_packages import functions_of, packages_of
from dryfit.tracing.trace import record, trace
from tests.dryfit.decoders import DECODERS
from tests.dryfit.families import FAMILIES
from tests.repository import ROOT
from tests.warm import launchers

HAVE_FLA = find_spec("fla") is not None
ALL = ["causal-conv1d", "fla", "mamba-ssm"]
DELTA, SPACE, CONVOLUTION = (
    ["causal-conv1d", "fla"],
    ["causal-conv1d", "mamba-ssm"],
    ["causal-conv1d"],
)
ASK_FOR = {
    **dict.fromkeys(
        ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "kimi_linear", "olmo_hybrid"), DELTA
    ),
    **dict.fromkeys(
        ("nemotron_h", "granitemoehybrid", "falcon_h1", "bamba", "zamba2", "jamba", "mamba2"), SPACE
    ),
    **dict.fromkeys(("lfm2", "lfm2_moe", "lfm3"), CONVOLUTION),
}


def scenario(family: str, **fields) -> Scenario:
    sizes = {
        "method": "full",
        "precision": "bf16",
        "sequence_length": 256,
        "micro_batch": 2,
        "gpu": "rtx-4090",
    }
    return Scenario.from_mapping({"model": (FAMILIES | DECODERS)[family], **sizes, **fields})


def traced(family: str, **fields) -> dict:
    return trace(scenario(family, **fields), capability=(8, 9), timeline=False)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_models_functions_say_which_packages_they_are_taken_from(family):
    """Their names say nothing: Bamba's and Kimi-Linear's modules are called like any other's."""
    assert packages_of(scenario(family)) == ASK_FOR.get(family, [])


LOOPS = ("qwen3_5_text", "kimi_linear", "lfm2", "nemotron_h", "bamba", "jamba")


@pytest.mark.few(1, 2)
@pytest.mark.parametrize(
    ("family", "checkpointing"),
    [
        pytest.param(
            family, checkpointing, marks=() if checkpointing == number % 2 else pytest.mark.nightly
        )
        for number, family in enumerate(LOOPS)
        for checkpointing in (True, False)
    ],
)
def test_a_package_that_is_not_here_gives_a_lower_bound(family, checkpointing, monkeypatch):
    monkeypatch.setattr("dryfit.step.kernel_packages.find_spec", lambda name: None)
    asked = {"gradient_checkpointing": checkpointing}
    loop = traced(family, **asked, packages=[])
    least = traced(family, **asked, packages=ASK_FOR[family])
    assert loop["packages"] == dict.fromkeys(ASK_FOR[family], "loop") and "bounds" not in loop
    assert least["packages"] == dict.fromkeys(ASK_FOR[family], "least")
    bounds = least["bounds"]
    assert (
        bounds["lowest_bytes"]
        == least["peak_allocated_bytes"]
        <= loop["peak_allocated_bytes"] + 2**20
    )
    assert bounds["highest_bytes"] is None and bounds["missing"] in least["warnings"]
    for name in ASK_FOR[family]:
        assert name in bounds["missing"]
    small, large = find({"vram_gib": 1}), find("rtx-4090")
    assert verdict(least | {"required_bytes": int(1.01 * small.usable_bytes)}, small).fits is False
    assert verdict(least, large).word is Word.TOO_CLOSE and verdict(loop, large).fits


def test_without_packages_the_loop_runs_and_the_answer_says_so():
    found = traced("qwen3_5_text", packages=[])
    (note,) = [text for text in found["notes"] if "own loops run" in text]
    assert (
        "causal-conv1d and fla" in note
        and "chunk_gated_delta_rule" in note
        and "recurrent" not in note
    )
    assert "packages" not in traced("qwen2", packages=[])
    found = traced("qwen2", kernels="packages")
    assert any("asks for no package" in text for text in found["warnings"])
    named = {(each.package, each.kernel) for each in functions_of(scenario("bamba"))}
    assert ("mamba-ssm", "mamba_split_conv1d_scan_combined") in named and (
        "causal-conv1d",
        "causal_conv1d_fn",
    ) in named


@pytest.mark.thorough
def test_a_search_takes_the_loop_where_a_package_is_not_here(monkeypatch):
    monkeypatch.setattr("dryfit.step.kernel_packages.find_spec", lambda name: None)
    loop, missing = (
        record(scenario("bamba", packages=packages)).peak_bytes() for packages in ([], SPACE)
    )
    assert loop == missing


@pytest.mark.thorough
def test_the_answer_has_the_other_kernels_beside(monkeypatch):
    monkeypatch.setattr("dryfit.step.kernel_packages.find_spec", lambda name: None)
    sizes = {"method": "full", "sequence_length": 2048, "gpu": "rtx-4090"}
    answer = whole_answer(parse_request({"model": FAMILIES["kimi_linear"], **sizes}))
    (other,) = answer["other_kernels"]
    assert other["packages"] == DELTA and other["lower_bound"] and other["fits"] is None
    assert other["required_bytes"] < answer["trace"]["required_bytes"]
    (line,) = other_kernels(answer)
    assert (
        line.startswith("  with causal-conv1d and flash-linear-attention: at least")
        and "(-" in line
    )
    missing = whole_answer(
        parse_request({"model": FAMILIES["kimi_linear"], **sizes, "kernels": "packages"})
    )
    (loop,) = missing["other_kernels"]
    assert (
        not loop["packages"]
        and loop["fits"]
        and loop["required_bytes"] == answer["trace"]["required_bytes"]
    )
    assert (
        of_step(missing).startswith("TOO CLOSE TO CALL: the step needs at least")
        and missing["fits"] is None
    )
    assert other_kernels(missing)[0].startswith(
        "  without causal-conv1d and flash-linear-attention: "
    )


@pytest.mark.parametrize(
    ("fields", "write"),
    [
        ({"kernels": "packages", "packages": []}, "packages: null"),
        ({"packages": ["flashy"]}, "packages: [fla]"),
    ],
)
def test_packages_that_cannot_be_meant_are_refused(fields, write):
    with pytest.raises(UserError) as caught:
        scenario("qwen2", **fields)
    assert caught.value.write == write


# --- the packages themselves ------------------------------------------------------------------------------------

needs_fla = pytest.mark.skipif(not HAVE_FLA, reason="`make test-kernels` runs it")


@needs_fla
@pytest.mark.parametrize(
    "family", [name for name, packages in ASK_FOR.items() if "fla" in packages]
)
@pytest.mark.parametrize("checkpointing", [True, False])
def test_linear_attention_runs_the_package_that_is_here(family, checkpointing):
    """More than the least that any kernel can need, and less than the loop."""
    asked = {"gradient_checkpointing": checkpointing, "sequence_length": 1024}
    taken = traced(family, **asked, packages=["fla"])
    assert taken["packages"] == {"causal-conv1d": "loop", "fla": "package"}
    assert any("chunk" in name for name in taken["triton_kernels"])
    assert any("kernels of fla 0." in text for text in taken["notes"])
    loop = traced(family, **asked, packages=[])
    assert taken["peak_allocated_bytes"] < loop["peak_allocated_bytes"] and not loop.get(
        "triton_kernels"
    )


@needs_fla
def test_nothing_said_takes_what_is_installed():
    assert traced("qwen3_5_text")["packages"] == {"causal-conv1d": "loop", "fla": "package"}


_OTHER_VERSION = """
import json, sys
sys.path.insert(0, sys.argv[2])
from dryfit.scenario.scenario import Scenario
from dryfit.tracing.trace import trace
asked = Scenario.from_mapping(json.loads(sys.argv[1]))
found = trace(asked, capability=(8, 9), timeline=False)
print(json.dumps({name: found.get(name) for name in ("peak_allocated_bytes", "packages", "warnings", "bounds")}))
"""


OTHER = {
    "model": FAMILIES["kimi_linear"],
    "method": "full",
    "sequence_length": 256,
    "gpu": "rtx-4090",
}


@cache
def peak_of_the_loop() -> int:
    asked = Scenario.from_mapping(OTHER | {"packages": []})
    return trace(asked, capability=(8, 9), timeline=False)["peak_allocated_bytes"]


@pytest.mark.few(0, 1)
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("__version__ = '0.1'", "has no chunk_kda"),
        ("raise OSError('no driver')", "import fails (OSError: no driver)"),
    ],
)
def test_a_version_without_the_function_is_named_and_the_loop_runs_as_it_would(
    content, problem, tmp_path
):
    """transformers swallows the error, and runs the loop without a word. No process has looked for fla before."""
    (tmp_path / "fla").mkdir()
    (tmp_path / "fla" / "__init__.py").write_text(content)
    program = tmp_path / "program.py"
    program.write_text(_OTHER_VERSION)
    command = [
        f"{launchers()}/python",
        str(program),
        json.dumps(OTHER | {"packages": ["fla"]}),
        str(tmp_path),
    ]
    run = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["peak_allocated_bytes"] == peak_of_the_loop()
    (warning,) = [text for text in found["warnings"] if problem in text]
    assert "fla" in warning and "lower bound" in warning
    assert (
        found["bounds"]["lowest_bytes"]
        < found["peak_allocated_bytes"]
        == found["bounds"]["highest_bytes"]
    )
