"""What ``training.backend: trl`` can't do, refused before any job; each step that it takes is the one that was gated.

TRL 1.16, ``trainer/sft_trainer.py``: where the reasons below come from.
"""

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from dryfit.common.errors import UserError
from dryfit.common.schema import yaml_lines
from dryfit.scenario.scenario import Scenario


class _Refused(NamedTuple):
    """A setting that TRL's trainer does not take here."""

    setting: str  # of the section training
    found: Any
    reason: str
    allowed: Any  # the value to write


def refused_by_trl(scenario: Scenario, loop: Mapping[str, Any]) -> Iterator[UserError]:
    """Settings of a training that its backend can't do; none for the project's own."""
    if loop["backend"] != "trl":
        return
    for one in _refused(scenario, loop):
        yield UserError(
            f"`training.backend: trl` and `{one.setting}: {one.found}` don't go together: {one.reason}.",
            where="training in the configuration",
            found=one.found,
            allowed=f"{one.setting} {one.allowed}; or backend ours",
            write=yaml_lines(["training"], one.setting, one.allowed),
        )
    if scenario.lora is not None and scenario.lora.dora and scenario.method == "qlora":
        yield UserError(
            "`training.backend: trl` and `lora.dora` on a quantized base don't go together: TRL trains lengths in fp32"
            " beside factors in bf16, and no scenario says so.",
            where="lora and training in the configuration",
            found="dora: true",
            allowed="dora false, method lora, or backend ours",
            write="training:\n  backend: ours",
        )


def _refused(scenario: Scenario, loop: Mapping[str, Any]) -> Iterator[_Refused]:
    if scenario.packing != "none":
        reason = "TRL packs with flash attention alone, and shares no prefix"
        yield _Refused("packing", scenario.packing, reason, "none")
        if loop["rows_per_step"] is not None:
            reason = "without packing a step has micro_batch x gradient_accumulation rows"
            yield _Refused("rows_per_step", loop["rows_per_step"], reason, None)
    if scenario.attention_mask != "padding":
        reason = "TRL gives each batch a mask, which decides how attention runs"
        yield _Refused("attention_mask", scenario.attention_mask, reason, "padding")
    if scenario.loss != "chunked":
        reason = "TRL takes its loss a few tokens at a time"
        yield _Refused("loss", scenario.loss, reason, "chunked")
    if scenario.loop != "trainer":
        yield _Refused("loop", scenario.loop, "TRL's trainer is the loop", "trainer")
    if scenario.method == "qlora" and scenario.adapter_dtype != "bf16":
        reason = "TRL trains the adapters of a quantized base in bf16"
        yield _Refused("adapter_precision", scenario.adapter_precision, reason, "bf16")
    if scenario.parallel.gpus > 1:
        reason = "it is started in one process here"
        yield _Refused("parallel", dict(gpus=scenario.parallel.gpus), reason, {"gpus": 1})
    if loop["on_out_of_memory"] == "halve":
        reason = "TRL's step can't be taken again in smaller parts"
        yield _Refused("on_out_of_memory", "halve", reason, "stop")
    if loop["keep"] == "averaged":
        yield _Refused("keep", "averaged", "TRL's trainer takes no mean of the weights", "best")


def refuse_missing_trl(loop: Mapping[str, Any], own_packages: bool) -> None:
    """Raise where a training is to be TRL's and its jobs would not find it.

    ``own_packages``: whether jobs run with the packages of this environment, and not with conda's, which have no TRL.
    """
    if loop["backend"] != "trl":
        return
    if not own_packages:
        raise UserError(
            "`training.backend: trl` needs TRL, and the conda environments of the rules have none.",
            where="training.backend in the configuration",
            found="--use-conda, or a container",
            allowed="an environment of your own with TRL, without --use-conda; or backend ours",
            write="python3 envs/install.py .venv --extra trl",
        )
    if importlib.util.find_spec("trl") is None:
        raise UserError(
            "`training.backend: trl` needs TRL, which is not installed.",
            where="training.backend in the configuration",
            found="trl",
            allowed="TRL (Apache-2.0) in this environment; or backend ours",
            write="python3 envs/install.py .venv --extra trl",
        )
