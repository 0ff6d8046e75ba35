"""The loop on a small real model: it learns, accumulation changes nothing, a killed run ends like one that was not."""

import json

import pytest
import torch

from dryfit.common.errors import UserError
from dryfit.scenario.scenario import Scenario
from dryfit.step.batches import IGNORED, Row, answer_tokens
from dryfit.step.model import build_model
from dryfit.step.optimizers import build_optimizer
from scripts.training import loop as training_loop
from scripts.training.averaging import first_averaged_step
from scripts.training.loop_state import LoopState, Resumed
from scripts.training.train_process import save_adapter
from scripts.training.validation import ValidationHistory, ValidationRows, is_due, validation_loss

LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LOOP = {
    "epochs": 2,
    "max_steps": None,
    "learning_rate": 0.02,
    "schedule": "cosine",
    "warmup_ratio": 0.1,
    "decay_ratio": 0.2,
    "max_grad_norm": 1.0,
    "validate_every_steps": None,
    "keep": "last",
    "average_ratio": 0.33,
    "early_stopping_patience": None,
}


def scenario(**differences):
    return Scenario.from_mapping(
        {
            "model": LLAMA,
            "method": "qlora",
            "precision": "fp32",
            "sequence_length": 16,
            "micro_batch": 4,
            "gradient_checkpointing": False,
            "lora": {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": "all-linear"},
            **differences,
        }
    )


def rows(count=40, longest=1):
    """A prompt of two tokens, and an answer that follows from it, of 2 to ``longest`` + 1 tokens."""
    made = []
    for n in range(count):
        a, b = 3 + n % 20, 30 + n % 3
        answer = [(a + b) % 60] * (1 + n % longest) + [2]
        made.append(Row([a, b, *answer], [IGNORED, IGNORED, *answer]))
    return made


def fitted(tmp_path, step=None, loop=LOOP, save_every=3, stop_after=None, data=None, held_out=None):
    """Train from the same start; returns the adapter and what the loop leaves behind."""
    step = step or scenario()
    torch.use_deterministic_algorithms(True)
    model = build_model(step, "cpu", seed=0)
    optimizer = build_optimizer(model, step, learning_rate=loop["learning_rate"])
    if stop_after is not None:
        taken = 0
        update = optimizer.step

        def killed_step(*args, **kwargs):
            nonlocal taken
            if taken == stop_after:
                raise KeyboardInterrupt
            taken += 1
            return update(*args, **kwargs)

        optimizer.step = killed_step
    checkpoint = LoopState(tmp_path / "checkpoint")
    settings = {**loop, "save_every_steps": save_every}
    chosen = ValidationRows.of(held_out, step, 0) if held_out else None
    found = training_loop.Fit(
        model, optimizer, data or rows(), step, settings, 7, 0, checkpoint, held_out=chosen
    ).run()
    adapter = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return adapter, found


def fit(tmp_path, *settings, **more):
    """The adapter, the curve and the step that the training was resumed from."""
    adapter, found = fitted(tmp_path, *settings, **more)
    return adapter, found.curve, found.start


def test_it_learns(tmp_path):
    _, curve, start = fit(tmp_path)
    assert start == 0 and len(curve) == 20
    assert curve[-1]["loss"] < 0.9 * curve[0]["loss"]
    assert curve[0]["answer_tokens"] == 8 and curve[0]["tokens"] == 16


NOISY = {"rank": 4, "alpha": 8, "dropout": 0.2, "target_modules": "all-linear"}
IN_BF16 = {
    "precision": "bf16",
    "autocast": "bf16",
    "optimizer": "adamw_fused",
}  # the default where bf16 is fast


@pytest.mark.thorough
@pytest.mark.parametrize(
    "step", [{}, {"lora": NOISY}, IN_BF16]
)  # noise comes from the random state, which is kept
def test_a_killed_run_ends_like_one_that_was_not(tmp_path, step):
    chosen = scenario(**step)
    whole, whole_curve, _ = fit(tmp_path / "whole", chosen)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "killed", chosen, stop_after=8)
    adapter, curve, start = fit(tmp_path / "killed", chosen)
    assert start == 6  # the last multiple of save_every_steps
    assert curve == whole_curve
    assert all(torch.equal(adapter[name], whole[name]) for name in whole)


def test_a_damaged_checkpoint_is_not_gone_on_from(tmp_path, caplog):
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, stop_after=4)
    checkpoint = LoopState(tmp_path / "checkpoint")
    for name in ("state.pt", "curve.jsonl", "checkpoint.json"):
        path = checkpoint.folder / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-9] + b"8" + whole[-8:])
        assert checkpoint.load(None, None) == Resumed(), "training begins anew"
        assert f"{name} is not what the step that made it has written" in caplog.text
        path.write_bytes(whole)
    assert fit(tmp_path)[2] == 3


