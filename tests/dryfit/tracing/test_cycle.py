"""A cycle beside vLLM: whose what is in each phase, what to turn, and what can't start."""

from types import SimpleNamespace

import pytest

from dryfit.analytic.estimate import estimate
from dryfit.ask.text import cycle_lines
from dryfit.cards.gpus import find
from dryfit.common.errors import UserError
from dryfit.common.text import GIB
from dryfit.planner.compare import compare
from dryfit.planner.cycle import knobs, largest_utilization, longest_completion, server_answers
from dryfit.planner.feasibility import feasibility
from dryfit.scenario.scenario import Scenario
from dryfit.tracing.cycle import answers_left_out, cycle
from dryfit.tracing.measure import measure
from dryfit.tracing.scenario_trace import traced
from dryfit.tracing.trace import trace
from tests.dryfit.decoders import DECODERS

pytestmark = pytest.mark.skipif("not __import__('importlib').util.find_spec('trl')")
GPU = find("rtx-4090")


def scenario(**generation) -> Scenario:
    return Scenario.from_mapping(
        {
            "model": DECODERS["qwen2"],
            "objective": "grpo",
            "method": "lora",
            "precision": "bf16",
            "gpu": "rtx-4090",
            "sequence_length": 64,
            "micro_batch": 4,
            "preference": {"generations": 4, "reference": "adapter_off"},
            "generation": {"engine": "vllm", **generation},
        }
    )


@pytest.fixture(scope="module")
def known():
    return trace(scenario(), capability=GPU.capability, timeline=False)


@pytest.mark.thorough
def test_trl_says_nothing_of_what_the_asker_did_not_write(recwarn):
    trace(scenario(), capability=GPU.capability, timeline=False)
    assert not [each for each in recwarn if "rollout_func" in str(each.message)]


@pytest.mark.thorough
@pytest.mark.parametrize("reference", [None, "adapter_off"])
def test_answers_of_micro_batches_that_are_left_out_are_counted_in_the_update(reference):
    fields = scenario().to_mapping() | {"gradient_accumulation": 4}
    asked = Scenario.from_mapping(
        fields | {"preference": {"generations": 4, "reference": reference}}
    )
    short, whole = (
        trace(asked, "cpu", timeline=False)["phases"],
        measure(asked, "cpu", timeline=False)["phases"],
    )
    for phase in ("forward", "backward", "optimizer"):
        assert whole[phase] - short[phase] == answers_left_out(asked) > 0


def of(known, **generation):
    return cycle(scenario(**generation), known, GPU)


def by_name(found):
    return {phase.name: phase for phase in found.phases if phase.card == "trainer"}


@pytest.mark.thorough
def test_the_trainers_phases_beside_vllm_are_measured_to_the_byte():
    phases = trace(scenario(), "cpu", timeline=False)["phases"]
    assert phases == measure(scenario(), "cpu", timeline=False)["phases"]
    assert (
        "old_log_probabilities" in phases
    )  # which TRL takes beside vLLM even where an update ends with its answers


@pytest.mark.thorough
def test_the_server_awake_and_its_trainer(known):
    found = of(known, utilization=0.5)
    for phase in found.phases:
        assert {"trainer", "server weights", "server cache", "CUDA graphs", "CUDA context"} <= set(
            phase.owners
        )
    assert found.peak.most_bytes < 0.5 * GPU.total_bytes + 2 * GIB and found.owner == "server cache"
    fields = {"method": "qlora", "versions": {"vllm": "0.27.0"}}
    asked = Scenario.from_mapping(scenario().to_mapping() | fields)
    own = trace(asked, capability=GPU.capability, timeline=False)
    found = cycle(asked, own, GPU)
    model = DECODERS["qwen2"]
    tables = (
        model["vocab_size"] * model["hidden_size"] * (1 if model.get("tie_word_embeddings") else 2)
    )
    packed = own["parameters"] - tables
    assert (
        by_name(found)["generate"].owners["server weights"][0]
        == packed // 2 + packed // 64 * 4 + 2 * tables
    )
    assert found.server.weights() < of(known).server.weights()


