"""Meshes that no step can have, with what divides and what to write.

A mesh divides GPUs by tensor, context, pipeline and replicate; FSDP2 shards among what is left. Which of them go
together is what the installed libraries combine: accelerate shards, replicates and divides tokens; transformers
divides matrices and experts, with and without FSDP2; torchtitan's plan for its models adds sequence and loss parallel;
DeepSpeed's Ulysses runs under its ZeRO; PyTorch's schedules run a pipeline.
"""

from collections.abc import Iterator
from math import gcd
from typing import Any

from dryfit.common.errors import UserError
from dryfit.scenario.divided_rows import (
    OF_TITAN,
    Problem,
    context,
    divides,
    sequence_and_loss,
    ulysses,
)
from dryfit.scenario.model import EXPERT_COUNTS
from dryfit.scenario.optimizers import OPTIMIZERS
from dryfit.scenario.strategies import AXES, DIVIDED, NONE, SCHEDULES, even_stages


def mesh_contradictions(scenario: Any, where: object) -> Iterator[UserError]:
    """What is wrong with a scenario's mesh; nothing where it has none."""
    parallel = scenario.parallel
    if parallel.pipelined and parallel.pipeline == 1:
        problems: Iterator[Problem] = _without_a_pipeline(parallel)
    elif parallel.by_titan and parallel.tensor == 1:
        problems = _without_matrices(parallel)
    elif not parallel.meshed:
        return
    else:
        problems = _problems(scenario)
    for problem in problems:
        value = getattr(scenario, problem.field)
        given = (
            {"parallel": {**parallel.written, **problem.change}}
            if problem.field == "parallel"
            else problem.change
        )
        yield UserError(
            problem.text,
            where=where,
            found=parallel.written if problem.field == "parallel" else value,
            allowed=problem.allowed,
            change=given,
        )


def _without_a_pipeline(parallel: Any) -> Iterator[Problem]:
    for name, plain, said in (("schedule", "1f1b", "1f1b"), ("stage_layers", None, "null")):
        if getattr(parallel, name) != plain:
            yield Problem(
                f"`parallel.{name}: {_listed(getattr(parallel, name))}` is of a pipeline, and `parallel.pipeline` says"
                " 1.",
                f"{name}: {said}; or pipeline: 2, 3, ...",
                {name: plain},
            )


def _without_matrices(parallel: Any) -> Iterator[Problem]:
    for name in OF_TITAN:
        if getattr(parallel, name):
            yield Problem(
                f"`parallel.{name}` divides what the GPUs of `tensor` would hold alike, and `parallel.tensor` says 1.",
                f"{name}: false; or tensor: 2, 4, ...",
                {name: False},
            )


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _problems(scenario: Any) -> Iterator[Problem]:
    parallel = scenario.parallel
    yield from _number_of_gpus(parallel)
    yield from _strategies(parallel)
    yield from _together(parallel)
    if parallel.tensor > 1:
        yield from _tensor(scenario)
    if parallel.by_titan:
        yield from sequence_and_loss(scenario)
    if parallel.ulysses > 1:
        yield from ulysses(scenario)
    if parallel.context > 1:
        yield from context(scenario)
    if parallel.pipeline > 1:
        yield from _pipeline(scenario)
    if parallel.expert > 1:
        yield from _expert(scenario)
    if (
        parallel.by_plan
        and not parallel.by_titan
        and parallel.reduce_in_fp32
        and scenario.compute_precision != "bf16"
    ):
        yield Problem(
            "`parallel.reduce_in_fp32: true` with a tensor or expert plan is transformers' `fsdp_mixed_precision`, and"
            f" gathers weights in bf16, and this step computes in {scenario.compute_precision}.",
            "reduce_in_fp32: false; or bf16",
            {"reduce_in_fp32": False},
        )
    yield from _other_fields(scenario)


