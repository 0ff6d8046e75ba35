"""Rule ``train_adapter``: LoRA or QLoRA, with the step that the trace predicted and the gate let through.

Set up, say what will happen, then take steps. A killed run goes on from its last checkpoint, which is found
by the digest of everything that shaped it, so the state of other settings is never taken up. The checkpoint is
no output of the rule: Snakemake removes outputs of a job that failed.
"""

import json
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.common.digests import digest
from scripts.common.errors import UserError
from scripts.common.files import atomic_folder, read_json, read_jsonl, sha256_file, write_json, write_jsonl
from scripts.common.job import job, keep_host_memory, log
from scripts.scenario.scenario import Scenario

if TYPE_CHECKING:
    from scripts.training.batches import Row


def pick_device(wanted: str) -> str:
    """``auto`` is CUDA when there is one; asking for CUDA where there is none is an error."""
    import torch

    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "No CUDA device was found.",
            where="training.device",
            found=wanted,
            allowed="auto, cpu; or cuda on a machine with a GPU and a CUDA build of torch",
            write="training:\n  device: auto",
        )
    return wanted


def learning_rate_at(step: int, total: int, peak: float, warmup_ratio: float) -> float:
    """Linear warm-up to the peak, then a cosine down to zero. ``step`` counts from 0."""
    warmup = math.ceil(total * warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def plan_steps(rows: int, effective_batch: int, epochs: int, max_steps: int | None) -> tuple[int, int]:
    """Optimizer steps in an epoch, and in the whole run."""
    per_epoch = math.ceil(rows / effective_batch)
    total = per_epoch * epochs
    return per_epoch, total if max_steps is None else min(total, max_steps)


class Checkpoint:
    """The state of a run between two steps, in one folder that appears whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, step: int, model: Any, optimizer: Any, curve: list[dict]) -> None:
        import torch

        with atomic_folder(self.folder) as partial:
            trained = {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}
            random = {"cpu": torch.get_rng_state()}
            if torch.cuda.is_available():
                random["cuda"] = torch.cuda.get_rng_state_all()
            state = {"step": step, "trained": trained, "optimizer": optimizer.state_dict(), "random": random}
            torch.save(state, partial / "state.pt")
            write_jsonl(partial / "curve.jsonl", curve)

    def load(self, model: Any, optimizer: Any) -> tuple[int, list[dict]]:
        """Take up the saved state; (0, []) when there is none."""
        import torch

        if not (self.folder / "state.pt").is_file():
            return 0, []
        state = torch.load(self.folder / "state.pt", map_location="cpu", weights_only=True)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(state["trained"][name])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"]["cpu"])
        if "cuda" in state["random"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["random"]["cuda"])
        return state["step"], list(read_jsonl(self.folder / "curve.jsonl"))

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def validation_loss(model: Any, rows: "list[Row]", batch_size: int, pad_token_id: int) -> float:
    """Mean negative log-likelihood of an answer token over the rows, in nats."""
    import torch

    from scripts.training.batches import collate, epoch_batches, learned_tokens
    from scripts.training.step import chunked_loss

    model.eval()
    device = next(model.parameters()).device
    total = tokens = 0.0
    with torch.no_grad():
        for batch in epoch_batches(rows, batch_size, seed=0, epoch=0):
            learned = learned_tokens(batch)
            total += float(chunked_loss(model, collate(batch, pad_token_id, device))) * learned
            tokens += learned
    model.train()
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
) -> tuple[list[dict], int]:
    """Take the steps. Returns the curve (a row a step) and the step that it was resumed from."""
    import torch

    from scripts.training.batches import collate, epoch_batches, learned_tokens
    from scripts.training.step import forward_backward, optimizer_step

    device = next(model.parameters()).device
    # fp16 gradients under autocast underflow without a scale; bf16 has fp32's range.
    scaler = torch.amp.GradScaler(device.type) if scenario.precision == "fp16-mixed" else None
    effective_batch = scenario.micro_batch * scenario.gradient_accumulation
    per_epoch, total = plan_steps(len(rows), effective_batch, loop["epochs"], loop["max_steps"])
    start, curve = checkpoint.load(model, optimizer)
    if start:
        log.info("Going on from the checkpoint after step %d", start)
    last_message = time.monotonic()
    begun, done_tokens = time.monotonic(), 0
    batches: list[list[Row]] = []
    for step in range(start, total):
        if not batches or step % per_epoch == 0:
            batches = epoch_batches(rows, effective_batch, seed, step // per_epoch)
        batch = batches[step % per_epoch]
        rate = learning_rate_at(step, total, loop["learning_rate"], loop["warmup_ratio"])
        for group in optimizer.param_groups:
            group["lr"] = rate
        learned = learned_tokens(batch)
        loss = 0.0
        for first in range(0, len(batch), scenario.micro_batch):
            micro = batch[first : first + scenario.micro_batch]
            # Each micro-batch counts by its answer tokens: accumulation gives the gradient of the whole batch.
            share = learned_tokens(micro) / learned
            scale = share if scaler is None else scaler.scale(torch.tensor(share, device=device))
            micro_loss = forward_backward(model, collate(micro, pad_token_id, device), scenario, loss_scale=scale)
            loss += share * float(micro_loss)
        norm = float(optimizer_step(model, optimizer, scenario, max_grad_norm=loop["max_grad_norm"], scaler=scaler))
        tokens = sum(len(row.input_ids) for row in batch)
        done_tokens += tokens
        if not math.isfinite(loss):
            raise UserError(
                f"The loss is {loss} at step {step + 1}.",
                where="training",
                allowed="a smaller learning_rate, or another precision (fp16 overflows where bf16 does not)",
            )
        curve.append(
            {
                "gradient_norm": norm,
                "learned_tokens": learned,
                "learning_rate": rate,
                "loss": loss,
                "step": step + 1,
                "tokens": tokens,
            }
        )
        if (step + 1) % loop["save_every_steps"] == 0 and step + 1 < total:
            checkpoint.save(step + 1, model, optimizer, curve)
        now = time.monotonic()
        if now - last_message >= 5 or step + 1 == total:
            last_message = now
            speed = done_tokens / (now - begun)
            left = (total - step - 1) * (now - begun) / (step + 1 - start)
            log.info(
                "step %d of %d  loss %.3f  %.0f tokens/s  %.0f s left", step + 1, total, loss, speed, max(left, 0.0)
            )
    return curve, start


def save_adapter(model: Any, folder: Path, base: str) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json``, the same bytes for the same adapter."""
    with atomic_folder(folder.with_name(folder.name + ".new")) as partial:
        model.save_pretrained(partial)
        config = read_json(partial / "adapter_config.json")
        config["base_model_name_or_path"] = base
        for key, value in config.items():
            if isinstance(value, list) and all(isinstance(item, str) for item in value):
                config[key] = sorted(value)  # PEFT keeps sets, whose order differs from run to run
        folder.mkdir(parents=True, exist_ok=True)
        os.replace(partial / "adapter_model.safetensors", folder / "adapter_model.safetensors")
        write_json(folder / "adapter_config.json", config)
    shutil.rmtree(folder.with_name(folder.name + ".new"))


def versions() -> dict[str, str]:
    """Releases of the packages that shape the result."""
    import importlib.metadata

    names = ("bitsandbytes", "peft", "torch", "transformers")
    return {name: importlib.metadata.version(name) for name in names} | {"python": sys.version.split()[0]}


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
    """Train and write the adapter, the curve and the report."""
    description = read_json(base / "description.json")
    scenario = Scenario.from_mapping({**scenario_mapping, "model": read_json(base / "config.json")}, where="training")
    state = {
        "code": code,
        "loop": loop,
        "scenario": scenario.to_mapping(),
        "seed": seed,
        "train": sha256_file(inputs["train"]),
        "weights": read_json(inputs["weights"]),
    }
    folder = Path(outputs["adapter"]).parent
    checkpoint = Checkpoint(folder.parent / "checkpoints" / digest(state))

    import torch
    from transformers import AutoTokenizer

    from scripts.training.batches import learned_tokens, read_rows
    from scripts.training.model import assert_quantized, build_model, build_optimizer

    device = pick_device(loop["device"])
    torch.set_num_threads(threads)
    if device == "cpu":
        keep_host_memory()
    torch.use_deterministic_algorithms(True, warn_only=device == "cuda")
    torch.utils.deterministic.fill_uninitialized_memory = False  # finds reads of it; here it is a twentieth of the time
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    rows, held_out = read_rows(inputs["train"]), read_rows(inputs["validation"])[: loop["validation_rows"]]
    effective_batch = scenario.micro_batch * scenario.gradient_accumulation
    per_epoch, total = plan_steps(len(rows), effective_batch, loop["epochs"], loop["max_steps"])
    log.info(
        "effective batch %d = micro-batch %d x accumulation %d; %d rows = %d steps an epoch; %d steps; %s, %d threads",
        effective_batch,
        scenario.micro_batch,
        scenario.gradient_accumulation,
        len(rows),
        per_epoch,
        total,
        device,
        threads,
    )
    started = time.monotonic()
    model = build_model(scenario, device, weights=base, seed=seed)
    quantized = assert_quantized(model, scenario)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log.info("%s: %d trainable parameters; %s", description["title"], trainable, json.dumps(quantized, sort_keys=True))
    optimizer = build_optimizer(model, scenario, learning_rate=loop["learning_rate"], weight_decay=loop["weight_decay"])
    loaded = time.monotonic()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    curve, resumed_from = fit(model, optimizer, rows, scenario, loop, seed, pad_token_id, checkpoint)
    trained = time.monotonic()
    # A 4-bit weight is unpacked once a batch, so on the CPU large ones pay; on a card, no more rows than were gated.
    loss = validation_loss(model, held_out, 64 if device == "cpu" else scenario.micro_batch, pad_token_id)
    log.info("validation loss %.4f over %d rows", loss, len(held_out))
    save_adapter(model, folder, description["source"].get("repository", description["title"]))
    write_jsonl(outputs["curve"], curve)
    steps_here = curve[resumed_from:]
    seconds = trained - loaded
    write_json(
        outputs["report"],
        {
            "base": {key: description[key] for key in ("license", "source", "title")},
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "effective_batch": effective_batch,
            "epochs": total / per_epoch,
            "final_loss": sum(row["loss"] for row in curve[-10:]) / len(curve[-10:]),
            "first_loss": curve[0]["loss"],
            "learned_tokens": sum(row["learned_tokens"] for row in curve),
            "loop": loop,
            "peak_allocated_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
            "quantized": quantized,
            "resumed_from_step": resumed_from or None,
            "scenario": {key: value for key, value in scenario.to_mapping().items() if key != "model"},
            "seed": seed,
            "steps": total,
            "times": {
                "load_wall_seconds": loaded - started,
                "tokens_per_second": sum(row["tokens"] for row in steps_here) / seconds,
                "train_wall_seconds": seconds,
            },
            "threads": threads,
            "tokens": sum(row["tokens"] for row in curve),
            "train_rows": len(rows),
            "trainable_parameters": trainable,
            "validation_loss": loss,
            "validation_rows": len(held_out),
            "validation_learned_tokens": learned_tokens(held_out),
            "versions": versions(),
        },
    )
    checkpoint.remove()


if __name__ == "__main__":
    with job(snakemake):
        main(
            Path(snakemake.input.config).parent,
            snakemake.params.scenario,
            snakemake.params.loop,
            snakemake.params.seed["seed"],
            {name: snakemake.input[name] for name in ("train", "validation", "weights")},
            {name: snakemake.output[name] for name in ("adapter", "report", "curve")},
            snakemake.threads,
            snakemake.params.code,
        )
