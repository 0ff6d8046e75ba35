"""The planner: what it says fits does, what it suggests suffices, and the effective batch stays."""

import time
from dataclasses import asdict, replace

import pytest
import yaml

from dryfit.analytic.estimate import analytic_estimate, weights_bytes
from dryfit.analytic.parameters import parameter_count
from dryfit.cards.gpus import GIB, Gpu, catalogue, find, known
from dryfit.derived.step import derived_step
from dryfit.hours.step_time import speeds
from dryfit.planner import plan, suggestions
from dryfit.planner.calibrated import CalibratedEstimator, _above, _described, layers_alike, sweep
from dryfit.planner.changes import apply, as_method, moves, spread, whole_4bit_bytes
from dryfit.planner.feasibility import largest
from dryfit.planner.suggestions import _bigger_gpu, _divided, _suggestion, _verified, suggest
from dryfit.readers.request import parse_request
from dryfit.scenario.scenario import Scenario
from dryfit.tracing.trace import trace
from tests.dryfit.decoders import LLAMA_3_LAYERS
from tests.dryfit.families import FAMILIES

pytestmark = pytest.mark.usefixtures("nothing_beside")
LLAMA = {**LLAMA_3_LAYERS, "num_hidden_layers": 2}


def make(**fields) -> Scenario:
    return Scenario.from_mapping({"model": LLAMA, "sequence_length": 256, **fields})


def card(usable: int) -> Gpu:
    return replace(
        find({"vram_gib": 1, "context_mib": 512}),
        total_bytes=usable + find({"vram_gib": 1, "context_mib": 512}).context_bytes,
    )


def required(scenario: Scenario) -> int:
    return trace(scenario, timeline=False)["required_bytes"]


def test_suggestions_fit_in_order_of_their_cost() -> None:
    scenario = make(micro_batch=8, gradient_checkpointing=False, attention="eager", loop="manual")
    need = required(scenario)
    gpu = card(int(need * 0.8))
    found = suggest(scenario, gpu)
    assert len(found) >= 2
    names = [move.name for move in moves(scenario)]
    places = [names.index(item.move) for item in found if item.move in names]
    assert places == sorted(places)
    for item in found:
        if "gpu" in item.changes:
            continue
        changed = apply(scenario, item.changes)
        assert required(changed) == item.required_bytes <= gpu.usable_bytes
        assert changed.micro_batch * changed.gradient_accumulation == 8
        assert item.headroom_bytes == gpu.usable_bytes - item.required_bytes
        assert all(key in item.write for key in item.changes)
    assert "gpu" in found[-1].changes


def test_which_changes_are_offered() -> None:
    (found,) = [
        move
        for move in moves(make(micro_batch=6, gradient_accumulation=2))
        if move.name == "micro_batch"
    ]
    assert [tuple(one.values()) for one in found.options] == [(4, 3), (3, 4), (2, 6), (1, 12)]
    offered = [
        changes
        for move in moves(make(method="lora", lora={"rank": 16}))
        for changes in move.options
    ]
    assert [changes["lora"]["rank"] for changes in offered if "lora" in changes] == [8, 4]
    assert [changes["sequence_length"] for changes in offered if "sequence_length" in changes] == [
        192,
        128,
    ]
    scenario = make(method="full", precision="bf16-mixed")
    assert apply(scenario, {"method": "lora"}).lora is not None
    assert apply(make(), {"method": "full"}).quantization is None
    scenario = make(method="full", gpu={"name": "t4", "count": 2}, gradient_accumulation=2)
    names = [move.name for move in moves(scenario)]
    assert names.index("spread") < names.index("lora")
    scenario = make(
        method="full", precision="bf16-mixed", parallel={"strategy": "zero2", "gpus": 4}
    )
    strategies = [
        c["parallel"]["strategy"]
        for move in moves(scenario)
        for c in move.options
        if "parallel" in c
    ]
    assert strategies == ["zero3"]
    # Two GPUs of one row each make a batch of two: four of them can't keep it.
    changes, price = spread(make(**TWO), 4)
    assert changes.keys() == {"parallel"} and "effective batch becomes 4" in price
    changes, price = spread(make(gradient_accumulation=2, **TWO), 4)
    assert changes["gradient_accumulation"] == 1 and "effective batch" not in price