def _number_of_gpus(parallel: Any) -> Iterator[Problem]:
    """A mesh whose product is not the number of GPUs."""
    said = " x ".join(
        f"{axis} {getattr(parallel, axis)}" for axis in AXES if _counts(parallel, axis)
    )
    if parallel.strategy != NONE and parallel.mesh > 1 and parallel.gpus % parallel.mesh:
        yield Problem(
            f"A mesh of {said} has {parallel.mesh} places, and `parallel.gpus: {parallel.gpus}` is no multiple.",
            f"gpus: {parallel.mesh}, {2 * parallel.mesh}, {3 * parallel.mesh}, ...;"
            f" {parallel.kind.title} shards among the rest",
            {"gpus": -(-parallel.gpus // parallel.mesh) * parallel.mesh},
        )
    if parallel.strategy == NONE and parallel.mesh != parallel.gpus:
        yield Problem(
            f"A mesh of {said or 'experts'} has {parallel.mesh} places, and `parallel.gpus` says {parallel.gpus}.",
            f"gpus: {parallel.mesh}; or strategy fsdp2, which shards among more",
            {"gpus": parallel.mesh} if parallel.mesh > parallel.gpus else {"strategy": DIVIDED},
        )


def _counts(parallel: Any, axis: str) -> bool:
    return axis != "expert" and getattr(parallel, axis) > 1


def _strategies(parallel: Any) -> Iterator[Problem]:
    named = [axis for axis in AXES if getattr(parallel, axis) > 1]
    if parallel.ulysses > 1:
        if not parallel.zero_stage:
            yield Problem(
                f"`parallel.ulysses: {parallel.ulysses}` needs DeepSpeed's ZeRO, whose attention exchanges the heads.",
                "strategy: zero2, zero3; or context, which goes with fsdp2",
                {"strategy": "zero3"},
            )
        if len(named) > 1:
            yield Problem(
                f"`parallel.ulysses: {parallel.ulysses}` can't be combined with {' and '.join(_others(named))}:"
                " accelerate leaves the groups to DeepSpeed, which has no others.",
                f"{', '.join(f'{axis}: 1' for axis in _others(named))}",
                dict.fromkeys(_others(named), 1),
            )
        return
    if parallel.strategy not in (NONE, DIVIDED):
        yield Problem(
            f"`parallel.{named[0]}` and `parallel.strategy: {parallel.strategy}` are not predicted together.",
            "strategy fsdp2, which shards among the rest; or none",
            {"strategy": DIVIDED},
        )
    for axis in named:
        if axis in ("context", "replicate", "expert") and parallel.strategy == NONE:
            yield Problem(
                f"`parallel.{axis}: {getattr(parallel, axis)}` needs `parallel.strategy: fsdp2`, which shards the model"
                " over these GPUs.",
                "strategy: fsdp2",
                {"strategy": DIVIDED},
            )
    if parallel.replicate > 1 and parallel.strategy == DIVIDED and parallel.gpus == parallel.mesh:
        alone = parallel.replicate == parallel.mesh
        yield Problem(
            f"`parallel.replicate: {parallel.replicate}` leaves no GPUs to shard among, and accelerate refuses"
            " replicas of what is not sharded.",
            "strategy ddp" if alone else "replicate: 1, or more GPUs",
            {"strategy": "ddp", "replicate": 1} if alone else {"replicate": 1},
        )


def _others(named: list[str]) -> list[str]:
    return [axis for axis in named if axis != "ulysses"]


# What the installed versions can't combine, and why.
_APART = (
    (
        "context",
        "tensor",
        "accelerate's tensor parallel imports a name that transformers 5.24 no longer has",
    ),
    ("context", "pipeline", "accelerate, whose context parallel this is, has no pipeline"),
    ("context", "expert", "accelerate, whose context parallel this is, divides no experts"),
    ("pipeline", "expert", "transformers refuses to send tokens to experts inside a pipeline"),
    ("pipeline", "replicate", "transformers refuses FSDP inside a pipeline"),
)


def _together(parallel: Any) -> Iterator[Problem]:
    for first, second, why in _APART:
        if getattr(parallel, first) > 1 and getattr(parallel, second) > 1:
            yield Problem(
                f"`parallel.{first}: {getattr(parallel, first)}` and `parallel.{second}: {getattr(parallel, second)}`"
                f" can't be combined: {why}.",
                f"{first}: 1; or {second}: 1",
                {second: 1},
            )
    if parallel.pipeline > 1 and parallel.strategy == DIVIDED:
        yield Problem(
            f"`parallel.pipeline: {parallel.pipeline}` and `parallel.strategy: fsdp2` can't be combined: transformers"
            " refuses FSDP inside a pipeline.",
            "strategy: none, with tensor x pipeline as many as gpus; or pipeline: 1",
            {"strategy": NONE, "gpus": parallel.pipeline * parallel.tensor, "replicate": 1},
        )
    if parallel.by_titan:
        return
    if parallel.by_plan and parallel.offload != "none":
        yield Problem(
            "`parallel.offload: cpu` is predicted for accelerate's FSDP2, not for transformers' with a tensor or expert"
            " plan.",
            "offload: none; or tensor and expert: 1",
            {"offload": "none"},
        )
    if parallel.by_plan and not parallel.reshard_after_forward:
        yield Problem(
            "`parallel.reshard_after_forward: false` is accelerate's; transformers' FSDP2 with a tensor or expert plan"
            " gives gathered weights back.",
            "reshard_after_forward: true; or tensor and expert: 1",
            {"reshard_after_forward": True},
        )


def _adapters(scenario: Any, axis: str, why: str) -> Iterator[Problem]:
    """Adapters on what an axis divides; ``why`` they don't go together, behind their names."""
    if scenario.method != "full":
        yield Problem(
            f"`parallel.{axis}` and `method: {scenario.method}` {why}",
            f"full; or {axis}: 1",
            {"method": "full"},
            "method",
        )


def _tensor(scenario: Any) -> Iterator[Problem]:
    parallel = scenario.parallel
    heads = scenario.size("num_attention_heads")
    keys = scenario.size("num_key_value_heads") or heads
    columns = scenario.size("intermediate_size")
    common = gcd(*(count for count in (heads, keys, columns) if count))
    for count, what in (
        (heads, "the attention heads"),
        (keys, "the heads of keys and values"),
        (columns, "the columns of the MLP"),
    ):
        yield from divides(parallel, "tensor", count, what, common)
    if (scenario.model.get("text_config") or scenario.model).get("tie_word_embeddings"):
        yield Problem(
            "The output head of this model is its embedding (`tie_word_embeddings`). transformers' plan divides both,"
            " and its way to do so where they are one tensor is not followed.",
            "tensor: 1; or a model with a head of its own",
            {"tensor": 1},
        )
    if scenario.method == "qlora":
        yield Problem(
            "`parallel.tensor` and `method: qlora` can't be combined: transformers' plan divides matrices, and"
            " bitsandbytes has packed these into bytes without rows.",
            "lora, full; or tensor: 1",
            {"method": "lora"},
            "method",
        )
    elif other := _beyond_factors(scenario):
        yield Problem(
            f"`parallel.tensor` and an adapter with {other} can't be combined: of PEFT's adapters LoRA's factors alone"
            " are divided as the matrices beside them.",
            "peft_type LORA without it; or tensor: 1",
            {"adapter": {"peft_type": "LORA", "r": 16, "target_modules": "all-linear"}},
            "adapter",
        )
    elif scenario.method == "lora" and parallel.by_titan:
        yield Problem(
            "`parallel.sequence_parallel` or `loss_parallel` and `method: lora` can't be combined: torchtitan's plan"
            " knows no adapters.",
            "full; or both false",
            {"method": "full"},
            "method",
        )
    elif scenario.method == "lora" and parallel.pipeline > 1:
        yield Problem(
            "`parallel.tensor`, `parallel.pipeline` and `method: lora` are not predicted together.",
            "full; or tensor: 1; or pipeline: 1",
            {"method": "full"},
            "method",
        )


def _beyond_factors(scenario: Any) -> str:
    """What a scenario's adapters have beside LoRA's factors; "" for nothing."""
    lora, adapter = scenario.lora, scenario.adapter or {}
    if lora is not None:
        return ", ".join(name for name in ("dora", "modules_to_save") if getattr(lora, name))
    kind = str(adapter.get("peft_type", "LORA")).upper()
    if kind != "LORA":
        return f"peft_type {kind}"
    named = ("use_dora", "modules_to_save", "target_parameters", "trainable_token_indices")
    return ", ".join(name for name in named if adapter.get(name))


def _pipeline(scenario: Any) -> Iterator[Problem]:
    parallel, layers = scenario.parallel, scenario.size("num_hidden_layers")
    each = SCHEDULES[parallel.schedule]
    if layers and parallel.stages > layers:
        yield Problem(
            f"A pipeline of {parallel.stages} stages (`parallel.pipeline: {parallel.pipeline}`, {each} on each GPU) has"
            f" more stages than the model has layers, {layers}.",
            f"pipeline: 1 to {max(layers // each, 1)}",
            {"pipeline": max(layers // each, 1), "gpus": max(layers // each, 1) * parallel.tensor},
        )
    elif layers and parallel.stage_layers is not None:
        yield from _layers_of_stages(parallel, layers)
    batches = scenario.gradient_accumulation
    if batches < parallel.pipeline or (each > 1 and batches % parallel.pipeline):
        multiple = -(-max(batches, 1) // parallel.pipeline) * parallel.pipeline
        yield Problem(
            f"`parallel.pipeline: {parallel.pipeline}` with `schedule: {parallel.schedule}` needs"
            f" {'a multiple of as many' if each > 1 else 'at least as many'} micro-batches, and `gradient_accumulation`"
            f" says {batches}.",
            f"{parallel.pipeline} or {'a multiple' if each > 1 else 'more'}",
            {"gradient_accumulation": multiple},
            "gradient_accumulation",
        )
    if (scenario.model.get("text_config") or scenario.model).get("tie_word_embeddings"):
        yield Problem(
            "The output head of this model is its embedding (`tie_word_embeddings`), and a pipeline has the one on the"
            " last stage and the other on the first.",
            "pipeline: 1; or a model with a head of its own",
            {"pipeline": 1},
        )


def _layers_of_stages(parallel: Any, layers: int) -> Iterator[Problem]:
    """Stages that are not as many as the pipeline's, or whose layers are not the model's."""
    given, even = parallel.stage_layers, list(even_stages(layers, parallel.stages))
    if not all(
        isinstance(count, int) and not isinstance(count, bool) and count > 0 for count in given
    ):
        wrong = "every stage has one layer or more, as a whole number"
    elif len(given) != parallel.stages:
        wrong = f"it names {len(given)} stages, and the pipeline has {parallel.stages}"
    elif sum(given) != layers:
        wrong = f"its layers are {sum(given)}, and the model has {layers}"
    else:
        return
    yield Problem(
        f"`parallel.stage_layers: {list(given)}` does not fit the model: {wrong}.",
        f"null; or {parallel.stages} numbers whose sum is {layers}",
        {"stage_layers": even},
    )


def _expert(scenario: Any) -> Iterator[Problem]:
    parallel = scenario.parallel
    experts = next((scenario.size(name) for name in EXPERT_COUNTS if scenario.size(name)), None)
    if experts is None:
        yield Problem(
            "`parallel.expert` divides experts, and this model has none.",
            "expert: 1",
            {"expert": 1},
        )
        return
    yield from divides(parallel, "expert", experts, "the experts")
    places = parallel.shard * parallel.tensor
    if parallel.expert % parallel.tensor or places % parallel.expert:
        yield Problem(
            f"`parallel.expert: {parallel.expert}` has to be a multiple of `tensor` and divide the {places} GPUs that"
            " share a model (shard x tensor): transformers divides experts among those.",
            f"expert: {places}, or a divisor of it that is a multiple of {parallel.tensor}",
            {"expert": places},
        )
    yield from _adapters(
        scenario,
        "expert",
        "are not predicted together: PEFT adds adapters after transformers has sharded the model, and they stay whole.",
    )


def _other_fields(scenario: Any) -> Iterator[Problem]:
    rows = (
        ("loss", scenario.loss == "full" or scenario.parallel.divided, "full"),
        ("packing", scenario.packing == "none", "none"),
        ("attention_mask", scenario.attention_mask == "none", "none"),
        ("loop", scenario.loop == "trainer", "trainer"),
        ("objective", scenario.objective == "sft", "sft"),
        ("compile", scenario.compile == "none" or _compiled_by_layers(scenario), "none"),
        ("float8", scenario.float8 == "none" or _by_layers(scenario.parallel), "none"),
        ("qat", scenario.qat == "none", "none"),
        ("kernels", scenario.kernels == "transformers", "transformers"),
        ("activation_offload", not scenario.activation_offload, False),
        (
            "optimizer",
            OPTIMIZERS[scenario.optimizer].elementwise or scenario.parallel.divided,
            "adamw",
        ),
        ("images", scenario.images is None, None),
    )
    for field, goes, instead in rows:
        if not goes:
            yield Problem(
                f"`{field}: {getattr(scenario, field)}` and a mesh (`parallel`) are not predicted together.",
                f"{'null' if instead is None else str(instead).lower()}; or a `parallel` of strategy and gpus alone",
                {field: instead},
                field,
            )


def _compiled_by_layers(scenario: Any) -> bool:
    """Whether compiled layers are followed on such a mesh: those that FSDP2 shards afterwards."""
    return (
        scenario.compile == "layers" and scenario.parallel.sharded and _by_layers(scenario.parallel)
    )


def _by_layers(parallel: Any) -> bool:
    """Whether the libraries exchange or compile layers on such a mesh: before FSDP2, and after torchtitan's plan."""
    return parallel.pipeline == 1 and (
        parallel.by_titan or (parallel.sharded and not parallel.by_plan)
    )
