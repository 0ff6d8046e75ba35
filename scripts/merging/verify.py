"""Prove a merged folder right, from its files up to its answers, as far as the machine's memory allows.

Checks, each with its status in the report:

``files``      every file has the digest that the manifest says
``tensors``    names, shapes and dtypes are the base's
``untouched``  what the adapter leaves alone is the base's, byte for byte
``layers``     a sample of the changed weights equals what PEFT's own layers merge
``logits``     on held-out requests the merged model computes what base plus adapter compute
``answers``    and its greedy answers are the same

The first four need one layer's memory; the last two hold a model, and the report says when they were not run.

By hand::

    python -m scripts.merging.verify --base DIR --adapter DIR --merged DIR [--prompts test.jsonl]
"""

import argparse
import os
import shlex
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from dryfit.common.errors import UserError
from dryfit.common.files import read_jsonl, read_report, sha256_file, standing_for, write_report
from dryfit.common.terminal import command, log, progress
from scripts.common.checkpoint import (
    FLOAT_DTYPES,
    StoredTensor,
    WeightFolder,
    open_checkpoint,
    read_into,
    read_tensor,
)
from scripts.common.job import job
from scripts.common.reports import CARRIED, carry
from scripts.merging.adapter import (
    LORA_KEY,
    PREFIX,
    MergePlan,
    open_adapter,
    plan_merge,
    without_numbers,
)
from scripts.merging.logits import (
    NO_QUESTIONS,
    Questions,
    check_logits,
    free_memory,
    not_run,
    result_of,
)
from scripts.merging.merge import MANIFEST, check_small_inputs

CHUNK_BYTES = 2**24  # compared at once


def check_files(merged: Path, digests: dict[str, str]) -> dict[str, Any]:
    """Digest of every file against the manifest, and no weight beside those it names."""
    files = {name: digest for name, digest in sorted(digests.items()) if name != MANIFEST}
    wrong = [
        name
        for name, digest in progress(files.items(), "digests", len(files), "file")
        if not (merged / name).is_file() or sha256_file(merged / name) != digest
    ]
    wrong += sorted({path.name for path in merged.glob("*.safetensors")} - set(files))
    return result_of(not wrong, files=len(files), wrong=wrong)


def check_tensors(plan: MergePlan, merged: WeightFolder, dtype: str) -> dict[str, Any]:
    """Names, shapes, dtypes and the shard of each tensor; the one exception is an output layer that came untied."""
    expected = set(plan.base.tensors) | ({plan.untied} if plan.untied else set())
    wrong, converted = expected ^ set(merged.tensors), 0
    for name in expected & set(merged.tensors):
        ours, theirs = merged.tensors[name], plan.source(name)
        other_dtype = ours.dtype != theirs.dtype
        convertible = theirs.dtype in FLOAT_DTYPES and FLOAT_DTYPES.get(ours.dtype) == dtype
        if (ours.shape, ours.path.name) != (theirs.shape, theirs.path.name) or (
            other_dtype and not convertible
        ):
            wrong.add(name)
        converted += other_dtype
    added = sorted(set(merged.tensors) - set(plan.base.tensors))
    return result_of(
        not wrong,
        tensors=len(merged.tensors),
        added=added,
        converted=converted,
        wrong=sorted(wrong),
    )


def check_untouched(plan: MergePlan, merged: WeightFolder) -> dict[str, Any]:
    """Byte for byte where the dtype is the base's; value for value where the whole model was converted."""
    import torch

    tensors = [tensor for name, tensor in merged.tensors.items() if not plan.update(name).keys]
    wrong = []
    for ours in progress(tensors, "untouched tensors", unit="tensor"):
        theirs = plan.base.tensors.get(plan.update(ours.name).source or ours.name)
        if theirs is None or ours.shape != theirs.shape:
            same = False
        elif ours.dtype == theirs.dtype:
            same = all(a == b for a, b in zip(_chunks(ours), _chunks(theirs), strict=True))
        else:
            values = read_tensor(ours)
            same = torch.equal(values, read_tensor(theirs).to(values.dtype))
        if not same:
            wrong.append(ours.name)
    return result_of(
        not wrong, tensors=len(tensors), bytes=sum(tensor.bytes for tensor in tensors), wrong=wrong
    )


def _chunks(tensor: StoredTensor) -> Iterator[bytearray]:
    with open(tensor.path, "rb", buffering=0) as handle:
        for start in range(tensor.start, tensor.end, CHUNK_BYTES):
            buffer = bytearray(min(CHUNK_BYTES, tensor.end - start))
            read_into(handle.fileno(), memoryview(buffer), start, tensor.path)
            yield buffer


