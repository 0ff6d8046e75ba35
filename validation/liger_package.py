"""Liger's kernels through its own package, in the benchmark whose baselines :mod:`validation.modules` traces.

    python -m validation.liger_package FOLDER

FOLDER holds a folder for each release (``pip install --no-deps --target FOLDER/0.3.0 liger-kernel==0.3.0``);
``--releases`` names them. Each runs in a process of its own, on a simulated card. Needs ``requirements-kernels.txt``.

A row was measured with the code of a commit. Releases are what can be installed, so a row gets the first release that
was made after its figures. The head with cross-entropy is the exception: its commit changed that loss, and the figures
that came with it are of the code before, which 0.4.2 has.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from validation.modules import (
    DISTILLED,
    DTYPES,
    GPUS,
    KINDS,
    LOSSES,
    PAIRS,
    Benchmark,
    left_behind_bytes,
    read,
    shown,
)
from will_it_fit.cards.gpus import find
from will_it_fit.common.errors import UserError
from will_it_fit.common.terminal import command
from will_it_fit.engine.simulation import simulated
from will_it_fit.engine.trace import Options, trace_step
from will_it_fit.tracing.simulated_card import card_of

# By the version that the benchmark's table says, and the module: the first release after the row was measured.
RELEASES = {
    ("0.2.1", ""): "0.3.0", ("0.3.1", ""): "0.4.0", ("0.4.2", "head_and_cross_entropy"): "0.4.2",
    ("0.4.0", ""): "0.4.2", ("0.4.1", ""): "0.5.0", ("0.4.2", "distill_jsd"): "0.5.3", ("0.5.4", ""): "0.5.5",
    ("0.5.10", ""): "0.6.0", ("0.6.0", ""): "0.6.1", ("0.6.1", ""): "0.6.2", ("0.7.0", ""): "0.8.0",
    ("0.8.0", ""): "0.8.1",
}  # fmt: skip

STEPS = 3  # the last is like all that follow
MULTIPLYING = set(KINDS) - set(LOSSES) | {"head_and_cross_entropy"}


def release_of(row: Mapping[str, str]) -> str:
    """The release of liger-kernel that a row is traced with."""
    version = row["liger_version"]
    return RELEASES.get((version, row["module"])) or RELEASES[version, ""]


def use_release(folder: Path) -> None:
    """Let this process import ``liger_kernel`` from a folder, and no other release.

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
        fused = _module("transformers.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyLoss()
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
        config = LlamaConfig(hidden_size=hidden, intermediate_size=int(row["outputs"]), hidden_act=activation)
        bench.module = getattr(_module(f"transformers.{row['module']}"), name)(config).to(DTYPES[row["dtype"]])
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
        given = (bench.inputs[0], head.weight, bench.other, bench.heads[-1].weight, bench.words, *biases, 0.5, 0.5)
        return lambda: function.apply(*given)
    if kind == "kto":
        fused = _module("chunked_loss.kto_loss").LigerFusedLinearKTOLoss(use_ref_model=True)
        return lambda: fused(
            _input=bench.input, lin_weight=head.weight, target=bench.words, preference_labels=bench.each,
            bias=head.bias, ref_input=bench.other, ref_weight=bench.heads[-1].weight,
            ref_bias=bench.heads[-1].bias, kl=bench.more,
        )  # fmt: skip
    module = _module("chunked_loss.grpo_loss").LigerFusedLinearGRPOLoss
    fused = module(beta=0.1, use_ref_model=True)
    return lambda: fused(
        bench.input, head.weight, bench.words, bench.more, bench.each, None, ref_input=bench.other,
        ref_weight=bench.heads[-1].weight,
    )  # fmt: skip


_FUNCTIONS = {
    "orpo": "LigerFusedLinearORPOFunction",
    "cpo": "LigerFusedLinearCPOFunction",
    "simpo": "LigerFusedLinearSimPOFunction",
    "distill_jsd": "LigerFusedLinearJSDFunction",
    "distill_cosine": "LigerFusedLinearCosineSimilarityFunction",
}


def peak_bytes(row: Mapping[str, str]) -> int:
    """The peak of a row with Liger's kernels, by the trace; inside a simulated card.

    The script measures the baseline's speed first. So both threads that multiply, the program's and the backward
    pass's, have their workspaces of cuBLAS when Liger's memory is measured: a small product stands for that.
    """
    with torch.device("meta"):
        bench = KINDS.get(row["module"], Benchmark)(row)
        run = step_of(row, bench)
        small = nn.Linear(8, 8, bias=False, dtype=torch.bfloat16) if row["module"] in MULTIPLYING else None

    def step() -> None:
        if small is not None:
            small(torch.empty(8, 8, dtype=torch.bfloat16, device="cuda", requires_grad=True)).sum().backward()
            small.zero_grad()
        run()

    report = trace_step(bench, None, step, options=Options(compiled="follow", scalars=1.0, steps=STEPS))
    return report.peak_allocated_bytes + left_behind_bytes(row)


def results(rows: Iterable[Mapping[str, str]]) -> Iterator[dict[str, Any]]:
    """For each row, with the release that this process imports: what was measured, what the trace says."""
    # It names each backend of another maker with the error, whose frames hold tensors of the step.
    logging.getLogger("liger_kernel").setLevel(logging.ERROR)
    for gpu, group in groupby(sorted(rows, key=itemgetter("gpu")), itemgetter("gpu")):
        with simulated(card_of(find(GPUS[gpu]))):
            for row in group:
                measured = int(row["liger_peak_allocated_bytes"])
                traced = peak_bytes(row)
                yield {
                    "id": row["id"],
                    "measured_bytes": measured,
                    "predicted_bytes": traced,
                    "error_percent": round(100 * (traced / measured - 1), 4),
                }


def results_of_releases(folder: Path) -> Iterator[dict[str, Any]]:
    """The same for all rows, each with its release, in a process for each release and GPU: a card is heard once."""
    groups = sorted({(release_of(row), row["gpu"]) for row in read()})
    for release, gpu in groups:
        command = [sys.executable, "-W", "ignore", "-m", "validation.liger_package", str(folder), "--one", release, gpu]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"liger-kernel {release} can't be traced.", found=done.stderr[-2000:])
        yield from map(json.loads, done.stdout.splitlines())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="with a folder for each release of liger-kernel")
    parser.add_argument("--releases", action="store_true", help="name the releases, one a line; trace nothing")
    parser.add_argument("--one", nargs=2, metavar=("RELEASE", "GPU"), help="one release on one GPU, JSON lines")
    asked = parser.parse_args()
    if asked.releases:
        print(*sorted({release_of(row) for row in read()}), sep="\n")
        return 0
    if asked.one:
        release, gpu = asked.one
        use_release(asked.folder / release)
        for found in results(row for row in read() if (release_of(row), row["gpu"]) == (release, gpu)):
            print(json.dumps(found))
        return 0
    if asked.folder is None:
        parser.error("name a folder with the releases")
    print(shown(list(results_of_releases(asked.folder.resolve()))))
    return 0


if __name__ == "__main__":
    command(main)
