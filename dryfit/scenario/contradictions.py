"""Fields of a scenario that don't go together: what excludes what, why, and what to write. The one table.

A row's ``wrong`` takes a :class:`View`. Where it holds, the row's texts are made, with the view's values for ``{...}``;
``change`` is the YAML of the fields that would be right.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import yaml

from dryfit.common.errors import UserError
from dryfit.scenario.description import MOST
from dryfit.scenario.generation import CONTRADICTIONS as OF_GENERATION
from dryfit.scenario.generation import OF_ANSWERS, Generation
from dryfit.scenario.model import KERNEL_PACKAGES
from dryfit.scenario.objectives import SUPERVISED
from dryfit.scenario.optimizers import OPTIMIZERS
from dryfit.scenario.strategies import NONE

View = SimpleNamespace  # a scenario's fields, and what follows from them


class Only(NamedTuple):
    """What goes with something, and why nothing else does."""

    allowed: Any
    why: str


class Contradiction(NamedTuple):
    """``field`` is the one to change, under which its value is shown."""

    wrong: Callable[[View], Any]
    field: str
    problem: str
    allowed: str
    change: str


def _sizes(zero: Any) -> list[Any]:
    return [
        zero.reduce_bucket_size,
        zero.stage3_prefetch_bucket_size,
        zero.stage3_param_persistence_threshold,
    ]


# What this table asks of the loop around a training's step.
_LOOP = (
    "device",
    "early_stopping_patience",
    "keep",
    "on_out_of_memory",
    "validate_every_steps",
)


def _view(scenario: Any, loop: Mapping[str, Any]) -> View:
    """A scenario's fields, those of its parallel and quantization, and the loop's settings."""
    parallel, lora, quantization = scenario.parallel, scenario.lora, scenario.quantization
    lengths = {"previous_sequence_length": scenario.previous_sequence_length or 0}
    lengths["sequence_length"] = scenario.sequence_length
    longest = max(lengths, key=lambda name: (lengths[name], name))
    gpu = scenario.gpu if isinstance(scenario.gpu, Mapping) else {}
    mixed = "autocast" if scenario.autocast else "precision"
    return View(
        **{**vars(scenario), "zero": parallel.zero_stage},
        **asdict(parallel),
        **asdict(scenario.preference),
        **asdict(scenario.generation),
        steps=scenario.steps_per_generation,
        **asdict(scenario.versions),
        answer=scenario.completion_length,
        beyond=scenario.sequence_length - (scenario.generation.max_model_length or 0),
        half_length=max(scenario.sequence_length // 2, 1),
        sharded=parallel.sharded,
        sizes_in_words=any(
            isinstance(size, str) and size != "auto" for size in _sizes(scenario.zero)
        ),
        weights_on_host=scenario.zero.offload_param == "cpu",
        several=max(parallel.gpus, 2),
        meshed=parallel.meshed,
        is_mixed=scenario.mixed,
        has_wider_states=scenario.has_wider_states,
        trained_dtype=scenario.trained_dtype,
        half=scenario.precision.removesuffix("-mixed"),
        compute=scenario.compute_precision,
        weights=scenario.weight_precision,
        cast=scenario.autocast_precision,
        mixed=mixed,
        mixed_value=getattr(scenario, mixed),
        mixed_in_bf16=str(getattr(scenario, mixed)).replace("fp16", "bf16"),
        dropout=lora.dropout if lora else 0,
        odd_rank=_odd_rank(lora),
        storage=quantization.storage if quantization else None,
        packed_experts=scenario.experts.quantized,
        experts_on_host=scenario.experts.offload == "host",
        router_loss=scenario.experts.router_loss,
        family=scenario.model.get("model_type"),
        int8=bool(quantization) and quantization.type == "int8",
        of_4bit=quantization and (quantization.storage != "uint8" or quantization.compute),
        longest=longest,
        length=lengths[longest],
        limit=scenario.size("max_position_embeddings"),
        rows=scenario.size("hidden_size") or MOST,
        gpu_kind=next((f"{key}: {value}" for key, value in gpu.items() if key != "count"), ""),
        gpu_count=gpu.get("count", parallel.gpus),
        strategy_title=parallel.kind.title,
        fsdp=parallel.kind.fsdp,
        trained=parallel.kind.trained,
        aim=scenario.aim,
        **{key: loop.get(key) for key in _LOOP},
    )


def _odd_rank(lora: Any) -> int | None:
    """The first rank of adapters that is odd; None without one."""
    if lora is None:
        return None
    ranks = [lora.rank, *(lora.rank_pattern or {}).values()]
    return next((rank for rank in ranks if rank % 2), None)


_APART = "don't go together"
# Where each number is updated for itself tensors may be cut anywhere.
_CUT_ANYWHERE = ", ".join(name for name, one in OPTIMIZERS.items() if one.elementwise)
# Those whose states can be wider than what they train.
_WITH_WIDER_STATES = "adamw"
# What TRL's trainers leave no choice about, by field: what goes with them, and why.
_BY_TRL = {
    "loss": Only(("full",), "the objective is the loss"),
    "packing": Only(("none",), "its rows are not packed"),
    "loop": Only(("trainer",), "TRL's trainer is the loop"),
    "use_cache": Only((False,), "TRL's trainers keep no keys and values"),
    "activation_offload": Only(
        (False,), "TRL's way of it runs on streams of a GPU, which are not followed"
    ),
    "kbit_preparation": Only(
        ("none",), "TRL's trainers prepare a 4-bit base themselves, or not at all"
    ),
    "adapter_precision": Only(
        ("fp32",), "TRL casts the adapters itself: bf16 over a 4-bit base, else fp32"
    ),
    "optimizer_state_precision": Only(
        (None,), "TRL makes the optimizer, whose states have the dtype of what is trained"
    ),
    "optimizer": Only(
        tuple(name for name, one in OPTIMIZERS.items() if one.in_trl),
        "TRL makes the optimizer, and this one is not predicted in its trainers",
    ),
}


def _by_trl(field: str) -> Contradiction:
    allowed, why = _BY_TRL[field]
    as_written = ["null" if word is None else str(word).lower() for word in allowed]
    words = ", ".join(as_written)
    return Contradiction(
        lambda s: s.aim.trainer and getattr(s, field) not in allowed,
        field,
        f"`objective: {{objective}}` and `{field}: {{{field}}}` {_APART}: {why}.",
        f"{words}; or objective sft",
        f"{field}: {as_written[0]}",
    )


# What goes with images in the rows.
_WITH_IMAGES = {
    "loss": Only("full", "the model's own loss is the one that is known with images"),
    "packing": Only("none", "packed rows hold text"),
    "objective": Only(
        SUPERVISED, "TRL's trainers would prepare the images themselves, which is not predicted"
    ),
    "previous_sequence_length": Only(None, "each row has its images"),
}


def _with_images(field: str) -> Contradiction:
    allowed, why = _WITH_IMAGES[field]
    word = "null" if allowed is None else allowed
    return Contradiction(
        lambda s: s.images and getattr(s, field) != allowed,
        field,
        f"`images` and `{field}: {{{field}}}` {_APART}: {why}.",
        f"{word}; or images null",
        f"{field}: {word}",
    )


def _of_generation(row: tuple[Any, ...]) -> Contradiction:
    wrong, *texts = row
    return Contradiction(lambda s: s.generation != _NOTHING_SAID and wrong(s), *texts)


def _of_answers(row: tuple[Any, ...]) -> Contradiction:
    wrong, *texts = row

    def said(s):
        return s.aim.trainer or s.reference or s.reward_model or s.teacher or s.engine != "none"

    return Contradiction(lambda s: said(s) and wrong(s), *texts)


_NOTHING_SAID = Generation()
# What no step can be.
STEP = (
    *map(_by_trl, _BY_TRL),
    *map(_with_images, _WITH_IMAGES),
    Contradiction(
        lambda s: (
            s.compile != "none"
            and (s.fsdp == 1 or s.zero or s.aim.trainer or (s.fsdp == 2 and s.compile == "model"))
        ),
        "compile",
        "`compile: {compile}` is predicted for supervised fine-tuning on one GPU, with DDP, and by layers with FSDP2.",
        "none; layers with objective sft and strategy fsdp2; or strategy none, ddp",
        "compile: none",
    ),
    Contradiction(
        lambda s: s.compile_mode != "default" and s.compile == "none",
        "compile_mode",
        "`compile_mode: {compile_mode}` and `compile: none` don't go together: nothing is compiled.",
        "default; or compile model, layers",
        "compile_mode: default",
    ),
    Contradiction(
        lambda s: s.compile_mode in ("reduce-overhead", "max-autotune") and s.strategy != "none",
        "compile_mode",
        "`compile_mode: {compile_mode}` captures CUDA graphs, which are followed on one GPU.",
        "default, max-autotune-no-cudagraphs; or strategy none",
        "compile_mode: default",
    ),
    Contradiction(
        lambda s: (
            s.compile_mode in ("reduce-overhead", "max-autotune") and s.gradient_accumulation > 1
        ),
        "compile_mode",
        "`compile_mode: {compile_mode}` and `gradient_accumulation: {gradient_accumulation}` don't go"
        " together: CUDA graphs overwrite the first micro-batch's gradients, and PyTorch stops.",
        "default, max-autotune-no-cudagraphs; or gradient_accumulation 1",
        "compile_mode: default",
    ),
    Contradiction(
        lambda s: s.kernels == "packages" and s.packages == (),
        "packages",
        "`kernels: packages` and `packages: []` don't go together: no package is left whose kernels could run.",
        "null, all that the model's code asks for; or some of "
        f"{', '.join(KERNEL_PACKAGES)}; or kernels transformers",
        "packages: null",
    ),
    Contradiction(
        lambda s: set(s.packages or ()) - set(KERNEL_PACKAGES),
        "packages",
        "`packages` names a package whose kernels are not known here.",
        f"a list of {', '.join(KERNEL_PACKAGES)}",
        "packages: [fla]",
    ),
    Contradiction(
        lambda s: s.kernels == "liger" and s.loss != "liger",
        "loss",
        "`kernels: liger` and `loss: {loss}` don't go together: Liger's patch brings its fused loss.",
        "liger; or kernels transformers",
        "loss: liger",
    ),
    Contradiction(
        lambda s: s.packages and (s.aim.trainer or s.images or s.sharded or s.zero),
        "packages",
        "`packages` are followed for supervised fine-tuning on text, on one GPU and with DDP.",
        "null or []; or objective sft and strategy none or ddp",
        "packages: []",
    ),
    Contradiction(
        lambda s: (
            s.kernels != "transformers" and (s.aim.trainer or s.images or s.sharded or s.zero)
        ),
        "kernels",
        "`kernels: {kernels}` is predicted for supervised fine-tuning on text, on one GPU and with DDP.",
        "transformers; or objective sft and strategy none or ddp",
        "kernels: transformers",
    ),
    Contradiction(
        lambda s: s.images and s.strategy != NONE,
        "parallel",
        "`images` and `parallel.strategy: {strategy}` are not predicted together.",
        "strategy: none; or images null",
        "parallel: {{strategy: none, gpus: 1}}",
    ),
    Contradiction(
        lambda s: s.aim.trainer and (s.meshed or (s.strategy != NONE and not s.aim.in_pairs)),
        "parallel",
        "`objective: {objective}` is not predicted with this `parallel` (strategy {strategy}, {gpus} GPUs).",
        "strategy: none; or objective sft; dpo and orpo with ddp, fsdp1, fsdp2 and zero",
        "parallel: {{strategy: none, gpus: 1}}",
    ),
    Contradiction(
        lambda s: s.reference == "adapter_off" and s.method == "full",
        "preference",
        f"`preference.reference: adapter_off` and `method: full` {_APART}: there is no adapter to turn off.",
        "model, precomputed, null",
        "preference: {{reference: model}}",
    ),
    *map(_of_answers, OF_ANSWERS),
    *map(_of_generation, OF_GENERATION),
    Contradiction(
        lambda s: s.vllm and not re.fullmatch(r"0\.(2[2-9]|3[01])(\.\d+)?", s.vllm),
        "versions",
        "`versions.vllm: {vllm}` is no version whose rules were read.",
        "0.22.0 to 0.31.0",
        "versions: {{vllm: 0.31.0}}",
    ),
    Contradiction(
        lambda s: s.aim.trainer and s.answer >= s.sequence_length,
        "preference",
        "`preference.completion_length: {answer}` leaves no token of `sequence_length: {sequence_length}` for the"
        " prompt.",
        "1 to sequence_length - 1, or null",
        "preference: {{completion_length: {half_length}}}",
    ),
    Contradiction(
        lambda s: s.micro_batch < s.aim.least_rows,
        "micro_batch",
        "TRL refuses `objective: kto` with one row at a time: it estimates its KL term from the other rows.",
        "2 or more",
        "micro_batch: 2",
    ),
    Contradiction(
        lambda s: s.method == "qlora" and s.is_mixed,
        "precision",
        f"`precision: {{precision}}` and `method: qlora` {_APART}: mixed precision casts fp32 weights in each step, and"
        " a quantized base has none. The precision is that of the weights that are not quantized; `autocast` may be set"
        " besides.",
        "fp32, fp16, bf16",
        "precision: {half}",
    ),
    Contradiction(
        lambda s: s.is_mixed and s.autocast not in (None, s.half),
        "autocast",
        "`precision: {precision}` and `autocast: {autocast}` contradict each other.",
        "autocast: {half}, or leave it out",
        "autocast: {half}",
    ),
    Contradiction(
        lambda s: s.attention == "flash" and s.compute == "fp32",
        "attention",
        f"`attention: flash` and `precision: fp32` {_APART}: the flash kernels take 16-bit tensors only.",
        "eager, sdpa, mem_efficient; or precision bf16",
        "attention: mem_efficient",
    ),
    Contradiction(
        lambda s: s.packing != "none" and s.attention == "flash",
        "attention",
        f"`packing: {{packing}}` and `attention: flash` {_APART}: the flash kernels take no mask.",
        "eager, sdpa, mem_efficient; or packing none",
        "attention: sdpa",
    ),
    Contradiction(
        lambda s: s.packing == "shared_prefix" and s.dropout,
        "lora",
        f"`packing: shared_prefix` and `lora.dropout` {_APART}: all rows of a pack would share the noise on their"
        " prefix.",
        "lora.dropout 0.0; or packing rows, where each row has its own",
        "packing: rows",
    ),
    Contradiction(
        lambda s: s.lora and s.lora.needs_floats and s.method == "qlora",
        "lora",
        f"`lora.initialization: {{lora.initialization}}` and `method: qlora` {_APART}: PEFT makes these factors out of"
        " weights in floating point alone.",
        "default, gaussian, olora; or method lora",
        "lora: {{initialization: olora}}",
    ),
    Contradiction(
        lambda s: s.lora and s.lora.dora and s.int8,
        "quantization",
        f"`lora.dora` and `quantization.type: int8` {_APART}: PEFT unpacks the layers to find their outputs' lengths,"
        " and bitsandbytes has no scales for its products afterwards (peft 0.21, bitsandbytes 0.50).",
        "nf4, fp4; or dora false",
        "quantization: {{type: nf4}}",
    ),
    Contradiction(
        lambda s: s.lora and s.lora.dora and s.lora.initialization == "mica",
        "lora",
        f"`lora.dora` and `lora.initialization: mica` {_APART}: each is a variant of LoRA to PEFT, and it has no both.",
        "another initialization; or dora false",
        "lora: {{initialization: default}}",
    ),
    Contradiction(
        lambda s: s.lora and s.lora.initialization == "orthogonal" and s.odd_rank,
        "lora",
        "`lora.initialization: orthogonal` needs an even rank, and there is {odd_rank}.",
        "even ranks, those of rank_pattern too; or another initialization",
        "lora: {{initialization: default}}",
    ),
    Contradiction(
        lambda s: s.packing != "none" and s.attention_mask == "padding",
        "attention_mask",
        f"`packing: {{packing}}` and `attention_mask: padding` {_APART}: a pack has a mask of its own.",
        "none; or packing none",
        "attention_mask: none",
    ),
    Contradiction(
        lambda s: s.attention_mask == "padding" and s.attention == "flash",
        "attention",
        f"`attention_mask: padding` and `attention: flash` {_APART}: PyTorch's flash kernel takes no mask.",
        "eager, sdpa, mem_efficient",
        "attention: sdpa",
    ),
    Contradiction(
        lambda s: s.keeps_outputs and s.loop == "trainer",
        "keeps_outputs",
        "`keeps_outputs` says what a manual loop keeps, and `loop: trainer` keeps no outputs.",
        "loop: manual, or keeps_outputs: false",
        "loop: manual",
    ),
    Contradiction(
        lambda s: s.keeps_outputs and s.loss == "chunked",
        "keeps_outputs",
        "`keeps_outputs` is about the outputs of the batch before, and `loss: chunked` has none.",
        "loss: full, or keeps_outputs: false",
        "keeps_outputs: false",
    ),
    Contradiction(
        lambda s: s.platform == "windows" and s.attention == "flash",
        "attention",
        f"`platform: windows` and `attention: flash` {_APART}: PyTorch for Windows is built without FlashAttention.",
        "sdpa, eager or mem_efficient; or platform linux",
        "attention: sdpa",
    ),
    Contradiction(
        lambda s: s.previous_sequence_length is not None and s.loop == "trainer",
        "previous_sequence_length",
        "`previous_sequence_length` is the length of the outputs of the batch before, and `loop: trainer` keeps none.",
        "loop: manual, or leave previous_sequence_length out",
        "loop: manual",
    ),
    Contradiction(
        lambda s: s.previous_sequence_length is not None and s.loss == "chunked",
        "previous_sequence_length",
        "`previous_sequence_length` is the length of the outputs of the batch before, and `loss: chunked` has none.",
        "loss: full, or leave previous_sequence_length out",
        "previous_sequence_length: null",
    ),
    Contradiction(
        lambda s: s.activation_offload and (s.sharded or s.zero),
        "activation_offload",
        "`activation_offload` and `parallel.strategy: {strategy}` are not predicted together: gathered weights would go"
        " to the host too.",
        "activation_offload: false; or strategy ddp",
        "activation_offload: false",
    ),
    Contradiction(
        lambda s: s.bitsandbytes and not re.fullmatch(r"\d+(\.\d+){1,2}", s.bitsandbytes),
        "versions",
        "`versions.bitsandbytes: {bitsandbytes}` is no version.",
        "two or three numbers, such as 0.42.0",
        "versions: {{bitsandbytes: 0.42.0}}",
    ),
    Contradiction(
        lambda s: s.bitsandbytes and s.method != "qlora",
        "versions",
        f"`versions.bitsandbytes` and `method: {{method}}` {_APART}: only 4-bit layers differ between its versions.",
        "null; or method qlora",
        "versions: {{bitsandbytes: null}}",
    ),
    Contradiction(
        lambda s: s.use_cache and s.loss == "chunked",
        "use_cache",
        f"`use_cache` and `loss: chunked` {_APART}: the chunked loss keeps no outputs of the decoder.",
        "use_cache: false, or loss: full",
        "use_cache: false",
    ),
    Contradiction(
        lambda s: s.strategy == "none" and s.gpus > 1 and not s.meshed,
        "parallel",
        "`parallel.strategy: none` uses one GPU, and `gpus` says {gpus}.",
        "ddp (a whole model on each), fsdp1, fsdp2 (the model sharded); or gpus: 1",
        "parallel: {{strategy: fsdp2, gpus: {several}}}",
    ),
    Contradiction(
        lambda s: s.strategy != "none" and s.gpus == 1,
        "parallel",
        "`parallel.strategy: {strategy}` is for several GPUs, and `gpus` says 1.",
        "gpus: 2, 3, ...; or strategy: none",
        "parallel: {{strategy: {strategy}, gpus: 2}}",
    ),
    Contradiction(
        lambda s: s.offload != "none" and not s.sharded,
        "parallel",
        f"`parallel.offload: {{offload}}` and `parallel.strategy: {{strategy}}` {_APART}: only FSDP can keep its"
        " shards in the CPU's memory.",
        "offload: none; or strategy fsdp1, fsdp2",
        "parallel: {{strategy: {strategy}, gpus: {gpus}, offload: none}}",
    ),
    Contradiction(
        lambda s: s.offload != "none" and s.fsdp == 1,
        "parallel",
        "`parallel.offload: cpu` is predicted for FSDP2 alone. FSDP1 needs more: it keeps all gradients' shards on the"
        " GPU until the backward pass ends.",
        "strategy: fsdp2; or offload: none",
        "parallel: {{strategy: fsdp2, gpus: {several}, offload: cpu}}",
    ),
    Contradiction(
        lambda s: s.zero and s.sizes_in_words,
        "zero",
        "Sizes of `zero` are numbers of elements, or the word auto.",
        "0, 1, 2, ...; auto",
        "zero: {{reduce_bucket_size: auto}}",
    ),
    Contradiction(
        lambda s: s.zero in (1, 2) and s.weights_on_host,
        "zero",
        f"`zero.offload_param: cpu` and `parallel.strategy: {{strategy}}` {_APART}: stages 1 and 2 keep the"
        " weights whole.",
        "offload_param: none; or strategy zero3",
        "zero: {{offload_param: none}}",
    ),
    Contradiction(
        lambda s: not s.reshard_after_forward and s.zero,
        "parallel",
        f"`parallel.reshard_after_forward: false` and `parallel.strategy: {{strategy}}` {_APART}: ZeRO-3 gives gathered"
        " weights back, and ZeRO-2 does not shard them.",
        "reshard_after_forward: true; or strategy zero2, or fsdp2",
        "parallel: {{strategy: zero2, gpus: {gpus}}}",
    ),
    Contradiction(
        lambda s: not s.reshard_after_forward and not s.sharded and not s.zero,
        "parallel",
        f"`parallel.reshard_after_forward: false` and `parallel.strategy: {{strategy}}` {_APART}: nothing is sharded,"
        " so nothing is gathered that could be given back.",
        "reshard_after_forward: true; or strategy fsdp1, fsdp2",
        "parallel: {{strategy: {strategy}, gpus: {gpus}}}",
    ),
    Contradiction(
        lambda s: s.reduce_in_fp32 and s.fsdp != 2,
        "parallel",
        f"`parallel.reduce_in_fp32` and `parallel.strategy: {{strategy}}` {_APART}: FSDP2 alone is told the dtype"
        " of its sums here.",
        "reduce_in_fp32: false; or strategy fsdp2",
        "parallel: {{strategy: {strategy}, gpus: {gpus}}}",
    ),
    Contradiction(
        lambda s: s.gpus > s.gpu_count,
        "gpu",
        "`parallel.gpus: {gpus}` is more than `gpu` has.",
        "a count of {gpus} or more, or fewer `parallel.gpus`",
        "gpu: {{{gpu_kind}, count: {gpus}}}",
    ),
    Contradiction(
        lambda s: s.sharded and s.gpus > s.rows,
        "parallel",
        "`parallel.gpus: {gpus}` is too many: FSDP shards weights by rows, and this model's have {rows}, so"
        " further GPUs would stay empty.",
        "2 to {rows}",
        "parallel: {{strategy: {strategy}, gpus: {rows}}}",
    ),
    Contradiction(
        lambda s: s.float8 != "none" and s.qat != "none",
        "qat",
        f"`float8: {{float8}}` and `qat: {{qat}}` {_APART}: each exchanges the same layers.",
        "none; or float8 none",
        "qat: none",
    ),
    Contradiction(
        lambda s: (
            s.float8 != "none"
            and (
                s.method != "full"
                or s.fsdp == 1
                or s.zero
                or s.aim.trainer
                or s.images
                or (s.compile != "none" and not s.meshed and s.fsdp != 2)
            )
        ),
        "float8",
        "`float8: {float8}` is predicted for full fine-tuning on text: on one GPU without the compiler, with DDP and"
        " with FSDP2.",
        "none; or method full, strategy none, ddp, fsdp2",
        "float8: none",
    ),
    Contradiction(
        lambda s: (
            s.qat != "none"
            and (
                s.method != "full"
                or s.strategy != NONE
                or s.compile != "none"
                or s.aim.trainer
                or s.images
            )
        ),
        "qat",
        "`qat: {qat}` is predicted for full fine-tuning on text, on one GPU and without the compiler.",
        "none; or method full, strategy none, compile none",
        "qat: none",
    ),
    Contradiction(
        lambda s: s.float8_all_gather and (s.float8 != "tensorwise" or s.fsdp != 2),
        "parallel",
        "`parallel.float8_all_gather` gathers weights that `float8: tensorwise` casts, with FSDP2; this step has float8"
        " {float8} and strategy {strategy}.",
        "float8_all_gather: false; or float8 tensorwise and strategy fsdp2",
        "parallel: {{strategy: {strategy}, gpus: {gpus}, float8_all_gather: false}}",
    ),
    Contradiction(
        lambda s: s.packed_experts == "bitsandbytes" and s.method != "qlora",
        "experts",
        "`experts.quantized: bitsandbytes` packs experts as `quantization` says; this base is not quantized.",
        "none; or method qlora",
        "experts: {{quantized: none}}",
    ),
    Contradiction(
        lambda s: s.router_loss and s.loss != "full",
        "experts",
        f"`experts.router_loss` and `loss: {{loss}}` {_APART}: this loss runs past the model's own, which adds it.",
        "router_loss: false; or loss full",
        "loss: full",
    ),
    Contradiction(
        lambda s: s.packed_experts == "mxfp4" and s.family != "gpt_oss",
        "experts",
        "`experts.quantized: mxfp4` keeps what gpt-oss' files have packed, and this model is of the type {family}.",
        "none, bitsandbytes; or a model of the type gpt_oss",
        "experts: {{quantized: none}}",
    ),
    Contradiction(
        lambda s: s.method == "full" and (s.packed_experts != "none" or s.experts_on_host),
        "experts",
        f"`experts` and `method: full` {_APART}: packed experts, and those on the host, are frozen.",
        "method lora, qlora; or experts as they are",
        "experts: {{quantized: none, offload: none}}",
    ),
    Contradiction(
        lambda s: (
            (s.packed_experts != "none" or s.experts_on_host)
            and (s.strategy != NONE or s.aim.trainer or s.compile != "none")
        ),
        "experts",
        "`experts` are predicted for supervised fine-tuning on one GPU, without the compiler.",
        "experts: {{quantized: none, offload: none}}; or strategy none, objective sft, compile none",
        "experts: {{quantized: none, offload: none}}",
    ),
    Contradiction(
        lambda s: s.int8 and s.of_4bit,
        "quantization",
        "`storage` and `compute` are for 4-bit weights; those of LLM.int8 are stored as bytes, and compute in the dtype"
        " of their inputs.",
        "{{type: int8, storage: uint8, compute: null}}, or type nf4, fp4",
        "quantization: {{type: int8, storage: uint8, compute: null}}",
    ),
    Contradiction(
        lambda s: s.int8 and (s.sharded or s.zero),
        "quantization",
        f"`quantization.type: int8` and `parallel.strategy: {{strategy}}` {_APART}: LLM.int8 keeps each weight whole"
        " beside the parameter that {strategy_title} would shard.",
        "strategy ddp; or type nf4, fp4",
        "quantization: {{type: nf4}}",
    ),
    Contradiction(
        lambda s: s.fsdp == 1 and not s.int8 and s.storage not in (None, s.weights),
        "quantization",
        f"`parallel.strategy: fsdp1` and `quantization.storage: {{storage}}` {_APART}: FSDP1 puts all weights of a"
        " layer into one tensor, so that packed weights have to be stored in the dtype of the others.",
        "storage: {weights}; or strategy fsdp2",
        "quantization: {{storage: {weights}}}",
    ),
    Contradiction(
        lambda s: s.fsdp == 1 and s.kbit_preparation != "none" and s.weights != "fp32",
        "kbit_preparation",
        f"`parallel.strategy: fsdp1` and `kbit_preparation: {{kbit_preparation}}` {_APART}: FSDP1 puts all weights of a"
        " layer into one tensor, so that they need one dtype.",
        "none; or strategy fsdp2",
        "kbit_preparation: none",
    ),
    Contradiction(
        lambda s: s.sharded and s.loss not in (("full", "chunked") if s.zero == 3 else ("full",)),
        "loss",
        f"`loss: {{loss}}` and `parallel.strategy: {{strategy}}` {_APART}: this loss runs the output head outside the"
        " forward pass in which {strategy_title} has gathered its weights.",
        "full, or chunked with zero3; or strategy ddp",
        "loss: full",
    ),
    Contradiction(
        lambda s: s.has_wider_states and s.optimizer != _WITH_WIDER_STATES,
        "optimizer",
        "`optimizer: {optimizer}` and `optimizer_state_precision: fp32` don't go together where {trained_dtype} is"
        " trained: this optimizer decides itself what its states are.",
        f"{_WITH_WIDER_STATES}; or optimizer_state_precision null",
        f"optimizer: {_WITH_WIDER_STATES}",
    ),
    Contradiction(
        lambda s: s.has_wider_states and (s.zero or s.meshed),
        "optimizer_state_precision",
        "`optimizer_state_precision: fp32` and `parallel.strategy: {strategy}` are not predicted together.",
        "null; or strategy none, ddp, fsdp1, fsdp2",
        "optimizer_state_precision: null",
    ),
    Contradiction(
        lambda s: s.sharded and not OPTIMIZERS[s.optimizer].elementwise,
        "optimizer",
        f"`optimizer: {{optimizer}}` and `parallel.strategy: {{strategy}}` {_APART}: this optimizer takes whole"
        " tensors, and FSDP has sharded them.",
        f"{_CUT_ANYWHERE}; or strategy ddp",
        "optimizer: adamw",
    ),
    Contradiction(
        lambda s: s.zero and not OPTIMIZERS[s.optimizer].elementwise,
        "optimizer",
        "`optimizer: {optimizer}` and `parallel.strategy: {strategy}` are not predicted together: DeepSpeed steps one"
        " flat tensor, in which this optimizer would not find its weights.",
        f"{_CUT_ANYWHERE}; or strategy ddp",
        "optimizer: adamw",
    ),
    Contradiction(
        lambda s: s.zero and s.storage not in (None, "uint8") and s.cast not in (None, s.storage),
        "quantization",
        "`parallel.strategy: {strategy}`, `quantization.storage: {storage}` and `{mixed}: {mixed_value}` "
        f"{_APART}: DeepSpeed casts every floating weight to {{cast}}, which breaks 4-bit weights that are packed as"
        " {storage}.",
        "uint8, {cast}",
        "quantization: {{storage: {cast}}}",
    ),
    Contradiction(
        lambda s: s.zero == 3 and s.method != "qlora" and s.cast is None and s.weights != "fp32",
        "precision",
        "Under `parallel.strategy: zero3` transformers loads the weights in fp32 instead of `precision: {precision}`,"
        " unless mixed precision is on.",
        "autocast: {weights}, which `--{weights}` is; or precision: fp32",
        "autocast: {weights}",
    ),
    Contradiction(
        lambda s: s.method == "lora" and s.kbit_preparation == "trl",
        "kbit_preparation",
        "`kbit_preparation: trl` belongs to a quantized base: TRL casts embeddings and head only there.",
        "none, peft; or method qlora",
        "kbit_preparation: none",
    ),
    Contradiction(
        lambda s: s.limit and s.length > s.limit,
        "longest",
        "`{longest}` is beyond the {limit} positions of the model.",
        "1 to {limit}",
        "{longest}: {limit}",
    ),
)
# What can be predicted, and not trained.
TRAINING = (
    Contradiction(
        lambda s: s.compile != "none",
        "compile",
        "A compiled step can be predicted, and is not trained here.",
        "none",
        "compile: none",
    ),
    Contradiction(
        lambda s: s.kernels != "transformers",
        "kernels",
        "A step with `kernels: {kernels}` can be predicted, and is not trained here.",
        "transformers",
        "kernels: transformers",
    ),
    Contradiction(
        lambda s: s.images,
        "images",
        "A step with images can be predicted, and is not trained here.",
        "null",
        "images: null",
    ),
    Contradiction(
        lambda s: s.bitsandbytes,
        "versions",
        "A training takes the bitsandbytes that is installed; another version's layers can be predicted.",
        "null",
        "versions: {{bitsandbytes: null}}",
    ),
    Contradiction(
        lambda s: s.aim.trainer,
        "objective",
        "A step with `objective: {objective}` can be predicted. Supervised fine-tuning can be trained here, and TRL"
        " trains the others.",
        "sft",
        "objective: sft",
    ),
    Contradiction(
        lambda s: not s.trained,
        "parallel",
        "The memory of {strategy_title} can be predicted. FSDP2 and DDP can be trained.",
        "fsdp2, which shards the same; ddp",
        "parallel: {{strategy: fsdp2, gpus: {gpus}}}",
    ),
    Contradiction(
        lambda s: s.pipeline > 1 or s.expert > 1,
        "parallel",
        "The memory of `parallel.pipeline` and `parallel.expert` can be predicted. FSDP2, DDP, `tensor`, `context` and"
        " `replicate` can be trained.",
        "pipeline: 1, expert: 1",
        "parallel: {{strategy: fsdp2, gpus: {gpus}}}",
    ),
    Contradiction(
        lambda s: s.sequence_parallel or s.loss_parallel or s.float8_all_gather,
        "parallel",
        "Steps with `sequence_parallel`, `loss_parallel` or `float8_all_gather` can be predicted, and are not trained.",
        "false",
        "parallel: {{strategy: {strategy}, gpus: {gpus}}}",
    ),
    Contradiction(
        lambda s: s.reduce_in_fp32,
        "parallel",
        "A step with `parallel.reduce_in_fp32` can be predicted, and is not trained yet.",
        "reduce_in_fp32: false",
        "parallel: {{strategy: {strategy}, gpus: {gpus}}}",
    ),
    Contradiction(
        lambda s: s.offload != "none",
        "parallel",
        "A step with `parallel.offload: cpu` can be predicted, and is not trained yet.",
        "offload: none",
        "parallel: {{strategy: {strategy}, gpus: {gpus}}}",
    ),
    Contradiction(
        lambda s: (s.sharded or s.meshed) and s.cast == "fp16",
        "mixed",
        "fp16 under autocast needs its gradients scaled, which is not done for gradients that lie in parts on several"
        " GPUs.",
        "bf16, which needs no scale; or strategy ddp",
        "{mixed}: {mixed_in_bf16}",
    ),
    Contradiction(
        lambda s: s.device == "cpu" and not OPTIMIZERS[s.optimizer].on_cpu,
        "optimizer",
        f"`optimizer: {{optimizer}}` and `device: cpu` {_APART}: bitsandbytes has no kernel of it for the CPU.",
        "adamw, adamw_fused; or device: cuda",
        "optimizer: adamw",
    ),
    Contradiction(
        lambda s: s.gpus > 1 and s.on_out_of_memory == "halve",
        "on_out_of_memory",
        "A GPU that runs out of memory can't repeat its step: the other GPUs are already waiting for it.",
        "stop; or one GPU",
        "on_out_of_memory: stop",
    ),
    Contradiction(
        lambda s: s.keep == "best" and s.validate_every_steps is None,
        "keep",
        f"`keep: best` and `validate_every_steps: null` {_APART}: without a validation in between, the last step is all"
        " that there is to choose from.",
        "last, averaged; or a number of steps for validate_every_steps",
        "validate_every_steps: 50",
    ),
    Contradiction(
        lambda s: s.early_stopping_patience is not None and s.validate_every_steps is None,
        "early_stopping_patience",
        f"`early_stopping_patience: {{early_stopping_patience}}` and `validate_every_steps: null` {_APART}: without a"
        " validation in between, nothing says when to stop.",
        "null; or a number of steps for validate_every_steps",
        "validate_every_steps: 50",
    ),
    Contradiction(
        lambda s: s.early_stopping_patience is not None and s.keep == "averaged",
        "early_stopping_patience",
        f"`early_stopping_patience: {{early_stopping_patience}}` and `keep: averaged` {_APART}: a training that stops"
        " early never comes to the last steps, whose mean is kept.",
        "null; or keep: best",
        "early_stopping_patience: null",
    ),
)


def contradictions(
    scenario: Any,
    where: object,
    rows: Sequence[Contradiction] = STEP,
    loop: Mapping[str, Any] | None = None,
) -> Iterator[UserError]:
    """Contradictions of a scenario; with the settings of a training's ``loop``, ``where`` names each field."""
    view = _view(scenario, loop or {})
    shown = vars(view)
    for row in rows:
        if row.wrong(view):
            field = shown[row.field] if row.field in ("longest", "mixed") else row.field
            value = shown[field]
            yield UserError(
                row.problem.format(**shown),
                where=where if loop is None else f"{where}.{field}",
                found=asdict(value) if is_dataclass(value) else value,
                allowed=row.allowed.format(**shown),
                change=yaml.safe_load(row.change.format(**shown)),
            )