def peft_merge(plan: MergePlan, name: str) -> Any:
    """The weight ``name`` merged by PEFT, in the base's dtype, out of a model that has this one layer.

    PEFT decides rank, scale and the kind of layer by itself, from adapter_config.json and the module's path.
    """
    import torch
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    from transformers.pytorch_utils import Conv1D

    update, adapter = plan.update(name), plan.adapter
    match = LORA_KEY.match(str(update.a).removeprefix(PREFIX))
    assert match is not None, update
    module = match["module"]
    config = LoraConfig.from_pretrained(str(adapter.folder))
    config.init_lora_weights = False  # PEFT would draw random numbers that are overwritten below
    config.target_modules, config.modules_to_save, config.ensure_weight_tying = (
        {module},
        None,
        False,
    )
    weight = read_tensor(plan.source(name))
    if update.replace is not None:
        weight = adapter.read(update.replace).to(weight.dtype)
    bias = (
        plan.base.tensors.get(f"{name.removesuffix('.weight')}.bias") if config.lora_bias else None
    )
    with torch.device("meta"):
        if match["part"].startswith("lora_embedding"):
            layer: Any = torch.nn.Embedding(*weight.shape)
        elif update.transposed:
            layer = Conv1D(weight.shape[1], weight.shape[0])
            layer.bias = None
        else:
            layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = torch.nn.Parameter(read_tensor(bias), requires_grad=False)
    root = inner = torch.nn.Module()
    *parents, last = module.split(".")
    for part in parents:
        inner.add_module(part, torch.nn.Module())
        inner = inner.get_submodule(part)
    inner.add_module(last, layer)
    keys = [key for key in adapter.tensors if key.startswith(f"{PREFIX}{module}.lora_")]
    with torch.no_grad():
        inject_adapter_in_model(config, root)
        for key, parameter in root.named_parameters():
            if "lora_" in key:
                parameter.data = parameter.data.float()  # as PeftModel does
        loaded = set_peft_model_state_dict(
            root, {key.removeprefix(PREFIX): adapter.read(key) for key in keys}
        )
        assert not loaded.unexpected_keys, loaded
        root.get_submodule(module).merge()
    return layer.weight.data


