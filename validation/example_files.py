"""Which of another tool's example files get an answer: each is read, and its step traced with a few layers.

    python -m validation.example_files FOLDER [--under examples] [--kind sh] [--gpu 80GiB] [--read out.csv]

FOLDER is a checkout of axolotl, LLaMA-Factory, torchtune, Unsloth's notebooks, ms-swift or verl; the last two have
shell scripts. With --read files are read alone, and what was read of each goes into a table. No configuration is
fetched: what config/models/ lacks is stood in for (validation/data/example_stand_ins.yaml). The last lines count
answers and reasons; docs/other-tools.md has them.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dryfit import readers
from dryfit.ask.question import Question, QuestionOptions, question
from dryfit.common.errors import UserError
from dryfit.common.files import read_yaml
from dryfit.scenario.hub import FETCH, MODELS, HubId
from dryfit.scenario.model import ALIASES

STAND_INS = Path(__file__).parent / "data" / "example_stand_ins.yaml"
LAYERS = 2
_COUNTS = ("num_hidden_layers", *ALIASES["num_hidden_layers"], "n_layers")
# What says of each layer which kind it is; the first layer of a kind.
_KINDS = ("layer_types", "layers_block_type", "hybrid_override_pattern")
_OFFSETS = ("attn_layer_offset", "expert_layer_offset")
# Lists with one entry for a layer.
_BY_LAYER = (
    "layer_types",
    "intermediate_size",
    "activation_sparsity_pattern",
    "layers_block_type",
    "mlp_layer_types",
    "no_rope_layers",
    "hybrid_override_pattern",
)


def stand_in(hub: HubId, folder: Path) -> Path:
    """A configuration that stands for a model's, as a file.

    Raises
    ------
    UserError
        If no row of the table is for it.
    """
    for number, (pattern, named) in enumerate(read_yaml(STAND_INS)):
        if re.search(pattern, hub.name, re.I):
            changes = named if isinstance(named, dict) else {"model_type": named}
            kind = changes["model_type"]
            if (MODELS / f"{kind}.json").is_file():
                return MODELS / f"{kind}.json"
            path = folder / f"{number}-{kind}.json"
            path.write_text(json.dumps(_changed(_defaults(kind), changes)), encoding="utf-8")
            return path
    raise UserError("Nothing stands for this model here.", where=str(STAND_INS), found=hub.name)


def _defaults(kind: str) -> dict[str, Any]:
    """The sizes of a model_type's default configuration, whose class writes them itself."""
    import transformers

    return {key: value for key, value in transformers.AutoConfig.for_model(kind).to_dict().items()
            if isinstance(value, (int, float, str, bool, dict, list)) and not key.startswith("_")}  # fmt: skip


