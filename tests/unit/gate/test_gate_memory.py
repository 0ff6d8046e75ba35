"""The gate: a pass, a refusal with everything in it, an override that is recorded, and nothing to check."""

from dataclasses import replace

import pytest

from dryfit.cards.gpus import find, least_free
from dryfit.cards.verdict import Word
from dryfit.common.errors import UserError
from dryfit.common.files import read_report, write_report
from dryfit.planner.suggestions import suggest
from dryfit.scenario.scenario import Scenario
from dryfit.tracing.scenario_trace import Traced
from dryfit.tracing.trace import trace
from scripts.gate import gate_memory as gate
from scripts.gate.batch_times import batch_shapes, longest_batch
from scripts.gate.decision import (
    NOTHING_TO_GATE,
    Decision,
    _processes_to_end,
    chosen_gpu,
    decide_step,
)
from tests.dryfit.decoders import LLAMA_3_LAYERS


@pytest.fixture(scope="module")
def traced() -> Traced:
    scenario = Scenario.from_mapping(
        {
            "model": LLAMA_3_LAYERS,
            "sequence_length": 256,
            "micro_batch": 8,
            "gradient_accumulation": 2,
            "gradient_checkpointing": False,
        }
    )
    return Traced(scenario, trace(scenario, timeline=False))


def card(usable: int):
    """A card with so much, and nothing unknown beside the step but fragments."""
    size = find({"vram_gib": 1, "context_mib": 512})
    return replace(size, total_bytes=usable + size.context_bytes)


@pytest.fixture(scope="module")
def suggested(traced):
    """A search for changes that fit traces dozens of steps: one for all tests, and only until one change is found."""
    small = card(int(traced.trace["required_bytes"] * 0.7))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dryfit.planner.suggestions.SUGGESTIONS", 1)
        return suggest(
            traced.scenario, small, traced.trace, allowed=lambda step: step.parallel.gpus == 1
        )


@pytest.fixture(autouse=True)
def search(monkeypatch, suggested) -> None:
    monkeypatch.setattr("dryfit.planner.suggestions.suggest", lambda *step, **options: suggested)


def test_what_fits_needs_no_override_and_nothing_to_gate_is_no_pass(traced) -> None:
    need = traced.trace["required_bytes"]
    judged = decide_step(traced, card(int(1.031 * need)))
    assert judged.verdict.fits and not judged.suggestions
    judged = Decision(decide_step(traced, find("t4")), override=True)
    assert (judged.fits, judged.overridden) == (True, [])
    judged.enforce()
    judged = decide_step(traced, None)
    assert (judged.verdict.fits, judged.gpu, judged.reason) == (None, None, NOTHING_TO_GATE)


def test_too_close_to_call_passes_with_a_warning(traced, caplog) -> None:
    judged = decide_step(traced, card(traced.trace["required_bytes"] + 5))
    assert judged.verdict.word is Word.TOO_CLOSE and not judged.suggestions
    assert (
        "is too close to call" in caplog.text
        and "0.00 GiB to spare, and up to 0.01 GiB more" in caplog.text
    )
    Decision(judged, override=False).enforce()


def test_refusal_has_numbers_card_and_suggestions(traced) -> None:
    small = card(int(traced.trace["required_bytes"] * 0.7))
    judged = decide_step(traced, small)
    assert judged.verdict.fits is False
    text = str(judged.refusal())
    assert small.title in text
    assert "GiB" in text
    assert judged.suggestions[0].write in text
    assert "effective batch stays 16" in text
    assert "memory.gate.override" in text


