"""Steps composed from shallow models: the bytes of the whole step; and what can't be composed is traced whole."""

import json
from unittest import mock

import pytest
import torch

from dryfit.cards.gpus import find
from dryfit.common.errors import UserError
from dryfit.engine.composed import SecondStep
from dryfit.engine.periods import Unlike
from dryfit.hours.step_time import speeds
from dryfit.scenario.scenario import Scenario
from dryfit.tracing import layers
from dryfit.tracing.layers import Composed, depths
from dryfit.tracing.trace import Recorder, trace
from tests.dryfit.decoders import DECODERS
from tests.dryfit.pairwise import pairwise

nightly = pytest.mark.nightly
CARD = find("rtx-4090", "a test")
SIZES = {"sequence_length": 256, "micro_batch": 2}
MODELS = ("qwen2.5-coder-7b", "gemma-2b", "phi-3.5-mini")


def scenario(model: str = "qwen2.5-0.5b", layers: int = 9, **fields) -> Scenario:
    """A scenario on a model of the catalogue with so many layers."""
    known = Scenario.from_mapping({"model": model}).model
    lists = {
        name: value[:layers]
        for name, value in known.items()
        if isinstance(value, list) and len(value) > layers
    }
    return Scenario.from_mapping(
        {"model": {**known, **lists, "num_hidden_layers": layers}, **SIZES, **fields}
    )


@pytest.fixture(autouse=True)
def always_worth_it(monkeypatch):
    """Small models are composed too, where that takes longer than their trace."""
    monkeypatch.setattr(layers, "WORTH", 5)


def both(step: Scenario, target: str = "cuda") -> tuple[str, str, bool]:
    """The answer as it is given, the whole trace's, and whether the first one was composed."""
    how = {
        "capability": (8, 9),
        "timed_on": speeds([CARD]),
        "both_allocators": True,
        "sizes": [CARD.usable_bytes],
    }
    how = how if target == "cuda" else {}
    with mock.patch.object(
        Composed, "record", autospec=True, side_effect=Composed.record
    ) as record:
        seen: list[object] = []
        original = record.side_effect
        record.side_effect = lambda *arguments: seen.append(original(*arguments)) or seen[-1]
        given = json.dumps(trace(step, target, **how), sort_keys=True)
    with (
        mock.patch.object(layers, "depths", return_value=None),
        mock.patch.object(layers, "full_pipeline", lambda _: []),
    ):
        whole = json.dumps(trace(step, target, **how), sort_keys=True)
    return given, whole, seen[0] is not None


def allowed(row) -> bool:
    """Reentrant checkpointing needs adapters here; divided models have neither 4-bit weights nor the chunked loss."""
    plain = row["method"] != "qlora" and row["optimizer"] == "adamw" and row["loss"] == "full"
    return (row["strategy"] == "none" or plain) and (
        row["method"],
        row["gradient_checkpointing"],
    ) != ("full", "reentrant")


ROWS = pairwise(
    {
        "model": MODELS,
        "method": ("full", "lora", "qlora"),
        "gradient_checkpointing": (True, False, "reentrant"),
        "strategy": ("none", "fsdp2"),
        "optimizer": ("adamw", "paged_adamw_8bit", "adafactor"),
        "loss": ("full", "chunked"),
        "gradient_accumulation": (1, 2),
    },
    allowed,
)


@pytest.mark.few(1, 4)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(map(str, row.values())))
def test_the_bytes_of_the_whole_step(row):
    """Components, timeline, phases, times, and what a GPU must have: the same text."""
    fields = dict(row)
    strategy = fields.pop("strategy")
    if strategy != "none":
        fields["parallel"] = {"strategy": strategy, "gpus": 2}
    count = 8 if strategy != "none" else 7  # one more than the third shallow model's
    given, whole, composed = both(scenario(fields.pop("model"), count, **fields))
    assert given == whole
    assert composed


