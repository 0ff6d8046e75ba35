"""Meshes searched: all that a step can have, the order in which they are traced, what is shown as fitting."""

import json

import pytest

from dryfit.ask import command
from dryfit.ask.divisions import _left_out
from dryfit.cards.gpus import find
from dryfit.planner import divisions
from dryfit.planner.changes import spread
from dryfit.planner.divisions import Order, divide, fewest, ways
from tests.dryfit.tracing.several_gpus import LLAMA, scenario


def small(gpus=4, **fields):
    return scenario("full", "fsdp2", gpus=gpus, precision="bf16", sequence_length=64, **fields)


def named(steps):
    return {divisions.say_way(vars(step.parallel)) for step in steps}


def test_every_way_is_a_step_and_the_others_are_left_out():
    found = named(ways(small(), 4))
    assert {
        "ddp",
        "fsdp2",
        "fsdp2 x replicate 2",
        "fsdp2 x tensor 2",
        "fsdp2 x context 2",
        "fsdp2 x context 4",
    } <= found
    assert "fsdp2 x tensor 4" not in found  # two heads of keys and values
    assert not [way for way in found if "expert" in way]
    assert {"pipeline 2 x tensor 2 x schedule 1f1b", "fsdp2 x tensor 2 x sequence x loss"} <= found
    with_adapters = named(ways(small().changed(method="lora"), 4))
    assert "fsdp2 x tensor 2" in with_adapters
    assert not [
        way for way in with_adapters if "pipeline" in way or "sequence" in way or "loss" in way
    ]
    packed = named(ways(small().changed(method="qlora"), 4))
    assert not [way for way in packed if "tensor" in way or "pipeline" in way]


def test_ways_keep_the_update_and_have_an_order():
    """Four GPUs with a micro-batch each: two, where two of them share their rows, take two after each other."""
    for step in ways(small(), 4):
        rows = step.micro_batch * step.gradient_accumulation * step.parallel.rows_at_once
        assert rows == 2 * 4, step.parallel
    order = Order(small(), find("h100-80gb"))
    sizes = {
        divisions.say_way(vars(step.parallel)): order.required_bytes(step)
        for step in ways(small(), 4)
    }
    assert sizes["ddp"] > sizes["fsdp2 x replicate 2"] > sizes["fsdp2"]
    assert sizes["fsdp2 x tensor 2"] > sizes["fsdp2 x tensor 2 x sequence x loss"]
    seconds = {
        divisions.say_way(vars(step.parallel)): order.seconds_per_token(step)
        for step in ways(small(), 4)
    }
    assert (
        seconds["fsdp2 x tensor 2"]
        > seconds["fsdp2 x tensor 2 x sequence x loss"]
        > seconds["ddp"]
        > 0
    )
    step = small().changed(parallel={"strategy": "none", "gpus": 1}, optimizer="adamw_8bit")
    assert "whole tensors" in divisions._not_sharded(step)


def test_what_is_written_is_what_was_traced():
    """How FSDP gathers, sums and offloads stays with every division of the same kind, and in what is written."""
    own = {"reshard_after_forward": False, "reduce_in_fp32": True, "offload": "cpu"}
    step = small().changed(parallel={"strategy": "fsdp2", "gpus": 4, **own})
    found = {divisions.say_way(vars(each.parallel)): each.parallel for each in ways(step, 4)}
    assert found["fsdp2"] == step.parallel
    wide = divisions.written({"parallel": vars(found["fsdp2 x context 2"])})
    assert wide == {"strategy": "fsdp2", "gpus": 4, "context": 2, **own}
    assert list(wide)[:3] == ["strategy", "gpus", "context"]
    assert divisions.written({"parallel": vars(found["ddp"])}) == {"strategy": "ddp", "gpus": 4}


@pytest.mark.thorough
def test_the_asked_way_comes_first_and_the_best_of_the_others_after_it():
    said, shown = [], []
    found = divide(
        small(), find("h100-80gb"), lambda what, left, _: said.append((what, left)), shown.append
    )
    assert said[0] == ("4 GPUs, fsdp2", 4) and said[-1][1] == 0
    assert shown[0].way == "fsdp2" and found["asked"]["way"] == "fsdp2"
    rows = found["divisions"]
    assert len(rows) == 5 and found["considered"] == 9
    assert [row["fits"] for row in rows] == [True] * 5
    traced, others = {row["way"] for row in rows}, {row["way"] for row in found["not_traced"]}
    assert (
        not traced & others
        and traced | others == named(ways(small(), 4))
        and found["ruled_out"] == []
    )
    speeds = [row["tokens_per_second"] for row in rows]
    assert speeds == sorted(speeds, reverse=True)


