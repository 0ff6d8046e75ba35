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

import gc
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from scripts.common.errors import UserError
from scripts.common.files import read_json, read_jsonl, sha256_file, write_json
from scripts.common.job import command, job, log, progress
from scripts.merging.adapter import LORA_KEY, PREFIX, Adapter, Plan, Update, open_adapter, plan_merge, without_numbers
from scripts.merging.checkpoint import (
    FLOAT_DTYPES,
    ITEM_BYTES,
    SAFETENSORS_NAMES,
    Checkpoint,
    Shard,
    Tensor,
    open_checkpoint,
    read_into,
    read_tensor,
)
from scripts.merging.merge import MANIFEST

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
# Compared at once, in bytes.
CHUNK = 2**24
# Memory of a forward pass and of the process beside the weights, in bytes.
WORKING_BYTES = 700_000_000


def check_files(merged: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Digest of every file against the manifest, and no weight beside those it names."""
    wrong = []
    for name, entry in progress(sorted(manifest["files"].items()), "digests", unit="file"):
        path = merged / name
        if not path.is_file() or path.stat().st_size != entry["bytes"] or sha256_file(path) != entry["sha256"]:
            wrong.append(name)
    wrong += sorted({path.name for path in merged.glob("*.safetensors")} - set(manifest["files"]))
    return _result(not wrong, files=len(manifest["files"]), wrong=wrong)


def check_tensors(base: Checkpoint, merged: Checkpoint, plan: Plan, manifest: dict[str, Any]) -> dict[str, Any]:
    """Names, shapes, dtypes and the shard of each tensor; the one exception is an output layer that came untied."""
    expected = {}
    for name, (shard, tensor) in base.tensors.items():
        expected[name] = (tensor.shape, tensor.dtype, shard.name)
    if plan.untied is not None and plan.untied not in expected:
        source = plan.updates[plan.untied].source
        assert source is not None
        expected[plan.untied] = expected[source]
    converted = 0
    wrong = sorted(set(expected) ^ set(merged.tensors))
    for name in sorted(set(expected) & set(merged.tensors)):
        shard, tensor = merged.tensors[name]
        shape, dtype, file = expected[name]
        if dtype in FLOAT_DTYPES and FLOAT_DTYPES[dtype] != manifest["dtype"] == FLOAT_DTYPES.get(tensor.dtype):
            converted += 1
            dtype = tensor.dtype
        if (tensor.shape, tensor.dtype, shard.name) != (shape, dtype, file):
            wrong.append(name)
    added = sorted(set(merged.tensors) - set(base.tensors))
    return _result(not wrong, tensors=len(merged.tensors), added=added, converted=converted, wrong=wrong)


def check_untouched(base: Checkpoint, merged: Checkpoint, plan: Plan) -> dict[str, Any]:
    """Byte for byte where the dtype is the base's; value for value where the whole model was converted."""
    import torch

    names = [
        name
        for name in merged.tensors
        if name not in plan.updates or plan.updates[name] == Update(source=plan.updates[name].source)
    ]
    wrong, size = [], 0
    for name in progress(names, "untouched tensors", unit="tensor"):
        update = plan.updates.get(name)
        theirs = base.tensors.get((update.source if update else None) or name)
        if theirs is None:
            wrong.append(name)
            continue
        ours = merged.tensors[name]
        size += ours[1].bytes
        if ours[1].dtype == theirs[1].dtype:
            same = all(a == b for a, b in zip(_chunks(*ours), _chunks(*theirs), strict=False))
            same = same and ours[1].bytes == theirs[1].bytes
        else:
            expected = read_tensor(*theirs)
            same = torch.equal(read_tensor(*ours), expected.to(read_tensor(*ours).dtype))
        if not same:
            wrong.append(name)
    return _result(not wrong, tensors=len(names), bytes=size, wrong=wrong)


def _chunks(shard: Shard, tensor: Tensor) -> Iterator[bytes]:
    with open(shard.path, "rb", buffering=0) as handle:
        for start in range(tensor.start, tensor.end, CHUNK):
            buffer = bytearray(min(CHUNK, tensor.end - start))
            read_into(handle.fileno(), memoryview(buffer), start, shard.path)
            yield bytes(buffer)


def peft_merge(base: Checkpoint, adapter: Adapter, name: str, update: Update) -> Any:
    """The weight ``name`` merged by a layer of PEFT's own, in the base's dtype.

    PEFT decides rank and scale by itself, from adapter_config.json and the module's path in the adapter.
    """
    import torch
    from peft import LoraConfig
    from peft.tuners.lora.layer import Embedding, Linear
    from peft.utils.other import get_pattern_key
    from transformers.pytorch_utils import Conv1D

    match = LORA_KEY.match(adapter_key := str(update.a).removeprefix(PREFIX))
    assert match is not None, adapter_key
    module = match["module"]
    config = LoraConfig.from_pretrained(str(adapter.folder))
    config.init_lora_weights = False  # PEFT would draw random numbers that are overwritten below
    rank = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), module), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), module), config.lora_alpha)

    shard, tensor = base.tensors[update.source or name]
    weight = read_tensor(shard, tensor)
    if update.replace is not None:
        weight = adapter.read(update.replace).to(weight.dtype)
    bias = None
    if config.lora_bias:
        bias = read_tensor(*base.tensors[f"{name.removesuffix('.weight')}.bias"])
    with torch.device("meta"):
        if match["part"].startswith("lora_embedding"):
            layer: Any = torch.nn.Embedding(*weight.shape)
        elif update.transposed:
            layer = Conv1D(weight.shape[1], weight.shape[0])
        else:
            layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    if bias is not None or hasattr(layer, "nf"):
        layer.bias = torch.nn.Parameter(bias if bias is not None else torch.zeros(weight.shape[-1]), False)
    config.fan_in_fan_out = isinstance(layer, Conv1D)
    kind = Embedding if isinstance(layer, torch.nn.Embedding) else Linear
    with torch.no_grad():
        lora = kind(layer, "default", config=config, r=rank, lora_alpha=alpha)
        if kind is Embedding:
            lora.lora_embedding_A["default"].data = adapter.read(str(update.a))
            lora.lora_embedding_B["default"].data = adapter.read(str(update.b))
        else:
            lora.lora_A["default"].weight.data = adapter.read(str(update.a))
            lora.lora_B["default"].weight.data = adapter.read(str(update.b))
        if update.magnitude is not None:
            lora.lora_magnitude_vector["default"].weight.data = adapter.read(update.magnitude)
        lora.merge()
    return layer.weight.data