@pytest.mark.thorough
def test_suggestions_say_what_they_save_and_cost_in_time_from_two_traces() -> None:
    a100 = find("a100-80gb")
    sizes = {"model": LLAMA_3_LAYERS, "micro_batch": 8, "sequence_length": 512}
    scenario = make(**sizes, gradient_checkpointing=False, optimizer="adamw_fused")

    def timed(step: Scenario) -> dict:
        found = trace(step, capability=a100.capability, timeline=False, timed_on=speeds([a100]))
        return {**found, "time": found["times"]["a100-80gb"]}

    before, after = timed(scenario), timed(scenario.changed(gradient_checkpointing=True))
    gpu = replace(a100, total_bytes=after["required_bytes"] + a100.context_bytes)
    found = [item for item in suggest(scenario, gpu, before) if "gpu" not in item.changes]
    item = next(item for item in found if item.changes == {"gradient_checkpointing": True})
    ratio = after["time"]["seconds_per_step"] / before["time"]["seconds_per_step"]
    assert item.slower_share == pytest.approx(ratio - 1, abs=1e-4) and 1.1 < ratio < 1.6
    saved = (before["required_bytes"] - item.required_bytes) / GIB
    assert (
        item.cost
        == f"time: each layer runs again in backward; saves {saved:.2f} GiB, {ratio - 1:.0%} slower"
    )


