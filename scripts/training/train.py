"""Rule ``train_adapter``: LoRA or QLoRA, with the step that the trace predicted and the gate let through.

Set up, say what will happen, then take steps. A killed run is resumed from its last checkpoint, which is found by the
digest of everything that shaped it, so the state of other settings is never taken up. The last step has a checkpoint
too: what comes after it may fail and costs no step. Checkpoints are no outputs of the rule, since Snakemake removes
the outputs of a job that failed; and a finished training is kept, for when its settings come back.

On several GPUs :func:`main` starts this module once for each (:mod:`scripts.training.processes`), and all of them run
:func:`train`, the same loop on different rows of each step. What is saved is whole, and rank 0 writes it.
"""

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.common.cache import ResultCache
from scripts.common.digests import digest
from scripts.common.errors import UserError
from scripts.common.files import (
    atomic_folder,
    read_folder,
    read_json,
    read_jsonl,
    read_report,
    write_json,
    write_jsonl,
    write_report,
)
from scripts.common.job import job, keep_host_memory, log
from scripts.common.pick_device import pick_device
from scripts.common.tokenizer import read_tokenizer
from scripts.settings.scenario import Scenario, rows_in_a_step
from scripts.training.processes import ALONE, Group, divided_like, launch, started, whole

if TYPE_CHECKING:
    from scripts.training.batches import Row


