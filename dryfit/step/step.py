"""The one way to take a training step. Training runs it, the trace follows it on ``meta``, the measurement measures it.

A step is ``gradient_accumulation`` times :func:`forward_backward`, then one :func:`optimizer_step`. Who holds which
tensor while the next one is made decides the peak of memory, so that the order of statements here is part of the
result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import chain, repeat
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dryfit.engine.patching import patched
from dryfit.scenario.fields import CHUNK_TOKENS, MICRO_BATCHES
from dryfit.scenario.scenario import Scenario
from dryfit.step.batches import IGNORED
from dryfit.step.low_precision import scales_for_the_next_step
from dryfit.step.meshes import loss_of_parts, parts_of_rows, split_tokens, whole_rows
from dryfit.step.model import autocast_dtype
from dryfit.step.packing import full_packs
from dryfit.step.parallel import (
    backward,
    bare,
    clip_gradients,
    engine_step,
    exchanging,
    shard_again,
    within_forward,
)
from dryfit.step.pipeline import Pipeline
from dryfit.step.quantized import without_noise

OFFLOADED_FROM = (
    1024  # bytes: smaller tensors stay on the GPU, as in TRL's and torchtune's OffloadActivations
)
UNSLOTHS_FROM = (
    2 * 2**20
)  # the same of Unsloth (unsloth_zoo 2026.10.9, gradient_checkpointing.py, MINIMUM_SIZE)


def forward_backward(
    model: nn.Module,
    batch: dict[str, torch.Tensor],
    scenario: Scenario,
    *,
    loss_scale: float | torch.Tensor = 1.0,
    held: list[object] | None = None,
    last: bool = True,
) -> torch.Tensor:
    """Run one micro-batch forward and backward; gradients add up in the parameters.

    Parameters
    ----------
    model
        From :func:`dryfit.step.model.build_model` or :func:`dryfit.step.parallel.parallelize`, in training
        mode.
    batch
        ``input_ids`` and ``labels`` (tokens x micro-batch, int64), labels :data:`IGNORED` where nothing is learned.
        Padding on the right needs no ``attention_mask``: a causal model never looks there, and without a mask the
        fused attention kernels can be used. With one it is honoured.
    loss_scale
        Factor on the loss before backward: 1 / accumulation, or this micro-batch's share of the learned tokens.
    held
        Where a manual loop keeps its outputs, so that those before live until these are there; None: nowhere.
    last
        Whether it is the step's last micro-batch.

    Returns
    -------
    torch.Tensor
        Mean loss over the learned tokens, detached, shape ().
    """
    device = batch["input_ids"].device.type
    least = UNSLOTHS_FROM if scenario.kernels == "unsloth" else OFFLOADED_FROM
    waiting = on_host(model, least) if scenario.activation_offload else nullcontext()
    with _autocast(scenario, device), waiting:
        if scenario.loss == "chunked":
            loss = within_forward(model, chunked_loss, batch)
        elif scenario.parallel.ulysses > 1:
            loss = loss_of_parts(model, batch, scenario.parallel)
        else:
            output = model(**batch)
            loss = output.loss
            if held is not None:
                held[:] = [output]
            if (
                scenario.loop == "trainer"
            ):  # the logits may go before backward begins; a manual loop keeps them
                del output
    scaled = isinstance(loss_scale, torch.Tensor) or loss_scale != 1.0
    backward(model, loss * loss_scale if scaled else loss, last=last)
    return loss.detach()


def forward_loss(
    model: nn.Module, batch: dict[str, torch.Tensor], scenario: Scenario
) -> torch.Tensor:
    """The mean loss of a micro-batch, forward alone, by the loss that the scenario trains with; shape ().

    Within :func:`evaluating`.
    """
    with _autocast(scenario, batch["input_ids"].device.type):
        if scenario.loss == "chunked":
            return within_forward(model, chunked_loss, batch)
        if scenario.parallel.ulysses > 1:
            return loss_of_parts(model, batch, scenario.parallel)
        return model(**batch).loss


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Neither gradients nor noise; afterwards training mode, and a sharded model as a step leaves it."""
    with torch.no_grad(), without_noise(bare(model)):
        yield
    shard_again(model)


def divided_rows(
    model: nn.Module, batch: dict[str, Any], scenario: Scenario, learned: int
) -> AbstractContextManager:
    """Around a micro-batch's passes: what the mesh makes of it, such as the part of the tokens that a GPU has.

    ``learned``: tokens of the batch that the loss counts. With ``parallel.context`` the losses of the GPUs that share
    the rows add up to the mean loss.
    """
    if scenario.parallel.context > 1:
        return split_tokens(model, batch, learned)
    if scenario.parallel.ulysses > 1:
        return parts_of_rows(model, batch)
    return whole_rows(batch, scenario) if scenario.parallel.by_titan else nullcontext()


