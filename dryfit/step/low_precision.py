"""Linear layers whose products run in fewer bits than their weights have, as torchao (0.18) exchanges them.

================  ====================================================================================================
field             what runs
================  ====================================================================================================
``float8``        torchao ``float8``, ``convert_to_float8_training`` with one of its recipes
                  (``Float8LinearConfig.from_recipe_name``): inputs, weights and gradients are cast to 8 bits for each
                  product, and the weights stay as they are
``qat``           torchao ``quantization/qat`` with ``prototype/qat``'s configurations: weights and inputs are rounded
                  to 4 bits and back in each forward pass, and trained in their own dtype
================  ====================================================================================================

The output head stays as it is, as in torchtitan's and axolotl's settings, and so does a layer whose sizes are no
multiples of 16, which the products in 8 bits need.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from dryfit.scenario.scenario import Scenario

_MULTIPLE = (
    16  # torchao float8/float8_linear_utils.py, `_auto_filter_for_recipe`; 32 for blocks of mxfp4
)


def exchange_products(model: nn.Module, scenario: Scenario) -> None:
    """Exchange the linear layers of a model on any device, as the scenario says."""
    wanted = _layers_of(model, 32 if scenario.qat == "mxfp4" else _MULTIPLE)
    if scenario.float8 != "none":
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        config = Float8LinearConfig.from_recipe_name(scenario.float8)
        if scenario.parallel.float8_all_gather:
            config = replace(config, enable_fsdp_float8_all_gather=True)
        convert_to_float8_training(model, config=config, module_filter_fn=wanted)
    if scenario.qat != "none":
        from torchao.prototype.qat import MXFakeQuantizeConfig, NVFP4FakeQuantizeConfig
        from torchao.quantization import quantize_
        from torchao.quantization.qat import QATConfig

        kind = {"mxfp4": MXFakeQuantizeConfig, "nvfp4": NVFP4FakeQuantizeConfig}[scenario.qat]
        config = QATConfig(activation_config=kind(), weight_config=kind(), step="prepare")
        quantize_(model, config, filter_fn=wanted)


def scales_for_the_next_step(model: nn.Module) -> None:
    """After an update, where weights are cast before they are gathered: as accelerate's hook and torchtitan's loop."""
    from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

    precompute_float8_dynamic_scale_for_fsdp(model)


def _layers_of(model: nn.Module, multiple: int) -> Callable[[nn.Module, str], bool]:
    head = model.get_output_embeddings()

    def wanted(module: nn.Module, name: str) -> bool:
        if not isinstance(module, nn.Linear) or module is head:
            return False
        return not module.in_features % multiple and not module.out_features % multiple

    return wanted


def low_precision_note(scenario: Scenario) -> str:
    """What a person should know of products in fewer bits."""
    what = "float8" if scenario.float8 != "none" else f"QAT in {scenario.qat}"
    followed = f"{what} is followed through the compiler."
    if scenario.compile == "none":
        followed = (
            f"{what} is followed without the compiler, which people run it with: it fuses the casts, and needs less at"
            " a time. Weights, gradients and states keep their dtype, so the step takes hardly less than without it."
        )
    return f"{followed} cuBLASLt's workspace of products in 8 bits is not counted"