def learning_rate_at(step: int, total: int, peak: float, warmup_ratio: float) -> float:
    """Linear warm-up to the peak, then a cosine down to zero. ``step`` counts from 0."""
    warmup = math.ceil(total * warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def plan_steps(rows: int, rows_per_step: int, epochs: int, max_steps: int | None) -> tuple[int, int]:
    """Optimizer steps in an epoch, and in the whole run."""
    per_epoch = math.ceil(rows / rows_per_step)
    total = per_epoch * epochs
    return per_epoch, total if max_steps is None else min(total, max_steps)


def planned_steps(rows: "list[Row]", scenario: Scenario, loop: dict, seed: int, prefix: int) -> Iterator[list[list]]:
    """For each step of a run, in order, the micro-batches of each GPU (:func:`scripts.training.packing.micro_batches`).

    A step's rows are dealt out like cards: rows of like length lie beside each other, so that all get as much to do.
    """
    from scripts.training.batches import epoch_batches
    from scripts.training.packing import micro_batches

    count, gpus = rows_in_a_step(scenario, loop), scenario.parallel.gpus
    per_epoch, total = plan_steps(len(rows), count, loop["epochs"], loop["max_steps"])
    steps: list[list[Row]] = []
    for step in range(total):
        if step % per_epoch == 0:
            steps = epoch_batches(rows, count, seed, step // per_epoch, by_length=scenario.packing == "none")
        rows_by_rank = [steps[step % per_epoch][rank::gpus] for rank in range(gpus)]
        yield [micro_batches(hand, scenario, prefix) if hand else [] for hand in rows_by_rank]


def check_rows(
    rows: "list[Row]", held_out: "list[Row]", scenario: Scenario, loop: dict, seed: int, prefix: int
) -> None:
    """What can be known to go wrong later is said before the first step.

    Raises
    ------
    UserError
        Without rows, or with one that teaches nothing; or when a step's rows need more packs than were gated.
    """
    from scripts.training.batches import answer_tokens

    for name, split in (("train", rows), ("validation", held_out)):
        if not split:
            raise UserError(
                f"The {name} split has no rows.",
                where="dataset.split in the configuration",
                allowed="a larger dataset, or a larger share for this split",
                write=f"dataset:\n  split: {{{name}: 0.2, ...}}",
            )
        if silent := sum(not answer_tokens([row]) for row in split):
            raise UserError(
                f"{silent} rows of the {name} split have no token to learn.",
                where="training",
                allowed="rows with an answer; encode_dataset makes no others",
            )
    if scenario.packing == "none":
        return
    most = max(len(micros) for shares in planned_steps(rows, scenario, loop, seed, prefix) for micros in shares)
    if most > scenario.gradient_accumulation:
        raise UserError(
            f"The rows of one step take {most} micro-batches; the memory was predicted for fewer.",
            where="training",
            found=f"gradient_accumulation: {scenario.gradient_accumulation}, rows_per_step: {loop['rows_per_step']}",
            allowed="more of them, longer packs (sequence_length), or fewer rows in a step",
            write=f"gradient_accumulation: {most}",
        )


class Checkpoint:
    """The state of a run between two steps, in one folder that appears whole or not at all."""

    def __init__(self, folder: Path, group: Group = ALONE) -> None:
        self.folder, self.group = folder, group

    def save(self, step: int, model: Any, optimizer: Any, curve: list[dict], seconds: float) -> None:
        """``step``: how many have been taken, in ``seconds``. Tensors are saved whole, random states one a process."""
        import torch
        from torch.utils._pytree import tree_map

        random = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            random["cuda"] = torch.cuda.get_rng_state()
        state = {"optimizer": tree_map(whole, optimizer.state_dict()), "seconds": seconds, "step": step}
        state["trained"] = {name: whole(p.detach()).cpu() for name, p in _trained(model)}
        state["random"] = self.group.collected(random)
        if self.group.rank == 0:
            with atomic_folder(self.folder) as partial:
                torch.save(state, partial / "state.pt")
                write_jsonl(partial / "curve.jsonl", curve)
                write_report(partial / "checkpoint.json", {"step": step}, partial / "state.pt", partial / "curve.jsonl")

    def load(self, model: Any, optimizer: Any) -> tuple[int, list[dict], float]:
        """Take up the saved state: steps taken, their curve, their seconds; (0, [], 0.0) without one that is whole."""
        import torch

        report, saved, curve = (self.folder / name for name in ("checkpoint.json", "state.pt", "curve.jsonl"))
        if not self.folder.is_dir():
            return 0, [], 0.0
        try:
            read_report(report, saved, curve)
        except UserError as error:
            log.warning("The checkpoint in %s is not used, so training begins anew: %s", self.folder, error.problem)
            return 0, [], 0.0
        state = torch.load(saved, map_location="cpu", weights_only=True)
        with torch.no_grad():
            for name, parameter in _trained(model):
                parameter.copy_(divided_like(state["trained"][name], parameter))
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for index, moments in state["optimizer"]["state"].items():
            for name, value in moments.items():
                moments[name] = divided_like(value, parameters[index])
        optimizer.load_state_dict(state["optimizer"])
        random = state["random"][self.group.rank]
        torch.set_rng_state(random["cpu"])
        if "cuda" in random and torch.cuda.is_available():
            torch.cuda.set_rng_state(random["cuda"])
        return state["step"], list(read_jsonl(curve)), state["seconds"]

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _trained(model: Any) -> "Iterator[tuple[str, Any]]":
    from scripts.training.parallel import bare

    return ((name, parameter) for name, parameter in bare(model).named_parameters() if parameter.requires_grad)


def validation_loss(
    model: Any, rows: "list[Row]", batch_size: int, pad_token_id: int, group: Group = ALONE, divided: bool = False
) -> float:
    """Mean negative log-likelihood of an answer token over the rows, in nats.

    ``divided``: by FSDP, so that only the whole forward pass, in all processes at once, has all weights.
    """
    import torch

    from scripts.training.batches import answer_tokens, collate, epoch_batches
    from scripts.training.model import without_noise
    from scripts.training.parallel import bare
    from scripts.training.step import chunked_loss

    device, total, tokens = next(model.parameters()).device, 0.0, 0.0
    batches = epoch_batches(rows, batch_size, seed=0, epoch=0)
    with torch.no_grad(), without_noise(bare(model)):
        for first in range(0, len(batches), group.size):
            own = first + group.rank < len(batches)  # a process without a batch computes another's, for nothing
            batch = batches[first + group.rank if own else first]
            learned = answer_tokens(batch) if own else 0
            tensors = collate(batch, pad_token_id, device)
            loss = model(**tensors, use_cache=False).loss if divided else chunked_loss(bare(model), tensors)
            total += float(loss) * learned
            tokens += learned
    total, tokens = group.sums(total, tokens)
    return total / tokens


def fit(
    model: Any,
    optimizer: Any,
    rows: "list[Row]",
    scenario: Scenario,
    loop: dict,
    seed: int,
    pad_token_id: int,
    checkpoint: Checkpoint,
    prefix: int = 0,
    predicted: Mapping[str, Any] | None = None,
) -> tuple[list[dict], int, float]:
    """Take the steps.

    ``prefix`` is the number of tokens that rows share in a pack; ``predicted`` is the gate's report, whose figures
    explain an out-of-memory error. With ``on_out_of_memory: halve`` a step that the device can't hold is taken again,
    and the later ones are taken, in micro-batches of half the size: as many rows, the same gradient.

    Returns the curve (a row a step), the step that it was resumed from, and the seconds that all steps took.
    """
    import torch

    from scripts.training.batches import answer_tokens
    from scripts.training.packing import collate_packs
    from scripts.training.parallel import bare, exchanging
    from scripts.training.step import forward_backward, optimizer_step

    device, group = next(model.parameters()).device, checkpoint.group
    # fp16 gradients under autocast underflow without a scale; bf16 has fp32's range.
    scaler = torch.amp.GradScaler(device.type) if scenario.autocast_precision == "fp16" else None
    _, total = plan_steps(len(rows), rows_in_a_step(scenario, loop), loop["epochs"], loop["max_steps"])
    start, curve, seconds = checkpoint.load(model, optimizer)
    if start:
        log.info("Resuming from the checkpoint after step %d", start)
    begun = last_message = time.monotonic()
    computed_here, half = 0, None

    def accumulate(micros: list, rounds: int) -> tuple[float, int]:
        """Forward and backward over a step's micro-batches; returns their loss and the tokens that were computed.

        In as many rounds as the GPU takes that has most, since they meet in each: one that has no more rows takes one
        that counts for nothing.
        """
        learned, loss, computed = answer_tokens(batch), 0.0, 0
        for number in range(rounds):
            own = number < len(micros)
            packs = micros[number] if own else [[min(batch, key=lambda row: len(row.input_ids))]]
            # Each micro-batch counts by its answer tokens: accumulation gives the gradient of the whole batch.
            share = answer_tokens([row for pack in packs for row in pack]) / learned if own else 0.0
            weight = share * group.size  # DDP and FSDP take the mean of the GPUs' gradients
            scale = weight if scaler is None else scaler.scale(torch.tensor(weight, device=device))
            tensors = collate_packs(packs, scenario, prefix, pad_token_id, bare(model).config, device)
            with exchanging(model, last=number == rounds - 1):
                loss += share * float(forward_backward(model, tensors, scenario, loss_scale=scale))
            computed += tensors["input_ids"].numel()
        return loss, computed

    for step, shares in enumerate(planned_steps(rows, scenario, loop, seed, prefix)):
        if step < start:
            continue
        micros, rounds = shares[group.rank], max(map(len, shares))
        if half:  # what was found too large for the device is not tried again
            micros = _split(micros, half)
            rounds = len(micros)
        rate = learning_rate_at(step, total, loop["learning_rate"], loop["warmup_ratio"])
        for parameters in optimizer.param_groups:
            parameters["lr"] = rate
        batch = [row for micros_of_one in shares for packs in micros_of_one for pack in packs for row in pack]
        while True:
            try:
                loss, computed = accumulate(micros, rounds)
                break
            except torch.OutOfMemoryError as error:
                largest = max(map(len, micros))
                if loop.get("on_out_of_memory") != "halve" or largest == 1:
                    raise _out_of_memory(error, scenario, predicted) from None
                # The same rows, so the same step: no weight has changed yet.
                half = largest // 2
                log.warning("Out of memory at step %d: micro-batches of %d from here on, as many rows", step + 1, half)
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            micros = _split(micros, half)
            rounds = len(micros)
        loss, computed = group.sums(loss, computed)
        if not math.isfinite(loss):  # before it can spoil the weights
            raise _not_finite("loss", loss, step, checkpoint)
        norm = float(optimizer_step(model, optimizer, scenario, max_grad_norm=loop["max_grad_norm"], scaler=scaler))
        if scaler is None and not math.isfinite(norm):
            raise _not_finite("gradients' norm", norm, step, checkpoint)
        tokens = sum(len(row.input_ids) for row in batch)
        packs_in_all = sum(len(packs) for micros_of_one in shares for packs in micros_of_one)
        saved = prefix * (len(batch) - packs_in_all)  # prefixes that were not computed again
        curve.append(
            {
                "answer_tokens": answer_tokens(batch),
                "computed_tokens": int(computed),
                "gradient_norm": norm if math.isfinite(norm) else None,  # a step that the scaler left out
                "learning_rate": rate,
                "loss": loss,
                "micro_batch": half or scenario.micro_batch,
                "padding_tokens": int(computed) - tokens + saved,
                "rows": len(batch),
                "shared_tokens": saved,
                "step": step + 1,
                "tokens": tokens,
            }
        )
        now = time.monotonic()
        if (step + 1) % loop["save_every_steps"] == 0 or step + 1 == total:
            checkpoint.save(step + 1, model, optimizer, curve, seconds + now - begun)
        computed_here += computed
        if now - last_message >= 5 or step + 1 == total:
            last_message = now
            speed = computed_here / (now - begun)
            left = (total - step - 1) * (now - begun) / (step + 1 - start)
            log.info("step %d of %d  loss %.3f  %.0f tokens/s  %.0f s left", step + 1, total, loss, speed, left)
    return curve, start, seconds + time.monotonic() - begun


def _split(micros: list, size: int) -> list:
    """The same packs in micro-batches of at most ``size``."""
    return [packs[first : first + size] for packs in micros for first in range(0, len(packs), size)]


def _out_of_memory(error: Exception, scenario: Scenario, predicted: Mapping[str, Any] | None) -> UserError:
    """The allocator's figures beside the trace's, and what to change."""
    import torch

    found = [str(error).splitlines()[0]]
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found.append(
            f"the allocator had {torch.cuda.max_memory_allocated()} bytes in use and {torch.cuda.max_memory_reserved()}"
            f" reserved at most; {free} of the device's {total} are free, the rest is this process's and others'"
        )
    if predicted:
        found.append(
            f"the trace said {predicted['peak_allocated_bytes']} in use, and a device with"
            f" {predicted['required_bytes']} free"
        )
    half, twice = scenario.micro_batch // 2, scenario.gradient_accumulation * 2
    smaller = f"micro_batch: {half}\n  gradient_accumulation: {twice}" if half else "gradient_checkpointing: true"
    return UserError(
        "The training step does not fit the device's memory.",
        where="training; `nvidia-smi` names the other processes on the device",
        found="; ".join(found),
        allowed="a smaller micro-batch (on_out_of_memory: halve does it by itself), or what `python -m"
        " scripts.memory.predict` says fits; with more required than allocated, allocator.expandable_segments",
        write=f"training:\n  {smaller}",
    )


def _not_finite(what: str, value: float, step: int, checkpoint: Checkpoint) -> UserError:
    kept = f"; the state before it is kept in {checkpoint.folder}" if checkpoint.folder.is_dir() else ""
    return UserError(
        f"The {what} is {value} at step {step + 1}{kept}.",
        where="training",
        allowed="a smaller learning_rate, or another precision (fp16 overflows where bf16 does not)",
        write="learning_rate: 2.0e-4",
    )


def token_shares(curve: list[dict], prefix: int) -> dict[str, dict[str, float]]:
    """What the computed tokens were: ``count`` and ``share`` of answers, requests, prefix and padding.

    ``prefix`` is the number of tokens that all rows begin with, computed once for each row or, shared, for each pack.
    """
    total = {key: sum(row[key] for row in curve) for key in curve[0] if key.endswith("tokens") or key == "rows"}
    counts = {
        "answers": total["answer_tokens"],
        "padding": total["padding_tokens"],
        "prefix": prefix * total["rows"] - total["shared_tokens"],
    }
    counts["requests"] = total["computed_tokens"] - sum(counts.values())
    return {kind: {"count": count, "share": count / total["computed_tokens"]} for kind, count in counts.items()}


def save_adapter(model: Any, folder: Path, base: str, group: Group = ALONE) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json``, the same bytes for the same adapter.

    Called by all processes, which each hold a part of a divided adapter; rank 0 writes it.
    """
    from scripts.training.adapters import adapter_names
    from scripts.training.parallel import bare

    model, tensors = bare(model), None
    if group.size > 1:
        added = adapter_names(model)
        tensors = {name: whole(value) if name in added else value for name, value in model.state_dict().items()}
    if group.rank:
        return
    with atomic_folder(folder.with_name(folder.name + ".new")) as partial:
        model.save_pretrained(partial, state_dict=tensors)
        config = read_json(partial / "adapter_config.json")
        config["base_model_name_or_path"] = base
        for key, value in config.items():
            if isinstance(value, list) and all(isinstance(item, str) for item in value):
                config[key] = sorted(value)  # PEFT keeps sets, whose order differs from run to run
        folder.mkdir(parents=True, exist_ok=True)
        os.replace(partial / "adapter_model.safetensors", folder / "adapter_model.safetensors")
        write_json(folder / "adapter_config.json", config)
    shutil.rmtree(folder.with_name(folder.name + ".new"))


def base_name(description: Mapping[str, Any]) -> str:
    """What an adapter calls its base: the Hub's name, or the title."""
    return description["source"].get("repository", description["title"])


def about_base(description: Mapping[str, Any]) -> dict[str, Any]:
    """What the report says of the base."""
    return {key: description[key] for key in ("license", "source", "title")}


def name_base(description: Mapping[str, Any], report: Path, config: Path, *others: Path) -> None:
    """Let kept files name the base as it is described now: its title or licence shapes no adapter, and may differ."""
    write_json(config, {**read_json(config), "base_model_name_or_path": base_name(description)})
    write_report(report, {**read_json(report), "base": about_base(description)}, config, *others)


def versions() -> dict[str, str]:
    """Releases of the packages that shape the result."""
    import importlib.metadata

    names = ("bitsandbytes", "peft", "torch", "transformers")
    return {name: importlib.metadata.version(name) for name in names} | {"python": sys.version.split()[0]}


def set_allocator(scenario: Scenario) -> None:
    """Let PyTorch's caching allocator work as the trace assumed; before torch is imported.

    A setting of the same name in the environment stays, and is named when it contradicts.
    """
    wanted = f"expandable_segments:{scenario.allocator.expandable_segments}"
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if given := os.environ.get(name):
            if wanted not in given and (scenario.allocator.expandable_segments or "expandable_segments:True" in given):
                log.warning("%s=%s in the environment; the memory was predicted with %s", name, given, wanted)
            return
    os.environ["PYTORCH_ALLOC_CONF"] = wanted


def main(
    base: Path,
    scenario_mapping: dict,
    loop: dict,
    seed: int,
    inputs: dict[str, str],
    outputs: dict[str, str],
    threads: int,
    code: str,
) -> None:
    """Train and write the adapter, the curve and the report; or put back what was written for the same before."""
    read_folder(base / "description.json")
    data = read_report(inputs["encoded"], inputs["train"], inputs["validation"])
    scenario = Scenario.from_mapping({**scenario_mapping, "model": read_json(base / "config.json")}, where="training")
    rows_in_a_step(scenario, loop)
    set_allocator(scenario)
    gpus = scenario.parallel.gpus
    device = pick_device(loop["device"], gpus)
    state = {
        "code": code,
        "data": {name: data["sha256"][Path(inputs[name]).name] for name in ("train", "validation")},
        "device": device,
        "loop": loop,
        "scenario": scenario.to_mapping(),
        "seed": seed,
        "weights": read_report(inputs["weights"])["files"],
    }
    folder, report, curve_path = (Path(outputs[name]) for name in ("adapter", "report", "curve"))
    folder = folder.parent
    adapter = [folder / "adapter_config.json", folder / "adapter_model.safetensors"]
    kept = ResultCache(folder.parent / "kept", state, report, [*adapter, curve_path])
    if kept.restore():
        name_base(read_report(base / "description.json"), report, *adapter, curve_path)
        return
    read_folder(inputs["weights"])
    checkpoint = Checkpoint(folder.parent / "checkpoints" / digest(state))
    work = {
        "base": str(base),
        "checkpoint": str(checkpoint.folder),
        "device": device,
        "inputs": {name: str(path) for name, path in inputs.items()},
        "loop": loop,
        "outputs": {name: str(path) for name, path in outputs.items()},
        "scenario": scenario.to_mapping(),
        "seed": seed,
        "threads": max(1, threads // gpus) if device == "cpu" else threads,
    }
    if gpus == 1:
        train(**work)
    else:
        resumed = f"it resumes from the last checkpoint, saved every {loop['save_every_steps']} steps"
        launch("scripts.training.train", work, gpus, resumed)
    kept.store()
    checkpoint.remove()


def train(
    base: str,
    scenario: dict,
    loop: dict,
    seed: int,
    inputs: dict[str, str],
    outputs: dict[str, str],
    threads: int,
    device: str,
    checkpoint: str,
    group: Group = ALONE,
) -> None:
    """Train, in the one process or in one of several, and write the adapter, the curve and the report.

    Parameters
    ----------
    base
        Folder of the model.
    scenario
        The step as a whole mapping, its model included.
    inputs, outputs
        The rule's, by name.
    threads
        Of this process.
    device
        ``cpu`` or ``cuda``: the current one.
    checkpoint
        Folder of the run's state.
    """
    scenario = Scenario.from_mapping(scenario, where="training")
    base, description = Path(base), read_folder(Path(base, "description.json"))
    predicted = read_report(inputs["gate"]) if "gate" in inputs else None
    rows_per_step = rows_in_a_step(scenario, loop)
    sharded = scenario.parallel.sharded
    folder, report, curve_path = (Path(outputs[name]) for name in ("adapter", "report", "curve"))
    folder = folder.parent

    import torch

    from scripts.training.batches import answer_tokens, read_rows
    from scripts.training.exactness import self_test
    from scripts.training.model import assert_quantized, build_model, build_optimizer
    from scripts.training.packing import collate_packs, common_prefix
    from scripts.training.parallel import bare, parallelize, where_to_build
    from scripts.training.step import forward_backward

    torch.set_num_threads(threads)
    if device == "cpu":
        keep_host_memory()
    torch.use_deterministic_algorithms(True, warn_only=device == "cuda")
    torch.utils.deterministic.fill_uninitialized_memory = False  # finds reads of it; here it is a twentieth of the time
    torch.manual_seed(seed)
    tokenizer = read_tokenizer(base)
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    rows, held_out = read_rows(inputs["train"]), read_rows(inputs["validation"])[: loop["validation_rows"]]
    prefix = common_prefix(rows)
    shared = prefix if scenario.packing == "shared_prefix" else 0
    check_rows(rows, held_out, scenario, loop, seed, shared)
    per_epoch, total = plan_steps(len(rows), rows_per_step, loop["epochs"], loop["max_steps"])
    forms = {"none": "padded", "rows": "packed", "shared_prefix": f"packed behind {shared} shared tokens"}
    log.info(
        "%d rows a step, %s; %d rows = %d steps an epoch; %d steps; micro-batches of at most %d x %d tokens; %s, "
        "%d threads%s",
        *(rows_per_step, forms[scenario.packing], len(rows), per_epoch, total),
        *(scenario.micro_batch, scenario.sequence_length, device, threads),
        f"; {group.size} processes, {scenario.parallel.strategy}" if group.size > 1 else "",
    )
    started = time.monotonic()
    model = build_model(scenario, where_to_build(scenario, device), weights=base, seed=seed)
    quantized = assert_quantized(model, scenario)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log.info("%s: %d trainable parameters; %s", description["title"], trainable, json.dumps(quantized, sort_keys=True))
    model = parallelize(model, scenario, device if device == "cpu" else f"cuda:{torch.cuda.current_device()}")
    if scenario.parallel.strategy == "ddp":
        # DDP orders its buckets anew after the first backward pass, and with them the sums of three or more GPUs round
        # otherwise. Before the first step, so that a resumed run has the order of one that was not killed.
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if device == "cuda" else []):
            packs = [[min(rows, key=lambda row: len(row.input_ids))]]
            forward_backward(
                model, collate_packs(packs, scenario, shared, pad_token_id, bare(model).config, device), scenario
            )
        model.zero_grad(set_to_none=True)
    if group.rank:  # dropout's noise is another in each process; all have made the same adapters
        torch.manual_seed(seed + group.rank)
    exactness = None
    if scenario.packing != "none":
        exactness = self_test(model, scenario, rows, shared, pad_token_id)
        log.info("packed rows against rows alone: %s", json.dumps(exactness, sort_keys=True))
    optimizer = build_optimizer(model, scenario, learning_rate=loop["learning_rate"], weight_decay=loop["weight_decay"])
    loaded = time.monotonic()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    state = Checkpoint(Path(checkpoint), group)
    curve, resumed_from, seconds = fit(
        model, optimizer, rows, scenario, loop, seed, pad_token_id, state, prefix=shared, predicted=predicted
    )
    halved = [row for row in curve if row["micro_batch"] < scenario.micro_batch]
    # Before anything that can fail: the checkpoint of the last step, and these.
    save_adapter(model, folder, base_name(description), group)
    if group.rank == 0:
        write_jsonl(curve_path, curve)
    # A 4-bit weight is unpacked once a batch, so on the CPU large ones pay; on a card, no more rows than were gated.
    batch_size = 64 if device == "cpu" else scenario.micro_batch
    loss = validation_loss(model, held_out, batch_size, pad_token_id, group, sharded)
    peaks = group.collected(torch.cuda.max_memory_allocated() if device == "cuda" else None)
    if group.rank:
        return
    log.info("validation loss %.4f over %d rows", loss, len(held_out))
    totals = {key: sum(row[key] for row in curve) for key in ("answer_tokens", "computed_tokens", "rows", "tokens")}
    write_report(
        report,
        {
            "answer_tokens": totals["answer_tokens"],
            "base": about_base(description),
            "computed_tokens": totals["computed_tokens"],
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "effective_batch": rows_per_step,
            "epochs": total / per_epoch,
            "final_loss": sum(row["loss"] for row in curve[-10:]) / len(curve[-10:]),
            "first_loss": curve[0]["loss"],
            "loop": loop,
            "out_of_memory": {"micro_batch": halved[-1]["micro_batch"], "steps": len(halved)} if halved else None,
            "packing": {"exactness": exactness, "kind": scenario.packing, "prefix_tokens": prefix},
            "peak_allocated_bytes": max(peaks) if device == "cuda" else None,  # of the GPU with most
            "quantized": quantized,
            "resumed_from_step": resumed_from or None,
            "scenario": {key: value for key, value in scenario.to_mapping().items() if key != "model"},
            "seed": seed,
            "steps": total,
            "times": {
                "answer_tokens_per_second": totals["answer_tokens"] / seconds,
                "computed_tokens_per_second": totals["computed_tokens"] / seconds,
                "load_wall_seconds": loaded - started,
                "rows_per_second": totals["rows"] / seconds,
                "tokens_per_second": totals["tokens"] / seconds,
                "train_wall_seconds": seconds,
            },
            "threads": threads,
            "token_shares": token_shares(curve, prefix),
            "tokens": totals["tokens"],
            "train_rows": len(rows),
            "trainable_parameters": trainable,
            "validation_answer_tokens": answer_tokens(held_out),
            "validation_loss": loss,
            "validation_rows": len(held_out),
            "versions": versions(),
        },
        folder / "adapter_config.json",
        folder / "adapter_model.safetensors",
        curve_path,
    )


if __name__ == "__main__":
    if "snakemake" in globals():
        with job(snakemake):
            main(
                Path(snakemake.input.config).parent,
                snakemake.params.scenario,
                snakemake.params.loop,
                snakemake.params.seed["seed"],
                {name: snakemake.input[name] for name in ("encoded", "gate", "train", "validation", "weights")},
                {name: snakemake.output[name] for name in ("adapter", "report", "curve")},
                snakemake.threads,
                snakemake.params.code,
            )
    else:  # one of several processes
        with started(Path(sys.argv[1])) as (work, group):
            train(**work, group=group)
