"""What a step finds and leaves: weights and their way to the device, workspaces, optimizer states.

Sources: PyTorch 2.13 (torch/optim/adamw.py); bitsandbytes: :mod:`dryfit.engine.bitsandbytes_rules`; how weights are
loaded, in every detail: dryfit/tracing/loading.py.
"""

from collections.abc import Iterator, Sequence

from dryfit.analytic.graph import Ledger
from dryfit.analytic.setting import Setting
from dryfit.engine.bitsandbytes_rules import (
    EIGHT_BIT_FROM,
    PAGED_FROM,
    VALUES_8BIT,
    packed,
    packing,
)
from dryfit.engine.components import (
    ADAPTERS,
    COLLECTIVES,
    OPTIMIZER_STATES,
    QUANTIZATION_STATE,
    TEMPORARIES,
    WEIGHTS_4BIT,
    WORKSPACES,
)
from dryfit.engine.cuda_rules import CUBLASLT_WORKSPACE_BYTES, cublas_workspace_bytes
from dryfit.scenario.optimizers import OPTIMIZERS

_LEFT_OUT = (
    "map",
    "magnitudes",
    "largest",
)  # a block of 512 or 1,024 bytes each, for the first weight or for a moment


def hold_weights(ledger: Ledger, setting: Setting) -> None:
    """Weights and adapters, before the first step."""
    for what, parts, times in _kept(setting):
        for component, width, count in parts:
            ledger.hold(component, what, width, count, times)
    for width, elements, times in _buckets(setting):
        ledger.hold(COLLECTIVES, "buckets of gradients", width, elements, times)


def _buckets(setting: Setting) -> list[tuple[int, int, int]]:
    """What DDP sends gradients in: as much as they are, from its construction on."""
    return setting.trained_shapes() if setting.scenario.parallel.kind.replicates else []


def _kept(setting: Setting) -> Iterator[tuple[str, list[tuple[str, int, int]], int]]:
    """Weights and adapters as this GPU has them: what, (component, bytes of an element, elements), how many such."""
    for group, elements, _, times in setting.decoder.weight_shapes():
        if group == "linear" and setting.quantized:
            parts = packed(elements, nested=setting.nested)
            if setting.packed_sharded:
                parts["weight"] = 1, setting.share(parts["weight"][1])
            named = [
                (WEIGHTS_4BIT if name == "weight" else QUANTIZATION_STATE, *part)
                for name, part in parts.items()
            ]
            yield "4-bit linear layers", named, times
        else:
            part = (
                setting.weight_component(group),
                setting.weight_width(group),
                setting.share(elements),
            )
            yield group.replace("_", " "), [part], times
    if setting.scenario.lora:
        for _, elements, times in setting.decoder.adapter_shapes(setting.scenario.lora):
            yield "adapters", [(ADAPTERS, setting.adapter_width, setting.share(elements))], times


def load(ledger: Ledger, setting: Setting) -> None:
    """Tell the allocator how the weights come to the device: it decides which blocks they get.

    Under FSDP2 they are loaded on the host, and this GPU's share comes: 4-bit weights with all of their statistics.

    transformers first allocates and frees one block of the model's size, then brings each tensor in the order of the
    names; a weight to be quantized comes whole, and goes when the packed one is there.
    """
    if setting.sharded:
        for _, parts, times in _kept(setting):
            for _, width, count in parts * times:
                ledger.allocate(width * count)
        return
    dense = setting.dense_width
    order = setting.decoder.arrivals(setting.scenario.model["model_type"].startswith("gpt"))
    packed = [setting.quantized and group == "linear" for group, _ in order]
    sizes = [
        elements // 2 if pack else elements * dense
        for pack, (_, elements) in zip(packed, order, strict=True)
    ]
    ledger.free(ledger.allocate(sum(sizes)))
    whole: list[
        tuple[int, int, str]
    ] = []  # what is not packed: how to free it, its elements and group
    for pack, (group, elements) in zip(packed, order, strict=True):
        arrived = ledger.allocate(elements * dense)
        if pack:
            _quantize(ledger, setting, elements)
            ledger.free(arrived)
        else:
            whole.append((arrived, elements, group))
    preparation = setting.scenario.kbit_preparation
    if preparation != "none" and dense < 4:
        for place, (arrived, elements, group) in enumerate(whole):
            whole[place] = ledger.allocate(elements * 4), elements, group
            ledger.free(arrived)
        ledger.empty_cache()
    if setting.scenario.lora:
        for _, elements, times in setting.decoder.adapter_shapes(setting.scenario.lora):
            for _ in range(times):
                ledger.allocate(elements * setting.adapter_width)
    if preparation == "trl":  # what is no norm and no bias back to 16 bits
        for arrived, elements, group in whole:
            if setting.weight_width(group) < 4:
                ledger.allocate(elements * setting.weight_width(group))
                ledger.free(arrived)
    for width, elements, times in _buckets(setting):
        for _ in range(times):
            ledger.allocate(elements * width)


