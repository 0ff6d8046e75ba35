"""What memory is for: the one list of names that every engine gives to components, and documents read.

Weights are named by their dtype; an engine that knows only their sum says :data:`WEIGHTS`. Without torch.
"""

from __future__ import annotations

from collections.abc import Mapping

WEIGHTS = "weights"
WEIGHTS_4BIT = "weights_4bit"
WEIGHTS_8BIT = "weights_8bit"  # of LLM.int8
WEIGHTS_OTHER = "weights_other"  # integers, booleans
QUANTIZATION_STATE = "quantization_state"
ADAPTERS = "adapters"
GRADIENTS = "gradients"
OPTIMIZER_STATES = "optimizer_states"
ACTIVATIONS = "activations"
INPUTS = "inputs"
LOGITS_AND_LOSS = "logits_and_loss"  # whatever is as wide as the vocabulary
WEIGHT_CASTS = "weight_casts"  # 16-bit copies that autocast keeps of fp32 weights
TEMPORARIES = "temporaries"  # gradients of activations, dequantized weights, what operators need while they run
WORKSPACES = "workspaces"  # of cuBLAS
UNSHARDED = "unsharded_parameters"  # of the layers that FSDP has gathered
COLLECTIVES = "collective_buffers"  # what is sent and received between GPUs
LOADING = "loading"  # what only exists while the model is brought to the device
ROUNDING = "allocator_rounding"  # blocks are larger than what was asked for
OVERHEAD = "overhead"  # all that the rule of thumb says of the last three

HOST = "host"  # no component: what lies in the host's memory and doesn't count
_DTYPES = {dtype: f"weights_{dtype}" for dtype in ("fp32", "fp16", "bf16")}

# Components that documents show as one, in their order.
GROUPS: dict[str, tuple[str, ...]] = {
    "parameters": (
        WEIGHTS,
        *_DTYPES.values(),
        WEIGHTS_4BIT,
        WEIGHTS_8BIT,
        WEIGHTS_OTHER,
        QUANTIZATION_STATE,
    ),
    "adapters": (ADAPTERS,),
    "gradients": (GRADIENTS,),
    "optimizer_states": (OPTIMIZER_STATES,),
    "activations": (ACTIVATIONS, INPUTS),
    "logits": (LOGITS_AND_LOSS,),
    "several_gpus": (UNSHARDED, COLLECTIVES),
    "temporaries": (TEMPORARIES, WEIGHT_CASTS),
    "overhead": (OVERHEAD, WORKSPACES, LOADING, ROUNDING),
}
# Okabe and Ito's (2008), which people with any common colour blindness can tell apart; brown is not one of theirs.
COLOURS = {
    "parameters": "#0072B2",
    "adapters": "#56B4E9",
    "gradients": "#E69F00",
    "optimizer_states": "#D55E00",
    "activations": "#009E73",
    "logits": "#F0E442",
    "several_gpus": "#8C6D31",
    "temporaries": "#CC79A7",
    "overhead": "#999999",
}
_GROUP_OF = {component: group for group, components in GROUPS.items() for component in components}


def weights(dtype: str) -> str:
    """The component of weights in a dtype, ``fp32``, ``fp16`` or ``bf16``."""
    return _DTYPES.get(dtype, WEIGHTS_OTHER)


def grouped(components: Mapping[str, int], *, adapters: bool) -> dict[str, int]:
    """Bytes by group, in the order of :data:`GROUPS`; the sum stays the same.

    ``adapters``: only adapters are trained, so that gradients and optimizer states are theirs.

    Raises :class:`KeyError` for a name that is not in the list.
    """
    sums = dict.fromkeys(GROUPS, 0)
    for component, size in components.items():
        group = _GROUP_OF[component]
        sums["adapters" if adapters and group in ("gradients", "optimizer_states") else group] += (
            size
        )
    return {group: size for group, size in sums.items() if size}
