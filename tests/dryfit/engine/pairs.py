"""Steps on two processes, each strategy as PyTorch itself has it: traced on ``meta``, or measured with gloo.

python -m tests.dryfit.engine.pairs FOLDER measures all of them in two processes.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed import _functional_collectives as functional_collectives
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor import parallel as plans
from torch.distributed.tensor.experimental import _attention as ring
from torch.distributed.tensor.experimental import context_parallel
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes

from dryfit.engine.report import Report
from dryfit.engine.trace import measure_step

WORDS, WIDTH, INNER, HEADS, TOKENS, ROWS, EXPERTS = 256, 32, 96, 4, 32, 2, 4


class Attention(nn.Module):
    """Causal attention; ``attend`` takes queries, keys and values (rows x heads x tokens x size)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.attend: Callable = lambda *heads: functional.scaled_dot_product_attention(
            *heads, is_causal=True
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        shape = (*hidden.shape[:2], -1, WIDTH // HEADS)
        heads = [layer(hidden).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v)]
        return self.out(self.attend(*heads).transpose(1, 2).flatten(2))


class Gated(nn.Module):
    """A gated feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(WIDTH, INNER, bias=False) for _ in range(2))
        self.down = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down(functional.silu(self.gate(hidden)) * self.up(hidden))


class Routed(nn.Module):
    """Experts on two processes: tokens go to theirs by all-to-all, and come back."""

    def __init__(self, group: Any) -> None:
        super().__init__()
        self.group, self.router = group, nn.Linear(WIDTH, EXPERTS, bias=False)
        self.weight = nn.Parameter(torch.empty(EXPERTS // group.size(), WIDTH, WIDTH).fill_(0.01))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden.flatten(0, 1)
        score = self.router(rows).softmax(-1).amax(-1, keepdim=True)
        chosen = torch.tensor(list(range(EXPERTS)), device=rows.device).repeat(
            len(rows) // EXPERTS
        )  # in turns
        counts = torch.zeros(EXPERTS, dtype=torch.long, device=rows.device)
        counts.scatter_add_(0, chosen, torch.ones_like(chosen))
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts, group=self.group)
        sent, taken = (
            each.view(self.group.size(), -1).sum(1).tolist() for each in (counts, arriving)
        )
        order = chosen.argsort(stable=True)
        exchange = partial(functional_collectives.all_to_all_single_autograd, group=self.group)
        mine = functional_collectives.wait_tensor(exchange((rows * score)[order], taken, sent))
        made = torch.cat(
            [part @ self.weight[number] for number, part in enumerate(mine.chunk(len(self.weight)))]
        )
        back = exchange(made, sent, taken)
        return torch.zeros_like(rows).index_add(0, order, back).view_as(hidden)


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a norm."""

    def __init__(self, feed: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.attention, self.feed = Attention(), feed()
        self.before, self.between = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attention(self.before(hidden))
        return hidden + self.feed(self.between(hidden))


class Decoder(nn.Module):
    """A small decoder, or a stage of one: some layers, with the embedding before or the head behind them."""

    def __init__(
        self, layers: int = 2, *, feed: Callable = Gated, first: bool = True, last: bool = True
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH) if first else None
        self.blocks = nn.ModuleList([Block(feed) for _ in range(layers)])
        self.norm = nn.RMSNorm(WIDTH) if last else None
        self.head = nn.Linear(WIDTH, WORDS, bias=False) if last else None

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        hidden = given if self.embedding is None else self.embedding(given)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden if self.head is None else self.head(self.norm(hidden))


@dataclass
class Taken:
    """What a trace or a measurement takes."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: Callable
    batch: Any


def tokens_of(device: str, rows: int = ROWS, tokens: int = TOKENS) -> tuple[torch.Tensor, ...]:
    return torch.zeros((2, rows, tokens), dtype=torch.long, device=device).unbind()


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(0, 1))


def plainly(
    model: nn.Module,
    batch: Any,
    around: Callable[[], AbstractContextManager] = nullcontext,
    **options: Any,
) -> Taken:
    """Forward, backward, update by AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), **{"foreach": True, **options})

    def step(given: Any) -> None:
        tokens, labels = given
        with around():
            loss = loss_of(model(tokens), labels)
            loss.backward()
        update(optimizer, tokens)

    return Taken(model, optimizer, step, batch)


def update(optimizer: torch.optim.Optimizer, tensor: torch.Tensor) -> None:
    if not tensor.is_meta:
        time.sleep(0.1)  # until gloo's thread has let go of its last buffer
    optimizer.step()
    optimizer.zero_grad()


# --- strategies: each builds on a device, as one of two ranks --------------------------------------------------------