def test_a_checkpoint_keeps_the_scale_of_fp16_gradients(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    found, kept = (
        torch.amp.GradScaler("cpu", init_scale=512.0),
        LoopState(tmp_path / "checkpoint"),
    )
    found.scale(model(torch.ones(1, 2)).sum()).backward()
    kept.save(1, model, optimizer, [], 0.0, found)
    fresh = torch.amp.GradScaler("cpu")
    assert kept.load(model, optimizer, fresh).step == 1 and fresh.get_scale() == 512.0


def test_a_checkpoint_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, stop_after=2)
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize(
    ("whole", "parts", "more"),
    [
        ({"micro_batch": 8}, {"micro_batch": 2, "gradient_accumulation": 4}, {}),
        (
            {"micro_batch": 40},
            {"packing": "rows", "micro_batch": 2, "gradient_accumulation": 20},
            {"rows_per_step": 40},
        ),
    ],
    ids=["accumulation", "packs"],
)
def test_parts_of_a_batch_take_the_step_of_the_whole(tmp_path, whole, parts, more):
    one_step, data = (
        {**LOOP, "max_steps": 1},
        rows(longest=9),
    )  # a short answer must not weigh as much as a long one
    together, (row,), _ = fit(tmp_path / "a", scenario(**whole), one_step, data=data)
    apart, (other,), _ = fit(tmp_path / "b", scenario(**parts), one_step | more, data=data)
    assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert row["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-4)
    for name in together:
        torch.testing.assert_close(together[name], apart[name], rtol=1e-3, atol=1e-5)
    if more:
        assert other["rows"] == 40 and other["tokens"] == sum(len(row.input_ids) for row in data)
        assert other["padding_tokens"] < row["padding_tokens"] / 4


def test_the_adapter_is_saved_with_the_same_bytes_every_time(tmp_path):
    step = scenario()
    texts = set()
    for attempt in ("a", "b"):
        save_adapter(build_model(step, "cpu", seed=0), tmp_path / attempt, "base/model")
        texts.add((tmp_path / attempt / "adapter_config.json").read_text())
        assert sorted(path.name for path in (tmp_path / attempt).iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
    assert len(texts) == 1
    config = json.loads(texts.pop())
    assert config["base_model_name_or_path"] == "base/model" and config["r"] == 4
    assert config["target_modules"] == sorted(config["target_modules"])
    first, second = (
        (tmp_path / attempt / "adapter_model.safetensors").read_bytes() for attempt in ("a", "b")
    )
    assert first == second


@pytest.fixture
def small_device(monkeypatch):
    """A device that holds micro-batches of at most 3 rows."""
    from dryfit.step import step as step_module

    real = step_module.forward_backward

    def limited(model, batch, *args, **kwargs):
        if len(batch["input_ids"]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(model, batch, *args, **kwargs)

    monkeypatch.setattr(step_module, "forward_backward", limited)


def test_out_of_memory_is_explained(tmp_path, small_device):
    with pytest.raises(UserError, match="does not fit") as error:
        fit(tmp_path, scenario(micro_batch=8))
    assert "micro_batch: 4\n  gradient_accumulation: 2" in error.value.write
    assert "Tried to allocate 2.00 GiB" in str(error.value)


@pytest.mark.thorough
def test_halved_micro_batches_take_the_same_steps(tmp_path, small_device, monkeypatch):
    loop, data = {**LOOP, "on_out_of_memory": "halve", "max_steps": 4}, rows(longest=9)
    halved, curve, _ = fit(tmp_path / "halved", scenario(micro_batch=8), loop, data=data)
    assert [row["micro_batch"] for row in curve] == [2] * 4 and [row["rows"] for row in curve] == [
        8
    ] * 4
    monkeypatch.undo()
    whole, other_curve, _ = fit(tmp_path / "whole", scenario(micro_batch=8), loop, data=data)
    assert [row["micro_batch"] for row in other_curve] == [8] * 4
    for row, other in zip(curve, other_curve, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-3)
    for name in whole:
        torch.testing.assert_close(halved[name], whole[name], rtol=1e-2, atol=1e-4)


@pytest.mark.few(1)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, value):
    from dryfit.step import step as step_module

    real, calls = step_module.forward_backward, []

    def overflowing(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs) * (value if len(calls) == 8 else 1.0)

    monkeypatch.setattr(step_module, "forward_backward", overflowing)
    with pytest.raises(UserError, match=r"(nan|inf) at step 8.*is kept in .*checkpoint") as error:
        fit(tmp_path)
    assert "learning_rate" in str(error.value)
    monkeypatch.undo()
    adapter, curve, start = fit(tmp_path)
    whole, whole_curve, _ = fit(tmp_path / "whole")
    assert start == 6 and curve == whole_curve
    assert all(torch.equal(adapter[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    "form", [{}, {"loss": "chunked"}, {"packing": "rows", "micro_batch": 2}, {"micro_batch": 1}]
)
def test_validation_loss_is_the_mean_over_answer_tokens(form):
    step = scenario(**form)
    model, data = build_model(step, "cpu", seed=0), rows(10, longest=9)
    loss = validation_loss(model, ValidationRows.of(data, step, 0), step)
    with torch.no_grad():
        tokens = [answer_tokens([row]) for row in data]
        sums = [
            count
            * model(
                input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])
            ).loss.item()
            for row, count in zip(data, tokens, strict=True)
        ]
    assert len(set(tokens)) > 2
    assert loss == pytest.approx(sum(sums) / sum(tokens), rel=1e-4)
    assert model.training


def test_the_last_step_has_a_checkpoint_too(tmp_path):
    _, curve, _ = fit(tmp_path, loop={**LOOP, "max_steps": 2}, save_every=100)
    assert fit(tmp_path, loop={**LOOP, "max_steps": 2}, save_every=100)[1:] == (curve, 2)


def test_computed_tokens_are_answers_requests_prefix_and_padding():
    """Three rows behind a prefix of 5 in two packs: the prefix of one of them was not computed again."""
    row = {
        "computed_tokens": 40,
        "answer_tokens": 9,
        "padding_tokens": 4,
        "rows": 3,
        "shared_tokens": 5,
        "tokens": 41,
    }
    shares = training_loop.token_shares([row], prefix=5)
    assert {kind: part["count"] for kind, part in shares.items()} == {
        "answers": 9,
        "padding": 4,
        "prefix": 10,
        "requests": 17,
    }
    assert sum(part["share"] for part in shares.values()) == pytest.approx(1)


# --- validation ------------------------------------------------------------------------------------


def other_answers(count=8):
    """Rows with other answers than the training's: soon, the better it learns the worse it is on them."""
    made = []
    for number, row in enumerate(rows(count)):
        end = 5 if number % 4 else 2
        answer = [(row.input_ids[2] + 7) % 60, end]
        made.append(Row([*row.input_ids[:2], *answer], [IGNORED, IGNORED, *answer]))
    return made


WATCHED = {
    **LOOP,
    "schedule": "constant",
    "warmup_ratio": 0.0,
    "validate_every_steps": 2,
    "keep": "best",
}
# The lowest validation loss comes early, so three validations without a better one end the training.
STOPPING = {**WATCHED, "early_stopping_patience": 3}


def validated(found):
    return {row["step"]: row["validation_loss"] for row in found.curve if "validation_loss" in row}


@pytest.mark.parametrize(
    ("every", "expected"), [(None, [7]), (3, [3, 6, 7]), (7, [7]), (9, [7]), (1, [*range(1, 8)])]
)
def test_a_validation_is_due_every_so_many_steps_and_after_the_last(every, expected):
    due = [step for step in range(1, 8) if is_due(step, 7, {"validate_every_steps": every})]
    assert due == expected


def test_progress_keeps_the_first_of_equal_losses_and_counts_those_that_were_no_better():
    progress, loop = ValidationHistory(), {"early_stopping_patience": 2}
    assert [progress.note(step, loss) for step, loss in ((2, 1.0), (4, 0.5), (6, 0.5))] == [
        True,
        True,
        False,
    ]
    assert (progress.best_step, progress.best_loss, progress.since_best) == (4, 0.5, 1)
    assert not progress.is_over(loop)
    progress.note(8, 0.6)
    assert progress.is_over(loop) and not progress.is_over({"early_stopping_patience": None})
    assert ValidationHistory(**progress.to_mapping()) == progress


def test_validation_changes_no_step(tmp_path):
    noisy = scenario(lora=NOISY)
    quiet, unwatched = fitted(tmp_path / "a", noisy)
    loop = {**LOOP, "validate_every_steps": 1}
    watched, found = fitted(tmp_path / "b", noisy, loop, held_out=other_answers())
    assert [row.pop("validation_loss") > 0 for row in found.curve] == [True] * 20
    assert found.curve == unwatched.curve
    assert all(torch.equal(watched[name], quiet[name]) for name in quiet)


def test_the_best_adapter_is_the_one_that_is_kept(tmp_path):
    kept, found = fitted(tmp_path / "best", loop=WATCHED, held_out=other_answers())
    losses = validated(found)
    best = min(losses, key=losses.get)
    assert best == found.progress.best_step < 20 and len(found.curve) == 20
    assert losses[best] < losses[20]
    until_then = {**WATCHED, "max_steps": best}
    there, _ = fitted(tmp_path / "until then", loop=until_then, held_out=other_answers())
    assert all(torch.equal(kept[name], there[name]) for name in there)
    last, _ = fitted(tmp_path / "last", loop={**WATCHED, "keep": "last"}, held_out=other_answers())
    assert not all(torch.equal(kept[name], last[name]) for name in last)


AVERAGED = {**LOOP, "keep": "averaged", "average_ratio": 0.25, "validate_every_steps": None}


def test_the_kept_adapter_is_the_mean_of_the_last_steps(tmp_path):
    """Of 20 steps the last five: each run until then ends with that step's adapter, at a constant rate."""
    steady = {"schedule": "constant", "warmup_ratio": 0.0}
    mean, found = fitted(tmp_path / "mean", loop={**AVERAGED, **steady}, held_out=other_answers())
    steps = []
    for last in range(16, 21):
        loop = {**LOOP, **steady, "max_steps": last}
        adapter, alone = fitted(tmp_path / f"until {last}", loop=loop, held_out=other_answers())
        steps.append(adapter)
    for name, tensor in mean.items():
        expected = torch.stack([adapter[name] for adapter in steps]).double().mean(0)
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-7)
    assert validated(found)[20] != validated(alone)[20], "the last validation is the mean's"


@pytest.mark.parametrize("stop_after", [8, 18])
def test_a_killed_run_ends_with_the_same_mean(tmp_path, stop_after):
    """Killed before the steps that count, and between them."""
    whole, expected = fitted(tmp_path / "whole", loop=AVERAGED, held_out=other_answers())
    with pytest.raises(KeyboardInterrupt):
        fitted(tmp_path / "killed", loop=AVERAGED, stop_after=stop_after, held_out=other_answers())
    adapter, found = fitted(tmp_path / "killed", loop=AVERAGED, held_out=other_answers())
    assert found.start == 3 * (stop_after // 3) and found.curve == expected.curve
    assert all(torch.equal(adapter[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    ("total", "ratio", "first"), [(124, 0.33, 84), (20, 0.25, 16), (3, 0.33, 3), (5, 1, 1)]
)
def test_the_steps_that_count_are_the_last_ones(total, ratio, first):
    assert first_averaged_step(total, {"average_ratio": ratio}) == first
    assert first <= total, "there is always one"


def test_training_stops_after_validations_that_were_no_better(tmp_path):
    _, found = fitted(tmp_path, loop=STOPPING, held_out=other_answers())
    best = found.progress.best_step
    assert found.stopped_early and len(found.curve) == best + 3 * 2 < 20
    again = fitted(tmp_path, loop=STOPPING, held_out=other_answers())[1]
    assert again.start == len(found.curve) and again.curve == found.curve and again.stopped_early


@pytest.mark.thorough
@pytest.mark.parametrize("stop_after", [5, 8])
def test_a_killed_run_ends_with_the_same_best_adapter_and_stops_at_the_same_step(
    tmp_path, stop_after
):
    """Killed between the best validation and the end: the checkpoint holds the best adapter and the count."""
    settings = {"loop": STOPPING, "held_out": other_answers(), "save_every": 3}
    step = scenario(lora=NOISY)
    whole, expected = fitted(tmp_path / "whole", step, **settings)
    assert expected.stopped_early and len(expected.curve) > stop_after
    with pytest.raises(KeyboardInterrupt):
        fitted(tmp_path / "killed", step, stop_after=stop_after, **settings)
    adapter, found = fitted(tmp_path / "killed", step, **settings)
    assert found.start == 3 * (stop_after // 3)
    assert found.curve == expected.curve
    assert found.progress.best_step == expected.progress.best_step
    assert all(torch.equal(adapter[name], whole[name]) for name in whole)


@pytest.mark.few(1)
def test_a_validation_loss_that_is_no_number_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(training_loop, "validation_loss", lambda *given: float("nan"))
    with pytest.raises(UserError, match="validation loss is nan at step 2"):
        fitted(tmp_path, loop=WATCHED, held_out=other_answers())
