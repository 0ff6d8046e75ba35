"""What an answer leaves out of another tool's file, in bytes where they are known."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from dryfit.analytic.decoder import NotDescribed
from dryfit.analytic.setting import describe
from dryfit.cards.gpus import named
from dryfit.cards.verdict import Omission, has_range
from dryfit.common.errors import UserError
from dryfit.common.files import read_yaml
from dryfit.common.text import GIB, gib
from dryfit.data import data_path
from dryfit.engine.components import weights
from dryfit.readers.reading import TOO_HIGH, TOO_LOW, Reading
from dryfit.scenario.model import size
from dryfit.scenario.scenario import Scenario
from dryfit.scenario.strategies import WEIGHTS


def omissions(
    readings: Iterable[Reading], scenario: Scenario, answer: Mapping[str, Any]
) -> Iterator[Omission]:
    """What the files of a question say and a scenario can't.

    ``answer``: with the trace or the analytic estimate, whose parts bound what is missing.
    """
    yield from _outliers(scenario)
    if scenario.objective == "orpo" and scenario.pairs_by_rules:
        yield Omission("orpo's copies of its logits", _orpo_bytes(scenario, answer))
    for reading in readings:
        yield from _images(reading, scenario)
        for remark in reading.remarks:
            if remark.bound == "step" and has_range(answer.get("trace") or {}):
                continue  # the range says the same, and closer
            size = bound_bytes(remark.bound, scenario, answer)
            yield Omission(
                remark.key,
                0 if remark.errs == TOO_HIGH else size,
                0 if remark.errs == TOO_LOW else size,
            )


# What a file says of images, and what it trains beside the language model where it is false.
_OF_IMAGES = ("image_max_pixels", "image_resolution", "max_pixels", "image_size")
_FROZEN = ("freeze_vit", "freeze_aligner", "freeze_vision_tower", "freeze_multi_modal_projector")


def _images(reading: Reading, scenario: Scenario) -> Iterator[Omission]:
    """The images of a file's rows, where the answer is about the language model alone."""
    said = [key for key in _OF_IMAGES if reading.own.get(key)] + [
        key for key in _FROZEN if reading.own.get(key) is False
    ]
    reads_images = any(
        name.endswith("ForConditionalGeneration")
        for name in scenario.model.get("architectures") or ()
    )
    if said and reads_images and not scenario.images:
        yield Omission(f"images ({said[0]})", None, decides=True)


