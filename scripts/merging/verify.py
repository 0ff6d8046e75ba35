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
import gc
import os
import shlex
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from scripts.common.checkpoint import (
    FLOAT_DTYPES,
    ITEM_BYTES,
    SAFETENSORS_NAMES,
    Checkpoint,
    Tensor,
    open_checkpoint,
    read_into,
    read_tensor,
)
from scripts.common.errors import UserError
from scripts.common.files import read_jsonl, read_report, sha256_file, write_report
from scripts.common.job import command, job, log, progress
from scripts.common.sizes import gib
from scripts.merging.adapter import LORA_KEY, PREFIX, Plan, open_adapter, plan_merge, without_numbers
from scripts.merging.merge import MANIFEST, check_small_inputs

# Root mean square of the logits' differences that rounding explains, as a share of the logits' standard
# deviation, by the dtype of the weights and the dtype of the computation. Three to ten times what a 30-layer model
# shows (float32 3e-6; bfloat16 weights 7e-3, computing in bfloat16 as well 4e-2); an adapter that was left out
# or added twice differs by more, unless it hardly learned anything.
LOGITS_TOLERANCE = {
    ("float32", "float32"): 1e-4,
    ("float16", "float32"): 3e-3,
    ("bfloat16", "float32"): 2e-2,
    ("float16", "float16"): 2e-2,
    ("bfloat16", "bfloat16"): 1e-1,
}
# The most, in units of that tolerance, by which an answer's token may lead over the one that the merged model
# prefers for the two to be called a tie: four standard deviations of the difference of two logits.
TIE = 6
CHUNK_BYTES = 2**24  # compared at once
WORKING_BYTES = 700_000_000  # of a forward pass and of the process beside the weights


def check_files(merged: Path, digests: dict[str, str]) -> dict[str, Any]:
    """Digest of every file against the manifest, and no weight beside those it names."""
    files = {name: digest for name, digest in sorted(digests.items()) if name != MANIFEST}
    wrong = [
        name
        for name, digest in progress(files.items(), "digests", len(files), "file")
        if not (merged / name).is_file() or sha256_file(merged / name) != digest
    ]
    wrong += sorted({path.name for path in merged.glob("*.safetensors")} - set(files))
    return _result(not wrong, files=len(files), wrong=wrong)


def check_tensors(plan: Plan, merged: Checkpoint, dtype: str) -> dict[str, Any]:
    """Names, shapes, dtypes and the shard of each tensor; the one exception is an output layer that came untied."""
    expected = set(plan.base.tensors) | ({plan.untied} if plan.untied else set())
    wrong, converted = expected ^ set(merged.tensors), 0
    for name in expected & set(merged.tensors):
        ours, theirs = merged.tensors[name], plan.source(name)
        other_dtype = ours.dtype != theirs.dtype
        convertible = theirs.dtype in FLOAT_DTYPES and FLOAT_DTYPES.get(ours.dtype) == dtype
        if (ours.shape, ours.path.name) != (theirs.shape, theirs.path.name) or (other_dtype and not convertible):
            wrong.add(name)
        converted += other_dtype
    added = sorted(set(merged.tensors) - set(plan.base.tensors))
    return _result(not wrong, tensors=len(merged.tensors), added=added, converted=converted, wrong=sorted(wrong))


def check_untouched(plan: Plan, merged: Checkpoint) -> dict[str, Any]:
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
    return _result(not wrong, tensors=len(tensors), bytes=sum(tensor.bytes for tensor in tensors), wrong=wrong)


def _chunks(tensor: Tensor) -> Iterator[bytearray]:
    with open(tensor.path, "rb", buffering=0) as handle:
        for start in range(tensor.start, tensor.end, CHUNK_BYTES):
            buffer = bytearray(min(CHUNK_BYTES, tensor.end - start))
            read_into(handle.fileno(), memoryview(buffer), start, tensor.path)
            yield buffer