@pytest.mark.few(0, 2)
@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"model": "qwen3-30b-a3b", "method": "qlora"}, 7),  # experts
        (
            {"model": "gemma-2-2b", "method": "lora"},
            12,
        ),  # every other layer looks back a window only
        ({"method": "full", "precision": "fp16-mixed", "loop": "manual"}, 8),
        (
            {
                "method": "full",
                "parallel": {"strategy": "fsdp2", "gpus": 8, "reshard_after_forward": False},
            },
            9,
        ),
        (
            {
                "method": "lora",
                "adapter": {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj", "v_proj"]},
            },
            8,
        ),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_others(fields, count):
    given, whole, composed = both(scenario(layers=count, **fields))
    assert given == whole and composed


PIPELINE = {"strategy": "none", "gpus": 2, "pipeline": 2}


@pytest.mark.few(0, 3)
@pytest.mark.parametrize(
    ("parallel", "fields"),
    [
        (
            {"strategy": "fsdp2", "gpus": 3},
            {"layers": 9},
        ),  # what a sum sends is no whole number of bytes
        ({"strategy": "none", "gpus": 2, "tensor": 2}, {"layers": 9}),
        ({"strategy": "fsdp2", "gpus": 4, "context": 2}, {"layers": 9}),
        pytest.param(
            {"strategy": "fsdp2", "gpus": 4, "replicate": 2}, {"layers": 9}, marks=nightly
        ),
        pytest.param(
            PIPELINE,
            {"layers": 14, "gradient_accumulation": 2, "gradient_checkpointing": False},
            marks=nightly,
        ),
        pytest.param(
            PIPELINE | {"gpus": 4, "tensor": 2},
            {"layers": 14, "gradient_accumulation": 2},
            marks=nightly,
        ),
        (PIPELINE | {"stage_layers": [8, 6]}, {"layers": 14, "gradient_accumulation": 2}),
        (PIPELINE, {"layers": 4, "gradient_accumulation": 9}),
        pytest.param(
            PIPELINE | {"schedule": "gpipe"},
            {"layers": 4, "gradient_accumulation": 9},
            marks=nightly,
        ),
        pytest.param(PIPELINE, {"layers": 12, "gradient_accumulation": 8}, marks=nightly),
        pytest.param(
            {"strategy": "none", "gpus": 3, "pipeline": 3},
            {"layers": 3, "gradient_accumulation": 14},
            marks=nightly,
        ),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_meshes(parallel, fields):
    """Of a pipeline each stage's layers, its micro-batches, or both."""
    step = scenario(method="full", model="qwen2.5-coder-7b", parallel=parallel, **fields)
    small = {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 640,
        "num_attention_heads": 4,
    }
    step = step.changed(model={**step.model, **small, "num_key_value_heads": 2})
    given, whole, composed = both(step)
    assert given == whole
    assert composed


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("model", "method", "period", "count"),
    [
        pytest.param("qwen3.5-9b", "full", 4, 20, marks=nightly),
        ("qwen3.5-9b", "qlora", 2, 12),
        pytest.param("qwen3.5-9b", "qlora", 4, 24, marks=nightly),
        pytest.param("qwen3-next-80b-a3b", "qlora", 4, 24, marks=nightly),
    ],
)
def test_hybrid_layers_with_convolutions(model, method, period, count):
    """Layers attend linearly, in transformers' own loops, but the last of each period; the convolutions' workspaces
    are there too. The models' own period is four."""
    step = scenario(model, layers=count, method=method, packages=[])
    period_of = ["linear_attention"] * (period - 1) + ["full_attention"]
    step = step.changed(model={**step.model, "layer_types": period_of * (count // period)})
    assert same_but_for_frees_in_a_row(step)
    assert trace(step, "cuda", capability=(8, 9))["peak_allocated_range_bytes"][1] is None


def test_hybrid_layers_with_the_kernels_of_packages():
    """Triton's kernels are tuned in the first layer that runs them, of every trace."""
    pytest.importorskip("fla")
    given, whole, composed = both(
        scenario("qwen3.5-9b", layers=24, method="qlora", packages=["fla"])
    )
    assert given == whole and composed
    assert json.loads(given)["triton_kernels"]


@pytest.mark.thorough
def test_on_a_cpu_too():
    given, whole, composed = both(scenario(method="lora"), "cpu")
    assert given == whole and composed


@pytest.mark.few(1, 2)
@pytest.mark.parametrize(
    ("model", "count", "expected"),
    [
        ("qwen2.5-coder-7b", 28, [3, 4, 5]),
        ("gemma-2-2b", 26, [6, 8, 10]),  # whole periods are left out
        ("gpt-oss-20b", 24, [6, 8, 10]),
        (
            "gemma-3-27b",
            62,
            [14, 20, 26],
        ),  # five of six look back a window only; 62 end with two of those
        ("qwen3.5-27b", 64, [8, 12, 16]),  # three of four attend linearly
        ("qwen3.5-397b-a17b", 60, [8, 12, 16]),
    ],
)
def test_the_period_is_that_of_the_built_layers(model, count, expected):
    plan = depths(scenario(model, layers=count))
    assert plan.shallow == expected and plan.whole == count
    assert (
        plan.at(scenario(model, layers=count), plan.shallow[0]).model["num_hidden_layers"]
        == expected[0]
    )


@pytest.mark.thorough
def same_but_for_frees_in_a_row(step: Scenario) -> bool:
    """Whether a composed answer is the whole trace's, but for what is allocated between two frees in a row."""
    given, whole, composed = both(step)
    given, whole = json.loads(given), json.loads(whole)
    mine, theirs = given.pop("timeline"), whole.pop("timeline")
    assert mine["phase"] == theirs["phase"]
    assert max(mine["allocated_bytes"]) == max(theirs["allocated_bytes"])
    return composed and given == whole


def test_frees_in_a_row_may_come_in_another_order():
    """A step of many layers that kept their inputs ends with a long chain of objects, which Python frees in parts."""
    model = {
        **DECODERS["qwen2"],
        "num_hidden_layers": 26,
        "hidden_size": 256,
        "intermediate_size": 640,
    }
    fields = {"model": model, "sequence_length": 300, "versions": {"bitsandbytes": "0.42.0"}}
    assert same_but_for_frees_in_a_row(Scenario.from_mapping(fields))


# --- what is traced whole -----------------------------------------------------------------------------------------


def refused(step: Scenario) -> bool:
    given, whole, composed = both(step)
    assert given == whole
    return not composed


@pytest.mark.few(0, 2)
@pytest.mark.parametrize(
    "fields",
    [
        {"parallel": {"strategy": "ddp", "gpus": 2}},
        {"parallel": {"strategy": "fsdp1", "gpus": 2}},
        {
            "adapter": {
                "peft_type": "LORA",
                "r": 8,
                "target_modules": ["q_proj"],
                "layers_to_transform": [1, 2],
            }
        },
        {
            "adapter": {
                "peft_type": "LORA",
                "r": 8,
                "target_modules": ["q_proj"],
                "rank_pattern": {"model.layers.4.self_attn.q_proj": 32},
            }
        },
    ],
    ids=["ddp", "fsdp1", "adapters in some layers", "a larger rank in one layer"],
)
def test_what_differs_from_layer_to_layer_or_adds_up(fields):
    assert refused(scenario(method="lora", layers=7, **fields))


def test_layers_that_differ_in_a_way_nobody_named(monkeypatch):
    """One class, one configuration; the fifth layer's MLP is wider, or the sixth computes once more by its number."""
    from transformers.models.qwen2 import modeling_qwen2 as qwen

    begin = qwen.Qwen2MLP.__init__
    made: list[int] = []

    def wider(self, config):
        made.append(1)
        begin(self, config)
        if len(made) % 8 == 5:
            self.up_proj = torch.nn.Linear(self.hidden_size, 2 * self.intermediate_size, bias=False)
            self.down_proj = torch.nn.Linear(
                2 * self.intermediate_size, self.hidden_size, bias=False
            )
            self.gate_proj = torch.nn.Linear(
                self.hidden_size, 2 * self.intermediate_size, bias=False
            )

    with monkeypatch.context() as patch:
        patch.setattr(qwen.Qwen2MLP, "__init__", wider)
        assert depths(scenario(layers=8)) is None
    step = qwen.Qwen2Attention.forward

    def twice(self, hidden_states, *arguments, **named):
        if self.layer_idx == 6:
            step(self, hidden_states, *arguments, **named)
        return step(self, hidden_states, *arguments, **named)

    assert depths(scenario(layers=9)) is not None
    monkeypatch.setattr(qwen.Qwen2Attention, "forward", twice)
    assert depths(scenario(layers=9)) is None
    assert refused(scenario(layers=9, method="lora"))


@pytest.mark.thorough
def test_a_third_record_that_is_another_is_no_proof(monkeypatch):
    """An optimizer that looks at the number of parameters: nothing in the modules tells."""
    begin = torch.optim.AdamW.step

    def step(self, *arguments, **named):
        if len(self.param_groups[0]["params"]) == 62:  # of the model with five layers
            torch.empty(2**20, device="meta")
        return begin(self, *arguments, **named)

    assert depths(scenario(method="full")).shallow == [3, 4, 5]
    assert not refused(scenario(method="full"))
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    assert refused(scenario(method="full"))


def test_a_wrong_scenario_says_what_a_whole_trace_says():
    step = scenario(method="lora", lora={"rank": 8, "target_modules": ["nothing"]})
    with pytest.raises(UserError) as given:
        trace(step)
    with mock.patch.object(layers, "depths", return_value=None), pytest.raises(UserError) as whole:
        trace(step)
    assert str(given.value) == str(whole.value)


def recorded(sizes, **fields) -> list[tuple[int, int]]:
    """Of each model that a recorder has traced its layers and the steps taken; its recordings are the whole steps'."""
    recorder, whole = Recorder(), Recorder()
    prepare, traced = recorder._prepare, []

    def prepared(each: Scenario):
        ready = prepare(each)
        steps: list[int] = []
        ready.optimizer.register_step_post_hook(lambda *_: steps.append(1))
        traced.append((each.model["num_hidden_layers"], steps))
        return ready

    recorder._prepare = prepared
    for length, rows in sizes:
        step = scenario(sequence_length=length, micro_batch=rows, **fields)
        traced_before = len(traced)
        own = recorder(step, (8, 9))
        traced[traced_before:] = [(layers, len(steps)) for layers, steps in traced[traced_before:]]
        with mock.patch.object(layers, "depths", return_value=None):
            other = whole(step, (8, 9))
        assert own.sequences == other.sequences and own.workspaces == other.workspaces, (
            length,
            rows,
        )
    return traced


@pytest.mark.few(0, 1)
@pytest.mark.parametrize(
    ("fields", "shallow"),
    [
        ({"method": "qlora"}, [3, 4, 5]),
        (
            {
                "method": "lora",
                "gradient_checkpointing": False,
                "packing": "rows",
                "loop": "manual",
            },
            [4, 5, 6],
        ),
        pytest.param(
            {"method": "full", "model": "gemma-2-2b", "layers": 12}, [6, 8, 10], marks=nightly
        ),
        ({"method": "full", "model": "phi-3.5-mini", "optimizer": "adafactor"}, [3, 4, 5]),
        ({"method": "lora", "layers": 8, "parallel": {"strategy": "fsdp2", "gpus": 2}}, [5, 6, 7]),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_many_sizes_are_proven_once_and_less_is_traced_from_the_third_on(fields, shallow):
    """Between two sizes the shallowest model is traced alone, and everywhere the first step tells the second."""
    low, middle, high = shallow
    first = [
        (low, 2),
        (middle, 2),
        (high, 2),
        (low, 2),
        (middle, 1),
    ]  # the shallowest model's two sizes agree
    between, outside = [(low, 1)], [(low, 1), (middle, 1)]
    # Three rows, 64 tokens and six rows lie outside of what was traced until then.
    sizes = [(128, 2), (512, 2), (256, 2), (384, 3), (64, 2), (512, 6), (256, 4)]
    traced = [*first, *between, *outside * 3, *between]
    if fields["method"] != "qlora":  # where sizes lie is the same for every step
        sizes, traced = sizes[:4], [*first, *between, *outside]
    if (
        fields["method"] == "full"
    ):  # sums over fewer tokens need no room, and an embedding's over more than 3,072 do
        sizes = [(512, 2), (1536, 2), (1024, 2), (640, 3)]
    assert recorded(sizes, **fields) == traced


@pytest.mark.thorough
def test_what_grows_with_layers_and_size_is_traced_at_every_size(monkeypatch):
    from transformers.models.qwen2 import modeling_qwen2 as qwen

    forward = qwen.Qwen2Model.forward

    def all_layers_together(self, input_ids=None, **named):
        torch.empty(self.config.num_hidden_layers, 2**12, input_ids.shape[1], device="meta")
        return forward(self, input_ids, **named)

    monkeypatch.setattr(qwen.Qwen2Model, "forward", all_layers_together)
    assert recorded([(128, 2), (512, 2), (256, 2)], method="lora") == [
        (3, 2),
        (4, 2),
        (5, 2),
        (3, 2),
        (4, 1),
        (3, 1),
        (4, 1),
    ]


def test_a_first_step_with_other_launches_tells_no_second(monkeypatch):
    behind, refused = SecondStep.behind, []

    def with_a_launch_more(self, first):
        first.kernels_run = {**first.kernels_run, "another": 1}
        with pytest.raises(Unlike) as caught:
            behind(self, first)
        refused.append(caught.value)
        raise caught.value

    monkeypatch.setattr(SecondStep, "behind", with_a_launch_more)
    recorder = Recorder()
    for length in (128, 512, 256):
        recorder(scenario(sequence_length=length, micro_batch=2, method="lora"), (8, 9))
    assert refused


@pytest.mark.nightly
def test_a_second_step_that_is_another_is_traced(monkeypatch):
    """It allocates what the first does not, or as much as another tensor at one size alone."""
    from transformers.models.qwen2 import modeling_qwen2 as qwen

    forward, calls = qwen.Qwen2Model.forward, []

    def more(bytes_of):
        def again(self, input_ids=None, **named):
            calls.append(self)
            second = len(calls) > 1 and calls[-2] is self
            torch.empty(bytes_of(input_ids, second), dtype=torch.uint8, device="meta")
            if second:
                calls.clear()
            return forward(self, input_ids, **named)

        return again

    twice = [(3, 2), (4, 2), (5, 2), (3, 2), (4, 2)]
    sizes = [(128, 2), (512, 2), (256, 2)]
    monkeypatch.setattr(
        qwen.Qwen2Model, "forward", more(lambda ids, second: 12_345_678 if second else 7)
    )
    assert recorded(sizes, method="lora") == [*twice, (3, 2)]
    calls.clear()
    monkeypatch.setattr(
        qwen.Qwen2Model,
        "forward",
        more(lambda ids, second: 2**20 + (ids.shape[1] - 128 if second else 0)),
    )
    assert recorded(sizes, method="lora") == [*twice, (3, 2)]
