"""Liger's kernels through its own package, in the benchmark whose baselines :mod:`validation.modules` traces.

    git clone --filter=blob:none --no-checkout https://github.com/linkedin/Liger-Kernel CHECKOUT
    python -m validation.liger_package CHECKOUT

Figures came into the table with a commit, and each row runs that commit's package: in a process for each commit and
GPU, on a simulated card. The sizes of a script follow each other as there (:mod:`validation.liger_scripts`). Needs
the extra `run`.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import subprocess
import sys
import tarfile
import tempfile
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dryfit.cards.gpus import find
from dryfit.common.errors import UserError
from dryfit.common.terminal import command
from dryfit.engine.simulation import simulated
from dryfit.tracing.simulated_card import card_of
from validation.liger_scripts import ScriptRun, measured, run_of
from validation.modules import (
    DISTILLED,
    DTYPES,
    GPUS,
    KINDS,
    NEAR,
    PAIRS,
    Benchmark,
    left_again,
    left_behind,
    read,
    shown,
)

# The commit of Liger-Kernel that a module's figures came with; by GPU where there are two. The head with cross-entropy
# is the exception: its commit changed that loss, and the figures are of the code before.
COMMITS = {
    **dict.fromkeys(
        ("cross_entropy", "geglu", "swiglu", "rms_norm", "layer_norm a100"), "b5672a153b"
    ),
    "kl_div": "a307eac8b0",
    "jsd h100": "6817c2d34d",
    "heads_and_jsd": "ff6650bbce",
    "orpo_16bit": "6b2fd02d57",
    "orpo": "6b2fd02d57",
    "cpo": "16d06edf4f",
    "simpo": "ebd5303530",
    "head_and_cross_entropy": "90fb5e4a3c~1",
    "distill_jsd": "aa2d23dc7f",
    "kto": "ee5aaf26b9",
    "distill_cosine": "08906d3d9c",
    "layer_norm h100": "6a2c49130e",
    **dict.fromkeys(("grpo_token", "grpo_sequence"), "78125679ab"),
    "tvd": "5c9cecc85c",
    "jsd b200": "8ef203a42d",
}
MEMORY_FIRST = {"kl_div h100", "jsd h100", "tvd h100"}  # whose scripts measure it before speed
BASELINE_FIRST = {"jsd b200"}


def commit_of(row: Mapping[str, str]) -> str:
    """The commit of Liger-Kernel that a row is traced with."""
    module = row["module"]
    return COMMITS.get(module) or COMMITS[f"{module} {row['gpu']}"]


def package_of(checkout: Path, commit: str, folder: Path) -> None:
    """Put the package as a commit has it into a folder.

    UserError: if the checkout doesn't have the commit.
    """
    command = ["git", "-C", str(checkout), "archive", f"{commit}:src/liger_kernel"]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        raise UserError(
            "The checkout doesn't have a commit of Liger-Kernel.",
            where=str(checkout),
            found=f"{commit}: {done.stderr.decode(errors='replace').strip()}",
            allowed="a clone of https://github.com/linkedin/Liger-Kernel with its history",
        )
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder / "liger_kernel", filter="data")


def use_package(folder: Path) -> None:
    """Let this process import ``liger_kernel`` from a folder, and no other one.

    The packages' own ``__init__`` is left out: an old one imports names that transformers no longer has.
    """
    for name in ("liger_kernel", "liger_kernel.transformers"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(folder / name.replace(".", "/"))]


def _module(name: str) -> Any:
    return import_module(f"liger_kernel.{name}")


def step_of(row: Mapping[str, str], bench: nn.Module) -> Callable[[], None]:
    """Forward and backward once with Liger's kernels, over what the baseline's benchmark keeps on the GPU."""
    kind = row["module"]
    if kind in PAIRS or kind in DISTILLED or kind in ("kto", "grpo_token", "grpo_sequence"):
        loss = _chunked(kind, bench)
    elif kind == "heads_and_jsd":
        fused = _module("transformers.fused_linear_jsd").LigerFusedLinearJSD(0.5, 1.0)
        loss = lambda: fused(bench.input, bench.student.weight, bench.other, bench.teacher.weight)  # noqa: E731
    elif kind == "head_and_cross_entropy":
        fused = _module(
            "transformers.fused_linear_cross_entropy"
        ).LigerFusedLinearCrossEntropyLoss()
        loss = lambda: fused(bench.other.weight, bench.input, bench.target)  # noqa: E731
    elif kind == "cross_entropy":
        own = _module("transformers.cross_entropy").LigerCrossEntropyLoss()
        loss = lambda: own(bench.input, bench.target)  # noqa: E731
    elif kind in ("kl_div", "jsd", "tvd"):
        bench.loss = _of_probabilities(kind)
        if row["gpu"] == "b200":  # the script of that year passes a gradient
            return lambda: _backward_of(bench())
        return bench.step
    else:
        _own_module(row, bench)
        return bench.step
    return lambda: _first(loss()).backward()


def _backward_of(loss: torch.Tensor) -> None:
    loss.backward(torch.randn_like(loss), retain_graph=True)


def _first(loss: Any) -> torch.Tensor:
    """Later releases give more than the loss."""
    return loss[0] if isinstance(loss, tuple) else loss


def _of_probabilities(kind: str) -> nn.Module:
    name, options = {
        "kl_div": ("LigerKLDIVLoss", {"reduction": "batchmean"}),
        "jsd": ("LigerJSD", {}),
        "tvd": ("LigerTVDLoss", {"reduction": "batchmean"}),
    }[kind]
    return getattr(_module(f"transformers.{kind}"), name)(**options)


def _own_module(row: Mapping[str, str], bench: nn.Module) -> None:
    """Liger's norm beside the baseline's, or its MLP in the place of the baseline's."""
    hidden = int(row["hidden_size"] or row["outputs"])
    if row["module"] in ("swiglu", "geglu"):
        from transformers import LlamaConfig

        name = "LigerSwiGLUMLP" if row["module"] == "swiglu" else "LigerGEGLUMLP"
        activation = "silu" if row["module"] == "swiglu" else "gelu_pytorch_tanh"
        config = LlamaConfig(
            hidden_size=hidden, intermediate_size=int(row["outputs"]), hidden_act=activation
        )
        bench.module = getattr(_module(f"transformers.{row['module']}"), name)(config).to(
            DTYPES[row["dtype"]]
        )
    else:
        name = "LigerRMSNorm" if row["module"] == "rms_norm" else "LigerLayerNorm"
        bench.module = getattr(_module(f"transformers.{row['module']}"), name)(hidden)


