"""What a step finds and leaves: weights and their way to the device, workspaces, optimizer states.

Sources: bitsandbytes 0.50 (functional.py, quantize_4bit; optim/optimizer.py), PyTorch 2.13 (torch/optim/adamw.py); the
libraries' way of loading in every detail, with its sources: dryfit/tracing/loading.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from dryfit.analytic.graph import Ledger
from dryfit.analytic.setting import BLOCKSIZE, NESTED_BLOCKSIZE, Setting
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

CODE_VALUES = 256  # of bitsandbytes' map of 8-bit numbers; 16 of 4-bit ones
PAGED_FROM = 100_000  # elements: smaller states stay on the device (bitsandbytes: get_state_buffer)
EIGHT_BIT_FROM = 4096  # elements: smaller ones keep states in fp32 (min_8bit_size)


def hold_weights(ledger: Ledger, setting: Setting) -> None:
    """Weights and adapters, before the first step."""
    for group, elements, _, times in setting.decoder.weight_shapes():
        if group == "linear" and setting.quantized:
            for component, width, count in _packed(elements, nested=setting.nested):
                shared = setting.packed_sharded and component == WEIGHTS_4BIT
                ledger.hold(component, "4-bit linear layers", width, setting.share(count) if shared else count, times)
        else:
            component, width = setting.weight_component(group), setting.weight_width(group)
            ledger.hold(component, group.replace("_", " "), width, setting.share(elements), times)
    if setting.scenario.lora:
        for _, elements, times in setting.decoder.adapter_shapes(setting.scenario.lora):
            ledger.hold(ADAPTERS, "adapters", setting.adapter_width, setting.share(elements), times)
    for width, elements, times in _buckets(setting):
        ledger.hold(COLLECTIVES, "buckets of gradients", width, elements, times)


def _buckets(setting: Setting) -> list[tuple[int, int, int]]:
    """What DDP sends gradients in: as much as they are, from its construction on."""
    return setting.trained_shapes() if setting.scenario.parallel.kind.replicates else []


def _packed(elements: int, *, nested: bool) -> list[tuple[str, int, int]]:
    """A 4-bit weight as (component, bytes of an element, elements).

    Two weights to a byte, a scale for each 64 of them; the scales quantized again by 256 if double, with a map of their
    own and an offset.
    """
    scales = -(-elements // BLOCKSIZE)
    parts = [(WEIGHTS_4BIT, 1, -(-elements // 2)), (QUANTIZATION_STATE, 4, 16)]
    if not nested:
        return [*parts, (QUANTIZATION_STATE, 4, scales)]
    quantized = [(1, scales), (4, -(-scales // NESTED_BLOCKSIZE)), (4, CODE_VALUES), (4, 1)]
    return parts + [(QUANTIZATION_STATE, *part) for part in quantized]


def load(ledger: Ledger, setting: Setting) -> None:
    """Tell the allocator how the weights come to the device: it decides which blocks they get.

    Under FSDP2 they are loaded on the host, and only this GPU's share comes.

    transformers first allocates and frees one block of the model's size, then brings each tensor in the order of the
    names; a weight to be quantized comes whole, and goes when the packed one is there.
    """
    if setting.sharded:
        return _load_shares(ledger, setting)
    dense = setting.dense_width
    order = setting.decoder.arrivals(setting.scenario.model["model_type"].startswith("gpt"))
    packed = [setting.quantized and group == "linear" for group, _ in order]
    sizes = [elements // 2 if pack else elements * dense for pack, (_, elements) in zip(packed, order, strict=True)]
    ledger.free(ledger.allocate(sum(sizes)))
    whole: list[tuple[int, int, str]] = []  # what is not packed: how to free it, its elements and group
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


def _load_shares(ledger: Ledger, setting: Setting) -> None:
    """The shares of the weights as they stay; 4-bit weights with all of their statistics."""
    for group, elements, _, times in setting.decoder.weight_shapes():
        parts = [("", setting.weight_width(group), setting.share(elements))]
        if group == "linear" and setting.quantized:
            parts = _packed(elements, nested=setting.nested)
        for _ in range(times):
            for component, width, count in parts:
                shared = setting.packed_sharded and component == WEIGHTS_4BIT
                ledger.allocate(width * (setting.share(count) if shared else count))
    if setting.scenario.lora:
        for _, elements, times in setting.decoder.adapter_shapes(setting.scenario.lora):
            for _ in range(times):
                ledger.allocate(setting.share(elements) * setting.adapter_width)


def _quantize(ledger: Ledger, setting: Setting, elements: int) -> None:
    """The allocations of packing a weight that has arrived."""
    count = -(-elements // BLOCKSIZE)
    scales = ledger.allocate(count * 4)
    ledger.allocate(-(-elements // 2))
    ledger.allocate(16 * 4)
    if setting.nested:
        ledger.allocate(4)
        centred = ledger.allocate(count * 4)
        ledger.allocate(-(-count // NESTED_BLOCKSIZE) * 4)
        ledger.allocate(count)
        ledger.allocate(CODE_VALUES * 4)
        ledger.free(centred)
        ledger.free(scales)


def largest_arriving_bytes(setting: Setting) -> int:
    """Bytes of the largest weight that comes to the device whole and stays packed."""
    if not setting.quantized or setting.sharded:
        return 0
    return max(setting.decoder.elements(m) for m in setting.decoder.matrices) * setting.dense_width


def hold_working_set(ledger: Ledger, setting: Setting) -> None:
    """What the first step brings and every later one finds: cuBLAS's workspaces, optimizer states."""
    ledger.hold(WORKSPACES, "of cuBLAS", 1, cublas_workspace_bytes(setting.capability), 2)
    if any(m.bias for m in setting.decoder.matrices) or setting.decoder.family.head_bias:
        threads = 2 if setting.scenario.gradient_checkpointing else 1  # recomputing happens in autograd's
        ledger.hold(WORKSPACES, "of cublasLt", 1, CUBLASLT_WORKSPACE_BYTES, threads)
    hold_optimizer_states(ledger, setting, setting.trained_shapes())


