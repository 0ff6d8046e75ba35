"""DeepSpeed's ZeRO: against real processes, and against the arithmetic of its authors."""

import json
import subprocess
import sys
from contextlib import nullcontext
from importlib.util import find_spec

import pytest

import will_it_fit.tracing.trace
from tests.repository import ROOT
from tests.will_it_fit.tracing.gloo_steps import ZERO_STEPS
from tests.will_it_fit.tracing.several_gpus import LLAMA, scenario, small_buckets
from will_it_fit.common.errors import UserError
from will_it_fit.tracing.ranks import Kind
from will_it_fit.tracing.trace import trace

PARAMETERS = 684928  # of the small Llama
needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="`make test-deepspeed` runs it where deepspeed is installed"
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What two processes with gloo and DeepSpeed measured, by rank."""
    folder = tmp_path_factory.mktemp("gloo")
    command = [sys.executable, "-m", "tests.will_it_fit.tracing.gloo_steps", str(folder), "zero"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=900)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@needs_deepspeed
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", range(len(ZERO_STEPS)), ids=["-".join(map(str, step)) for step in ZERO_STEPS])
def test_two_processes_take_what_the_fake_group_says(number, rank, measured, monkeypatch):
    """To the byte, in every phase and in each process."""
    method, strategy, fields, buckets = ZERO_STEPS[number]
    monkeypatch.setattr(will_it_fit.tracing.trace, "kinds_of_ranks", lambda _: (Kind(rank, (rank,)),))
    with small_buckets() if buckets == "small" else nullcontext():
        report = trace(scenario(method, strategy, **fields), "cpu", timeline=False)
    assert report["resident_bytes"] == measured[rank][number]["resident_bytes"]
    assert report["phases"] == measured[rank][number]["phases"]


@needs_deepspeed
def test_of_zero2_the_last_process_is_followed(monkeypatch):
    """Its gradients come first, while all activations are there: it takes more in backward than the first."""
    step = scenario("full", "zero2", gpus=4)
    with small_buckets():
        followed = trace(step, "cpu", timeline=False)["phases"]
        monkeypatch.setattr(will_it_fit.tracing.trace, "kinds_of_ranks", lambda _: (Kind(0, (0,)),))
        first = trace(step, "cpu", timeline=False)["phases"]
    assert first["backward"] < followed["backward"]
    assert {phase: size for phase, size in first.items() if phase != "backward"}.items() <= followed.items()


@needs_deepspeed
@pytest.mark.parametrize("gpus", [2, 4, 8])
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_states_are_divided_as_its_authors_say(strategy, gpus):
    """The ZeRO paper (section 3): 2 bytes of weight, 2 of gradient, 12 of states a parameter, in mixed precision.

    DeepSpeed's own estimate has 18 divided bytes: the fp32 copy of gradients too, which the update makes.
    """
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    with small_buckets():
        report = trace(scenario("full", strategy, gpus=gpus, precision="bf16-mixed"), timeline=False)
    found = report["components_by_phase"]["optimizer"]
    share = PARAMETERS // gpus
    assert found["optimizer_states"] == pytest.approx(12 * share, rel=0.01)
    assert found["weights_bf16"] == pytest.approx(2 * (share if strategy == "zero3" else PARAMETERS), rel=0.02)
    states = found["weights_bf16"] + found["gradients"] + found["optimizer_states"]
    if strategy == "zero2":  # the update makes an fp32 copy of a share of gradients, and lets go of the others
        _, estimate = estimate_zero2_model_states_mem_needs(PARAMETERS, gpus, cpu_offload=False)
        assert estimate == 2 * PARAMETERS + 18 * share
        assert 2 * PARAMETERS + 14 * share < states < 1.02 * estimate  # what lies across two shares is held whole
    else:
        largest = 512 * 128
        _, estimate, _ = estimate_zero3_model_states_mem_needs(PARAMETERS, largest, gpus, cpu_offload=False)
        assert estimate == 4 * largest + 18 * share
        assert found["gradients"] == pytest.approx(2 * share + 4 * share, rel=0.01)
        assert states == pytest.approx(estimate - 4 * largest + 2 * share, rel=0.02)


@needs_deepspeed
def test_zero3_leaves_a_range_and_zero2_none():
    """Blocks that a second stream uses come back when the GPU has got there: how far ahead the CPU is decides."""
    low, high = trace(scenario("full", "zero3"), timeline=False)["reserved_range_bytes"]
    assert low < high
    low, high = trace(scenario("full", "zero2"), timeline=False)["reserved_range_bytes"]
    assert low == high


@needs_deepspeed
def test_the_weights_of_zero3_come_one_after_the_other_and_4_bit_ones_all_at_once():
    model = {**LLAMA, "hidden_size": 512, "intermediate_size": 2048, "vocab_size": 64}
    linear = 3 * (3 * 512 * 2048 + 2 * 512 * 512 + 2 * 512 * 256)
    load = {}
    with small_buckets():
        for method in ("lora", "qlora"):
            step = scenario(method, "zero3", model=model, precision="bf16", autocast="bf16", lora={"rank": 1})
            load[method] = trace(step, timeline=False)["phases"]["load"]
    assert 2 * linear / 2 < load["lora"] < 0.75 * 2 * linear
    assert linear / 2 < load["qlora"]


@needs_deepspeed
def test_notes_say_what_deepspeed_does_of_its_own():
    notes = trace(scenario("full", "zero3", precision="bf16-mixed"), timeline=False)["notes"]
    assert "500,000,000 elements, takes 1,000,000,000 bytes on each GPU all the time" in notes[0]
    assert "16,384 elements" in notes[0] and "fp32 copy" in notes[1]
    note, others = trace(scenario("full", "zero2"), timeline=False)["notes"]
    assert "2,000,000,000 bytes on each GPU while gradients are exchanged" in note and "up to 7 % higher" in others


@needs_deepspeed
def test_the_configuration_is_accelerates():
    """And leaves to DeepSpeed what accelerate leaves to it."""
    from will_it_fit.step.parallel import zero_configuration

    found = zero_configuration(scenario("full", "zero3", precision="bf16-mixed", gradient_accumulation=3))
    assert found["zero_optimization"]["stage"] == 3 and found["bf16"] == {"enabled": True}
    assert found["train_batch_size"] == 2 * 3 * 2 and found["gradient_clipping"] == 1.0
    assert not {"overlap_comm", "reduce_bucket_size", "contiguous_gradients"} & set(found["zero_optimization"])
    assert "auto" not in json.dumps(found, default=str)


def test_without_the_package_a_scenario_says_what_to_install(monkeypatch):
    monkeypatch.setattr("will_it_fit.scenario.scenario.find_spec", lambda name: None)
    with pytest.raises(UserError, match="deepspeed, which is not installed") as caught:
        trace(scenario("full", "zero3"))
    assert caught.value.write == 'pip install "will-it-fit[deepspeed]"'
    assert "fsdp2, which needs none" in str(caught.value)


@needs_deepspeed
def test_the_command_answers_in_a_process_that_imported_nothing(tmp_path):
    """DeepSpeed's own imports ask for the compiler, in the middle of a trace if nobody made them before."""
    file = tmp_path / "step.yaml"
    file.write_text("model: smollm2-135m\nmethod: full\nautocast: bf16\nsequence_length: 256\n")
    words = [str(file), "--gpu", "4090", "--fresh", "--set", "parallel={strategy: zero3, gpus: 2}"]
    done = subprocess.run([sys.executable, "-m", "will_it_fit.ask", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("FITS")