def test_edited_rows_are_named_without_a_gpu_too(traced, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("scripts.gate.decision.found_in_machine", lambda gpus=1: [])
    write_report(tmp_path / "trace.json", traced.to_mapping())
    (tmp_path / "train.parquet").write_bytes(b"rows")
    write_report(tmp_path / "encode.json", {"rows": 1}, tmp_path / "train.parquet")
    edited = (tmp_path / "encode.json").read_text().replace('"rows": 1', '"rows": 2')
    (tmp_path / "encode.json").write_text(edited)
    settings = {"gpu": "auto", "hours": None, "override": False}
    encoded, train = str(tmp_path / "encode.json"), str(tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"rm .*encode.json"):
        gate.main(
            str(tmp_path / "trace.json"),
            settings,
            str(tmp_path / "gate.json"),
            encoded=encoded,
            train=train,
        )


def test_the_rule_fails_without_a_file_and_an_override_is_recorded(traced, tmp_path) -> None:
    write_report(tmp_path / "trace.json", traced.to_mapping())
    settings = {"gpu": {"vram_gib": 0.6, "context_mib": 512}, "hours": None}
    trace_file, gate_file = str(tmp_path / "trace.json"), str(tmp_path / "gate.json")
    with pytest.raises(UserError, match="does not fit"):
        gate.main(trace_file, settings | {"override": False}, gate_file)
    assert not (tmp_path / "gate.json").exists()
    gate.main(trace_file, settings | {"override": True}, gate_file)
    judged = read_report(gate_file)
    assert (judged["fits"], judged["override"], judged["overridden"]) == (
        False,
        True,
        True,
    ) and judged["suggestions"]


def test_another_gpu_is_gated_by_a_trace_of_its_own_kernels() -> None:
    """Before compute capability 8.0 the attention of this step keeps its scores."""
    model = {**LLAMA_3_LAYERS, "num_key_value_heads": LLAMA_3_LAYERS["num_attention_heads"] // 2}
    fields = {
        "model": model,
        "precision": "fp16",
        "sequence_length": 1024,
        "gradient_checkpointing": False,
    }
    scenario = Scenario.from_mapping(fields)
    known = Traced(scenario, trace(scenario, timeline=False))
    on_t4 = trace(scenario, capability=(7, 5), timeline=False)
    assert on_t4["required_bytes"] > known.trace["required_bytes"]
    judged = decide_step(known, find("t4"))
    assert judged.step == on_t4 and judged.step is known.on(find("t4")), "traced once for each GPU"
    assert decide_step(known, find("a100-40gb")).step == known.trace
    ada = find("rtx-4090")
    as_small = replace(
        ada, total_bytes=ada.total_bytes - ada.usable_bytes + find("t4").usable_bytes
    )
    assert as_small.usable_bytes == find("t4").usable_bytes
    assert known.on(as_small)["required_bytes"] < on_t4["required_bytes"]
    of_t4 = replace(known, capability=(7, 5), trace={**known.trace, "required_bytes": 1})
    assert decide_step(of_t4, find("t4")).step["required_bytes"] == 1


def test_a_step_that_only_the_configuration_makes_too_long_passes(traced) -> None:
    """No batch of the data is as long as the configuration allows."""
    scenario = traced.scenario
    small = card(int(0.99 * traced.trace["required_bytes"]))
    assert decide_step(traced, small).verdict.fits is False
    judged = decide_step(traced, small, replace(scenario, micro_batch=2, sequence_length=64))
    assert (judged.verdict.fits, judged.suggestions) == (True, [])
    assert "at the longest batch of the data, 2 x 64 tokens" in judged.reason
    assert judged.step["required_bytes"] < judged.configured["required_bytes"]
    again = decide_step(traced, small, replace(scenario, sequence_length=250))
    assert again.verdict.headroom_bytes == small.usable_bytes - again.step["required_bytes"]


def test_the_first_thing_to_change_is_what_others_hold(traced) -> None:
    need = traced.trace["required_bytes"]
    full = replace(card(need), held_bytes=need // 2, holders=("python (process 42)",))
    judged = decide_step(traced, full)
    assert judged.suggestions[0].write == "# end python (process 42)"
    assert judged.suggestions[0].headroom_bytes == 0
    text = str(judged.refusal())
    assert "held by python (process 42)" in text


def test_of_several_gpus_all_that_are_short_have_to_be_freed(traced) -> None:
    need = traced.trace["required_bytes"]
    free, held = (
        card(2 * need),
        replace(card(need), held_bytes=need // 2, holders=("python (process 42)",)),
    )
    fuller = replace(held, held_bytes=need // 2 + 1, holders=("python (process 43)",))
    needs = lambda gpu: need  # noqa: E731
    assert (
        decide_step(traced, least_free([free, card(int(1.1 * need))], needs)).verdict.fits is True
    )
    one = decide_step(traced, least_free([free, held], needs))
    assert (one.verdict.fits, one.verdict.headroom_bytes, one.gpu.index) == (False, -(need // 2), 1)
    assert one.suggestions[0].write == "# end python (process 42)"
    assert "GPU 1 (a GPU of this size)" in str(one.refusal())
    both = least_free([held, fuller, free], needs)
    assert both.index == 1
    (ended,) = _processes_to_end(traced, both)
    assert ended.write == "# end python (process 43), python (process 42)"
    assert _processes_to_end(traced, least_free([held, card(need // 2)], needs)) == []


LOOP = {"epochs": 1, "max_steps": None, "rows_per_step": None, "seed": 1}
LENGTHS = [5, 30, 9, 12, 7, 8]


def write_rows(folder, rows: list[dict]) -> str:
    import pandas

    pandas.DataFrame(rows).to_parquet(folder / "train.parquet")
    return str(folder / "train.parquet")


def of_lengths(lengths: list[int]) -> list[dict]:
    return [{"input_ids": [1] * n, "labels": [-100] * (n - 2) + [1, 2]} for n in lengths]


def test_the_longest_batch_is_that_of_the_data(tmp_path) -> None:
    train = write_rows(tmp_path, of_lengths(LENGTHS))
    step = Scenario.from_mapping({"model": LLAMA_3_LAYERS, "sequence_length": 64, "micro_batch": 4})
    longest = longest_batch(batch_shapes(train, step, LOOP), step)
    assert (longest.micro_batch, longest.sequence_length) == (4, 30)
    step = step.changed(packing="rows", micro_batch=1, gradient_accumulation=2)
    found = longest_batch(batch_shapes(train, step, LOOP | {"rows_per_step": 6}), step)
    assert (found.micro_batch, 30 <= found.sequence_length <= 64) == (1, True)
    # Two GPUs with four parts of each row, and all six rows: 30 tokens are padded to 32.
    step = mesh_step(context=2)
    shapes = batch_shapes(train, step, LOOP)
    assert [len(shares) for shares in shapes] == [1, 1]  # one share of the rows, for both GPUs
    longest = longest_batch(shapes, step)
    assert (longest.micro_batch, longest.sequence_length) == (4, 32)
    # A pack counts its shared prefix once: 20 tokens that all rows begin with, and each row's own.
    prefix, own = list(range(10, 30)), [3, 5, 4]
    rows = [
        {
            "input_ids": [*prefix, *range(100 * n, 100 * n + size)],
            "labels": [*[-100] * (18 + size), 1, 2],
        }
        for n, size in enumerate(own, 1)
    ]
    train = write_rows(tmp_path, rows)
    step = Scenario.from_mapping(
        {
            "model": LLAMA_3_LAYERS,
            "sequence_length": 64,
            "micro_batch": 1,
            "packing": "shared_prefix",
        }
    )
    longest = longest_batch(batch_shapes(train, step, LOOP | {"rows_per_step": 3}), step)
    assert (longest.micro_batch, longest.sequence_length) == (1, len(prefix) + sum(own))


def mesh_step(**parallel) -> Scenario:
    fields = {"model": LLAMA_3_LAYERS, "sequence_length": 64, "micro_batch": 4, "method": "lora"}
    return Scenario.from_mapping(
        {**fields, "parallel": {"strategy": "fsdp2", "gpus": 2, **parallel}}
    )


def test_a_mesh_is_judged_by_the_gpu_that_needs_most(tmp_path) -> None:
    step = mesh_step(context=2)
    traced = Traced(step, trace(step, timeline=False))
    need = traced.trace["required_bytes"]
    written = gated(tmp_path, traced, need + 2**30, [30] * 8)
    assert written["fits"] and written["effective_batch"] == 4
    assert [row["ranks"] for row in written["ranks"]] == [[0], [1]]
    assert (
        max(row["required_bytes"] for row in written["ranks"]) == written["required_bytes"] == need
    )


def test_the_gpu_is_the_one_that_is_named_or_that_the_job_asks_for() -> None:
    gpus = ["a100-40gb", "t4"]
    assert chosen_gpu("auto", gpus, 10**9).name == "t4"
    assert chosen_gpu("auto", gpus, 20 * 10**9).name == "a100-40gb"
    assert chosen_gpu("auto", gpus, 10**12).name == "a100-40gb"
    assert chosen_gpu("rtx-4090", gpus, 10**9).name == "rtx-4090"
    assert chosen_gpu("t4").name == "t4"
    with pytest.raises(UserError, match="not known"):
        chosen_gpu("t5")


def gated(folder, traced, usable: int, lengths: list[int]) -> dict:
    """What the rule writes for rows of such lengths."""
    train = write_rows(folder, of_lengths(lengths))
    write_report(folder / "trace.json", traced.to_mapping())
    write_report(folder / "encode.json", {"rows": len(lengths)}, train)
    size = (usable + find({"vram_gib": 1}).context_bytes) / 2**30
    settings = {"gpu": {"vram_gib": size, "context_mib": 512}, "hours": None, "override": False}
    gate.main(
        str(folder / "trace.json"),
        settings,
        str(folder / "gate.json"),
        encoded=str(folder / "encode.json"),
        train=train,
        loop=LOOP,
    )
    return read_report(folder / "gate.json")


def test_the_longest_batch_of_the_data_decides_where_the_configured_step_does_not_fit(
    traced, tmp_path
) -> None:
    need, lengths = traced.trace["required_bytes"], [30] * 16
    tight = gated(tmp_path, traced, int(0.99 * need), lengths)
    assert tight["fits"] and tight["required_bytes"] < need == tight["configured"]["required_bytes"]
    assert "at the longest batch of the data, 8 x 30 tokens" in tight["reason"]
    wide = gated(tmp_path, traced, int(1.05 * need), lengths)
    assert wide["fits"] and wide["required_bytes"] == need and "longest batch" not in wide["reason"]


def test_the_gate_replays_at_the_very_size_that_is_free(traced) -> None:
    """A trace that was asked about other sizes is taken again; by luck is a verdict too."""
    usable = int(0.99 * traced.trace["required_bytes"])
    lucky = {
        **traced.trace,
        "asked_bytes": [usable],
        "also_fits_bytes": [[usable - 10, usable + 1]],
    }
    by_luck = decide_step(replace(traced, trace=lucky), card(usable))
    assert (by_luck.verdict.word, by_luck.verdict.headroom_bytes) == (Word.TOO_CLOSE, 10)
    again = decide_step(replace(traced, trace={**lucky, "asked_bytes": []}), card(usable))
    assert again.verdict.fits is False and usable in again.step["asked_bytes"]
