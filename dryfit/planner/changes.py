"""What can be changed of a step so that it needs less memory or less time, and what each change costs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from dryfit.analytic.decoder import NotDescribed
from dryfit.analytic.setting import describe
from dryfit.cards.gpus import EXPANDABLE_LINE, is_unified
from dryfit.common.errors import UserError
from dryfit.common.text import gib, yaml_text
from dryfit.planner.largest_fit import steps
from dryfit.scenario.model import EXPERT_COUNTS
from dryfit.scenario.optimizers import EIGHT_BIT, FUSED, OPTIMIZERS, PAGED
from dryfit.scenario.scenario import Scenario
from dryfit.scenario.strategies import DIVIDED, NONE

Changes = dict[str, Any]
COUNTS = (2, 4, 8)  # of GPUs of a kind
BF16_FROM = (
    8,
    0,
)  # compute capability of the first GPUs with bf16 products (CUDA C++ Programming Guide, arithmetic)


class Move(NamedTuple):
    """One way to need less: its name, what it costs in words, and the changes; for memory from mild to strong."""

    name: str
    cost: str
    options: Sequence[Changes]


def written_out(changes: Mapping[str, Any], between: str = ", ") -> str:
    """Changes as the YAML of the fields to write."""
    return between.join(f"{key}: {yaml_text(value)}" for key, value in changes.items())


def moves(scenario: Scenario) -> Iterator[Move]:
    """What can be changed to need less memory, the cheapest first.

    Changes that contradict the scenario's other fields are left out.
    """
    return _without_contradictions(scenario, _moves(scenario))


def faster_moves(scenario: Scenario, capability: tuple[int, int] | None = None) -> Iterator[Move]:
    """What can be changed to take less time on a GPU with memory left, the cheapest first; options from the fastest on.

    ``capability``: compute capability of the GPU.
    """
    return _without_contradictions(scenario, _moves_for_speed(scenario, capability))


def _without_contradictions(scenario: Scenario, candidates: Iterator[Move]) -> Iterator[Move]:
    for move in candidates:
        possible = [changes for changes in move.options if _possible(scenario, changes)]
        if possible:
            yield move._replace(options=possible)


def _possible(scenario: Scenario, changes: Changes) -> bool:
    try:
        apply(scenario, changes)
    except UserError:
        return False
    return True


def _moves(scenario: Scenario) -> Iterator[Move]:
    yield from _moves_for_free(scenario)
    yield from _moves_among_gpus(scenario)
    yield from _moves_for_time(scenario)
    yield from _moves_for_quality(scenario)


def _moves_for_free(scenario: Scenario) -> Iterator[Move]:
    """The same numbers, or nearly, at the same speed."""
    quantization, kind = scenario.quantization, OPTIMIZERS[scenario.optimizer]
    if not scenario.allocator.expandable_segments:
        cost = f"free: the same step without gaps in its memory; set {EXPANDABLE_LINE} before Python starts"
        yield Move("expandable_segments", cost, [{"allocator": {"expandable_segments": True}}])
    if scenario.loads == "host" and scenario.method != "qlora" and is_unified(scenario.gpu):
        cost = "free: no copy of the weights on the host; load with device_map={'': 0}"
        yield Move("load_on_device", cost, [{"loads": "device"}])
    if scenario.attention == "eager":
        yield Move(
            "fused_attention", "free: the same numbers from a fused kernel", [{"attention": "sdpa"}]
        )
    if scenario.loop == "manual":
        dropped = (
            {"previous_sequence_length": None, "keeps_outputs": False}
            if scenario.holds_outputs
            else {}
        )
        yield Move(
            "trainer_loop",
            "free: the logits may go before backward begins",
            [{"loop": "trainer", **dropped}],
        )
    if scenario.use_cache:
        cost = "free: training does not read the keys and values that it keeps"
        yield Move("no_cache", cost, [{"use_cache": False}])
    if kind.copies_moments:
        cost = "free: the same update without a copy of the second moments"
        yield Move("fused_optimizer", cost, [{"optimizer": FUSED}])
    unpacked = whole_4bit_bytes(scenario)
    if unpacked:
        cost = f"free: 4-bit weights are divided among GPUs too, {gib(unpacked)} less on each"
        storage = {**asdict(quantization), "storage": scenario.weight_precision}
        yield Move("divide_4bit_weights", cost, [{"quantization": storage}])
    if quantization and quantization.type == "int8" and scenario.gradient_checkpointing is True:
        cost = "free: lets go of the inputs that LLM.int8's layers hold on to otherwise"
        yield Move("reentrant_checkpointing", cost, [{"gradient_checkpointing": "reentrant"}])
    if quantization and quantization.type != "int8" and not quantization.double:
        double = {**asdict(quantization), "double": True}
        yield Move(
            "double_quantization",
            "next to nothing: the scales are quantized too",
            [{"quantization": double}],
        )
    if scenario.kbit_preparation != "none":
        cost = "weights that are not quantized stay in 16 bits"
        yield Move("no_kbit_preparation", cost, [{"kbit_preparation": "none"}])


def _moves_among_gpus(scenario: Scenario) -> Iterator[Move]:
    """More communication among the GPUs that are there."""
    parallel = scenario.parallel

    def with_parallel(**changes: Any) -> list[Changes]:
        return [{"parallel": {**parallel.written, **changes}, **_divisible(scenario)}]

    if not parallel.reshard_after_forward:
        cost = "half as much again of communication"
        yield Move("reshard_after_forward", cost, with_parallel(reshard_after_forward=True))
    if parallel.kind.replicates:
        cost = "more communication: weights, gradients and states are divided, and gathered layer by layer"
        yield Move("fsdp2", cost, with_parallel(strategy=DIVIDED))
    if parallel.kind.zero == 2:
        cost = "more communication: weights are divided too, and gathered layer by layer"
        yield Move("zero3", cost, with_parallel(strategy="zero3"))
    count = scenario.gpu.get("count", 1) if isinstance(scenario.gpu, Mapping) else 1
    if parallel.strategy == NONE and count > 1:
        changes, cost = spread(scenario, count)
        yield Move("spread", cost, [changes])


def _moves_for_time(scenario: Scenario) -> Iterator[Move]:
    """The same numbers more slowly."""
    yield from _moves_of_experts(scenario)
    effective = scenario.micro_batch * scenario.gradient_accumulation
    if scenario.loss == "full":
        cost = "a little time: the output head runs again in backward"
        yield Move("chunked_loss", cost, [{"loss": "chunked"}])
    if not scenario.gradient_checkpointing:
        cost = "time: each layer runs again in backward"
        yield Move("gradient_checkpointing", cost, [{"gradient_checkpointing": True}])
    if scenario.micro_batch > 1:
        smaller = [n for n in range(scenario.micro_batch - 1, 0, -1) if effective % n == 0]
        options = [{"micro_batch": n, "gradient_accumulation": effective // n} for n in smaller]
        yield Move(
            "micro_batch",
            f"some time: smaller steps, the effective batch stays {effective}",
            options,
        )


def _moves_of_experts(scenario: Scenario) -> Iterator[Move]:
    """Experts that a quantized base leaves in 16 bits: packed as well, and kept on the host."""
    if scenario.method != "qlora" or not any(scenario.size(name) for name in EXPERT_COUNTS):
        return
    packed = {"quantized": "bitsandbytes", "offload": scenario.experts.offload}
    if scenario.experts.quantized == "none":
        cost = "experts in 4 bits too, unpacked whenever their layer runs (axolotl's quantize_moe_experts, Unsloth)"
        yield Move("packed_experts", cost, [{"experts": packed}])
    if scenario.experts.offload == "none":
        kept = (
            packed["quantized"]
            if scenario.experts.quantized == "none"
            else scenario.experts.quantized
        )
        cost = "time: packed experts wait on the host, and come when their layer runs (axolotl's expert_offload)"
        yield Move("experts_on_host", cost, [{"experts": {"quantized": kept, "offload": "host"}}])


def _moves_for_quality(scenario: Scenario) -> Iterator[Move]:
    """Other numbers: less precise states and weights, smaller adapters, shorter rows, fewer trained weights."""
    kind = OPTIMIZERS[scenario.optimizer]
    narrow: Changes = {}
    if scenario.optimizer_state_precision is not None:
        narrow = {"optimizer_state_precision": None}
    if scenario.has_wider_states:
        cost = f"optimizer states in {scenario.trained_dtype}, as what is trained"
        yield Move("narrow_states", cost, [narrow])
    if kind.bits is None and kind.elementwise:
        options = [{"optimizer": EIGHT_BIT, **narrow}]
        yield Move("8bit_optimizer", "optimizer states in 8 bits", options)
    if not kind.paged:
        cost = "optimizer states in 8 bits that may move to the host, slowly"
        yield Move("paged_optimizer", cost, [{"optimizer": PAGED, **narrow}])
    if scenario.precision == "fp32" and scenario.method != "qlora":
        yield Move("16bit_weights", "weights in 16 bits", [{"precision": "bf16"}])
    if scenario.mixed:
        changes = {"precision": scenario.precision.removesuffix("-mixed")}
        yield Move("no_fp32_copy", "no fp32 copy of the weights", [changes])
    if scenario.lora and scenario.lora.rank > 4:
        lora = scenario.to_mapping()["lora"]
        options = [{"lora": {**lora, "rank": rank}} for rank in _halves(lora["rank"], 4)]
        yield Move("smaller_rank", "adapters with less capacity", options)
    if scenario.sequence_length > 128:
        lengths = [
            n for n in steps("sequence_length", scenario.sequence_length)[-2::-1] if n >= 128
        ]
        yield Move(
            "sequence_length",
            "longer examples are dropped",
            [{"sequence_length": n} for n in lengths],
        )
    if scenario.method == "full":
        yield Move("lora", "only adapters are trained", [as_method(scenario, "lora")])
    if _divisible(scenario):
        yield Move("4bit_weights", "a base of 4 bits instead of 8", [_divisible(scenario)])
    if scenario.method != "qlora":
        yield Move(
            "qlora", "only adapters are trained, on a 4-bit base", [as_method(scenario, "qlora")]
        )


def _moves_for_speed(scenario: Scenario, capability: tuple[int, int] | None) -> Iterator[Move]:
    """What saves time, and mostly takes memory for it: the same numbers first, then other ones."""
    rows, accumulated = scenario.micro_batch, scenario.gradient_accumulation
    if (
        capability
        and capability < BF16_FROM
        and scenario.precision == "bf16"
        and not scenario.autocast
    ):
        cost = "other numbers: fp16, whose range is smaller; this GPU has no bf16 products"
        yield Move("fp16", cost, [{"precision": "fp16"}])
    if scenario.attention == "eager":
        yield Move(
            "fused_attention", "free: the same numbers from a fused kernel", [{"attention": "sdpa"}]
        )
    if scenario.activation_offload:
        cost = "memory: activations stay on the GPU"
        yield Move("no_activation_offload", cost, [{"activation_offload": False}])
    if scenario.gradient_checkpointing:
        cost = "memory: each layer keeps its activations instead of running again"
        yield Move("no_checkpointing", cost, [{"gradient_checkpointing": False}])
    if scenario.loss == "chunked":
        yield Move("full_loss", "memory: the logits of all tokens at once", [{"loss": "full"}])
    if scenario.method == "qlora":
        cost = "memory: the base stays in 16 bits, and nothing has to be unpacked"
        yield Move("lora", cost, [as_method(scenario, "lora")])
    if accumulated > 1:
        factors = [n for n in range(accumulated, 1, -1) if accumulated % n == 0]
        options = [
            {"micro_batch": rows * n, "gradient_accumulation": accumulated // n} for n in factors
        ]
        cost = f"memory: larger micro-batches, the effective batch stays {rows * accumulated}"
        yield Move("larger_micro_batch", cost, options)
    elif scenario.packing == "none":
        cost = "memory, and fewer updates of a larger batch: the learning rate may have to change"
        yield Move("larger_batch", cost, [{"micro_batch": rows * 2**n} for n in range(6, 0, -1)])


def spread(scenario: Scenario, gpus: int) -> tuple[Changes, str]:
    """What to change to divide a step among GPUs with FSDP2, and its price: the effective batch stays if it can."""
    kept = scenario.parallel.written if scenario.parallel.strategy == DIVIDED else {}
    changes: Changes = {
        "parallel": {**kept, "strategy": DIVIDED, "gpus": gpus},
        **_divisible(scenario),
        **whole_loss(scenario),
    }
    price = f"the model is divided among {gpus} GPUs, and gathered layer by layer"
    price += "; the loss takes all logits at once" if "loss" in changes else ""
    price += (
        "; a base of 4 bits, since one of 8 can't be divided" if "quantization" in changes else ""
    )
    before, rows, steps = (
        scenario.parallel.rows_at_once,
        scenario.micro_batch,
        scenario.gradient_accumulation,
    )
    if before * steps % gpus == 0:
        changes["gradient_accumulation"] = before * steps // gpus
    elif before * rows % gpus == 0:
        changes["micro_batch"] = before * rows // gpus
    else:
        price += f"; the effective batch becomes {rows * steps * gpus}"
    return changes, price


def whole_loss(scenario: Scenario) -> Changes:
    """What to change of a loss under FSDP, which has no place for one in chunks: it runs the head on its own."""
    return {} if scenario.loss == "full" else {"loss": "full"}


def _divisible(scenario: Scenario) -> Changes:
    """What to change of a base that can't be divided: LLM.int8's becomes one of 4 bits."""
    quantization = scenario.quantization
    if quantization is None or quantization.type != "int8":
        return {}
    return {"quantization": {**asdict(quantization), "type": "nf4", "double": True}}


def whole_4bit_bytes(scenario: Scenario) -> int:
    """Bytes of 4-bit weights that FSDP2 leaves on each GPU and would divide, were they not stored as integers.

    0 where nothing is to be saved so, or nothing is known of the architecture.
    """
    quantization, parallel = scenario.quantization, scenario.parallel
    if quantization is None or quantization.storage != "uint8" or parallel.kind.fsdp != 2:
        return 0
    try:
        packed = describe(scenario.model).parameter_counts()["linear"] // 2
    except NotDescribed:
        return 0
    return packed - packed // parallel.gpus


def _halves(value: int, least: int) -> list[int]:
    values = []
    while value // 2 >= least:
        value //= 2
        values.append(value)
    return values


def as_method(scenario: Scenario, method: str) -> Changes:
    """What to change for another method.

    A quantized base has a precision of its own instead of mixed precision, FSDP1 takes its weights in that alone, and
    what TRL prepares is quantized.
    """
    changes: Changes = {"method": method}
    precision = scenario.precision.removesuffix("-mixed")
    if method == "qlora" and scenario.mixed:
        changes["precision"] = precision
    if method == "qlora" and scenario.parallel.kind.fsdp == 1 and not scenario.quantization:
        changes["quantization"] = {"storage": precision}
    if method != "qlora" and scenario.kbit_preparation == "trl":
        changes["kbit_preparation"] = "none"
    return changes


def apply(scenario: Scenario, changes: Changes) -> Scenario:
    """The scenario with changes; a new method drops what it has no place for, and takes defaults of what it needs."""
    values = scenario.to_mapping()
    method = changes.get("method", scenario.method)
    for key, methods in (("lora", ("lora", "qlora")), ("quantization", ("qlora",))):
        if method not in methods:
            values[key] = None
        elif values[key] is None:
            del values[key]
    if method == "full":
        values |= {"kbit_preparation": "none", "adapter": None}
    return Scenario.from_mapping({**values, **changes}, where="a suggestion")