def _quantize(ledger: Ledger, setting: Setting, elements: int) -> None:
    """The allocations of packing a weight that has arrived."""
    held: dict[str, int] = {}
    for name, size in packing(elements, nested=setting.nested):
        if name in _LEFT_OUT:
            continue
        if size:
            held[name] = ledger.allocate(size)
        else:
            ledger.free(held[name])


def largest_arriving_bytes(setting: Setting) -> int:
    """Bytes of the largest weight that comes to the device whole and stays packed."""
    if not setting.quantized or setting.sharded:
        return 0
    return max(setting.decoder.elements(m) for m in setting.decoder.matrices) * setting.dense_width


def hold_working_set(ledger: Ledger, setting: Setting) -> None:
    """What the first step brings and every later one finds: cuBLAS's workspaces, optimizer states."""
    ledger.hold(WORKSPACES, "of cuBLAS", 1, cublas_workspace_bytes(setting.capability), 2)
    if any(m.bias for m in setting.decoder.matrices) or setting.decoder.family.head_bias:
        threads = (
            2 if setting.scenario.gradient_checkpointing else 1
        )  # recomputing happens in autograd's
        ledger.hold(WORKSPACES, "of cublasLt", 1, CUBLASLT_WORKSPACE_BYTES, threads)
    hold_optimizer_states(ledger, setting, setting.trained_shapes())


def hold_optimizer_states(
    ledger: Ledger, setting: Setting, shapes: Sequence[tuple[int, int, int]]
) -> None:
    """The moments of each trained tensor: in its dtype, or in 8 bits with a scale for each block, paged or not.

    ``shapes`` as :meth:`Setting.trained_shapes` has them.
    """
    kind = OPTIMIZERS[setting.scenario.optimizer]
    moments = kind.moments
    for width, elements, times in shapes:
        if kind.bits is None:
            state_width = setting.state_width(width)
            ledger.hold(OPTIMIZER_STATES, "moments", state_width, elements, moments * times)
            if kind.counts_steps:
                ledger.hold(OPTIMIZER_STATES, "step counters", 4, 1, times)
        elif elements < EIGHT_BIT_FROM:
            ledger.hold(OPTIMIZER_STATES, "moments", 4, elements, moments * times)
        else:
            if not kind.paged or elements < PAGED_FROM:
                ledger.hold(OPTIMIZER_STATES, "moments", 1, elements, moments * times)
            ledger.hold(
                OPTIMIZER_STATES,
                "scales of moments",
                4,
                -(-elements // kind.block),
                moments * times,
            )
    if kind.bits is not None:
        ledger.hold(OPTIMIZER_STATES, "maps of 8-bit numbers", 4, VALUES_8BIT, moments)


def optimizer_step(ledger: Ledger, setting: Setting) -> None:
    """`foreach` AdamW takes the square root of all second moments at once: one more copy of them.

    With states wider than what is trained, it steps one tensor at a time, with a copy of that one.
    """
    ledger.begin("optimizer")
    if setting.scenario.has_wider_states:
        largest = max(elements for _, elements, _ in setting.trained_shapes())
        ledger.hold(TEMPORARIES, "the tensor that steps, in fp32", 4, largest, 1)
    elif OPTIMIZERS[setting.scenario.optimizer].copies_moments:
        for width, elements, times in setting.trained_shapes():
            ledger.hold(TEMPORARIES, "square roots of second moments", width, elements, times)
    ledger.look()