def check_layers(base: Checkpoint, merged: Checkpoint, adapter: Adapter, plan: Plan, count: int) -> dict[str, Any]:
    """Some changed weights, of every kind and spread over the model, against PEFT's merge of the same layer.

    They may differ by rounding: half a unit in the last place of a low-precision dtype; in float32, what another
    order of the ``r`` products makes of it.
    """
    import torch

    names = [name for name in merged.tensors if name in plan.updates and plan.updates[name].a is not None]
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(without_numbers(name), []).append(name)
    # One kind of layer after the other, each time deeper in the model.
    groups = list(kinds.values())
    picked = [(groups[index % len(groups)], index) for index in range(count)] if groups else []
    sample = sorted({group[index * len(group) // count] for group, index in picked}, key=names.index)
    layers = []
    for name in progress(sample, "layers against PEFT", unit="layer"):
        ours = read_tensor(*merged.tensors[name])
        expected = peft_merge(base, adapter, name, plan.updates[name]).to(ours.dtype)
        before = read_tensor(*base.tensors[plan.updates[name].source or name])
        precision = torch.finfo(ours.dtype).eps * (4 if ours.dtype == torch.float32 else 1)
        within, worst, different = True, 0.0, 0
        for rows in range(0, len(ours), step := max(1, 2**22 // max(1, ours[0].numel()))):
            a, b, w = (tensor[rows : rows + step].float() for tensor in (ours, expected, before))
            difference = (a - b).abs()
            within = within and bool((difference <= precision * (b.abs() + w.abs())).all())
            worst, different = max(worst, float(difference.max())), different + int((difference > 0).sum())
        layers.append({"name": name, "max_abs_difference": worst, "different_values": different, "within": within})
    good = all(layer["within"] for layer in layers)
    return _result(good, changed=len(names), layers=layers, identical=sum(not x["different_values"] for x in layers))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' loading bars and notes out of the log."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


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

    free = {}
    if torch.cuda.is_available():
        free["cuda"] = torch.cuda.mem_get_info()[0]
    return {**free, "cpu": psutil.virtual_memory().available}


def check_logits(
    base: Path,
    adapter: Path,
    merged: Path,
    weights: str,
    dtype: str,
    prompts: list[list[int]],
    stop: int | None,
    max_new_tokens: int,
    device: str,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Logits and greedy answers of the merged model against base plus adapter; one model in memory at a time.

    Base plus adapter answer each prompt greedily. The merged model then reads prompt and answer: where its
    most likely token is the answer's at every step, it would have given the same answer. A step at which the
    two best tokens lie within the tolerance is a tie that rounding may break either way, and is counted.

    Parameters
    ----------
    weights
        Dtype of the merged folder.
    dtype
        Dtype to compute in. float32 shows what the merge rounded and nothing else.
    prompts
        Token ids.
    stop
        Token that ends an answer.

    Returns
    -------
    tuple
        The results of the checks ``logits`` and ``answers``.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, GenerationConfig

    torch_type = getattr(torch, dtype)
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stop, pad_token_id=stop if stop is not None else 0
    )
    sequences, reference, effect = [], [], 0.0

    def logits(model: Any, sequence: Any, prompt: list[int]) -> Any:
        # From the prompt's last token on: each position there predicted one token of the answer.
        return model(sequence).logits[0, len(prompt) - 1 : -1].float().cpu()

    with torch.inference_mode(), _quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch_type)
        model = PeftModel.from_pretrained(model, adapter).to(device).eval()
        for prompt in progress(prompts, "base plus adapter", unit="prompt"):
            tokens = torch.tensor([prompt], device=device)
            sequence = model.generate(
                input_ids=tokens, attention_mask=torch.ones_like(tokens), generation_config=greedy
            )
            sequences.append(sequence)
            reference.append(logits(model, sequence, prompt))
            with model.disable_adapter():
                effect += float(((logits(model, sequence, prompt) - reference[-1]).double() ** 2).sum())
        del model
        gc.collect()
        model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch_type).to(device).eval()
        spread = float(torch.cat(reference).std())
        tolerance = LOGITS_TOLERANCE.get((weights, dtype), 1e-4) * spread
        worst, squares, count, same, ties, different = 0.0, 0.0, 0, 0, 0, []
        pairs = zip(prompts, sequences, reference, strict=True)
        for number, (prompt, sequence, expected) in enumerate(progress(pairs, "merged", len(prompts), "prompt")):
            ours = logits(model, sequence, prompt)
            difference = (ours - expected).abs()
            worst = max(worst, float(difference.max()))
            squares, count = squares + float((difference.double() ** 2).sum()), count + difference.numel()
            answer = sequence[0, len(prompt) :].cpu()
            missed = (ours.argmax(-1) != answer).nonzero().flatten().tolist()
            if not missed:
                same += 1
            elif float(expected[missed[0]].max() - expected[missed[0], ours[missed[0]].argmax()]) <= TIE * tolerance:
                ties += 1
            else:
                different.append(number)
    positions = sum(len(values) for values in reference)
    difference = (squares / max(1, count)) ** 0.5
    return (
        _result(
            difference <= tolerance,
            adapter_effect=(effect / max(1, count)) ** 0.5,
            computed_in=dtype,
            logits_standard_deviation=spread,
            max_abs_difference=worst,
            positions=positions,
            prompts=len(prompts),
            rms_difference=difference,
            tolerance=tolerance,
        ),
        _result(not different, different=different, prompts=len(prompts), same=same, tokens=positions, ties=ties),
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
    base, adapter, merged = Path(base), Path(adapter), Path(merged)
    manifest = read_json(merged / MANIFEST)
    checkpoint, loaded, result = open_checkpoint(base), open_adapter(adapter), open_checkpoint(merged)
    plan = plan_merge(checkpoint, loaded)
    checks = {
        "files": check_files(merged, manifest),
        "tensors": check_tensors(checkpoint, result, plan, manifest),
        "untouched": check_untouched(checkpoint, result, plan),
    }
    checks["layers"] = (
        check_layers(checkpoint, result, loaded, plan, layers)
        if checks["tensors"]["status"] == "passed"
        else _not_run("the tensors are not the base's")
    )
    requests = list(requests)
    weights = manifest["dtype"]
    stored = max(checkpoint.bytes, result.bytes)
    itemsize = ITEM_BYTES[SAFETENSORS_NAMES[weights]]
    sizes = {
        dtype: stored * size // itemsize + loaded.shard.bytes + WORKING_BYTES
        for dtype, size in (("float32", 4), (weights, itemsize))
    }
    free = free if free is not None else free_memory()
    chosen = choose_device(sizes, free)
    if checks["layers"]["status"] == "not run":
        checks["logits"] = checks["answers"] = _not_run("the tensors are not the base's")
    elif not requests:
        checks["logits"] = checks["answers"] = _not_run("no requests were given")
    elif chosen is None:
        room = ", ".join(f"{size / 1e9:.1f} GB free" + (f" on {name}" * (len(free) > 1)) for name, size in free.items())
        checks["logits"] = checks["answers"] = _not_run(f"needs {sizes[weights] / 1e9:.1f} GB, {room}")
    else:
        device, dtype = chosen
        prompts, stop = _tokenize(merged, requests, system)
        checks["logits"], checks["answers"] = check_logits(
            base, adapter, merged, weights, dtype, prompts, stop, max_new_tokens, device
        )
        checks["logits"]["device"] = device
    for name, check in checks.items():
        log.info("%-9s %s", name, check.get("reason", check["status"]))
    states = {check["status"] for check in checks.values()}
    return {"checks": checks, "complete": "not run" not in states, "passed": "failed" not in states}


def _tokenize(merged: Path, requests: list[str], system: str) -> tuple[list[list[int]], int | None]:
    """Requests as the token ids of the training's prompt, with the merged folder's own tokenizer."""
    from transformers import AutoTokenizer

    from scripts.common.chat import render_prompt

    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(merged)
    texts = [render_prompt(tokenizer, system, request) for request in requests]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts], tokenizer.eos_token_id


def require_passed(report: dict[str, Any], where: object) -> None:
    """Raise when a check failed, naming each."""
    failed = {name: check for name, check in report["checks"].items() if check["status"] == "failed"}
    if failed:
        facts = "; ".join(
            f"{name}: " + ", ".join(f"{key} {value}" for key, value in check.items() if key != "status")
            for name, check in failed.items()
        )
        raise UserError("The merged model is not base plus adapter.", where=where, found=facts[:2000])


def main() -> int:
    """Command line."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="python -m scripts.merging.verify", description="Compare a merged folder with its base and adapter."
    )
    for name in ("base", "adapter", "merged"):
        parser.add_argument(f"--{name}", required=True, metavar="DIR")
    parser.add_argument("--prompts", metavar="FILE", help='JSON lines with "request"; left out: layer checks alone')
    parser.add_argument("--count", type=int, default=8, metavar="N", help="requests to take (default 8)")
    parser.add_argument("--system", default="", help="system prompt of the training")
    parser.add_argument("--layers", type=int, default=8, metavar="N", help="weights to compare (default 8)")
    parser.add_argument("--report", metavar="FILE", help="where to write the report as JSON")
    arguments = parser.parse_args()
    requests = first_requests(arguments.prompts, arguments.count) if arguments.prompts else []
    report = verify(
        arguments.base,
        arguments.adapter,
        arguments.merged,
        requests=requests,
        system=arguments.system,
        layers=arguments.layers,
    )
    if arguments.report:
        write_json(arguments.report, report)
    require_passed(report, arguments.merged)
    for name, check in report["checks"].items():
        print(f"{name:9} {check.get('reason', check['status'])}")
    return 0


def first_requests(path: str | os.PathLike, count: int) -> list[str]:
    """The first requests of a split."""
    return [row["request"] for row in islice(read_jsonl(path), count)]


def run(
    base: Path, adapter: Path, merged: Path, prompts: str, settings: dict[str, Any], report_path: str | os.PathLike
) -> None:
    """The rule's work: verify, keep the report in the log when a check fails, fail then."""
    report = verify(
        base,
        adapter,
        merged,
        requests=first_requests(prompts, settings["prompts"]),
        system=settings["system"],
        layers=settings["layers"],
        max_new_tokens=settings["max_new_tokens"],
    )
    require_passed(report, merged)
    write_json(report_path, report)


if __name__ == "__main__":
    if "snakemake" in globals():
        with job(snakemake):
            run(
                Path(snakemake.input.base).parent,
                Path(snakemake.input.adapter).parent,
                Path(snakemake.input.manifest).parent,
                snakemake.input.prompts,
                snakemake.params.verify,
                snakemake.output.report,
            )
    else:
        command(main)