def hold_optimizer_states(ledger: Ledger, setting: Setting, shapes: Sequence[tuple[int, int, int]]) -> None:
    """The moments of each trained tensor: in its dtype, or in 8 bits with a scale for each block, paged or not.

    ``shapes`` as :meth:`Setting.trained_shapes` has them.
    """
    kind = OPTIMIZERS[setting.scenario.optimizer]
    moments = kind.moments
    for width, elements, times in shapes:
        if kind.bits is None:
            ledger.hold(OPTIMIZER_STATES, "moments", width, elements, moments * times)
            if kind.counts_steps:
                ledger.hold(OPTIMIZER_STATES, "step counters", 4, 1, times)
        elif elements < EIGHT_BIT_FROM:
            ledger.hold(OPTIMIZER_STATES, "moments", 4, elements, moments * times)
        else:
            if not kind.paged or elements < PAGED_FROM:
                ledger.hold(OPTIMIZER_STATES, "moments", 1, elements, moments * times)
            ledger.hold(OPTIMIZER_STATES, "scales of moments", 4, -(-elements // kind.block), moments * times)
    if kind.bits is not None:
        ledger.hold(OPTIMIZER_STATES, "maps of 8-bit numbers", 4, CODE_VALUES, moments)


def optimizer_step(ledger: Ledger, setting: Setting) -> None:
    """`foreach` AdamW takes the square root of all second moments at once: one more copy of them."""
    ledger.begin("optimizer")
    if OPTIMIZERS[setting.scenario.optimizer].copies_moments:
        for width, elements, times in setting.trained_shapes():
            ledger.hold(TEMPORARIES, "square roots of second moments", width, elements, times)
    ledger.look()
