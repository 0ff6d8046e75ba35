"""ZeRO by rules: against DeepSpeed's own engine, against real processes, and against its authors' arithmetic."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

import dryfit.tracing.trace
from dryfit.common.errors import UserError
from dryfit.scenario.scenario import Scenario, check_packages
from dryfit.tracing.hosts import host_of
from dryfit.tracing.ranks import RankKind
from dryfit.tracing.trace import trace
from tests.dryfit.tracing.gloo_steps import ZERO_STEPS
from tests.dryfit.tracing.several_gpus import LLAMA, SMALL, scenario
from tests.repository import ROOT
from tests.tiers import selected

PARAMETERS = 684928  # of the small Llama
MIXED, HALF = {"precision": "bf16-mixed"}, {"precision": "bf16", "autocast": "bf16"}
TIED = {"model": LLAMA | {"tie_word_embeddings": True}}
GEMMA = {
    "model": {
        "model_type": "gemma3_text",
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
    }
}
FLAT, ALL = ("zero1", "zero2"), ("zero1", "zero2", "zero3")
# What is compared with DeepSpeed's engine: strategies, method, what the step has else, and settings of ZeRO.
COMPARED = {
    **{
        f"{method}, {precision}, {gpus} GPUs, {count} micro-batches": (
            ALL,
            method,
            {"precision": precision, "gpus": gpus, "gradient_accumulation": count},
            SMALL,
        )
        for method in ("full", "lora")
        for precision in ("fp32", "bf16-mixed", "fp16-mixed")
        for gpus in (2, 8)
        for count in (1, 2)
    },
    "DeepSpeed's own sizes": (ALL, "full", MIXED, {}),
    "tensors larger than the bucket": (ALL, "full", MIXED, SMALL | {"reduce_bucket_size": 20_000}),
    "auto": (
        ALL,
        "full",
        MIXED,
        dict.fromkeys(
            (
                "reduce_bucket_size",
                "stage3_prefetch_bucket_size",
                "stage3_param_persistence_threshold",
            ),
            "auto",
        ),
    ),
    "qlora": (ALL, "qlora", HALF, SMALL),
    "tied": (ALL, "full", MIXED | TIED, SMALL),
    "without checkpointing": (ALL, "full", MIXED | {"gradient_checkpointing": False}, SMALL),
    "frozen layers recomputed": (ALL, "lora", HALF, SMALL),
    "other layers": (ALL, "lora", HALF | GEMMA, SMALL),
    "parts that need padding": (ALL, "full", MIXED | {"gpus": 5}, SMALL),
    "overlap": (FLAT, "full", MIXED, SMALL | {"overlap_comm": True}),
    "overlap, 2 micro-batches": (
        FLAT,
        "full",
        MIXED | {"gradient_accumulation": 2},
        SMALL | {"overlap_comm": True},
    ),
    "no buffer": (ALL, "full", MIXED, SMALL | {"contiguous_gradients": False}),
    "no buffer, overlap": (
        FLAT,
        "full",
        MIXED,
        SMALL | {"contiguous_gradients": False, "overlap_comm": True},
    ),
    "whole gradients": (ALL, "full", MIXED, SMALL | {"reduce_scatter": False}),
    "whole gradients of adapters": (ALL, "lora", HALF, SMALL | {"reduce_scatter": False}),
    "in turn": (FLAT, "full", MIXED, SMALL | {"round_robin_gradients": True}),
    "no overlap": (("zero3",), "full", MIXED, SMALL | {"overlap_comm": False}),
    "groups": (("zero3",), "full", MIXED, SMALL | {"sub_group_size": 60_000}),
    "each weight for itself": (("zero3",), "full", MIXED, SMALL | {"sub_group_size": 0}),
    "nothing ahead": (("zero3",), "full", MIXED, SMALL | {"stage3_prefetch_bucket_size": 0}),
    "nothing kept": (
        ("zero3",),
        "full",
        MIXED,
        SMALL | {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0},
    ),
    "all weights are small": (
        ("zero3",),
        "full",
        MIXED,
        SMALL | {"stage3_param_persistence_threshold": 1_000_000},
    ),
    "3 micro-batches": (("zero3",), "full", MIXED | {"gradient_accumulation": 3}, SMALL),
}
ROWS = [(name, strategy) for name, (strategies, *_) in COMPARED.items() for strategy in strategies]
needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None,
    reason="`make test-deepspeed` runs it where deepspeed is installed",
)


def predicted(monkeypatch, step, *, rules, **options):
    with monkeypatch.context() as patch:
        patch.setattr(Scenario, "zero_by_rules", rules)
        return trace(step, timeline=False, **options)


@pytest.mark.few(0, 25)
@needs_deepspeed
@pytest.mark.parametrize(
    ("name", "strategy"), ROWS, ids=[f"{strategy}: {name}" for name, strategy in ROWS]
)
def test_the_rules_give_the_bytes_of_deepspeeds_own_engine(name, strategy, monkeypatch):
    """In each phase and in all, allocated and reserved."""
    _, method, fields, zero = COMPARED[name]
    step = scenario(method, strategy, zero=zero, **fields)
    own, package = (
        predicted(monkeypatch, step, rules=rules, capability=(8, 0)) for rules in (True, False)
    )
    same = (
        "phases",
        "peak_allocated_bytes",
        "resident_bytes",
        "peak_reserved_bytes",
        "reserved_range_bytes",
    )
    assert {key: own[key] for key in same} == {key: package[key] for key in same}


@pytest.mark.few(0, 4)
@needs_deepspeed
@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize("strategy", ALL)
def test_the_rules_give_the_bytes_of_each_gpu(rank, strategy, monkeypatch):
    monkeypatch.setattr(
        dryfit.tracing.trace, "kinds_of_ranks", lambda _: (RankKind(rank, (rank,)),)
    )
    step = scenario("full", strategy, gpus=4, zero=SMALL, **MIXED)
    own, package = (predicted(monkeypatch, step, rules=rules) for rules in (True, False))
    assert (
        own["phases"] == package["phases"]
        and own["peak_reserved_bytes"] == package["peak_reserved_bytes"]
    )


@pytest.fixture(scope="module")
def measured(request, tmp_path_factory):
    """What two processes with gloo and DeepSpeed measured, by rank and the step's number."""
    folder, numbers = tmp_path_factory.mktemp("gloo"), map(str, sorted(selected(request, "number")))
    command = [
        sys.executable,
        "-m",
        "tests.dryfit.tracing.gloo_steps",
        str(folder),
        "zero",
        *numbers,
    ]
    subprocess.run(command, cwd=ROOT, check=True, timeout=900)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.few(0, 10)