def peft_merge(plan: Plan, name: str) -> Any:
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
    config.target_modules, config.modules_to_save, config.ensure_weight_tying = {module}, None, False
    weight = read_tensor(plan.source(name))
    if update.replace is not None:
        weight = adapter.read(update.replace).to(weight.dtype)
    bias = plan.base.tensors.get(f"{name.removesuffix('.weight')}.bias") if config.lora_bias else None
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
        loaded = set_peft_model_state_dict(root, {key.removeprefix(PREFIX): adapter.read(key) for key in keys})
        assert not loaded.unexpected_keys, loaded
        root.get_submodule(module).merge()
    return layer.weight.data


def check_layers(plan: Plan, merged: Checkpoint, count: int) -> dict[str, Any]:
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
    sample = sorted({group[index * len(group) // count] for group, index in picked}, key=names.index)
    layers = []
    for name in progress(sample, "layers against PEFT", unit="layer"):
        ours, before = read_tensor(merged.tensors[name]), read_tensor(plan.source(name))
        expected = peft_merge(plan, name).to(ours.dtype)
        precision = torch.finfo(ours.dtype).eps * (4 if ours.dtype == torch.float32 else 1)
        within, worst, different = True, 0.0, 0
        step = max(1, 2**22 // max(1, ours[0].numel()))
        for a, b, w in zip(ours.split(step), expected.split(step), before.split(step), strict=True):
            difference = (a.float() - b.float()).abs()
            within = within and bool((difference <= precision * (b.float().abs() + w.float().abs())).all())
            worst, different = max(worst, float(difference.max())), different + int((difference > 0).sum())
        layers.append({"name": name, "max_abs_difference": worst, "different_values": different, "within": within})
    good = all(layer["within"] for layer in layers)
    return _result(good, changed=len(names), layers=layers, identical=sum(not x["different_values"] for x in layers))


def comparison_bytes(stored: int, dtype: str, adapter_bytes: int) -> dict[str, int]:
    """Bytes that the comparison of the models needs, by the dtype that it computes in, the preferred one first.

    Parameters
    ----------
    stored
        Bytes of the weights' files, of ``dtype``.
    """
    itemsize = ITEM_BYTES[SAFETENSORS_NAMES[dtype]]
    return {
        name: stored * size // itemsize + adapter_bytes + WORKING_BYTES
        for name, size in (("float32", 4), (dtype, itemsize))
    }


def choose_device(sizes: dict[str, int], free: dict[str, int]) -> tuple[str, str] | None:
    """Device and dtype of the computation; None when no device has the room.

    Parameters
    ----------
    sizes
        Bytes needed by dtype, the preferred one first.
    free
        Free bytes by device, the preferred one first.
    """
    return next(((device, dtype) for device in free for dtype in sizes if free[device] >= sizes[dtype]), None)


def free_memory() -> dict[str, int]:
    """Free bytes of the GPU, if there is one, and of the machine."""
    import psutil
    import torch

    free = {"cuda": torch.cuda.mem_get_info()[0]} if torch.cuda.is_available() else {}
    return {**free, "cpu": psutil.virtual_memory().available}


def check_logits(
    plan: Plan, merged: Path, weights: str, place: tuple[str, str], requests: list[str], system: str, max_tokens: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Logits and greedy answers of the merged model against base plus adapter; one model in memory at a time.

    Base plus adapter answer each request greedily. The merged model then reads prompt and answer: where its
    most likely token is the answer's at every step, it would have given the same answer. A step at which the
    two best tokens lie within the tolerance is a tie that rounding may break either way, and is counted.

    Parameters
    ----------
    weights
        Dtype of the merged folder.
    place
        Device and dtype to compute in. float32 shows what the merge rounded and nothing else.
    max_tokens
        The most tokens of an answer.

    Returns
    -------
    tuple
        The results of the checks ``logits`` and ``answers``.
    """
    import torch
    import transformers
    from peft import PeftModel

    from scripts.common.chat import render_prompt

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device, dtype = place

    def load(folder: Path) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), trust_remote_code=False
        )

    def logits(model: Any, sequence: Any, start: int) -> Any:
        # From the prompt's last token on: each position there predicted one token of the answer.
        return model(sequence).logits[0, start - 1 : -1].float().cpu()

    tokenizer = transformers.AutoTokenizer.from_pretrained(merged, trust_remote_code=False)
    texts = [render_prompt(tokenizer, system, request) for request in requests]
    prompts = [tokenizer(text, add_special_tokens=False, return_tensors="pt").to(device) for text in texts]
    stop = tokenizer.eos_token_id
    greedy = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=max_tokens, eos_token_id=stop, pad_token_id=0 if stop is None else stop
    )
    reference, effect = [], 0.0  # (sequence, length of the prompt, logits of the answer) of base plus adapter
    with torch.inference_mode():
        model = PeftModel.from_pretrained(load(plan.base.folder), plan.adapter.folder).to(device).eval()
        for prompt in progress(prompts, "base plus adapter", unit="prompt"):
            start = prompt["input_ids"].shape[1]
            sequence = model.generate(
                input_ids=prompt["input_ids"], attention_mask=prompt["attention_mask"], generation_config=greedy
            )
            reference.append((sequence, start, logits(model, sequence, start)))
            with model.disable_adapter():
                effect += float((logits(model, sequence, start) - reference[-1][2]).double().square().sum())
        del model
        gc.collect()
        model = load(merged).to(device).eval()
        spread = float(torch.cat([values for *_, values in reference]).std())
        tolerance = LOGITS_TOLERANCE.get((weights, dtype), 1e-4) * spread
        worst, squares, same, ties, different = 0.0, 0.0, 0, 0, []
        for number, (sequence, start, expected) in enumerate(progress(reference, "merged", unit="prompt")):
            ours = logits(model, sequence, start)
            difference = (ours - expected).abs()
            worst, squares = max(worst, float(difference.max())), squares + float(difference.double().square().sum())
            missed = (ours.argmax(-1) != sequence[0, start:].cpu()).nonzero().flatten().tolist()
            if not missed:
                same += 1
            elif float(expected[missed[0]].max() - expected[missed[0], ours[missed[0]].argmax()]) <= TIE * tolerance:
                ties += 1
            else:
                different.append(number)
    count = sum(values.numel() for *_, values in reference)
    tokens = sum(len(values) for *_, values in reference)
    facts = {
        "adapter_effect": (effect / count) ** 0.5,
        "computed_in": dtype,
        "device": device,
        "logits_standard_deviation": spread,
        "max_abs_difference": worst,
        "positions": tokens,
        "prompts": len(prompts),
        "rms_difference": (squares / count) ** 0.5,
        "tolerance": tolerance,
    }
    return (
        _result(facts["rms_difference"] <= tolerance, **facts),
        _result(not different, different=different, prompts=len(prompts), same=same, ties=ties, tokens=tokens),
    )


def _result(good: bool, **facts: Any) -> dict[str, Any]:
    return {"status": "passed" if good else "failed", **facts}


def _not_run(reason: str) -> dict[str, Any]:
    return {"status": "not run", "reason": f"not run: {reason}"}


def verify(
    base: str | os.PathLike,
    adapter: str | os.PathLike,
    merged: str | os.PathLike,
    *,
    requests: Iterable[str] = (),
    system: str = "",
    layers: int = 8,
    max_new_tokens: int = 32,
    free: dict[str, int] | None = None,
) -> dict[str, Any]:
    """Run every check that the machine can run.

    Parameters
    ----------
    base, adapter, merged
        The folders of a merge.
    requests
        Held-out requests for the last two checks.
    system
        System prompt that the adapter was trained with.
    layers
        How many changed weights to compare with PEFT's.
    max_new_tokens
        The most tokens of an answer.
    free
        Free bytes by device; None: as found.

    Returns
    -------
    dict
        ``passed`` (no check failed), ``checks`` (by name: ``status`` passed, failed or not run, with figures),
        ``complete`` (every check ran).
    """
    merged, requests = Path(merged), list(requests)
    manifest = read_report(merged / MANIFEST)
    check_small_inputs(Path(base), Path(adapter))
    plan, weights = plan_merge(open_checkpoint(base), open_adapter(adapter)), manifest["dtype"]
    files = check_files(merged, manifest["sha256"])
    try:
        result = open_checkpoint(merged)
    except UserError as error:
        if files["status"] == "passed":
            raise
        others = dict.fromkeys(("tensors", "untouched", "layers", "logits", "answers"), _not_run(error.problem))
        return {"checks": {"files": files, **others}, "complete": False, "passed": False}
    checks = {
        "files": files,
        "tensors": check_tensors(plan, result, weights),
        "untouched": check_untouched(plan, result),
    }
    stored = max(sum(shard.bytes for shard in checkpoint.shards) for checkpoint in (plan.base, result))
    sizes = comparison_bytes(stored, weights, plan.adapter.path.stat().st_size)
    free = free if free is not None else free_memory()
    place = choose_device(sizes, free)
    changed = [name for name in checks["files"]["wrong"] if not name.endswith(".safetensors")]
    if checks["tensors"]["status"] == "failed":
        checks["layers"] = checks["logits"] = checks["answers"] = _not_run("the tensors are not the base's")
    else:
        checks["layers"] = check_layers(plan, result, layers)
        if changed:
            checks["logits"] = checks["answers"] = _not_run(f"{changed[0]} is not what the merge wrote")
        elif not requests:
            checks["logits"] = checks["answers"] = _not_run("no requests were given")
        elif place is None:
            room = ", ".join(f"{gib(size, 1)} free" + (f" on {name}" * (len(free) > 1)) for name, size in free.items())
            checks["logits"] = checks["answers"] = _not_run(f"needs {gib(sizes[weights], 1)}, {room}")
        else:
            checks["logits"], checks["answers"] = check_logits(
                plan, merged, weights, place, requests, system, max_new_tokens
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
        again = f"rm {shlex.quote(str(Path(where, MANIFEST)))}    # then the same command again: it is merged anew"
        problem = "The merged model is not base plus adapter."
        raise UserError(problem, where=where, found="; ".join(failed)[:2000], write=again)


def first_requests(path: str | os.PathLike, count: int) -> list[str]:
    """The first requests of a split."""
    return [row["request"] for row in islice(read_jsonl(path), count)]


def run(
    base: Path,
    adapter: Path,
    merged: Path,
    prompts: str,
    split: str,
    settings: dict[str, Any],
    report_path: str | os.PathLike,
) -> None:
    """The rule's work: verify, keep the report in the log when a check fails, fail then."""
    settings = dict(settings)
    read_report(split, prompts)
    requests = first_requests(prompts, settings.pop("prompts"))
    report = verify(base, adapter, merged, requests=requests, **settings)
    require_passed(report, merged)
    write_report(report_path, report)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.merging.verify", description="Compare a merged folder with its base and adapter."
    )
    for name in ("base", "adapter", "merged"):
        parser.add_argument(f"--{name}", required=True, metavar="DIR")
    parser.add_argument("--prompts", metavar="FILE", help='JSON lines with "request"; left out: layer checks alone')
    parser.add_argument("--count", type=int, default=8, metavar="N", help="requests to take (default 8)")
    parser.add_argument("--system", default="", help="system prompt of the training")
    parser.add_argument("--layers", type=int, default=8, metavar="N", help="weights to compare (default 8)")
    options = parser.parse_args()
    requests = first_requests(options.prompts, options.count) if options.prompts else []
    folders = (options.base, options.adapter, options.merged)
    report = verify(*folders, requests=requests, system=options.system, layers=options.layers)
    for name, check in report["checks"].items():
        print(f"{name:9} {check.get('reason', check['status'])}")
    require_passed(report, options.merged)
    return 0


if __name__ == "__main__":
    if "snakemake" in globals():
        with job(snakemake):
            run(
                Path(snakemake.input.base).parent,
                Path(snakemake.input.adapter).parent,
                Path(snakemake.input.manifest).parent,
                snakemake.input.prompts,
                snakemake.input.split,
                snakemake.params.verify,
                snakemake.output.report,
            )
    else:
        command(main)