def tensor_parallel(device: str, rank: int, *, sequence: bool, loss: bool = False) -> Taken:
    """PyTorch's own plan for a decoder."""
    mesh = init_device_mesh(device, (2,), mesh_dim_names=("tensor",))
    between = Shard(1) if sequence else Replicate()
    tops: dict[str, Any] = {
        "embedding": plans.RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "head": plans.ColwiseParallel(
            input_layouts=between,
            output_layouts=Shard(-1) if loss else Replicate(),
            use_local_output=not loss,
        ),
    }
    rows, columns = partial(plans.RowwiseParallel, output_layouts=between), plans.ColwiseParallel
    plan: dict[str, Any] = {f"attention.{name}": columns() for name in "qkv"} | {
        "attention.out": rows()
    }
    plan |= {"feed.gate": columns(), "feed.up": columns(), "feed.down": rows()}
    if sequence:
        whole = plans.PrepareModuleInput(
            input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)
        )
        plan |= {"attention": whole, "feed": whole}
        plan |= {"before": plans.SequenceParallel(), "between": plans.SequenceParallel()}
        tops["norm"] = plans.SequenceParallel()
    with torch.device(device):
        model = Decoder()
    plans.parallelize_module(model, mesh, tops)
    for block in model.blocks:
        plans.parallelize_module(block, mesh, plan)
    around = plans.loss_parallel if loss else nullcontext
    return plainly(model, tokens_of(device), around, foreach=sequence)


def rings(device: str, rank: int, *, rotate: str, balance: bool = True) -> Taken:
    """PyTorch's context_parallel."""
    mesh = init_device_mesh(device, (2,), mesh_dim_names=("context",))
    with torch.device(device):
        model = Decoder()
    taken = plainly(model, tokens_of(device))
    inner = taken.step

    def step(given: Any) -> None:
        ring.set_rotate_method(rotate)
        ring._cp_options.enable_load_balance = balance
        buffers = list(given)
        with context_parallel(
            mesh, buffers=buffers, buffer_seq_dims=[1, 1], no_restore_buffers=set(buffers)
        ):
            inner(buffers)

    taken.step = step
    return taken