@needs_deepspeed
@pytest.mark.parametrize("rules", [True, False], ids=["rules", "package"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "number", range(len(ZERO_STEPS)), ids=["-".join(map(str, step)) for step in ZERO_STEPS]
)
def test_two_processes_take_what_is_predicted(number, rank, rules, measured, monkeypatch):
    """To the byte, in every phase and in each process."""
    method, strategy, fields, sizes = ZERO_STEPS[number]
    step = scenario(method, strategy, zero=SMALL if sizes == "small" else {}, **fields)
    if rules and step.parallel.ulysses > 1:
        pytest.skip("Ulysses has no rules")
    monkeypatch.setattr(
        dryfit.tracing.trace, "kinds_of_ranks", lambda _: (RankKind(rank, (rank,)),)
    )
    report = predicted(monkeypatch, step, rules=rules, target="cpu")
    assert {name: report[name] for name in ("resident_bytes", "phases")} == measured[rank][
        str(number)
    ]


@pytest.mark.thorough
@pytest.mark.parametrize("strategy", FLAT)
def test_no_gpu_of_zero1_and_zero2_needs_more_than_those_that_are_followed(strategy, monkeypatch):
    """The embedding and the head, of which others have parts, are most of this model."""
    model = LLAMA | {"vocab_size": 4096}
    step = scenario(
        "full", strategy, gpus=8, model=model, zero=SMALL | {"reduce_bucket_size": 600_000}, **MIXED
    )
    followed = trace(step, timeline=False)
    every = []
    for rank in range(8):
        monkeypatch.setattr(
            dryfit.tracing.trace, "kinds_of_ranks", lambda _, rank=rank: (RankKind(rank, (rank,)),)
        )
        every.append(trace(step, timeline=False))
    assert followed["required_bytes"] >= max(each["required_bytes"] for each in every)
    assert len({each["phases"]["optimizer"] for each in every}) > 1


@pytest.mark.few(2, 3)
@pytest.mark.parametrize("gpus", [2, 4, 8])
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_states_are_divided_as_its_authors_say(strategy, gpus):
    """The ZeRO paper (section 3): 2 bytes of weight, 2 of gradient, 12 of states a parameter, in mixed precision.

    The update has the gradients of a share in fp32 as well. DeepSpeed's own estimates are such sums
    (``estimate_zero2_model_states_mem_needs``, ``estimate_zero3_model_states_mem_needs``).
    """
    report = trace(scenario("full", strategy, gpus=gpus, zero=SMALL, **MIXED), timeline=False)
    found = report["components_by_phase"]["optimizer"]
    share = PARAMETERS // gpus
    assert found["optimizer_states"] == pytest.approx(12 * share, rel=0.01)
    assert found["weights_bf16"] == pytest.approx(
        2 * (share if strategy == "zero3" else PARAMETERS), rel=0.02
    )
    if strategy == "zero3":
        assert found["gradients"] == pytest.approx(2 * share + 4 * share, rel=0.01)
    else:  # what lies across two shares is held whole
        states = found["weights_bf16"] + found["gradients"] + found["optimizer_states"]
        assert (
            2 * PARAMETERS + 14 * share < states < 2 * PARAMETERS + 18 * share + 2 * 2 * 512 * 128
        )


@pytest.mark.thorough
def test_zero3_computes_the_loss_in_chunks():
    """The head's weights are gathered for each chunk, and the logits of all tokens never exist at once."""
    wide = {"model": LLAMA | {"vocab_size": 32_000}, "micro_batch": 32, **MIXED}
    whole, chunks = (
        trace(scenario("full", "zero3", loss=loss, **wide), timeline=False)
        for loss in ("full", "chunked")
    )
    logits = [of["components"].get("logits_and_loss", 0) for of in (whole, chunks)]
    assert logits[1] < logits[0] / 2
    assert chunks["peak_allocated_bytes"] < whole["peak_allocated_bytes"]
    assert chunks["resident_bytes"] == whole["resident_bytes"]


def test_zero3_leaves_a_range_and_notes_say_what_deepspeed_does():
    """Blocks that a second stream uses come back when the GPU has got there: how far ahead the CPU is decides."""
    low, high = trace(scenario("full", "zero3"), timeline=False)["reserved_range_bytes"]
    assert low < high
    low, high = trace(scenario("full", "zero2"), timeline=False)["reserved_range_bytes"]
    assert low == high
    notes = trace(scenario("full", "zero3", precision="bf16-mixed"), timeline=False)["notes"]
    assert "500,000,000 elements, takes 1,000,000,000 bytes on each GPU all the time" in notes[0]
    assert (
        "16,384 elements" in notes[0] and "fp32 copy" in notes[1] and "DeepSpeed 0.19.8" in notes[2]
    )
    note, _ = trace(scenario("full", "zero2"), timeline=False)["notes"]
    assert "2,000,000,000 bytes on each GPU while gradients are exchanged" in note


@pytest.mark.thorough
def test_the_weights_of_zero3_come_one_after_the_other_and_4_bit_ones_all_at_once():
    model = {**LLAMA, "hidden_size": 512, "intermediate_size": 2048, "vocab_size": 64}
    linear = 3 * (3 * 512 * 2048 + 2 * 512 * 512 + 2 * 512 * 256)
    load = {}
    for method in ("lora", "qlora"):
        step = scenario(method, "zero3", model=model, lora={"rank": 1}, zero=SMALL, **HALF)
        load[method] = trace(step, timeline=False)["phases"]["load"]
    assert 2 * linear / 2 < load["lora"] < 0.75 * 2 * linear
    assert linear / 2 < load["qlora"]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("strategy", "offload", "gone"),
    [
        ("zero2", {"offload_optimizer": "cpu"}, {"optimizer_states"}),
        ("zero3", {"offload_optimizer": "cpu"}, {"optimizer_states", "gradients"}),
        (
            "zero3",
            {"offload_optimizer": "cpu", "offload_param": "cpu"},
            {"optimizer_states", "gradients", "weights_bf16"},
        ),
    ],
)
def test_what_lies_on_the_host_is_not_on_the_gpu(strategy, offload, gone):
    """States go, and a share of the gradients with stage 3; weights with ``offload_param``."""
    step = scenario("full", strategy, zero=SMALL, **MIXED)
    here, there = (
        trace(each, timeline=False) for each in (step, step.changed(zero=SMALL | offload))
    )
    found = there["components_by_phase"]["forward"]
    assert (
        not {name for name in gone if found.get(name)}
        and there["peak_allocated_bytes"] < here["peak_allocated_bytes"]
    )