def check_layers(plan: MergePlan, merged: WeightFolder, count: int) -> dict[str, Any]:
    """Some changed weights, of every kind and spread over the model, against PEFT's merge of the same layer.

    They may differ by rounding: half a unit in the last place of a low-precision dtype; in float32, what another
    order of the ``r`` products makes of it.
    """
    import torch

    names = [name for name in merged.tensors if plan.update(name).a is not None]
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(without_numbers(name), []).append(name)
    # One kind of layer after the other, each time deeper in the model.
    groups = list(kinds.values())
    picked = ((groups[index % len(groups)], index) for index in range(count if groups else 0))
    sample = sorted(
        {group[index * len(group) // count] for group, index in picked}, key=names.index
    )
    layers = []
    for name in progress(sample, "layers against PEFT", unit="layer"):
        ours, before = read_tensor(merged.tensors[name]), read_tensor(plan.source(name))
        expected = peft_merge(plan, name).to(ours.dtype)
        precision = torch.finfo(ours.dtype).eps * (4 if ours.dtype == torch.float32 else 1)
        within, worst, different = True, 0.0, 0
        step = max(1, 2**22 // max(1, ours[0].numel()))
        for a, b, w in zip(ours.split(step), expected.split(step), before.split(step), strict=True):
            difference = (a.float() - b.float()).abs()
            within = within and bool(
                (difference <= precision * (b.float().abs() + w.float().abs())).all()
            )
            worst, different = (
                max(worst, float(difference.max())),
                different + int((difference > 0).sum()),
            )
        layers.append(
            {
                "name": name,
                "max_abs_difference": worst,
                "different_values": different,
                "within": within,
            }
        )
    good = all(layer["within"] for layer in layers)
    return result_of(
        good,
        changed=len(names),
        layers=layers,
        identical=sum(not x["different_values"] for x in layers),
    )


def verify(
    base: str | os.PathLike,
    adapter: str | os.PathLike,
    merged: str | os.PathLike,
    *,
    questions: Questions = NO_QUESTIONS,
    layers: int = 8,
    free: dict[str, int] | None = None,
) -> dict[str, Any]:
    """Run every check that the machine can run.

    Parameters
    ----------
    base, adapter, merged
        The folders of a merge.
    questions
        What base plus adapter and the merged model are asked in the last two checks.
    layers
        How many changed weights to compare with PEFT's.
    free
        Free bytes by device; None: as found.

    Returns
    -------
    dict
        ``passed`` (no check failed), ``checks`` (by name: ``status`` passed, failed or not run, with figures),
        ``complete`` (every check ran).
    """
    merged = Path(merged)
    manifest = read_report(merged / MANIFEST)
    check_small_inputs(Path(base), Path(adapter))
    plan = plan_merge(open_checkpoint(base), open_adapter(adapter))
    checks = {"files": check_files(merged, manifest["sha256"])}
    try:
        result = open_checkpoint(merged)
    except UserError as error:
        if checks["files"]["status"] == "passed":
            raise
        checks |= dict.fromkeys(
            ("tensors", "untouched", "layers", "logits", "answers"), not_run(error.problem)
        )
        return {"checks": checks, "complete": False, "passed": False}
    checks["tensors"] = check_tensors(plan, result, manifest["dtype"])
    checks["untouched"] = check_untouched(plan, result)
    if checks["tensors"]["status"] == "failed":
        checks |= dict.fromkeys(
            ("layers", "logits", "answers"), not_run("the tensors are not the base's")
        )
    else:
        changed = [name for name in checks["files"]["wrong"] if not name.endswith(".safetensors")]
        checks["layers"] = check_layers(plan, result, layers)
        checks["logits"], checks["answers"] = (
            [not_run(f"{changed[0]} is not what the merge wrote")] * 2
            if changed
            else check_logits(
                plan,
                result,
                manifest["dtype"],
                questions,
                free if free is not None else free_memory(),
            )
        )
    for name, check in checks.items():
        log.info("%-9s %s", name, check.get("reason", check["status"]))
    states = {check["status"] for check in checks.values()}
    return {"checks": checks, "complete": "not run" not in states, "passed": "failed" not in states}


def require_passed(report: dict[str, Any], where: Path | str) -> None:
    """Raise when a check failed, naming each."""
    failed = [
        f"{name}: " + ", ".join(f"{key} {value}" for key, value in check.items() if key != "status")
        for name, check in report["checks"].items()
        if check["status"] == "failed"
    ]
    if failed:
        remove = shlex.quote(str(standing_for(Path(where, MANIFEST))))
        again = f"rm {remove}    # then the same command again: it is merged again"
        problem = "The merged model is not base plus adapter."
        raise UserError(problem, where=where, found="; ".join(failed)[:2000], write=again)


def first_requests(path: str | os.PathLike, count: int) -> list[str]:
    return [row["request"] for row in islice(read_jsonl(path), count)]


def run(
    base: Path,
    adapter: Path,
    merged: Path,
    prompts: str,
    split: str,
    settings: dict[str, Any],
    report_path: str | os.PathLike,
    **reports: str,
) -> None:
    """The rule's work: verify, keep the report in the log when a check fails, fail then; ``reports`` are carried."""
    read_report(split, prompts)
    carried = carry(**reports)  # before the work, so that an edited report costs none
    requests = first_requests(prompts, settings["prompts"])
    questions = Questions(requests, settings["system"], settings["max_new_tokens"])
    report = verify(base, adapter, merged, questions=questions, layers=settings["layers"])
    require_passed(report, merged)
    write_report(report_path, {CARRIED: carried, **report})


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.merging.verify",
        description="Compare a merged folder with its base and adapter.",
    )
    for name in ("base", "adapter", "merged"):
        parser.add_argument(f"--{name}", required=True, metavar="DIR")
    parser.add_argument(
        "--prompts", metavar="FILE", help='JSON lines with "request"; left out: layer checks alone'
    )
    parser.add_argument(
        "--count", type=int, default=8, metavar="N", help="requests to take (default 8)"
    )
    parser.add_argument("--system", default="", help="system prompt of the training")
    parser.add_argument(
        "--layers", type=int, default=8, metavar="N", help="weights to compare (default 8)"
    )
    options = parser.parse_args()
    requests = first_requests(options.prompts, options.count) if options.prompts else []
    folders, questions = (
        (options.base, options.adapter, options.merged),
        Questions(requests, options.system),
    )
    report = verify(*folders, questions=questions, layers=options.layers)
    for name, check in report["checks"].items():
        print(f"{name:9} {check.get('reason', check['status'])}")
    require_passed(report, options.merged)
    return 0


if __name__ == "__main__":
    if "snakemake" in globals():
        with job(snakemake):
            run(
                snakemake.input.base,
                Path(snakemake.input.adapter).parent,
                snakemake.input.merged,
                snakemake.input.prompts,
                snakemake.input.split,
                snakemake.params.verify,
                snakemake.output.report,
                **{name: snakemake.input[name] for name in ("weights", "training", "manifest")},
            )
    else:
        command(main)