def _outliers(scenario: Scenario) -> Iterator[Omission]:
    """1 % of the columns of each quantized layer's inputs, which LLM.int8 keeps in 16 bits where a value reaches 6.

    As the note of :func:`dryfit.step.quantized.quantization_notes` counts them, for decoders without experts.
    """
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    layers, hidden, inner, heads = sizes = [size(scenario.model, name) for name in names]
    if scenario.method != "qlora" or scenario.quantization.type != "int8" or not all(sizes):
        return
    wide = heads * size(scenario.model, "head_dim", hidden // heads)
    inputs = layers * (
        5 * hidden + wide + inner
    )  # query, key, value, gate and up; the output's; down
    yield Omission("columns that LLM.int8 keeps in 16 bits", inputs * scenario.tokens * 2 // 100)


def of_older_tools(
    readings: Iterable[Reading],
    scenario: Scenario,
    usable_bytes: int,
    traced: Callable[[Scenario], int],
) -> Iterator[str]:
    """Which older version of a tool takes a step that does not fit, where its file says nothing, in a sentence.

    The verdict is about the present version. A file that runs with an older one is told here what to set.

    ``usable_bytes``: what the GPU has for the step. ``traced``: what another step needs, in bytes. It may refuse one by
    a :class:`UserError`.
    """
    for reading in readings:
        own = {
            name: value
            for name, value in reading.older.items()
            if _as_read(scenario, reading, name)
        }
        if not own:
            continue
        with suppress(UserError):  # the older defaults don't go with what else is asked
            needed = traced(scenario.changed(**own))
            if needed > usable_bytes:
                how = " and ".join(_OLDER[name] for name in own)
                yield (
                    f"with {reading.older_is}, whose defaults are {how}, the step needs {gib(needed)} and does not fit;"
                    f" the file leaves {', '.join(own)} open"
                )


def of_an_older_loss(
    readings: Iterable[Reading], scenario: Scenario, trace: Mapping[str, Any], usable_bytes: int
) -> Iterator[str]:
    """That the step of a file does not fit with an older transformers, whose loss copied the logits once more in fp32.

    ``ForCausalLMLoss`` made its shifted logits contiguous until pull request 35646 of January 2025.
    """
    if not list(readings) or scenario.loss != "full" or scenario.aim.trainer:
        return
    more = _more_at_the_loss(4, scenario, trace)
    if more and trace["required_bytes"] + more > usable_bytes:
        needed = gib(trace["required_bytes"] + more)
        copies = "with transformers before 4.49, whose loss copies the logits once more"
        yield f"{copies}, the step needs {needed} and does not fit"


_OLDER = {
    "gradient_checkpointing": "no checkpointing",
    "loss": "whole logits",
    "precision": "weights in fp32",
}


def _as_read(scenario: Scenario, reading: Reading, name: str) -> bool:
    return name in reading.fields and getattr(scenario, name) == reading.fields[name]


def bound_bytes(kind: str | None, scenario: Scenario, answer: Mapping[str, Any]) -> int | None:
    """At most so many bytes; None where nothing can be said.

    ``kind``: what the setting touches: ``states``, ``activations``, ``logits``, ``gradients``, ``frozen`` (gradients
    and states), ``int8``, ``head_fp32``, ``masters`` (fp32 copies and states), ``liger_loss``, ``pair_logits`` (whole
    logits of a loss that compares answers), ``logits N`` (N bytes for each of them), ``evaluation N`` (N rows without
    gradients), ``evaluation N M`` (M bytes for each of their logits), ``bytes N``, ``unit`` (all weights and all
    gradients, gathered), ``gradient_shards`` (this GPU's gradients in the dtype of what is trained), ``rows`` (rows of
    the model's own length instead), ``experts N`` (those of 16 bits in N bits instead), ``expert_adapters`` (of each
    expert's layers), ``step`` (all that is not resident), ``reference`` (the weights of a second model), ``whole`` (all
    weights while they load), ``vllm N`` and ``vllm N sleeps`` (vLLM with that part of the card), ``shared vllm N`` and
    ``shared vllm standby`` (Unsloth's, which has the one copy of the weights).
    """
    shown = answer.get("trace") or answer.get("analytic")
    if kind is None or not shown:
        return None
    parts = shown["components"]
    if kind == "states":
        return parts.get("optimizer_states", 0)
    if kind.startswith("evaluation "):
        return _evaluation_bytes(*map(int, kind.split()[1:]), scenario=scenario, shown=shown)
    if kind.startswith("bytes "):
        return int(kind.rpartition(" ")[2])
    if kind.startswith("logits "):
        return _more_at_the_loss(int(kind.rpartition(" ")[2]), scenario, shown)
    if kind == "pair_logits":
        return _whole_logits_bytes(scenario, shown)
    if kind == "liger_loss":
        return _liger_loss_bytes(scenario)
    if kind == "unit":
        whole = shown.get("parameters"), shown.get("trainable_parameters")
        half = scenario.autocast_precision or scenario.precision != "fp32"
        return (
            sum(whole) * (2 if half else 4)
            if all(isinstance(count, int) for count in whole)
            else None
        )
    if kind == "gradient_shards":
        return _gradient_shard_bytes(scenario, shown)
    if kind == "rows":
        return _longer_rows_bytes(scenario, shown)
    if kind == "expert_adapters":
        return _expert_adapter_bytes(scenario)
    if kind.startswith("experts "):
        return _packed_expert_bytes(int(kind.rpartition(" ")[2]), scenario, parts)
    if kind == "whole":
        numbers = shown.get("parameters")
        width = 2 if scenario.autocast_precision or scenario.weight_precision != "fp32" else 4
        return (
            max(numbers * width - shown["peak_allocated_bytes"], 0)
            if isinstance(numbers, int)
            else None
        )
    if kind == "reference":
        return _reference_bytes(scenario, shown)
    if kind.startswith("vllm "):
        return _vllm_bytes(float(kind.split()[1]), kind.endswith("sleeps"), scenario, shown)
    if kind.startswith("shared vllm "):
        return _shared_vllm_bytes(kind.split()[2], scenario, shown)
    if kind == "gradients":
        return parts.get("gradients", 0)
    if kind == "activations":
        return parts.get("activations", 0)
    if kind == "logits":
        return parts.get("logits_and_loss", 0)
    if (
        kind == "masters"
    ):  # 8 bytes a number beside states of 4 bytes in bf16: as much again in fp32, and the copy
        return 2 * parts.get("optimizer_states", 0)
    if kind == "frozen":
        return parts.get("optimizer_states", 0) + parts.get("gradients", 0)
    if kind == "step":
        return shown["peak_allocated_bytes"] - shown["resident_bytes"]
    try:
        counts = describe(scenario.model).parameter_counts()
    except NotDescribed:
        return None
    if kind == "int8":
        return counts["linear"]
    return 2 * (counts["embeddings"] + counts.get("output_head", 0))


def _gradient_shard_bytes(scenario: Scenario, shown: Mapping[str, Any]) -> int | None:
    """What FSDP1 with offload has on a GPU at the end of backward, which FSDP2 has given to the host.

    It copies each gradient's shard to the host and keeps its own, cast to the dtype of the weights, until backward is
    over (torch 2.13 distributed/fsdp/_runtime_utils.py, ``_accumulate_sharded_grad``; ``prepare_gradient_for_optim``
    lets it go). What is trained has fp32 under autocast, as accelerate casts it.
    """
    numbers = shown.get("trainable_parameters")
    if not isinstance(numbers, int):
        return None
    width = 4 if scenario.autocast_precision or scenario.weight_precision == "fp32" else 2
    return -(-numbers // scenario.parallel.gpus) * width


def _longer_rows_bytes(scenario: Scenario, shown: Mapping[str, Any]) -> int | None:
    """How much more rows as long as the model takes them need: what is not resident, by tokens.

    Attention that keeps its scores grows by their square.
    """
    longest = scenario.size("max_position_embeddings")
    if not longest or longest <= scenario.sequence_length:
        return 0
    times = longest / scenario.sequence_length
    more = times**2 if scenario.attention == "eager" else times
    return round((more - 1) * (shown["peak_allocated_bytes"] - shown["resident_bytes"]))


def _packed_expert_bytes(bits: int, scenario: Scenario, parts: Mapping[str, int]) -> int | None:
    """How much less experts take in 8 bits, or in 4 and a byte for each 64 weights.

    Where the closed form does not know the model: all dense weights, of which experts are nearly all.
    """
    width = 4 if scenario.weight_precision == "fp32" else 2
    try:
        numbers = describe(scenario.model).parameter_counts().get("experts", 0)
    except NotDescribed:
        numbers = parts.get(weights(scenario.weight_precision), 0) // width
    return numbers * width - (numbers * 33 // 64 if bits == 4 else numbers)


def _expert_adapter_bytes(scenario: Scenario) -> int | None:
    """At most what adapters of all experts take: weights, gradients and two states in fp32."""
    names = ("num_hidden_layers", "num_local_experts", "hidden_size", "intermediate_size")
    layers, count, hidden, inner = sizes = [scenario.size(name) for name in names]
    if not all(sizes) or not scenario.lora:
        return None
    return layers * count * scenario.lora.rank * (hidden + 2 * inner + inner + hidden) * 16


def _whole_logits_bytes(scenario: Scenario, trace: Mapping[str, Any]) -> int | None:
    """What DPO's whole logits add to the peak (TRL 1.5, trl/trainer/dpo_trainer.py).

    The logits are copied without their last position. Backward holds this copy, the gradients of the chosen logits and
    of their logsumexp, and the gradient of the slice. In 16 bits log_softmax's result is kept besides.
    """
    half = scenario.autocast_precision or scenario.precision != "fp32"
    return _more_at_the_loss(5 * 2 if half else 4 * 4, scenario, trace)


def _reference_bytes(scenario: Scenario, shown: Mapping[str, Any]) -> int | None:
    """What a second model's weights take of one GPU; nothing with adapters, which are turned off instead."""
    numbers, parallel = shown.get("parameters"), scenario.parallel
    if scenario.method != "full":
        return 0
    if not isinstance(numbers, int) or parallel.meshed:
        return None
    if parallel.zero_stage == 3 and scenario.zero_settings.offload_param == "cpu":
        return 0
    cast = parallel.zero_stage and scenario.autocast_precision
    width = 2 if cast or scenario.weight_precision != "fp32" else 4
    return numbers * width // (parallel.gpus if WEIGHTS in parallel.kind.divides else 1)


def _vllm_bytes(
    share: float, sleeps: bool, scenario: Scenario, shown: Mapping[str, Any]
) -> int | None:
    """How far vLLM on the same card raises what a training of several GPUs needs.

    It takes its share of the whole card. Where it sleeps it gives all back for the update, and wakes its weights when
    they are synced. For adapters under ZeRO-3 TRL gathers the whole model to merge them
    (``trl/generation/vllm_generation.py``, ``sync_weights`` and ``_iter_named_params``, 1.16).
    """
    gpu = named(scenario.gpu) if scenario.gpu is not None else None
    if gpu is None or not isinstance(shown.get("parameters"), int):
        return None
    taken, weights, peak = (
        int(share * gpu.total_bytes),
        2 * shown["parameters"],
        shown["peak_allocated_bytes"],
    )
    trainer = shown["resident_bytes"] + _states_bytes(shown)
    merges = weights if scenario.parallel.zero_stage == 3 and scenario.method != "full" else 0
    generating, syncing = trainer + taken, trainer + (weights if sleeps else taken) + merges
    return max(generating, syncing, peak + (0 if sleeps else taken)) - peak


def _shared_vllm_bytes(share: str, scenario: Scenario, shown: Mapping[str, Any]) -> int | None:
    """How far Unsloth's vLLM raises the need: adapters and their states lie beside its share, and the update does.

    It has the one copy of the weights. In standby it gives all else back for the update, and its share is Unsloth's own
    for a card's size.
    """
    gpu = named(scenario.gpu) if scenario.gpu is not None else None
    numbers = shown.get("trainable_parameters")
    if gpu is None or not isinstance(numbers, int):
        return None
    sizes = read_yaml(data_path("unsloth.yaml"))["standby"]
    part = (
        next(part for gibs, part in sizes if gpu.total_bytes >= gibs * GIB)
        if share == "standby"
        else float(share)
    )
    taken, adapters, peak = int(part * gpu.total_bytes), 4 * numbers, shown["peak_allocated_bytes"]
    weights = max(shown["resident_bytes"] - adapters, 0)
    generating = adapters + _states_bytes(shown) + taken
    return max(generating, peak + (0 if share == "standby" else max(taken - weights, 0))) - peak


def _states_bytes(shown: Mapping[str, Any]) -> int:
    return max(
        parts.get("optimizer_states", 0)
        for parts in (shown.get("components_by_phase") or {"": {}}).values()
    )


def _orpo_bytes(scenario: Scenario, answer: Mapping[str, Any]) -> int | None:
    """What ORPO's whole logits add to those of a supervised step (TRL 1.16, trl/experimental/orpo/orpo_trainer.py).

    Three losses read them: that of the chosen answers, the answers' log-probabilities without the last position, and
    their gradients. Each may hold a copy in 16 bits. On one GPU TRL's own step was traced 2 bytes a logit above the
    supervised one, and its allocator needed up to 5.
    """
    shown = answer.get("trace")
    return _more_at_the_loss(3 * 2, scenario, shown) if shown else None


def _liger_loss_bytes(scenario: Scenario) -> int | None:
    """At most what Liger's fused loss holds beside a chunked loss of a few tokens.

    It computes gradients in its forward pass. Those of the hidden states wait for backward, and those of the head's
    weight too where it is trained. A chunk has logits, and in older versions their fp32 copy. There are as many chunks
    as the hidden size fits into the vocabulary, each a power of two of tokens and at most all of them
    (liger_kernel/ops/fused_linear_cross_entropy.py, 0.8.5).
    """
    vocabulary, hidden = size(scenario.model, "vocab_size"), size(scenario.model, "hidden_size")
    if not vocabulary or not hidden:
        return None
    width = 2 if scenario.autocast_precision or scenario.precision != "fp32" else 4
    chunk = -(-scenario.tokens // -(-vocabulary // hidden))
    logits = min(1 << (chunk - 1).bit_length(), scenario.tokens) * vocabulary * (width + 4)
    head = vocabulary * hidden * 4 if scenario.method == "full" else 0
    return logits + scenario.tokens * hidden * width + head


def _more_at_the_loss(width: int, scenario: Scenario, trace: Mapping[str, Any]) -> int | None:
    """How far the peak rises if so many bytes for each logit are alive between forward and backward."""
    phases, vocabulary = trace.get("phases"), size(scenario.model, "vocab_size")
    if not phases or not vocabulary:
        return None
    whole = scenario.tokens * scenario.aim.texts_in_a_row * vocabulary * width
    return max(
        max(phases.get("forward", 0), phases.get("backward", 0))
        + whole
        - trace["peak_allocated_bytes"],
        0,
    )


def _evaluation_bytes(
    rows: int, width: int | None = None, *, scenario: Scenario, shown: Mapping[str, Any]
) -> int | None:
    """By how much a pass of so many rows without gradients needs more than the step: weights and states, and logits.

    ``width``: bytes for each logit. Without it the loss is computed in fp32: in 16 bits the logits are there, their
    copy in fp32, and its log_softmax.
    """
    vocabulary = size(scenario.model, "vocab_size")
    if not vocabulary or scenario.loss != "full":
        return None
    half = scenario.autocast_precision or scenario.precision != "fp32"
    logits = (
        rows * scenario.sequence_length * vocabulary * (width or (2 + 4 + 4 if half else 4 + 4))
    )
    return max(
        shown["resident_bytes"] + _states_bytes(shown) + logits - shown["peak_allocated_bytes"], 0
    )
