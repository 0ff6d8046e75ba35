"""Rule ``compare_merged``: what merging changed, on the same requests.

An adapter is trained on top of the quantized base and merged into the unquantized one, so the merged model is not the
one that was trained. The trained one, base as quantized plus adapter, answers the first of the held-out requests that
the merged model answered; losses and answers of both are set side by side.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from dryfit.common.files import (
    read_folder,
    read_json,
    read_jsonl,
    read_report,
    write_jsonl,
    write_report,
)
from dryfit.common.terminal import log
from dryfit.scenario.scenario import Scenario
from scripts.common.job import job, keep_host_memory
from scripts.common.machine import pick_device
from scripts.common.statistics import share
from scripts.common.tokenizer import read_tokenizer
from scripts.evaluation.compare import compare
from scripts.evaluation.evaluate import answered
from scripts.tasks.support import registry
from scripts.tasks.text import Task


def as_trained(scenario: Scenario, base: Path, adapter: Path, device: str) -> Any:
    """The model that was trained, in evaluation mode.

    Parameters
    ----------
    scenario
        Of the training.
    base, adapter
        Folders of the base's weights and of the adapter.
    device
        On the CPU the quantized weights are unpacked once, to the values that training computed with: it unpacks them
        in each pass. In evaluation mode bitsandbytes would take a kernel there that rounds to bfloat16.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    from dryfit.step.model import build_model, weight_dtype
    from dryfit.step.quantized import dequantized, quantized_layers

    plain = scenario.changed(gradient_checkpointing=False, loss="full", packing="none")
    model = build_model(plain, device, weights=base)
    loaded = set_peft_model_state_dict(model, load_file(adapter / "adapter_model.safetensors"))
    assert not loaded.unexpected_keys, loaded.unexpected_keys
    if device == "cpu":
        for name, layer in quantized_layers(model).items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, dequantized(layer, weight_dtype(scenario)))
    return model.eval()


def side_by_side(task: Task, trained: list[dict], merged: list[dict]) -> dict[str, Any]:
    """Both models' figures on the same rows, the paired differences (merged minus trained), and the equal answers.

    ``trained``, ``merged``: a row for each request, as ``evaluate`` writes them.
    """
    import pandas as pd

    names = (
        task.right_flag,
        "loss",
        *(name for name in task.flags() if name not in (task.right_flag, *task.details)),
    )
    compared = compare(task, pd.DataFrame(trained), pd.DataFrame(merged))
    of_trained, of_merged = task.summarize(trained, share), task.summarize(merged, share)
    return {
        **{name: compared[name] for name in names},
        "merged": {name: of_merged[name] for name in names},
        "n": len(trained),
        "same_answers": share(
            one["answer"] == other["answer"] for one, other in zip(trained, merged, strict=True)
        ),
        "trained": {name: of_trained[name] for name in names},
    }


def main(
    task: Task,
    inputs: dict[str, str],
    outputs: dict[str, str],
    requests: int,
    device: str,
    threads: int,
) -> None:
    """Ask the trained model as the merged one was asked, and write a row for each request and the comparison."""
    import torch

    from dryfit.step.model import autocast_dtype

    device = pick_device(device)
    read_folder(inputs["description"])
    training = read_report(inputs["training"], inputs["adapter"], inputs["settings"])
    metrics = read_report(inputs["metrics"], inputs["answers"])
    read_folder(inputs["weights"])
    base = Path(inputs["weights"]).parent
    mapping = {**training["scenario"], "model": read_json(base / "config.json")}
    scenario = Scenario.from_mapping(mapping, where=inputs["training"])
    merged = list(read_jsonl(inputs["answers"]))[:requests]
    torch.set_num_threads(threads)
    if device == "cpu":
        keep_host_memory()
    dtype = autocast_dtype(scenario)
    lengths = {key: metrics["decoding"][key] for key in ("max_new_tokens", "batch_size")}
    model = as_trained(scenario, base, Path(inputs["adapter"]).parent, device)
    with torch.autocast(device, dtype) if dtype else nullcontext():
        trained = answered(
            task, model, read_tokenizer(base), metrics["prompt"]["system"], merged, **lengths
        )
    write_jsonl(outputs["answers"], trained)
    comparison = side_by_side(task, trained, merged)
    write_report(outputs["comparison"], comparison, outputs["answers"])
    log.info(
        "loss %.4f as trained, %.4f merged; %d of %d answers are the same",
        *(
            comparison["trained"]["loss"],
            comparison["merged"]["loss"],
            comparison["same_answers"]["count"],
            comparison["n"],
        ),
    )


if __name__ == "__main__":
    with job(snakemake):
        main(
            registry.of_job(snakemake.params.task),
            {
                **dict(snakemake.input.items()),
                "description": f"{snakemake.input.base}/description.json",
                "weights": f"{snakemake.input.base}/weights.json",
            },
            dict(snakemake.output.items()),
            snakemake.params.asked["requests"],
            snakemake.params.device["device"],
            snakemake.threads,
        )