def _chunked(kind: str, bench: nn.Module) -> Callable[[], Any]:
    """Losses that Liger computes in chunks and compiles."""
    head = bench.heads[-2] if kind in DISTILLED or len(bench.heads) == 4 else bench.heads[-1]
    if kind in PAIRS:
        name = kind.removesuffix("_16bit")
        function = getattr(_module(f"chunked_loss.{name}_loss"), _FUNCTIONS[name])
        return lambda: function.apply(bench.input, head.weight, bench.words)
    if kind in DISTILLED:
        file = {"distill_jsd": "jsd_loss", "distill_cosine": "cosine_similarity_loss"}[kind]
        function = getattr(_module(f"chunked_loss.{file}"), _FUNCTIONS[kind])
        biases = (None, None) if kind == "distill_cosine" else ()
        given = (
            bench.inputs[0],
            head.weight,
            bench.other,
            bench.heads[-1].weight,
            bench.words,
            *biases,
            0.5,
            0.5,
        )
        return lambda: function.apply(*given)
    if kind == "kto":
        fused = _module("chunked_loss.kto_loss").LigerFusedLinearKTOLoss(use_ref_model=True)
        return lambda: fused(
            _input=bench.input,
            lin_weight=head.weight,
            target=bench.words,
            preference_labels=bench.each,
            bias=head.bias,
            ref_input=bench.other,
            ref_weight=bench.heads[-1].weight,
            ref_bias=bench.heads[-1].bias,
            kl=bench.more,
        )
    module = _module("chunked_loss.grpo_loss").LigerFusedLinearGRPOLoss
    fused = module(beta=0.1, use_ref_model=True)
    return lambda: fused(
        bench.input,
        head.weight,
        bench.words,
        bench.more,
        bench.each,
        None,
        ref_input=bench.other,
        ref_weight=bench.heads[-1].weight,
    )