def ulysses(device: str, rank: int) -> Taken:
    """Before attention a part of the tokens of all heads becomes all tokens of a part of the heads."""
    group = init_device_mesh(device, (2,)).get_group()

    def turned(heads: torch.Tensor, split: int, joined: int) -> torch.Tensor:
        parts = torch.cat(heads.chunk(2, split)) if split else heads
        parts = functional_collectives.all_to_all_single_autograd(
            parts.contiguous(), None, None, group
        )
        return torch.cat(parts.chunk(2), joined)

    def attend(*heads: torch.Tensor) -> torch.Tensor:
        out = functional.scaled_dot_product_attention(
            *(turned(each, 1, 2) for each in heads), is_causal=True
        )
        return turned(out, 2, 1)

    with torch.device(device):
        model = Decoder()
    for block in model.blocks:
        block.attention.attend = attend
    return plainly(model, tokens_of(device, tokens=TOKENS // 2))


def pipeline(device: str, rank: int, *, schedule: str, each: int = 1, static: bool = True) -> Taken:
    """One of PyTorch's schedules with so many stages on each process, and four micro-batches."""
    mesh = init_device_mesh(device, (2,), mesh_dim_names=("pipeline",))
    count, batches = 2 * each, 4
    with torch.device(device):
        parts = {
            number: Decoder(4 // count, first=number == 0, last=number == count - 1)
            for number in range(rank, count, 2)
        }
    stages = []
    for number, part in parts.items():
        shapes = {}
        if static:
            with torch.device("meta"):
                hidden = torch.empty(ROWS, TOKENS, WIDTH, requires_grad=True)
                logits = torch.empty(ROWS, TOKENS, WORDS, requires_grad=True)
            shapes["input_args"] = hidden if number else tokens_of("meta")[0]
            shapes["output_args"] = hidden if number < count - 1 else logits
        stages.append(
            PipelineStage(
                part, number, count, torch.device(device), group=mesh.get_group(), **shapes
            )
        )
    plan = getattr(schedules, f"Schedule{schedule}")(
        stages if each > 1 else stages[0], batches, loss_fn=loss_of
    )
    model = nn.ModuleList(parts.values())
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)

    def step(given: Any) -> None:
        tokens, labels = given
        targets = {"target": labels, "losses": []} if count - 1 in parts else {}
        plan.step(*([tokens] if 0 in parts else []), **targets, return_outputs=False)
        update(optimizer, tokens)

    return Taken(model, optimizer, step, tokens_of(device, rows=ROWS * batches))


def experts(device: str, rank: int, *, divided: bool) -> Taken:
    """Experts on both processes; ``divided``: the rest of the model by FSDP2."""
    mesh = init_device_mesh(device, (2,), mesh_dim_names=("expert",))
    with torch.device(device):
        model = Decoder(feed=partial(Routed, mesh.get_group()))
    if divided:
        own = {block.feed.weight for block in model.blocks}
        for block in model.blocks:
            fully_shard(block, mesh=mesh, ignored_params=own)
        fully_shard(model, mesh=mesh, ignored_params=own)
    return plainly(model, tokens_of(device), foreach=not divided)


BUILDS: dict[str, Callable[[str, int], Taken]] = {
    "tensor": partial(tensor_parallel, sequence=False),
    "tensor and sequence": partial(tensor_parallel, sequence=True),
    "tensor, sequence and loss": partial(tensor_parallel, sequence=True, loss=True),
    "ring, all-gather": partial(rings, rotate="allgather"),
    "ring, all-to-all": partial(rings, rotate="alltoall"),
    "Ulysses": ulysses,
    "1F1B": partial(pipeline, schedule="1F1B"),
    "1F1B, shapes unknown": partial(pipeline, schedule="1F1B", static=False),
    "GPipe": partial(pipeline, schedule="GPipe"),
    "interleaved": partial(pipeline, schedule="Interleaved1F1B", each=2),
    "zero bubble": partial(pipeline, schedule="InterleavedZeroBubble", each=2),
    "experts": partial(experts, divided=False),
    "experts and FSDP2": partial(experts, divided=True),
}


# --- two processes with gloo -----------------------------------------------------------------------------------------


def figures(report: Report) -> dict[str, Any]:
    return {"phases": report.phases, "resident_bytes": report.resident_bytes}


def flash_on_cpu() -> torch.library.Library:
    """CUDA's flash attention for tensors on the CPU, which ring attention asks for: its outputs, and no values."""

    def forward(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> tuple:
        sums = query.new_zeros(query.shape[:3], dtype=torch.float32)
        seed, offset = torch.empty(2, dtype=torch.uint64), torch.empty((), dtype=torch.uint64)
        sizes = query.shape[2], key.shape[2]
        return torch.zeros_like(query), sums, None, None, *sizes, seed, offset, query.new_empty(0)

    def backward(_: torch.Tensor, *heads: torch.Tensor, **__: Any) -> tuple:
        return tuple(torch.zeros_like(each) for each in heads[:3])

    library = torch.library.Library("aten", "IMPL")
    library.impl("_scaled_dot_product_flash_attention", forward, "CPU")
    library.impl("_scaled_dot_product_flash_attention_backward", backward, "CPU")
    return library


def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool = False, **_: Any
):
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal)[0]


def settled(
    tensor: torch.Tensor, wait: Callable = functional_collectives.wait_tensor
) -> torch.Tensor:
    """Waits for a collective, and until gloo's thread has let go of its buffers."""
    output = wait(tensor)
    time.sleep(0.005)
    return output


def reduce_scattered(
    _: Any,
    output_tensor: Any,
    input_tensor: Any,
    group: Any,
    op: Any = None,
    async_op: bool = False,
):
    """FSDP2's reduce-scatter: gloo has none, and would reduce a copy of everything, which NCCL doesn't make."""
    dist.all_reduce(input_tensor, group=group)
    part = input_tensor.view(dist.get_world_size(group), -1)[dist.get_rank(group)]
    with _disable_current_modes():
        output_tensor.copy_(part.view_as(output_tensor))
    time.sleep(0.005)


def start(folder: Path, count: int = 2) -> tuple[int, list[int]]:
    """Become some processes with gloo; returns this one's rank, and the others' ids (in the first)."""
    torch.set_num_threads(1)
    rank, children = 0, []
    for number in range(1, count):  # the libraries are loaded once; no thread has been started yet
        child = os.fork()
        if not child:
            rank, children = number, []
            break
        children.append(child)
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(count))
    store = dist.FileStore(str(folder / "store"), count)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=count, timeout=timedelta(seconds=600)
    )
    return rank, children


def finish(folder: Path, rank: int, measured: dict[str, Any], children: list[int]) -> int:
    """Write what a process measured, and end it; in the first whether all ended well."""
    (folder / f"{rank}.json").write_text(json.dumps(measured))
    dist.destroy_process_group()
    return max(
        (os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children), default=0
    )


def gloo_as_nccl() -> AbstractContextManager:
    """Gloo's collectives with NCCL's buffers."""
    from contextlib import ExitStack

    from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter

    stack = ExitStack()
    stack.enter_context(mock.patch.object(functional_collectives, "wait_tensor", settled))
    stack.enter_context(mock.patch.object(DefaultReduceScatter, "__call__", reduce_scattered))
    return stack


def main(folder: Path, *names: str) -> int:
    rank, children = start(folder)
    flash_attention.__name__ = (
        "scaled_dot_product_attention"  # context_parallel exchanges it by its name
    )
    measured = {}
    with gloo_as_nccl():
        for name in names:
            library = flash_on_cpu() if "ring" in name else None
            attention = flash_attention if library else functional.scaled_dot_product_attention
            with mock.patch.object(functional, "scaled_dot_product_attention", attention):
                taken = BUILDS[name]("cpu", rank)
                measured[name] = figures(
                    measure_step(taken.model, taken.optimizer, taken.step, taken.batch)
                )
            if library:
                library._destroy()
    return finish(folder, rank, measured, children)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
