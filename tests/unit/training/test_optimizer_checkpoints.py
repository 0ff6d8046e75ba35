"""States of optional optimizers survive a checkpoint."""

import pytest
import torch

from dryfit.step.model import build_model
from dryfit.step.optimizers import build_optimizer, set_learning_rate
from dryfit.step.step import random_step
from scripts.training.loop_state import LoopState
from tests.dryfit.step.test_optimizers import known, scenario


@pytest.mark.parametrize(
    "optimizer", [known("adamw_torchao_8bit"), known("adamw_torchao_4bit"), known("galore")]
)
def test_a_run_is_taken_up_where_it_was_left(optimizer, tmp_path, monkeypatch):
    """Through a checkpoint's files; torchao's step runs without the compiler, which takes a minute."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    asked = scenario(optimizer=optimizer, precision="fp32")

    def two_steps(checkpoint) -> list[torch.Tensor]:
        model = build_model(asked, "cpu")
        for number in range(2):
            if number == 0 or checkpoint:
                own = build_optimizer(model, asked, largest_steps=False)
                checkpoint and checkpoint.load(model, own)
            set_learning_rate(own, 1e-2 / (number + 1))
            random_step(model, own, asked, "cpu", max_grad_norm=None)()
            checkpoint and checkpoint.save(number + 1, model, own, [], 1.0)
        assert all(float(group["lr"]) == pytest.approx(5e-3) for group in own.param_groups)
        return [parameter.detach() for parameter in model.parameters()]

    for left, right in zip(two_steps(None), two_steps(LoopState(tmp_path / "saved")), strict=True):
        assert torch.equal(left, right)