def test_what_each_phase_holds(known):
    phases = by_name(of(known, utilization=0.5, sleep_level=2))
    assert set(phases["update"].owners) == {"trainer", "CUDA graphs", "CUDA context"}
    assert (
        "server cache" not in phases["weight sync"].owners
        and "server weights" in phases["weight sync"].owners
    )
    assert "server cache" in phases["generate"].owners
    awake = by_name(of(known, utilization=0.5))
    pools = sum(awake["update"].owners[name][1] for name in ("server weights", "server cache"))
    assert awake["update"].most_bytes - phases["update"].most_bytes == pools
    found = of(known, mode="server", utilization=0.9)
    cards = {phase.card for phase in found.phases}
    assert cards == {"trainer", "server"}
    assert all("server cache" not in phase.owners for phase in by_name(found).values())
    assert by_name(found)["weight sync"].owners["trainer"][0] > 2 * GIB  # vLLM's packed buffers
    phases = by_name(of(known, sleep_level=2))
    names = (
        "load",
        "weight sync",
        "generate",
        "sleep",
        "old log-probabilities",
        "reference log-probabilities",
        "update",
    )
    assert tuple(phases) == names
    unused = known["required_bytes"] - known["peak_allocated_bytes"]
    assert phases["update"].owners["trainer"][0] == known["peak_allocated_bytes"] + unused
    assert (
        phases["old log-probabilities"].owners["trainer"][0]
        == known["phases"]["old_log_probabilities"] + unused
    )


def test_what_to_turn_and_how_far(known):
    found = of(known, utilization=0.8)
    turned = {next(iter(knob.changes["generation"])): knob for knob in knobs(found, known)}
    assert {"mode", "utilization"} <= set(turned)
    for knob in turned.values():
        parts = knob.changes["generation"]
        assert of(known, **{"utilization": 0.8, **parts}).peak.most_bytes == knob.required_bytes
        assert knob.saves_bytes == found.peak.most_bytes - knob.required_bytes > 0
    largest = largest_utilization(of(known), known)
    assert of(known, utilization=largest).fits is True
    try:
        assert of(known, utilization=round(largest + 0.01, 2)).fits is not True
    except UserError as error:
        assert "can't start" in str(error)
    found = of(known, utilization=0.3)
    answers, server, cache = server_answers(found, known), found.server, found.server.cache()
    blocks = cache.blocks(server.cache_bytes()[0]) - 1
    each = cache.blocks_of_request(64, server.tokens_at_once)
    assert answers["most_answers_at_once"] == blocks // each
    longest = answers["longest_row_tokens"]
    assert (
        longest == server.longest
        or server.requests * cache.blocks_of_request(longest + 1, 4096) > blocks
    )


def test_answers_and_servers_of_other_sizes():
    tight = Scenario.from_mapping(scenario(utilization=0.3).to_mapping() | {"sequence_length": 300})
    assert longest_completion(tight, GPU, 512) == 512
    assert longest_completion(tight, find({"vram_gib": 1.0}), 512) is None
    from dryfit.readers.request import parse_request

    asked = parse_request(
        scenario(mode="server").to_mapping() | {"gpu": "2xrtx-4090", "parallel": None}
    ).scenario
    assert asked.parallel.gpus == 1 and asked.generation.mode == "server"
    with pytest.raises(UserError, match="beyond the 4096 positions") as caught:
        Scenario.from_mapping(scenario().to_mapping() | {"sequence_length": 100_000})
    assert "sequence_length: 4096" in str(caught.value)


@pytest.mark.parametrize(("holds", "longest"), [(1000, 768), (768, 768), (255, None), (5000, 2048)])
def test_the_longest_answer_is_the_last_multiple_that_fits(monkeypatch, holds, longest):
    monkeypatch.setattr("dryfit.tracing.trace.trace", lambda *_, **__: {})
    monkeypatch.setattr(
        "dryfit.planner.cycle.cycle",
        lambda step, *_: SimpleNamespace(fits=step.completion_length <= holds),
    )
    assert longest_completion(scenario(), GPU, 2048) == longest


def test_an_answer_names_the_phase_and_its_owner(known):
    asked = scenario(utilization=0.5)
    mapping = compare(estimate(asked), traced(asked)).to_mapping()
    found = mapping["phases_of_cycle"]
    assert (
        mapping["fits"] is True
        and mapping["headroom_bytes"] == found["usable_bytes"] - found["required_bytes"]
    )
    assert mapping["sentence"].startswith(
        f"FITS: the largest phase, the {found['peak_phase']}, needs "
    )
    text = "\n".join(cycle_lines(mapping))
    for words in ("generate", "old log-probabilities", "largest utilization", "generation {"):
        assert words in text


def test_a_share_that_is_too_small_or_too_large_is_refused_with_what_to_write(known):
    with pytest.raises(UserError, match=r"can't start.*more\. The phase load fails") as caught:
        of(known, utilization=0.005)
    share = caught.value.change["generation"]["utilization"]
    assert of(known, utilization=share).server.cache_bytes()[0] > 0
    with pytest.raises(UserError, match="beside the trainer") as caught:
        of(known, utilization=0.99)
    assert of(known, utilization=caught.value.change["generation"]["utilization"]).server