def optimizer_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scenario: Scenario,
    *,
    max_grad_norm: float | None,
    scaler: torch.amp.GradScaler | None = None,
) -> torch.Tensor | None:
    """Clip the gradients, update the trainable parameters and drop the gradients.

    ``max_grad_norm``: largest allowed norm of all gradients together; None: don't clip. ``scaler``: for fp16 under
    autocast: its scale belongs into the ``loss_scale`` of :func:`forward_backward`.

    Returns the norm of the gradients before clipping, shape (); None without clipping.
    """
    if engine_step(model, max_grad_norm):
        return None
    if scaler is not None:
        scaler.unscale_(optimizer)
    norm = None
    if max_grad_norm is not None:
        norm = clip_gradients(model, max_grad_norm)
    if scaler is not None:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()
    if scenario.parallel.float8_all_gather:
        scales_for_the_next_step(model)
    optimizer.zero_grad(set_to_none=True)
    return norm


def random_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scenario: Scenario,
    device: str,
    *,
    max_grad_norm: float | None,
) -> Callable[[], None]:
    """A whole training step on random tokens, to be traced or measured; on ``meta`` with two micro-batches at most."""
    if isinstance(model, Pipeline):
        return _pipeline_step(model, optimizer, scenario, device, max_grad_norm)
    config = bare(model).config
    vocabulary = config.get_text_config().vocab_size
    image_token = getattr(config, "image_token_id", None) if scenario.images else None
    before = scenario.previous_sequence_length
    lengths = chain([before or scenario.sequence_length], repeat(scenario.sequence_length))
    held: list[object] | None = (
        [] if scenario.holds_outputs else None
    )  # outputs that live until the next ones are there
    count = min(
        scenario.gradient_accumulation,
        MICRO_BATCHES if device == "meta" else scenario.gradient_accumulation,
    )

    # A micro-batch's share of the step's tokens, times the GPUs over which gradients are averaged.
    parallel = scenario.parallel
    scale = parallel.averaged / (parallel.rows_at_once * scenario.gradient_accumulation)

    def step() -> None:
        length = next(lengths)
        for number in range(count):
            batch = random_batch(scenario, device, vocabulary, length=length)
            if image_token is not None:
                batch |= images_of(scenario, device, batch["input_ids"].shape, image_token)
            last = number == count - 1
            learned = scenario.micro_batch * (
                length - 1
            )  # the first token of a row predicts nothing before it
            with exchanging(model, last=last), divided_rows(model, batch, scenario, learned):
                forward_backward(model, batch, scenario, loss_scale=scale, held=held, last=last)
            del batch
        optimizer_step(model, optimizer, scenario, max_grad_norm=max_grad_norm)

    return step


def _pipeline_step(
    model: Pipeline,
    optimizer: torch.optim.Optimizer,
    scenario: Scenario,
    device: str,
    max_grad_norm: float | None,
) -> Callable[[], None]:
    """The same of a pipeline, which takes all micro-batches at once."""
    rows = scenario.micro_batch * scenario.gradient_accumulation
    vocabulary = model.config.get_text_config().vocab_size

    def step() -> None:
        batch = random_batch(replace(scenario, micro_batch=rows), device, vocabulary)
        model.step(batch["input_ids"], batch["labels"])
        del batch
        optimizer_step(model, optimizer, scenario, max_grad_norm=max_grad_norm)

    return step


def random_batch(
    scenario: Scenario,
    device: str | torch.device,
    vocabulary: int,
    seed: int = 0,
    *,
    length: int | None = None,
) -> dict:
    """A micro-batch of full length in which every token is learned; packs have positions and a mask besides.

    With ``attention_mask: padding`` a mask hides the first row's last token: which tokens it hides changes no size,
    that it hides any decides how attention runs. ``length``: tokens of a row instead of the scenario's.
    """
    shape = (scenario.micro_batch, length or scenario.sequence_length)
    if torch.device(device).type == "meta":
        batch = {
            key: torch.empty(shape, dtype=torch.long, device="meta")
            for key in ("input_ids", "labels")
        }
    else:
        tokens = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))
        batch = {"input_ids": tokens.to(device), "labels": tokens.to(device, copy=True)}
    if scenario.attention_mask == "padding":
        batch["attention_mask"] = torch.ones(shape, dtype=torch.long, device=device)
        if torch.device(device).type != "meta":
            batch["attention_mask"][0, -1] = 0
    return batch if scenario.packing == "none" else batch | full_packs(scenario, device)