@pytest.mark.parametrize(
    ("offload", "bytes_each"),
    [
        ({}, 0),
        ({"offload_optimizer": "cpu"}, 4 + 4 + 8 + 2),
        ({"offload_optimizer": "cpu", "offload_param": "cpu"}, 4 + 4 + 8 + 2 + 2),
    ],
)
def test_the_host_holds_what_is_offloaded(offload, bytes_each):
    step = scenario("full", "zero3", gpus=4, zero=offload, **MIXED)
    assert host_of(step, 8).step_bytes == bytes_each * PARAMETERS // 4


@needs_deepspeed
def test_the_configuration_is_accelerates():
    """With DeepSpeed's own defaults, and what the scenario says."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from dryfit.step.parallel import zero_configuration

    step = scenario("full", "zero3", precision="bf16-mixed", gradient_accumulation=3)
    found = zero_configuration(step)
    assert found["zero_optimization"]["stage"] == 3 and found["bf16"] == {"enabled": True}
    assert found["train_batch_size"] == 2 * 3 * 2 and found["gradient_clipping"] == 1.0
    assert "auto" not in json.dumps(found, default=str)
    own = DeepSpeedZeroConfig(stage=3)
    for name, value in vars(step.zero).items():
        if name not in ("other", "offload_optimizer", "offload_param", "overlap_comm"):
            assert value == getattr(own, name.removeprefix("stage3_"), getattr(own, name, None)), (
                name
            )
    other = {
        "zero_optimization": {"round_robin_gradients": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    found = zero_configuration(step.changed(zero={"other": other}))
    assert (
        found["zero_optimization"]["round_robin_gradients"]
        and found["data_types"] == other["data_types"]
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"parallel": {"strategy": "zero2", "gpus": 2, "ulysses": 2}},
        {"zero": {"other": {"zero_optimization": {"zero_quantized_weights": True}}}},
    ],
)
def test_without_the_package_what_has_no_rule_says_what_to_install(fields, monkeypatch):
    monkeypatch.setattr("dryfit.scenario.scenario.find_spec", lambda name: None)
    with pytest.raises(UserError, match="deepspeed, which is not installed") as caught:
        check_packages(scenario("full", "zero3", **fields))
    assert caught.value.write == 'pip install "dryfit[deepspeed]"'


@pytest.mark.thorough
def test_the_command_answers_in_a_process_that_imported_nothing(tmp_path):
    file = tmp_path / "step.yaml"
    file.write_text("model: smollm2-135m\nmethod: full\nautocast: bf16\nsequence_length: 256\n")
    words = [str(file), "--gpu", "4090", "--fresh", "--set", "parallel={strategy: zero3, gpus: 2}"]
    done = subprocess.run(
        [sys.executable, "-m", "dryfit.ask", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("FITS")
