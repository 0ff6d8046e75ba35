"""Rows in one sequence are computed as if each were alone, or refused."""

import random

import pytest
import torch

from dryfit.common.errors import UserError
from dryfit.scenario.scenario import Scenario
from dryfit.step import packing_self_test as exactness
from dryfit.step.batches import IGNORED, Row, answer_tokens
from dryfit.step.model import build_model
from dryfit.step.packing import collate_packs, common_prefix, micro_batches, pack_lengths
from dryfit.step.packing_self_test import self_test
from dryfit.step.step import forward_backward
from dryfit.tracing.measure import measure
from dryfit.tracing.trace import trace
from tests.dryfit.decoders import DECODERS

PREFIX = list(range(40, 61))
NOISELESS = {"gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}}
WITHOUT_POSITIONS = ("bloom",)  # attends by distance in the sequence (ALiBi)


def rows(count=9, seed=0):
    """A shared beginning, then a request and an answer of their own lengths."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        request, answer = (
            [draw.randrange(3, 300) for _ in range(draw.randrange(2, 9))] for _ in range(2)
        )
        made.append(
            Row([*PREFIX, *request, *answer], [IGNORED] * (len(PREFIX) + len(request)) + answer)
        )
    return made


def scenario(name, **fields):
    model = {**DECODERS[name], **NOISELESS.get(name, {})}
    fields = {
        "method": "lora",
        "precision": "fp32",
        "sequence_length": 120,
        "micro_batch": 2,
        **fields,
    }
    lora = {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": "all-linear"}
    return Scenario.from_mapping(
        {"model": model, "gradient_checkpointing": False, "lora": lora, **fields}
    )


def step(model, asked, made, prefix):
    """Loss and gradients of one step over some rows."""
    learned, loss = answer_tokens(made), 0.0
    for micro in micro_batches(made, asked, prefix):
        share = answer_tokens([row for pack in micro for row in pack]) / learned
        batch = collate_packs(micro, asked, prefix, 0, model.config, "cpu")
        loss += share * float(forward_backward(model, batch, asked, loss_scale=share))
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return loss, gradients


def distance(one, other):
    norm = sum(float(x.double().norm() ** 2) for x in one)
    return (
        sum(float((x - y).double().norm() ** 2) for x, y in zip(one, other, strict=True)) / norm
    ) ** 0.5


@pytest.mark.few(2, 8)
@pytest.mark.parametrize("kind", ["rows", "shared_prefix"])
@pytest.mark.parametrize("name", DECODERS)
def test_a_pack_gives_loss_and_gradients_of_its_rows_alone(name, kind):
    asked, made = scenario(name, packing=kind), rows()
    prefix = common_prefix(made) if kind == "shared_prefix" else 0
    model = build_model(asked, "cpu", seed=1)
    if name in WITHOUT_POSITIONS:
        with pytest.raises(UserError, match="packing: none"):
            self_test(model, asked, made, prefix, 0)
        return
    for parameter in model.parameters():
        if parameter.requires_grad:  # B is zero at the start, and A then has no gradient
            torch.nn.init.normal_(parameter, std=0.05)
    alone = step(model, scenario(name, micro_batch=1), made, 0)
    packed = step(model, asked, made, prefix)
    assert packed[0] == pytest.approx(alone[0], rel=1e-6)
    assert distance(alone[1], packed[1]) < 1e-5
    self_test(model, asked, made, prefix, 0)


@pytest.mark.parametrize("answers", [[[7, 8, 9], [7, 8, 9]], [[7], [8], [9, 10]]])
def test_a_prefix_that_is_all_of_the_prompt(answers):
    """The same request again and again: each row keeps the prompt's last token, which its answer's first follows."""
    made = [Row([*PREFIX, *answer], [IGNORED] * len(PREFIX) + answer) for answer in answers]
    prefix = common_prefix(made)
    assert prefix == len(PREFIX) - 1
    asked = scenario("llama", packing="shared_prefix")
    model = build_model(asked, "cpu", seed=1)
    alone, packed = (
        step(model, scenario("llama", micro_batch=1), made, 0),
        step(model, asked, made, prefix),
    )
    assert packed[0] == pytest.approx(alone[0], rel=1e-6)
    assert distance(alone[1], packed[1]) < 1e-5


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["none", "rows", "shared_prefix"])
def test_a_sequence_of_one_token_has_a_memory_too(kind):
    asked = scenario("llama", packing=kind, sequence_length=1, micro_batch=1, loss="chunked")
    traced, measured = trace(asked, "cpu", timeline=False), measure(asked, "cpu", timeline=False)
    assert traced["peak_allocated_bytes"] == measured["peak_allocated_bytes"]


def test_every_row_is_packed_once_and_no_pack_is_too_long():
    draw = random.Random(3)
    lengths = [draw.randrange(1, 60) for _ in range(500)]
    packs = pack_lengths(lengths, 64)
    assert sorted(index for pack in packs for index in pack) == list(range(500))
    used = [sum(lengths[index] for index in pack) for pack in packs]
    assert max(used) <= 64 and sum(used) > 0.95 * 64 * len(packs)
    assert packs == pack_lengths(lengths, 64)
    assert pack_lengths([], 8) == []


def test_how_rows_are_packed():
    """Room for 10 tokens, 4 of which all rows share: six own tokens, and no seventh."""
    made = [
        Row([1, 2, 3, 4, *own], [IGNORED] * 4 + own)
        for own in ([5] * 3, [6] * 3, [7] * 4, [8] * 2, [9])
    ]
    micros = micro_batches(made, scenario("llama", packing="shared_prefix", sequence_length=10), 4)
    own = sorted(sum(len(row.input_ids) - 4 for row in pack) for micro in micros for pack in micro)
    assert own == [1, 6, 6]
    assert (
        common_prefix(
            [Row([1, 2, 3, 4], [IGNORED] * 3 + [4]), Row([1, 2, 3, 5], [IGNORED] * 3 + [5])]
        )
        == 2
    )
    assert common_prefix([Row([1, 2], [IGNORED, 2])] * 2) == 0
    assert common_prefix([Row([1, 2], [1, 2])]) == 0
    assert (
        common_prefix([Row([1, 2, 3], [IGNORED] * 3)]) == 2
    )  # nothing learned: the row is all prefix but one
    assert common_prefix([]) == 0
    assert micro_batches([], scenario("llama", packing="none"), 0) == []
    row = Row([5, 6, 7], [5, 6, 7])
    asked = scenario("llama", packing="rows")
    labels = collate_packs([[row, row]], asked, 0, 0, build_model(asked, "meta").config, "cpu")[
        "labels"
    ]
    assert labels.tolist() == [[IGNORED, 6, 7, IGNORED, 6, 7]]
    assert pack_lengths([7, 6, 3], 10) == [[0, 2], [1]]
    assert pack_lengths([3, 6, 7, 4], 10) == [[2, 0], [1, 3]]


def test_what_can_not_be_packed_exactly_is_refused():
    with pytest.raises(UserError, match="sequence_length: 37"):
        micro_batches(
            [Row([1] * 37, [1] * 37)], scenario("llama", packing="rows", sequence_length=36), 0
        )
    with pytest.raises(UserError, match="packing: rows"):
        scenario("llama", packing="shared_prefix", lora={"rank": 4, "alpha": 8, "dropout": 0.1})
    scenario("llama", packing="rows", lora={"rank": 4, "alpha": 8, "dropout": 0.1})
    with pytest.raises(UserError, match="attention: sdpa"):
        scenario("llama", packing="rows", attention="flash", precision="bf16")
    noisy = {**DECODERS["gpt2"], "resid_pdrop": 0.1}
    asked = scenario("gpt2", model=noisy, packing="shared_prefix")
    with pytest.raises(UserError, match="dropout"):
        self_test(build_model(asked, "cpu"), asked, rows(), common_prefix(rows()), 0)
    asked = scenario(
        "mixtral", model={**DECODERS["mixtral"], "output_router_logits": True}, packing="rows"
    )
    with pytest.raises(UserError, match="auxiliary loss"):
        self_test(build_model(asked, "cpu"), asked, rows(), 0, 0)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "fields",
    [
        {
            "method": "qlora",
            "precision": "bf16",
            "kbit_preparation": "peft",
        },  # fp32 norms: fp32 queries
        {"method": "qlora", "precision": "bf16", "kbit_preparation": "peft", "autocast": "bf16"},
        {"method": "lora", "precision": "bf16-mixed"},
        {"method": "lora", "precision": "bf16"},
    ],
)
def test_the_mask_has_the_dtype_of_the_queries(fields):
    asked = scenario("llama", packing="shared_prefix", **fields)
    result = self_test(build_model(asked, "cpu", seed=1), asked, rows(), common_prefix(rows()), 0)
    assert result["loss_difference"] < 1e-4 and result["gradient_difference"] < 1e-2


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("Expected all tensors to be on the same device"),
    ],
)
def test_what_the_device_refuses_is_not_said_to_be_the_architecture(error, monkeypatch):
    asked, real = scenario("llama", packing="rows"), exactness.forward_backward

    def failing(model, batch, how, **options):
        if how.packing == "rows":
            raise error
        return real(model, batch, how, **options)

    monkeypatch.setattr(exactness, "forward_backward", failing)
    with pytest.raises(type(error), match=str(error)):
        self_test(build_model(asked, "cpu", seed=1), asked, rows(), 0, 0)


@pytest.mark.parametrize("broken", ["mask", "positions"])
def test_the_self_test_notices_what_goes_unheeded(broken, monkeypatch):
    """A mask or positions that a model ignores would be silent."""
    asked = scenario("llama", packing="shared_prefix")
    model = build_model(asked, "cpu")
    real = exactness.collate_packs

    def careless(*args):
        batch = real(*args)
        if "position_ids" in batch:
            batch.pop("attention_mask" if broken == "mask" else "position_ids")
        return batch

    monkeypatch.setattr(exactness, "collate_packs", careless)
    with pytest.raises(UserError, match="alone"):
        self_test(model, asked, rows(), common_prefix(rows()), 0)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("kind", ["rows", "shared_prefix"])
def test_the_trace_of_a_packed_step_is_the_measurement_to_the_byte(name, kind):
    asked = scenario(
        name, packing=kind, sequence_length=48, loss="chunked", method="qlora", precision="bf16"
    )
    traced, measured = trace(asked, "cpu", timeline=False), measure(asked, "cpu", timeline=False)
    assert traced["peak_allocated_bytes"] == measured["peak_allocated_bytes"]
    assert traced["phases"] == measured["phases"]
    masks = 2 if name == "gemma2" else 1  # a kind of layer each
    assert traced["components"]["inputs"] == asked.micro_batch * 48 * (3 * 8 + masks * 48 * 2)