def _changed(sizes: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes with some of them others, in their parts too."""
    found = dict(sizes)
    for name, value in changes.items():
        parts = isinstance(value, dict) and isinstance(found.get(name), dict)
        found[name] = _changed(found[name], value) if parts else value
    return found


def shallow(model: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with two layers, or as many as show each kind of layer; of its language model too."""
    changed, kinds = dict(model), next((model[name] for name in _KINDS if model.get(name)), [])
    every = [kinds.index(kind) + 1 for kind in dict.fromkeys(kinds)]
    every += [1 + (changed.get(name) or 0) for name in _OFFSETS]
    depth = max([LAYERS, *every, changed.get("full_attention_interval") or 0])
    if changed.get("num_kv_shared_layers"):  # the last layers take keys and values of those before, of each kind
        changed["num_kv_shared_layers"], depth = depth, 2 * depth
    for name in _COUNTS:
        if isinstance(changed.get(name), int):
            changed[name] = min(changed[name], depth)
    for name in _BY_LAYER:
        if isinstance(changed.get(name), (list, str)):
            changed[name] = changed[name][:depth]
    if isinstance(changed.get("text_config"), Mapping):
        changed["text_config"] = shallow(changed["text_config"])
    return changed


def outcome(path: Path, gpu: str) -> str:
    """``answer``, or the first line of the reason."""
    from dryfit.tracing.trace import trace

    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            asked = _asked(path, gpu)
            scenario = replace(asked.scenario, model=shallow(asked.scenario.model))
            while (
                change := _refused(lambda step=scenario: trace(step, capability=(9, 0), timeline=False))
            ) is not None:
                scenario = replace(scenario, **change)
    except UserError as error:
        return str(error).partition("\n")[0] + _more(error)
    except Exception as error:
        return f"CRASHED: {type(error).__name__}: {str(error)[:120]}"
    return "answer"


_READ = ("model", "method", "objective", "sequence_length", "micro_batch", "gradient_accumulation", "optimizer",
         "precision", "gradient_checkpointing")  # fmt: skip


def what_is_read(path: Path) -> dict[str, Any]:
    """A row: the outcome (``read``, ``open`` where a field has to be named, or the reason), and what was read."""
    try:
        if path.suffix in (".ipynb", ".py"):
            reading = readers.read_program(path, None)
        else:
            mapping = readers.mapping_of(path)
            reading = readers.read_tool(path, readers.kind_of(mapping, path), mapping, None)
    except UserError as error:
        return {"outcome": str(error).partition("\n")[0]}
    outcome = f"open: {', '.join(reading.needs)}" if reading.needs else "read"
    fields = {name: reading.fields.get(name) for name in _READ}
    fields["model"] = reading.fields.get("model_name") or fields["model"]
    rank = (reading.fields.get("lora") or {}).get("rank") or (reading.fields.get("adapter") or {}).get("r")
    said = "; ".join(f"{one.key} ({one.errs})" for one in reading.remarks)
    return {"outcome": outcome, **fields, "rank": rank, "not_described": said}


def _asked(path: Path, gpu: str) -> Question:
    """A file's question; where it names a folder that its user has, with what stands for the model of that name."""
    try:
        return question([path], QuestionOptions(gpu=gpu))
    except UserError as error:
        if "folder or a file that isn't there" not in str(error):
            raise
        model = FETCH.get()(HubId(Path(str(error.found)).name, None), str(path))
        return question([path], QuestionOptions(gpu=gpu, settings=(f"model={model}",)))


def _refused(traced: Callable[[], Any]) -> dict[str, Any] | None:
    """The change that a refusal asks for, where a file's answer makes it and says so (ask/answer.py); None: traced."""
    try:
        traced()
    except UserError as error:
        if error.change and set(error.change) <= {"attention", "autocast", "method"}:
            return dict(error.change)
        raise
    return None


def _more(error: UserError) -> str:
    return f" [{str(error.found)[:80]}]" if error.found else ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--under", default="examples")
    parser.add_argument("--kind", default="yaml", choices=("yaml", "sh", "ipynb"))
    parser.add_argument("--read", type=Path, metavar="CSV", help="read alone, and write what was read here")
    parser.add_argument("--gpu", default="80GiB")
    options = parser.parse_args(arguments)
    import tempfile

    pattern = "*.y*ml" if options.kind == "yaml" else f"*.{options.kind}"
    files = sorted((options.folder / options.under).rglob(pattern))
    if options.read:
        return _write_what_is_read(files, options.folder, options.read)
    reasons: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        FETCH.set(lambda hub, where: stand_in(hub, Path(folder)))
        for path in files:
            said = outcome(path, options.gpu)
            reasons[said] += 1
            print(f"{path.relative_to(options.folder)}: {said}", flush=True)
    print(f"\n{len(files)} files, {reasons.pop('answer', 0)} with an answer")
    for said, count in reasons.most_common():
        print(f"{count:>4}  {said}")
    return 0


def _write_what_is_read(files: list[Path], folder: Path, table: Path) -> int:
    rows = [{"file": str(path.relative_to(folder)), **what_is_read(path)} for path in files]
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["file", "outcome", *_READ, "rank", "not_described"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for outcome, count in Counter(row["outcome"] for row in rows).most_common():
        print(f"{count:>4}  {outcome}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