pytestmark = pytest.mark.usefixtures("nothing_beside")
WIDE = LLAMA | {"hidden_size": 512, "intermediate_size": 1408, "vocab_size": 4096}


@pytest.mark.thorough
@pytest.mark.parametrize("gpus", [2, pytest.param(4, marks=pytest.mark.nightly)])
def test_what_a_gpu_holds_in_any_case_is_below_each_trace(gpus):
    """So nothing that fits is ruled out."""
    step = small(model=WIDE | {"num_hidden_layers": 2})
    order = Order(step, find("h100-80gb"))
    for way in ways(step, gpus):
        traced = divisions._traced(way, find("h100-80gb"))[0]
        assert 0 < order.least_bytes(way) <= traced.peak_allocated_bytes, traced.way


def test_what_a_gpu_holds_in_any_case_rules_a_way_out(monkeypatch):
    """And the answer says how much it is; how many of the others are traced does not matter here."""
    monkeypatch.setattr(divisions, "TRACED", 1)
    monkeypatch.setattr(divisions, "MOST", 2)
    step = small(model=WIDE)
    card = find({"vram_gib": 0.56, "context_mib": 512})  # of which 0.06 are usable
    found = divide(step, card)
    assert {row["way"] for row in found["ruled_out"]} == {"ddp"}
    assert all(row["at_least_bytes"] > card.usable_bytes for row in found["ruled_out"])
    assert "ddp" not in {row["way"] for row in found["divisions"]}


@pytest.mark.parametrize(
    "fields",
    [{"method": "qlora"}, {"parallel": {"strategy": "fsdp2", "gpus": 4, "offload": "cpu"}}],
)
def test_what_is_not_certain_rules_nothing_out(fields):
    step = small().changed(**fields)
    assert Order(step, find("h100-80gb")).least_bytes(step) == 0


@pytest.mark.thorough
def test_layers_move_from_the_stage_that_needs_most():
    """The last stage of a pipeline has the logits; with fewer layers there each GPU needs less, traced."""
    parallel = {"strategy": "none", "gpus": 2, "pipeline": 2}
    sizes = {"num_hidden_layers": 8, "vocab_size": 32000, "tie_word_embeddings": False}
    step = small(model=LLAMA | sizes).changed(parallel=parallel, gradient_accumulation=4)
    even, ranks = divisions._traced(step, find("h100-80gb"))
    assert even.place == "stage 2 of 2"
    better = divisions.evened(step, ranks)
    assert sum(better.parallel.stage_layers) == 8 and better.parallel.stage_layers[0] > 4
    assert divisions._traced(better, find("h100-80gb"))[0].required_bytes < even.required_bytes


@pytest.mark.nightly
def test_where_nothing_fits_more_ways_are_traced(monkeypatch):
    monkeypatch.setattr(divisions, "TRACED", 2)
    monkeypatch.setattr(divisions, "MOST", 4)
    found = divide(
        small(model=WIDE, optimizer="adamw"), find({"vram_gib": 0.53, "context_mib": 512})
    )
    assert not any(row["fits"] for row in found["divisions"])
    assert len({row["way"] for row in found["divisions"] if "layers" not in row["way"]}) == 4


def searched(monkeypatch, error, card, first, then):
    """The ways that a search finds whose rough sizes are so many times the estimate, and those that it leaves."""
    step = small(model=WIDE)
    rough = Order.required_bytes
    monkeypatch.setattr(Order, "required_bytes", lambda self, each: rough(self, each) * error)
    by_name = {divisions.say_way(vars(each.parallel)): each for each in ways(step, 4)}
    search = divisions._DivisionSearch(card, order=Order(step, card))
    search.trace(by_name[first])
    left = search.best([by_name[name] for name in then])
    return [(one.way, one.fits) for one in search.found], [
        divisions.say_way(vars(each.parallel)) for each in left
    ]


@pytest.mark.thorough
def test_a_way_whose_rough_size_is_too_low_takes_no_others_place(monkeypatch):
    """As many as are shown fit, where so many do; what is too large by the smallest error so far waits."""
    monkeypatch.setattr(divisions, "TRACED", 2)
    first, *others = "fsdp2 x replicate 2", "ddp", "fsdp2", "fsdp2 x context 2", "fsdp2 x context 4"
    found, left = searched(
        monkeypatch, 0.01, find({"vram_gib": 0.62, "context_mib": 512}), first, others
    )
    assert found == [(first, False), ("fsdp2", True), ("fsdp2 x context 2", True)]
    assert left == ["ddp", "fsdp2 x context 4"]