WRONG = {
    "rows longer than the server's": (
        {"max_model_length": 32},
        "32 less: the phase generate fails",
        "max_model_length: 64",
    ),
    "sleep of another engine": (
        {"engine": "transformers", "sleep_level": 2},
        "only vLLM has it",
        "sleep_level: 0",
    ),
    "sleep of a server": (
        {"mode": "server", "sleep_level": 1},
        "nobody puts it to sleep",
        "sleep_level: 0",
    ),
    "two servers on one card": ({"servers": 2}, "can't lie on one card", "servers: 1"),
    "cards of several trainings": (
        {"tensor_parallel": 2},
        "a training for each",
        "tensor_parallel: 1",
    ),
}


@pytest.mark.parametrize(("generation", "says", "write"), WRONG.values(), ids=WRONG)
def test_what_can_not_be_is_refused_with_what_to_write(generation, says, write):
    with pytest.raises(UserError, match=says) as caught:
        scenario(**generation)
    assert write in str(caught.value.write)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"gpu": None}, "takes a share of a card"),
        ({"method": "qlora"}, "no bitsandbytes"),
        ({"method": "qlora", "versions": {"vllm": "0.28.0"}}, "no bitsandbytes"),
        (
            {"method": "qlora", "versions": {"vllm": "0.27.0"}, "quantization": {"type": "int8"}},
            "TRL refuses it",
        ),
        (
            {"gpu": "2xrtx-4090", "generation": {"engine": "vllm", "mode": "server", "servers": 2}},
            "would share a card",
        ),
        ({"versions": {"vllm": "0.5.0"}}, "no version whose rules were read"),
        ({"micro_batch": 2}, "doesn't divide"),
    ],
)
def test_what_does_not_go_with_a_server_is_refused(fields, says):
    with pytest.raises(UserError, match=says):
        Scenario.from_mapping(scenario().to_mapping() | fields)


def test_questions_that_know_no_server_are_refused():
    from dryfit.ask.answer import largest_that_fits, on_all_gpus
    from dryfit.ask.question import Question
    from dryfit.readers.request import parse_request

    request = parse_request(scenario().to_mapping())
    asked = Question(request, request.scenario, "scenario", GPU)
    with pytest.raises(UserError, match="share of a card"):
        on_all_gpus(asked)
    with pytest.raises(UserError, match="dryfit batch"):
        largest_that_fits(asked, "micro_batch")
    with pytest.raises(UserError, match="plan knows nothing"):
        feasibility({"lora": scenario()}, [GPU])


@pytest.mark.nightly
def test_what_does_not_fit_is_told_what_would_by_engine_and_by_trainer():
    crowded = Scenario.from_mapping(
        scenario(utilization=0.89, cuda_graphs=False).to_mapping()
        | {
            "model": {**DECODERS["qwen2"], "vocab_size": 152_064},
            "sequence_length": 1024,
            "micro_batch": 256,
        }
        | {
            "gradient_checkpointing": False,
            "preference": {"generations": 4},
            "gradient_accumulation": 1,
        }
    )
    own = traced(crowded)
    mapping = compare(estimate(crowded), own).to_mapping()
    assert mapping["fits"] is False and mapping["phases_of_cycle"]["peak_phase"] == "update"
    found = {item["move"]: item for item in mapping["suggestions"]}
    assert "sleep_level" in found and "gradient_checkpointing" in found
    for item in found.values():
        assert item["headroom_bytes"] >= 0
        assert (
            item["required_bytes"] + item["headroom_bytes"]
            == mapping["phases_of_cycle"]["usable_bytes"]
        )


@pytest.mark.parametrize(
    ("version", "level", "warned"),
    [("0.26.0", 2, True), ("0.26.0", 0, False), ("0.27.0", 2, False)],
)
def test_a_version_that_misjudges_its_weights_asleep_is_a_warning(version, level, warned, known):
    asked = Scenario.from_mapping(
        scenario(sleep_level=level).to_mapping() | {"versions": {"vllm": version}}
    )
    assert bool(cycle(asked, known, GPU).warnings) is warned


def test_a_model_divided_among_trainings_takes_a_part_of_each_card_and_all_their_answers(known):
    fields = {"gpu": "2xrtx-4090", "generation": {"engine": "vllm", "tensor_parallel": 2}}
    found = cycle(Scenario.from_mapping(scenario().to_mapping() | fields), known, GPU)
    alone = of(known)
    assert found.server.weights() == pytest.approx(alone.server.weights() / 2, rel=0.01)
    assert found.server.requests == 2 * alone.server.requests
    assert "each of the 2 cards trains a copy" in found.warnings[0] and not alone.warnings
    assert {phase.card for phase in found.phases} == {"trainer"}
