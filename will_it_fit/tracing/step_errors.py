"""The core's errors as those of a scenario, whose fields they name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from will_it_fit.common.errors import UserError
from will_it_fit.engine.errors import AttentionKernelError, StepError
from will_it_fit.scenario.scenario import Scenario


@contextmanager
def speaking_of(scenario: Scenario) -> Iterator[None]:
    """Turn the core's errors into those of a scenario, whose fields they name."""
    try:
        yield
    except AttentionKernelError as error:
        raise UserError(
            error.problem,
            where="attention",
            found=scenario.attention,
            allowed="sdpa, which takes the kernel that fits, or eager",
            change={"attention": "sdpa"},
        ) from error
    except StepError as error:
        if "differ in dtype" in str(error) and "int8" in str(error):
            raise UserError(
                "This architecture multiplies by the weights of a quantized layer itself, and they are packed.",
                where=f"model (model_type {scenario.model['model_type']}), {error.inner or error.line}",
                found=f"method {scenario.method}",
                allowed="lora, or full",
                change={"method": "lora"},
            ) from error
        if "differ in dtype" in str(error):
            raise UserError(
                f"The step fails: {error.problem}",
                where=f"precision, adapter_precision and kbit_preparation; {error.inner or error.line}",
                found=f"precision {scenario.precision}, adapter_precision {scenario.adapter_precision},"
                f" kbit_preparation {scenario.kbit_preparation}, autocast {scenario.autocast}",
                allowed="autocast, which casts the operands, or one dtype for all",
                change={"autocast": "fp16" if scenario.weight_precision == "fp16" else "bf16"},
            ) from error
        raise UserError(  # an architecture may ask for values, which meta tensors don't have
            f"The step of this architecture can't be traced. {error.problem}",
            where=f"model (model_type {scenario.model['model_type']}), {error.inner or error.line}",
            allowed="a decoder whose forward pass doesn't depend on the values of its tensors",
        ) from error