@pytest.mark.nightly
def test_what_an_estimate_thinks_fits_is_suggested_only_when_the_trace_says_so(monkeypatch) -> None:
    class Optimist(CalibratedEstimator):
        def __call__(self, scenario: Scenario) -> int:
            return 0 if scenario != self.asked else super().__call__(scenario)

    Optimist.asked = scenario = make(method="full", precision="fp32", micro_batch=4)
    monkeypatch.setattr(suggestions, "CalibratedEstimator", Optimist)
    gpu = card(required(scenario) // 4)
    found = [item for item in suggest(scenario, gpu) if "gpu" not in item.changes]
    for item in found:
        assert required(apply(scenario, item.changes)) == item.required_bytes <= gpu.usable_bytes
    assert "loss" not in {
        key for item in found for key in item.changes
    }  # the mildest, which is not enough


@pytest.mark.thorough
def test_several_changes_where_one_does_not_suffice() -> None:
    scenario = make(method="full", precision="fp32", micro_batch=8, gradient_checkpointing=False)
    alone = required(
        scenario.changed(gradient_checkpointing=True, micro_batch=1, gradient_accumulation=8)
    )
    gpu = card(int(alone * 0.65))
    first = suggest(scenario, gpu)[0]
    changed = apply(scenario, first.changes)
    assert required(changed) <= gpu.usable_bytes
    for key in first.changes:  # none of them is superfluous
        fewer = {name: value for name, value in first.changes.items() if name != key}
        if {"micro_batch", "gradient_accumulation"} & {key} or not fewer:
            continue
        assert required(apply(scenario, fewer)) > gpu.usable_bytes


@pytest.mark.thorough
def test_expandable_segments_are_the_first_suggestion_where_they_suffice() -> None:
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "vocab_size": 32000}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4}
    scenario = make(model={**LLAMA, **sizes, **heads}, method="full", sequence_length=1000)
    grown = scenario.changed(allocator={"expandable_segments": True})
    without, need = required(scenario), required(grown)
    assert need < without
    first = suggest(scenario, card((need + without) // 2))[0]
    assert (first.move, first.required_bytes) == ("expandable_segments", need)
    assert first.write == "allocator: {expandable_segments: true}"
    assert "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True" in first.cost
    assert "expandable_segments" not in {move.name for move in moves(grown)}


@pytest.mark.thorough
def test_a_shorter_length_is_the_longest_below_which_all_fit() -> None:
    scenario = make(sequence_length=1024, loss="chunked", optimizer="paged_adamw_8bit")
    gpu = card(required(scenario.changed(sequence_length=640)))
    (move,) = (move for move in moves(scenario) if move.name == "sequence_length")
    assert [changes["sequence_length"] for changes in move.options] == list(range(960, 127, -64))
    estimate = CalibratedEstimator(scenario, gpu)
    found = _verified(
        scenario, move, gpu, estimate, lambda step: estimate(step) <= gpu.usable_bytes
    )
    longest = largest(scenario, gpu, "sequence_length")["value"]
    assert 512 < found.changes["sequence_length"] == longest < 1024
    assert required(scenario.changed(**found.changes)) == found.required_bytes <= gpu.usable_bytes


def test_bigger_card_is_the_smallest_that_holds_it() -> None:
    scenario, gpu = make(micro_batch=1500), find("t4")
    last = _bigger_gpu(scenario, gpu, CalibratedEstimator(scenario, gpu))
    name = last.changes["gpu"]
    smaller = [
        c
        for c in catalogue().values()
        if gpu.total_bytes < c.total_bytes < catalogue()[name].total_bytes
    ]
    assert all(last.required_bytes > c.usable_bytes * 0.97 for c in smaller)


ODD = [
    {"loop": "manual", "previous_sequence_length": 64},
    {"loop": "manual", "keeps_outputs": True},
    {"use_cache": True, "gradient_checkpointing": False},
    {"adapter": {"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []}},
    {"kbit_preparation": "trl", "autocast": "bf16"},
    {"packing": "rows"},
    {"loss": "liger"},
    {"method": "full", "precision": "bf16-mixed"},
    {
        "quantization": {"type": "int8"},
        "parallel": {"strategy": "ddp", "gpus": 2},
        "gpu": {"vram_gib": 24, "count": 4},
    },
    {"quantization": {"type": "int8"}, "gpu": {"vram_gib": 24, "count": 2}},
]


@pytest.mark.parametrize("fields", ODD, ids=str)
def test_every_move_is_a_scenario(fields) -> None:
    scenario = make(**fields)
    changed = [apply(scenario, changes) for move in moves(scenario) for changes in move.options]
    assert changed and all(other != scenario for other in changed)
    assert not any(other.previous_sequence_length for other in changed if other.loop == "trainer")


@pytest.mark.parametrize("fields", [*ODD, {"quantization": {"double": False}}], ids=str)
def test_what_a_suggestion_says_to_write_is_its_change(fields) -> None:
    found = {"peak_allocated_bytes": 0, "required_bytes": 0}
    for move in moves(make(**fields)):
        for changes in move.options:
            written = _suggestion(move.name, changes, "", found, card(1)).write
            assert yaml.safe_load(f"{{{written}}}") == changes


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("more", "size", "close"), [({"use_cache": True}, 2, 0), ({"micro_batch": 4}, 1, 0.05)]
)
def test_a_bigger_gpu_is_found_by_its_own_kernels(more, size, close) -> None:
    """By the trace, or by the estimate's peak: before compute capability 8.0 this attention keeps its scores."""
    model = {**LLAMA, "num_attention_heads": 4, "num_key_value_heads": 2}
    scenario = make(
        model=model, precision="fp16", sequence_length=1024, gradient_checkpointing=False, **more
    )
    gpu = replace(find("t4"), total_bytes=size * GIB)
    found = _bigger_gpu(scenario, gpu, CalibratedEstimator(scenario, gpu))
    other = catalogue()[found.changes["gpu"]]
    old, new = (
        trace(scenario, capability=c, timeline=False)["required_bytes"]
        for c in ((7, 5), other.capability)
    )
    assert found.required_bytes == pytest.approx(new, rel=close) and new < old


@pytest.mark.parametrize(
    "fields",
    [
        {"kbit_preparation": "trl"},
        {"method": "full", "precision": "bf16-mixed"},
        {"method": "lora", "parallel": {"strategy": "fsdp1", "gpus": 2}},
        {"method": "lora", "precision": "fp16-mixed", "parallel": {"strategy": "fsdp1", "gpus": 2}},
    ],
    ids=str,
)
def test_a_scenario_of_one_method_is_one_of_each(fields) -> None:
    scenario = make(**fields)
    assert [apply(scenario, as_method(scenario, name)).method for name in ("full", "lora", "qlora")]


def test_what_is_traced_for_a_gpu_is_known_for_others_with_its_kernels() -> None:
    scenario = make(
        use_cache=True, gradient_checkpointing=False
    )  # which the analytic estimate does not describe
    estimate = CalibratedEstimator(scenario)
    answers = {name: estimate.on(find(name)) for name in ("rtx-3090", "rtx-a6000", "t4")}
    traced = {name: other.verify(scenario) for name, other in answers.items()}
    assert traced["rtx-3090"] is traced["rtx-a6000"] is not traced["t4"]
    assert not estimate.described and len(estimate._traced) == 2


def test_a_step_without_an_estimate_is_read_from_its_record_and_not_traced(monkeypatch) -> None:
    monkeypatch.setattr(
        "dryfit.tracing.trace.trace", lambda *_, **__: pytest.fail("a record knows this step")
    )
    step = parse_request({"model": "lfm2-1.2b", "sequence_length": 512, "like": "trl"}).scenario
    estimate = CalibratedEstimator(step, find("rtx-4090"))
    recorded = derived_step(step, (8, 9)).required_bytes
    assert estimate(step) == recorded
    longer = step.changed(sequence_length=2048)
    assert estimate(longer) == derived_step(longer, (8, 9)).required_bytes > recorded
    monkeypatch.setattr(CalibratedEstimator, "formula", lambda *_: 7)
    assert estimate(step.changed(optimizer="adamw_8bit")) == 7  # which no record has
    shared = next(gpu for gpu in known().values() if gpu.pool_bytes)
    assert (
        CalibratedEstimator(step, shared)(step) == 7
    )  # loading decides there, and is in no record
    assert estimate.on(shared)(step) == 7 and estimate.on(find("rtx-3090"))(step) > 7


@pytest.mark.few(2, 4)
@pytest.mark.parametrize("family", ["lfm2", "qwen3_5_moe_text", "gemma4_text", "mamba2"])
@pytest.mark.parametrize("method", ["full", "qlora"])
def test_layers_alike_stand_in_for_others_and_weights_count_exactly(family, method) -> None:
    """They decide which changes are traced: so all that they have to know is what needs more."""
    fields = {"model": FAMILIES[family], "method": method, "sequence_length": 256, "packages": []}
    scenario = Scenario.from_mapping(fields)
    alike = layers_alike(scenario)
    assert alike.model["model_type"] == "llama" and layers_alike(alike) is alike
    estimate = CalibratedEstimator(scenario)
    own, other = (weights_bytes(step, parameter_count(step.model)) for step in (scenario, alike))
    form = analytic_estimate(alike, blocks=False)["peak_allocated_bytes"]
    assert estimate.described and (
        method == "full" or estimate.formula(scenario) == form + own - other
    )
    assert estimate(scenario.changed(micro_batch=4)) > estimate(scenario)
    traced = estimate.verify(scenario)
    assert estimate(scenario) == traced["required_bytes"]


def test_a_target_of_the_models_own_layers_becomes_all_linear_where_others_stand_in() -> None:
    fields = {
        "model": FAMILIES["lfm2"],
        "lora": {"rank": 4, "target_modules": ["in_proj"]},
        "sequence_length": 64,
    }
    assert layers_alike(Scenario.from_mapping(fields)).lora.target_modules == "all-linear"


def test_a_sweep_over_layers_without_a_form_is_the_traces_at_its_ends(monkeypatch) -> None:
    scenario = Scenario.from_mapping(
        {"model": FAMILIES["lfm2"], "method": "lora", "sequence_length": 64}
    )
    traces, verify = [], CalibratedEstimator.verify
    monkeypatch.setattr(
        CalibratedEstimator, "verify", lambda own, step: traces.append(step) or verify(own, step)
    )
    rows = sweep(scenario, ranks=(4, 16), sequence_lengths=(64, 128, 512), micro_batches=(1, 2))
    assert len(traces) == 5 and len(rows) == 12
    for row in (rows[0], rows[5], rows[6], rows[11]):
        changes = {name: row[name] for name in ("sequence_length", "micro_batch")}
        step = scenario.changed(
            **changes, lora={**scenario.to_mapping()["lora"], "rank": row["rank"]}
        )
        assert row["required_bytes"] == required(step)


def test_estimates_meet_the_traces_that_taught_them() -> None:
    scenario = make()
    estimate = CalibratedEstimator(scenario)
    for batch in (1, 4, 16):
        traced = estimate.verify(scenario.changed(micro_batch=batch))
        assert estimate(scenario.changed(micro_batch=batch)) == traced["required_bytes"]
    between = scenario.changed(micro_batch=8)
    assert estimate(between) == pytest.approx(
        required(between), rel=0.15
    )  # segments are coarse here
    points = [(100, 10), (200, 30)]
    assert [_above(peak, points) for peak in (50, 100, 150, 200, 400)] == [5, 10, 20, 30, 60]
    assert _above(100, []) == 0


@pytest.mark.nightly
def test_sweep_of_two_hundred_settings() -> None:
    scenario = Scenario.from_mapping({"model": "qwen2.5-coder-7b"})
    started = time.monotonic()
    rows = sweep(
        scenario,
        ranks=[4, 8, 16, 32, 64],
        sequence_lengths=[128, 256, 512, 1024, 2048, 4096, 8192, 16384],
        micro_batches=[1, 2, 4, 8, 16],
    )
    print(f"{len(rows)} settings in {time.monotonic() - started:.1f} s")
    assert len(rows) == 200
    table = {
        (row["rank"], row["sequence_length"], row["micro_batch"]): row["required_bytes"]
        for row in rows
    }
    assert table[8, 512, 1] < table[64, 512, 1] < table[64, 4096, 1] < table[64, 4096, 16]


@pytest.mark.thorough
def test_the_mildest_change_that_fits_is_suggested_and_whole_weights_are_named() -> None:
    scenario = make(micro_batch=8, loss="chunked", optimizer="paged_adamw_8bit")
    gpu = card(required(scenario.changed(micro_batch=4, gradient_accumulation=2)))
    found = [item.changes for item in suggest(scenario, gpu) if "micro_batch" in item.changes]
    assert found == [{"micro_batch": 4, "gradient_accumulation": 2}]
    scenario = make(parallel={"strategy": "fsdp2", "gpus": 4})
    saved = whole_4bit_bytes(scenario)
    _, price, (changes,) = next(
        move for move in moves(scenario) if move.name == "divide_4bit_weights"
    )
    divided_too = apply(scenario, changes)
    resident = [trace(step, timeline=False)["resident_bytes"] for step in (scenario, divided_too)]
    assert (
        resident[0] - resident[1] == pytest.approx(saved, rel=0.05)
        and f"{saved / 2**30:.2f} GiB" in price
    )
    assert whole_4bit_bytes(divided_too) == whole_4bit_bytes(make()) == 0


@pytest.mark.thorough
def test_more_gpus_of_the_kind_are_suggested_where_they_suffice() -> None:
    model = {**LLAMA, "hidden_size": 1024, "intermediate_size": 4096}
    scenario = make(model=model, method="full", precision="fp32", gradient_accumulation=4)
    need = required(scenario)
    shared = {n: required(apply(scenario, spread(scenario, n)[0])) for n in (2, 4)}
    assert shared[4] < shared[2] < need
    gpu = card((shared[2] + shared[4]) // 2)
    (found,) = [item for item in suggest(scenario, gpu) if item.move == "more_gpus"]
    assert (
        found.changes["parallel"] == {"strategy": "fsdp2", "gpus": 4}
        and found.changes["gpu"]["count"] == 4
    )
    assert found.changes["gradient_accumulation"] == 1  # the effective batch stays
    assert found.required_bytes == shared[4] <= gpu.usable_bytes


@pytest.mark.thorough
def test_another_division_of_the_same_gpus_is_suggested_and_fits() -> None:
    """Of a step that FSDP2 shards already; what may not be suggested, such as what no training has, is left out."""
    model = {**LLAMA, "hidden_size": 1024, "intermediate_size": 4096}
    parallel = {"strategy": "fsdp2", "gpus": 4}
    scenario = make(
        model=model, method="full", micro_batch=1, sequence_length=1024, parallel=parallel
    )
    gpu = replace(card(int(0.9 * required(scenario))), count=4)
    asked = []  # whether each of these may be suggested
    found_all = suggest(scenario, gpu, allowed=lambda step: asked.append(step) or True)
    (found,) = [item for item in found_all if item.move == "division"]
    changed = apply(scenario, found.changes)
    assert (
        changed.parallel.gpus == 4
        and changed.parallel != scenario.parallel
        and "gpu" not in found.changes
    )
    assert required(changed) == found.required_bytes <= gpu.usable_bytes
    assert "the same GPUs, divided as" in found.cost
    assert changed.parallel in [step.parallel for step in asked]
    assert _divided(scenario, gpu, 4, allowed=lambda step: False) is None


TWO = {"parallel": {"strategy": "fsdp2", "gpus": 2, "reshard_after_forward": False}}


@pytest.mark.parametrize(
    ("fields", "changed"),
    [
        ({"gradient_accumulation": 6}, {"gradient_accumulation": 3}),
        ({"micro_batch": 4}, {"micro_batch": 2}),
        ({"micro_batch": 3}, {}),
        ({"gradient_accumulation": 2, **TWO}, {"gradient_accumulation": 1}),
        ({"micro_batch": 2, **TWO}, {"micro_batch": 1}),
        ({"micro_batch": 3, **TWO}, {}),
    ],
)
def test_a_divided_step_keeps_its_effective_batch_or_says_so(fields, changed) -> None:
    scenario = make(**fields)
    count = 2 * scenario.parallel.gpus
    changes, price = spread(scenario, count)
    assert {key: value for key, value in changes.items() if key != "parallel"} == changed
    assert apply(scenario, changes).parallel == replace(
        scenario.parallel, strategy="fsdp2", gpus=count
    )
    assert (f"effective batch becomes {3 * count}" in price) == (not changed)


def test_becomes_possible_finds_the_fewest_gpus(monkeypatch) -> None:
    scenario = make(method="full", precision="fp32")
    need = [
        required(scenario),
        *(required(apply(scenario, spread(scenario, n)[0])) for n in (2, 4, 8)),
    ]
    small, middle = card(need[2]), card(need[0])
    cards = {"small": replace(small, name="small"), "middle": replace(middle, name="middle")}
    monkeypatch.setattr(
        plan, "catalogue", lambda: {**cards, "none": replace(card(2**20), name="none")}
    )
    found = plan.becomes_possible({"A": scenario})
    assert [row["required_bytes"] for row in found["scenarios"]["A"]] == need
    assert {kind["gpu"]: kind["first"]["A"] for kind in found["gpus"]} == {
        "small": 4,
        "middle": 1,
        "none": None,
    }
    assert found["first"]["A"]["gpu"] == ("small" if 4 * need[2] < need[0] else "middle")


@pytest.mark.parametrize(
    ("fields", "like"),
    [
        (
            {"parallel": {"strategy": "zero3", "gpus": 4}},
            {"strategy": "fsdp2", "gpus": 4, "reshard_after_forward": True},
        ),
        (
            {"parallel": {"strategy": "zero2", "gpus": 4}},
            {"strategy": "fsdp2", "reshard_after_forward": False},
        ),
        (
            {"parallel": {"strategy": "zero2", "gpus": 4}, "loss": "chunked"},
            {"strategy": "ddp", "gpus": 4},
        ),
    ],
)
def test_of_zero_a_like_step_is_estimated_and_the_trace_corrects_it(fields, like) -> None:
    scenario = make(method="full", precision="bf16-mixed", **fields)
    estimate = CalibratedEstimator(scenario)
    stand_in = _described(scenario)
    assert like.items() <= asdict(stand_in.parallel).items()
    assert (stand_in.precision, stand_in.autocast) == ("bf16", None)
    estimate.learn(scenario, {"required_bytes": 123_456_789})
    assert estimate.described and estimate(scenario) == 123_456_789
    longer = scenario.changed(sequence_length=2 * scenario.sequence_length)
    assert estimate(longer) > 123_456_789


PICTURED = {
    "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "vocab_size": 300,
    },
    "vision_config": {"model_type": "siglip_vision_model", "image_size": 56},
    "mm_tokens_per_image": 4,
}


@pytest.mark.parametrize(
    "fields",
    [
        {"model": LLAMA, "objective": "dpo", "preference": {"reference": "model"}},
        {"model": LLAMA, "objective": "kto"},
        {"model": PICTURED, "images": {"height": 56, "width": 56}},
    ],
    ids=["dpo", "kto", "images"],
)
def test_what_is_not_described_is_searched_by_what_is_like_it(fields, monkeypatch):
    """Each trace of a trainer or of a whole vision-language model takes long: the estimate says which are worth it."""
    scenario = Scenario.from_mapping(
        {"method": "lora", "sequence_length": 256, "micro_batch": 4, **fields}
    )
    estimate = CalibratedEstimator(scenario)
    monkeypatch.setattr("dryfit.tracing.trace.trace", lambda *_, **__: pytest.fail("traced"))
    assert estimate.described
    guesses = [estimate(apply(scenario, {"micro_batch": rows})) for rows in (2, 3, 4)]
    assert guesses == sorted(set(guesses))


@pytest.mark.thorough
def test_experts_that_are_too_large_are_packed_or_kept_on_the_host() -> None:
    from tests.dryfit.decoders import DECODERS

    wide = {**DECODERS["mixtral"], "intermediate_size": 4096}
    scenario = make(
        model=wide,
        method="qlora",
        sequence_length=8,
        lora={"rank": 1, "target_modules": ["q_proj"]},
    )
    names = [move.name for move in moves(scenario)]
    assert names.index("packed_experts") < names.index("experts_on_host")
    assert "packed_experts" not in [move.name for move in moves(make(method="qlora"))]
    need, packed = (
        required(scenario),
        required(scenario.changed(experts={"quantized": "bitsandbytes"})),
    )
    found = {item.move: item for item in suggest(scenario, card((need + packed) // 2))}
    assert found["packed_experts"].required_bytes == packed < need


@pytest.mark.thorough
def test_where_loading_alone_is_too_much_only_another_way_to_load_is_tried() -> None:
    """LoRA whose weights lie twice in unified memory while they load; the step itself has room."""
    wide = {**LLAMA, "intermediate_size": 65536}
    scenario = make(model=wide, method="lora", gpu="gb10", sequence_length=8, lora={"rank": 1})
    needed = trace(scenario, timeline=False)
    copy, loaded = needed["host_copy_bytes"], needed["phases"]["load"]
    pool = max(needed["required_bytes"], loaded + copy // 2)
    gpu = replace(find("gb10"), total_bytes=pool, pool_bytes=pool, system_bytes=0, context_bytes=0)
    assert needed["required_bytes"] <= gpu.usable_bytes < loaded + copy
    found = suggest(scenario, gpu)
    assert [item.move for item in found if "gpu" not in item.changes] == ["load_on_device"]
    assert found[0].changes == {"loads": "device"} and "device_map" in found[0].cost
    assert not any(
        move.name == "load_on_device" for move in moves(make(method="lora", gpu="rtx-4090"))
    )


@pytest.mark.few(1, 1)
@pytest.mark.parametrize(
    ("search", "share"),
    [
        ("_verified", 0.5),
        ("_combined", 0.2),
        ("_more_gpus", 0.5),
        ("_bigger_gpu", 0.5),
        ("_divided", 0.5),
        ("_timed", 0.5),
    ],
)
def test_a_search_that_fails_is_left_out_and_named(search: str, share: float, monkeypatch) -> None:
    """Whatever it raises, the others' findings stand."""
    gpus = {"parallel": {"strategy": "ddp", "gpus": 2}} if search == "_divided" else {}
    scenario = make(micro_batch=8, gradient_checkpointing=False, method="lora", **gpus)
    card_of_a_kind = find("rtx-4090")
    known = trace(scenario, capability=(8, 9), timeline=False, timed_on=speeds([card_of_a_kind]))
    usable = int(share * known["required_bytes"])
    gpu = replace(card_of_a_kind, total_bytes=card_of_a_kind.context_bytes + usable)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a library's own")

    failed: list[str] = []
    monkeypatch.setattr(suggestions, search, broken)
    found = suggest(scenario, gpu, {**known, "time": known["times"]["rtx-4090"]}, failed=failed)
    assert failed and (found or search == "_verified")


def test_a_change_that_a_later_one_needs_is_not_left_out() -> None:
    """A smaller rank needs the adapters that `method: lora` brings: without it the step has no place for a rank."""
    scenario = make(method="full", gradient_checkpointing=True, micro_batch=1)
    sizes = {"full": 4, "lora": 3, "qlora": 1}

    class Known(CalibratedEstimator):
        def __call__(self, scenario: Scenario) -> int:
            return sizes[scenario.method] * 1000 + (scenario.lora.rank if scenario.lora else 0)

    fits = lambda step: Known.__call__(None, step) <= 1004  # noqa: E731
    taken = suggestions._cheapest(scenario, Known(scenario), fits, None)
    changes = {key: value for _, step in taken for key, value in step.items()}
    assert (
        fits(apply(scenario, changes))
        and changes["method"] == "qlora"
        and changes["lora"]["rank"] == 4
    )
