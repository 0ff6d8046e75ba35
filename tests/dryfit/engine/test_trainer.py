"""A trainer's own ``train()``: what is predicted is what a CPU measures, to the byte, in every phase."""

import pytest

from dryfit.engine.errors import TraceError
from dryfit.engine.trace import Options
from dryfit.engine.trainer import measure_trainer, trace_trainer

pytest.importorskip("trl")
from tests.dryfit.engine import trainers

TRAINERS = ("plain", "sft", "dpo", "kto", "orpo", "reward", "grpo")


@pytest.mark.few(1, 3)
@pytest.mark.parametrize("name", TRAINERS)
def test_a_trl_trainer_is_traced_to_the_byte(name, tmp_path):
    make = getattr(trainers, name)
    predicted = trace_trainer(lambda: make("meta", tmp_path), Options(target="cpu"))
    measured = measure_trainer(lambda: make("cpu", tmp_path))
    assert predicted.phases == measured.phases


@pytest.mark.parametrize(
    "changes, problem",
    [({"max_steps": -1}, "all of its epochs"), ({"save_strategy": "steps"}, "save_strategy")],
)
def test_a_trainer_that_does_more_than_train_is_named(changes, problem, tmp_path):
    with pytest.raises(TraceError, match=problem):
        trace_trainer(lambda: trainers.sft("meta", tmp_path, **changes))


@pytest.mark.parametrize("name, value", [("eval_strategy", "steps"), ("use_vllm", True)])
def test_evaluation_and_generation_elsewhere_are_named(name, value, tmp_path):
    def make():
        trainer = trainers.plain("meta", tmp_path)
        setattr(trainer.args, name, value)
        return trainer

    with pytest.raises(TraceError, match=f"does more than train: {name}"):
        trace_trainer(make)