_FUNCTIONS = {
    "orpo": "LigerFusedLinearORPOFunction",
    "cpo": "LigerFusedLinearCPOFunction",
    "simpo": "LigerFusedLinearSimPOFunction",
    "distill_jsd": "LigerFusedLinearJSDFunction",
    "distill_cosine": "LigerFusedLinearCosineSimilarityFunction",
}


def _runs(row: Mapping[str, str]) -> tuple[str, ScriptRun, ScriptRun]:
    """A row's size with Liger's kernels and without, inside a simulated card."""
    kind = KINDS.get(row["module"], Benchmark)
    with torch.device("meta"):
        ours, theirs = kind(row), kind(row)
        step = step_of(row, theirs)
    return row["id"], run_of(theirs, step), run_of(ours, ours.step)


def results(rows: Iterable[Mapping[str, str]]) -> Iterator[dict[str, Any]]:
    """For each row, with the package that this process imports: what was measured, what the trace says.

    Rows of one module are taken for all sizes of its script.
    """
    # It names each backend of another maker with the error, whose frames hold tensors of the step.
    logging.getLogger("liger_kernel").setLevel(logging.ERROR)
    for gpu, on_one in groupby(sorted(rows, key=itemgetter("gpu")), itemgetter("gpu")):
        with simulated(card_of(find(GPUS[gpu]))):
            for module, group in groupby(on_one, itemgetter("module")):
                sizes = {row["id"]: row for row in group}
                first = next(iter(sizes.values()))
                head = int(first["outputs"] or 0) * int(first["hidden_size"] or 0) * 2
                script = measured(
                    [_runs(row) for row in sizes.values()],
                    speed_first=f"{module} {gpu}" not in MEMORY_FIRST,
                    baseline_first=f"{module} {gpu}" in BASELINE_FIRST,
                    before=[head] * 2
                    if module == "heads_and_jsd"
                    else (),  # it gives both models the same weights
                    left=left_behind(first),
                    left_again=left_again(first),
                )
                for name, traced, baseline in script:
                    figure = int(sizes[name]["liger_peak_allocated_bytes"])
                    yield {
                        "id": name,
                        "measured_bytes": figure,
                        "predicted_bytes": traced,
                        "error_percent": round(100 * (traced / figure - 1), 4),
                        "baseline_off_bytes": baseline - int(sizes[name]["peak_allocated_bytes"]),
                    }


def results_of_commits(checkout: Path) -> Iterator[dict[str, Any]]:
    """The same for all rows, each with its commit, in a process for each commit and GPU: a card is heard once."""
    for commit, gpu in sorted({(commit_of(row), row["gpu"]) for row in read()}):
        with tempfile.TemporaryDirectory() as folder:
            package_of(checkout, commit, Path(folder))
            command = [
                sys.executable,
                "-W",
                "ignore",
                "-m",
                "validation.liger_package",
                folder,
                "--one",
                commit,
                gpu,
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise UserError(
                    f"Liger-Kernel {commit} can't be traced.", found=done.stderr[-2000:]
                )
            yield from map(json.loads, done.stdout.splitlines())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a checkout of Liger-Kernel with its history")
    parser.add_argument(
        "--one",
        nargs=2,
        metavar=("COMMIT", "GPU"),
        help="the folder's package on one GPU, JSON lines",
    )
    asked = parser.parse_args()
    if asked.one:
        commit, gpu = asked.one
        use_package(asked.folder)
        for found in results(
            row for row in read() if (commit_of(row), row["gpu"]) == (commit, gpu)
        ):
            print(json.dumps(found), flush=True)
        return 0
    found = list(results_of_commits(asked.folder.resolve()))
    near = sum(abs(row["baseline_off_bytes"]) <= NEAR for row in found)
    print(f"{shown(found)}; {near} of their baselines")
    return 0


if __name__ == "__main__":
    command(main)