def test_a_faster_way_whose_rough_size_is_too_high_is_traced(monkeypatch):
    """Unless it is too large by the smallest error that was seen."""
    monkeypatch.setattr(divisions, "TRACED", 1)
    card = find({"vram_gib": 0.62, "context_mib": 512})
    found, left = searched(
        monkeypatch, 2.5, card, "fsdp2 x context 2", ["fsdp2 x context 4", "fsdp2", "ddp"]
    )
    assert found == [("fsdp2 x context 2", True), ("fsdp2", True)] and left == [
        "fsdp2 x context 4",
        "ddp",
    ]


@pytest.mark.thorough
def test_a_stage_with_as_many_layers_as_before_is_not_traced_again(monkeypatch):
    from dryfit.tracing import trace as traces

    parallel = {"strategy": "none", "gpus": 3, "pipeline": 3}
    step = small(gpus=2, model=LLAMA | {"num_hidden_layers": 7}).changed(
        parallel=parallel, gradient_accumulation=3
    )
    moved = step.changed(parallel={**parallel, "stage_layers": [3, 3, 1]})
    followed, stages, follow = [], {}, traces._followed
    monkeypatch.setattr(
        traces,
        "_followed",
        lambda *given, **named: followed.append(given[4].stage) or follow(*given, **named),
    )
    card = find("h100-80gb")
    divisions._traced(step, card, stages)
    kept, ranks = divisions._traced(moved, card, stages)
    assert followed == [0, 1, 2, 1, 2]
    assert divisions._traced(moved, card) == (kept, ranks)


@pytest.mark.few(1, 1)
@pytest.mark.parametrize(("gib", "gpus"), [(0.7, 1), (0.62, 2), (0.6, 4), (0.52, None)])
def test_the_fewest_gpus_are_looked_for_from_one_on(gib, gpus, monkeypatch):
    """The first number of GPUs on which a traced division fits: 2 and 4 where the card holds no whole model."""
    step = small(gpus=2, model=WIDE)
    card = find({"vram_gib": gib, "context_mib": 512})
    monkeypatch.setattr(divisions, "COUNTS", (1, 2, 4))
    found = fewest(step, card)
    assert found["gpus"] == gpus and found["counts"] == [
        count for count in (1, 2, 4) if count <= (gpus or 4)
    ]
    assert all(
        not row["fits"] and row["required_bytes"] > card.usable_bytes for row in found["tried"]
    )
    if gpus is None:
        assert found["division"] is None
    else:
        assert found["division"]["fits"] and found["division"]["parallel"]["gpus"] == gpus
        assert found["division"]["required_bytes"] <= card.usable_bytes


def test_fsdp_takes_a_whole_loss_where_one_gpu_takes_it_in_chunks(monkeypatch):
    step = small(model=WIDE).changed(parallel={"strategy": "none", "gpus": 1}, loss="chunked")
    losses = {divisions.say_way(vars(way.parallel)): way.loss for way in ways(step, 4)}
    assert (losses["ddp"], losses["fsdp2"]) == ("chunked", "full")
    monkeypatch.setattr(divisions, "COUNTS", (1, 2, 4))
    found = fewest(step, find({"vram_gib": 0.64, "context_mib": 512}))
    assert found["gpus"] == 2 and found["division"]["loss"] == "full" and not found["not_sharded"]
    assert spread(step, 4)[0]["loss"] == "full"


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    return str(path)


WORDS = ("-s", "64", "--method", "full", "--set", "precision=bf16", "--fresh")


@pytest.mark.thorough
def test_the_command_line_ranks_divisions(model, capsys):
    assert command.main(["divide", model, "--gpu", "2xh100", *WORDS]) == 0
    text = capsys.readouterr().out
    assert text.startswith("FITS as asked, fsdp2: ")
    assert "2 GPUs, the best first:" in text and "write: parallel: {strategy:" in text


def test_the_command_line_says_what_was_left_out() -> None:
    ruled_out = {"way": "ddp", "at_least_bytes": 3 * 2**30}
    not_traced = {"way": "tensor 2", "rough_bytes": 2**31}
    lines = [
        *_left_out({"ruled_out": [ruled_out], "not_traced": [not_traced], "refused": ["context 2"]})
    ]
    assert [line.rpartition(": ")[2] for line in lines] == [
        "ddp (at least 3.00 GiB)",
        "tensor 2 (roughly 2.00 GiB)",
        "context 2",
    ]
    assert [*_left_out({"not_traced": []})] == []


def test_the_command_line_names_the_fewest(model, capsys):
    assert command.main(["divide", model, "--gpu", "h100", *WORDS, "--fewest", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gpus"] == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "divide` needs a GPU, and the file names none"),
        (["--gpu", "h100"], "is for several GPUs"),
        (["--gpu", "2xh100", "--quick"], "does not use --quick"),
    ],
)
def test_questions_that_cant_be_asked(model, words, said):
    with pytest.raises(command.UserError, match=said):
        command.main(["divide", model, *WORDS, *words])