def images_of(
    scenario: Scenario, device: str, shape: torch.Size, image_token: int
) -> dict[str, torch.Tensor]:
    """What a batch holds for its images: their pixels, and tokens and positions that say where they are.

    Tokens come from the CPU, so that they have values on ``meta`` too: an architecture looks for its images.
    """
    images, model = scenario.images, scenario.model
    count = images.tokens(model)
    rows = torch.full(shape, 0 if image_token else 1)
    for number in range(images.count):  # from the second token on, a token between two images
        start = 1 + number * (count + 1)
        rows[:, start : start + count] = image_token
    pixels = torch.empty(images.pixels(model, len(rows)), device=device)
    batch = {
        "input_ids": rows.to(device),
        "pixel_values": pixels if pixels.is_meta else pixels.normal_(),
    }
    if (
        patches := images.patches(model)
    ) is not None:  # where each patch is, and which only fill the image up
        height, width, most = patches
        places = torch.full((most, 2), -1)
        places[: height * width, 0] = torch.arange(width).repeat(height)
        places[: height * width, 1] = torch.arange(height).repeat_interleave(width)
        batch["image_position_ids"] = places.expand(len(pixels), -1, -1).contiguous().to(device)
        batch["mm_token_type_ids"] = (rows == image_token).long().to(device)
    grid = images.grid(model)
    if grid is not None:  # which place each token has in height, width and time
        batch["image_grid_thw"] = torch.tensor([grid] * (len(rows) * images.count)).to(device)
        batch["position_ids"] = (
            torch.arange(rows.shape[1]).expand(3, *rows.shape).contiguous().to(device)
        )
    elif model["model_type"] == "gemma3":  # whose image tokens see each other both ways
        batch["token_type_ids"] = (rows == image_token).long().to(device)
    return batch


def chunked_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy over the learned tokens without ever holding all logits.

    The decoder runs as ever. The output head and the loss run for the learned tokens alone, :data:`CHUNK_TOKENS` at a
    time, and again in the backward pass. The head is the architecture's own code (scaled or soft-capped logits
    included): its decoder returns the hidden states already computed.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    decoder = causal.get_decoder()
    if decoder is causal:  # Llama 4's finds itself (transformers 5.24)
        decoder = causal.model
    output = decoder(**inputs)
    kind, hidden = type(output), output.last_hidden_state
    del output
    hidden = hidden.reshape(-1, hidden.shape[-1])
    labels = functional.pad(batch["labels"], (0, 1), value=IGNORED)[..., 1:].reshape(-1)
    learned = _positions(labels, rows=len(batch["labels"]))
    hidden, labels = hidden.index_select(0, learned), labels.index_select(0, learned)

    def loss_of(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with decoder_returns(decoder, kind(last_hidden_state=states[None])):
            logits = causal(inputs_embeds=states[None]).logits
        return functional.cross_entropy(
            logits[0].float(), targets, ignore_index=IGNORED, reduction="sum"
        )

    if len(labels) <= CHUNK_TOKENS:  # nothing else is alive between this forward and its backward
        return loss_of(hidden, labels) / len(labels)
    total = None
    for states, targets in zip(hidden.split(CHUNK_TOKENS), labels.split(CHUNK_TOKENS), strict=True):
        part = checkpoint(loss_of, states, targets, use_reentrant=False)
        total = part if total is None else total + part
    return total / len(labels)


def _positions(labels: torch.Tensor, rows: int) -> torch.Tensor:
    """Indices of the learned tokens; on ``meta``, where labels have no values, all but the last of each row count."""
    if labels.device.type == "meta":
        return torch.empty(len(labels) - rows, dtype=torch.long, device="meta")
    return (labels != IGNORED).nonzero().squeeze(1)


def decoder_returns(decoder: nn.Module, output: object) -> AbstractContextManager[None]:
    """Let a decoder return what is known already."""
    return patched([(decoder, "forward", lambda *args, **kwargs: output)])


def on_host(model: nn.Module, least: int = OFFLOADED_FROM) -> AbstractContextManager:
    """Let what is kept for the backward pass wait on the host, but for weights and tensors of fewer bytes."""
    weights = {
        tensor.untyped_storage()._cdata for tensor in chain(model.parameters(), model.buffers())
    }
    pageable, pinned = save_on_cpu(), save_on_cpu(pin_memory=True)

    def pack(tensor: torch.Tensor) -> object:
        if tensor.nbytes < least or tensor.untyped_storage()._cdata in weights:
            return tensor
        return (pinned if tensor.is_cuda else pageable).pack_hook(tensor)

    def unpack(packed: object) -> torch.Tensor:
        return packed if isinstance(packed, torch.Tensor) else pinned.unpack_hook(packed)

    return saved_tensors_hooks(pack, unpack)


def _autocast(scenario: Scenario, device: str) -> AbstractContextManager:
    """Mixed precision; on ``meta``, where PyTorch has none, the trace emulates it."""
    dtype = autocast_dtype(scenario)
    parallel = (
        scenario.parallel
    )  # ZeRO casts the weights instead, and torchtitan leaves it to FSDP2
    if parallel.zero_stage or (parallel.by_titan and parallel.sharded):
        dtype = None
    return nullcontext() if dtype is None else torch.autocast(device, dtype)
