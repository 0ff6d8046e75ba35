"""One training in several processes, one for each GPU: started by ``accelerate launch``, watched until the last ends.

:func:`launch` runs ``python -m MODULE WORK.json`` once for each GPU and waits. In each process :func:`started` reads
what there is to do and joins the others: NCCL connects GPUs, gloo processes on the CPU. What a process logs reaches the
job's log; an error of its own is written down, so that the job ends with that message and the rank that it came from.
The group of a training in one process is :data:`ALONE`, whose sums are what it was given.
"""

import contextlib
import json
import logging
import os
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dryfit.common.errors import UserError
from dryfit.common.files import write_json
from dryfit.common.terminal import log
from scripts.common.job import end_with_parent

_PARTS = ("problem", "where", "found", "allowed", "write")  # of a UserError


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of one training, seen from one of them."""

    rank: int = 0  # this process's number, from 0
    size: int = 1  # how many there are

    def sums(self, *values: float) -> list[float]:
        """Each value added up over all processes, in double precision; the same in each of them."""
        if self.size == 1:
            return list(values)
        import torch

        added = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(added)
        return added.tolist()

    def collected(self, value: Any) -> list[Any]:
        """The value of each process, by rank; in rank 0 alone, in the others nothing."""
        if self.size == 1:
            return [value]
        import torch

        values = [None] * self.size if self.rank == 0 else None
        torch.distributed.gather_object(value, values)
        return values or []


ALONE = ProcessGroup()


def sharded_like(value: Any, example: Any) -> Any:
    """This process's part of a whole tensor, sharded as the example of the same shape is; else the value as it is."""
    if not hasattr(example, "full_tensor") or getattr(value, "shape", None) != example.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    whole_value = value.to(example.device_mesh.device_type)
    return distribute_tensor(
        whole_value, example.device_mesh, example.placements, src_data_rank=None
    )


def launch(module: str, work: Mapping[str, Any], gpus: int, resumed: str) -> None:
    """Run a module in as many processes as there are GPUs, and wait for them.

    Parameters
    ----------
    module
        Dotted name; its main program begins with :func:`started`.
    resumed
        What the message about a process that died says of the work done so far.

    Raises
    ------
    UserError
        The first process's own error, with its rank; or that one died, with its rank and how. The others are ended.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # Everything that accelerate would else take from the user's own file of defaults, or warn about.
    options = {
        "dynamo_backend": "no",
        "gpu_ids": "all",
        "main_process_port": 0,  # a free one
        "mixed_precision": "no",  # it is the scenario's
        "num_cpu_threads_per_process": max(1, work["threads"]),
        "num_machines": 1,
        "num_processes": gpus,
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    with (
        tempfile.TemporaryDirectory(prefix="training-") as made,
        _signals_kept(),
        _environment(work["device"]),
    ):
        folder = Path(made)
        write_json(folder / "work.json", {**work, "folder": made})
        arguments += ["--multi_gpu", "--module", module, str(folder / "work.json")]
        try:
            with _messages_from(folder / "messages"):
                launch_command(launch_command_parser().parse_args(arguments))
        except ChildFailedError as error:
            ends = {rank: failure.exitcode for rank, failure in error.failures.items()}
            raise _failure(folder, ends, resumed) from None


def _failure(folder: Path, ends: Mapping[int, int], resumed: str) -> Exception:
    """The error of the process that failed first: the others fail because it is gone.

    One that was killed could not write anything down; of those that could, the first wrote first.
    """
    for rank, code in sorted(ends.items()):
        if code < 0 and code != -signal.SIGTERM:
            name = signal.Signals(-code).name
            hint = (
                "; the kernel kills so when the host's memory is used up"
                if code == -signal.SIGKILL
                else ""
            )
            return UserError(
                f"The process of rank {rank} died ({name}), and the others were ended.",
                where=f"training on several GPUs, rank {rank}",
                found=f"{name}{hint}",
                allowed=f"the same command again: {resumed}",
            )
    written = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("rank-*.json")]
    if written:
        first = min(written, key=lambda one: (one["when"], one["rank"]))
        if first["error"]:
            parts = {name: first["error"][name] for name in _PARTS}
            if any(
                one["error"] != first["error"] for one in written
            ):  # not what all say of the same settings
                parts["problem"] = f"Rank {first['rank']}: {parts['problem']}"
            return UserError(parts.pop("problem"), **parts)
        return RuntimeError(
            f"rank {first['rank']} failed, and the others were ended:\n{first['traceback']}"
        )
    rank, code = min(ends.items())
    return RuntimeError(
        f"rank {rank} ended with status {code}, and the others were ended; its last words are above"
    )


@contextlib.contextmanager
def started(path: Path) -> Iterator[tuple[dict[str, Any], ProcessGroup]]:
    """In a process that :func:`launch` has started: what there is to do, and the group, which it has joined.

    It ends with the process that started it, however that one ends. An error is written down for it.
    """
    end_with_parent()
    work = json.loads(path.read_text(encoding="utf-8"))
    folder, rank = Path(work.pop("folder")), int(os.environ["RANK"])
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    messages = logging.FileHandler(folder / "messages", encoding="utf-8")
    messages.setFormatter(logging.Formatter(f"rank {rank}: %(message)s" if rank else "%(message)s"))
    log.addHandler(messages)
    try:
        with joined(work["device"]) as group:
            yield work, group
    except BaseException as error:
        parts = (
            {name: getattr(error, name) for name in _PARTS}
            if isinstance(error, UserError)
            else None
        )
        told = {
            "error": parts,
            "rank": rank,
            "traceback": traceback.format_exc(),
            "when": time.monotonic(),
        }
        partial = folder / f"{rank}.partial"
        partial.write_text(json.dumps(told, default=repr), encoding="utf-8")
        partial.replace(folder / f"rank-{rank}.json")
        if parts is None:
            raise
        raise SystemExit(1) from None


@contextlib.contextmanager
def joined(device: str) -> Iterator[ProcessGroup]:
    """The group that the environment describes (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT)."""
    import torch
    import torch.distributed as dist

    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Beside NCCL gloo, for what lies on the CPU: losses to be added, random states.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    try:
        yield ProcessGroup(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _messages_from(path: Path) -> Iterator[None]:
    """Pass on, line by line, what the processes write into this pipe: the job shows it, and keeps it."""
    os.mkfifo(path)
    # Open for writing too, so that the pipe has no end before the last process is gone.
    descriptor = os.open(path, os.O_RDWR)

    def pass_on() -> None:
        with os.fdopen(os.dup(descriptor), encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line == "\0\n":
                    return
                if line.strip():
                    log.info("%s", line.rstrip("\n"))

    reader = threading.Thread(target=pass_on, daemon=True)
    reader.start()
    try:
        yield
    finally:
        os.write(descriptor, b"\n\0\n")  # a process that was killed may have left half a line
        reader.join(5)
        os.close(descriptor)


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """torch's launcher puts handlers of its own in the place of these, for good."""
    kept = {
        number: signal.getsignal(number)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    }
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _environment(device: str) -> Iterator[None]:
    """Let the processes find the project's modules wherever they start, and on the CPU no GPU.

    transformers divides a model on the accelerator that it finds.
    """
    from scripts.common.code_digests import ROOT

    changed = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    }
    if device == "cpu":
        changed["CUDA_VISIBLE_DEVICES"] = ""
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
