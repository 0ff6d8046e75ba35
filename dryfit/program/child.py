"""The process in which a program runs: the card is simulated, the program followed, and what was found is written.

    python -m dryfit.program.child REQUEST.json RESULT.json

:mod:`.process` starts it, with the limits that the request names.
"""

from __future__ import annotations

import gc
import linecache
import logging
import os
import runpy
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from dryfit.common.errors import UserError
from dryfit.common.files import write_json

from .confinement import enter
from .request import ProgramRequest

EXPANDABLE = "expandable_segments:True"
OWN = str(Path(__file__).parents[1])


@dataclass
class Running:
    """A program that runs: what hears it; and lines that received an object of a process that doesn't run."""

    tracker: Any
    loop: Any
    memory: Any
    numbers: Any
    checkpoints: Any
    data: Any
    followed: Any
    received: list[str]


class Unfinished(Exception):
    """A program ended by an error, which is the cause: what was heard of it until then."""

    def __init__(self, running: Running) -> None:
        super().__init__()
        self.reads = _reads(running)
        self.ran_out = running.memory.ran_out


def _reads(running: Running) -> list[dict[str, Any]]:
    return [read.to_mapping() for read in running.numbers.reads.values()]


@contextmanager
def simulated_machine(
    asked: ProgramRequest, attended_keys: float | None = None
) -> Iterator[Running]:
    """A machine with the request's cards, of which this process has one: that of its rank.

    ``attended_keys``: see :class:`~dryfit.engine.card.Simulation`.
    """
    import torch
    import torch._dynamo  # makes tables of torch's functions: before one of them is exchanged
    from torch import nn

    from dryfit.cards.gpus import find
    from dryfit.engine.fake_group import fake_gpus
    from dryfit.engine.importing import when_imported
    from dryfit.engine.patching import patched
    from dryfit.engine.simulation import simulated
    from dryfit.engine.steps import listening, past_operators
    from dryfit.engine.trace import Options, make_tracker, surroundings
    from dryfit.tracing.simulated_card import UNNAMED, card_of

    from . import cuda, devices, group, libraries
    from .checkpoints import Checkpoints
    from .data import MadeUpData
    from .followed import Followed
    from .loop import Loop
    from .memory import Memory
    from .numbers import STAND_IN, Numbers
    from .nvml import nvml

    gpu = find(asked.gpu or UNNAMED)
    known = gpu.capability is not None
    card = card_of(gpu if known else None)
    if not known:  # a size alone: the kernels of a card that the engine assumes
        card = replace(card, memory_bytes=gpu.total_bytes)
    options = Options(
        steps=1,
        costs=True,
        scalars=STAND_IN,
        answers=libraries.QUESTIONS,
        origins=True,
        capability=card.capability,
        compiled="follow" if _has_triton() else "refuse",
    )
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(simulated(card, whole_program=True, attended_keys=attended_keys, index=asked.rank))
        device = enter(fake_gpus(asked.gpus)) if asked.torchrun else None
        none = nn.Module()
        tracker, _ = make_tracker(none, options, on_gpu=True)
        tracker.on_card = devices.placed(tracker)
        numbers = Numbers(asked.answers)
        tracker.values.asked, tracker.values.chooses = numbers.answer, numbers.choice
        memory = Memory(
            tracker, card, gpu.usable_bytes, raises=asked.runs_out and asked.gpu is not None
        )
        loop = Loop(tracker, asked.steps, memory.live_bytes)
        followed = Followed(loop, asked.program)
        processes = group.Group(tracker, stack, asked.gpus, asked.rank, device)
        stack.callback(processes.end)
        enter(patched(cuda.cuda_places(card, memory.answers(), asked.gpus, device)))
        enter(
            surroundings(tracker, none, options)
        )  # the compiler takes what the card answers now for constants
        if tracker.compiled is not None:
            tracker.compiled.expected = False
        enter(patched(cuda.nvidia_smi(card, asked.gpus)))
        enter(nvml(card, asked.gpus, memory.answers()["mem_get_info"]))
        enter(patched([*processes.places(), *libraries.library_places()]))
        enter(patched(followed.places()))
        own = [
            *numbers.places(),
            *devices.tensor_places(tracker),
            (torch, "device", devices.device_kind()),
        ]
        enter(patched(own, hidden=True))
        enter(tracker.origins.following())
        if device is not None:
            enter(listening(tracker, device))
        enter(loop.heard())
        enter(patched(past_operators(tracker), hidden=True))
        enter(patched(devices.array_places(tracker), hidden=True))
        data = MadeUpData(asked.batch)
        checkpoints = Checkpoints(tracker)
        of_models = lambda module: [*checkpoints.of_models(module), *followed.of_models(module)]  # noqa: E731
        later = {
            "transformers.modeling_utils": of_models,
            "diffusers.models.modeling_utils": checkpoints.of_diffusers,
            "transformers.trainer": followed.of_trainer,
            "transformers.configuration_utils": checkpoints.of_configurations,
        }
        enter(when_imported(later | data.when_imported()))
        enter(patched(data.patches()))
        enter(tracker)
        yield Running(
            tracker, loop, memory, numbers, checkpoints, data, followed, processes.received
        )


def _has_triton() -> bool:
    from torch.utils._triton import has_triton_package

    return has_triton_package()


def run(asked: ProgramRequest, tell: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Run the program; what was found, as plain values. ``tell`` is called with where it is."""
    from .loop import Enough

    warnings.filterwarnings(
        "ignore", message="Using `torch.compile.module.` when there are global hooks"
    )  # ours
    if asked.torchrun:
        os.environ.update(torchrun_variables(asked.gpus, asked.rank))
    gc.disable()  # as a trace: when cycles go is chance
    sys.argv = [asked.program, *asked.arguments]
    sys.path.insert(0, os.getcwd() if asked.module else str(Path(asked.program).resolve().parent))
    start = partial(runpy.run_module, alter_sys=True) if asked.module else runpy.run_path
    with simulated_machine(asked) as running:
        running.loop.tell = tell
        tell("the program loads")
        try:
            start(asked.program, run_name="__main__")
            outcome = "stopped" if running.loop.is_beyond else "ended"
        except Enough:
            outcome = "stopped"
        except SystemExit as error:
            if error.code not in (0, None) and not running.loop.updates:
                raise Unfinished(running) from error
            outcome = "stopped" if running.loop.is_beyond else "ended"
        except Exception as error:
            if not running.loop.has_enough() or running.memory.ran_out:
                raise Unfinished(running) from error
            if not _follows(error, Enough):
                print_error(error)
            outcome = "stopped"
        running.followed.end()
        running.loop.end()
        running.memory.forget_attempts()
    return _found(running, asked, outcome)


def _follows(error: BaseException | None, kind: type[BaseException]) -> bool:
    """Whether an error came while one of a kind was handled, as where a library tidies up."""
    while error is not None and not isinstance(error, kind):
        error = error.__context__
    return error is not None


def _found(running: Running, asked: ProgramRequest, outcome: str) -> dict[str, Any]:
    from dryfit.cards.gpus import catalogue, find, usable_sizes
    from dryfit.engine.interpolate import Asked
    from dryfit.engine.report import make_report

    tracker = running.tracker
    settings = ",".join(
        os.environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    )
    expandable = EXPANDABLE in settings
    sizes = {*usable_sizes(None), *(gpu.usable_bytes for gpu in catalogue().values())}
    if asked.gpu:
        sizes.add(find(asked.gpu).usable_bytes)
    report = make_report(
        tracker,
        on_gpu=True,
        timeline=False,
        expandable_segments=expandable,
        asked=Asked(sizes, both_allocators=True),
    )
    trace = replace(report, tensors=report.tensors and report.tensors[:LARGEST]).to_mapping()
    return {
        "outcome": outcome,
        "updates": running.loop.updates,
        "trace": trace | {"modules": by_module(report.tensors or [])},
        "expandable_segments": expandable,
        "peak_line": running.memory.peak_line,
        "library_line": running.memory.library_line,
        "received": running.received,
        "made_up": {"weights": running.checkpoints.made_up, "data": running.data.made_up},
        "time": _time(running, asked),
        "reads": _reads(running),
        "not_followed": running.followed.not_followed(outcome == "ended"),
        "growth_bytes": 0 if outcome == "ended" else running.loop.growth_bytes(),
        "ran_out": running.memory.ran_out,
        "share_bytes": running.memory.share_bytes,
    }


def _time(running: Running, asked: ProgramRequest) -> dict[str, Any] | None:
    """From the end of the last update but one to the end of the last: what a step takes; None where it isn't known."""
    from dryfit.cards.gpus import find
    from dryfit.hours.step_time import speed_of, step_time

    if not asked.gpu:
        return None
    pair = running.loop.launches[: asked.steps][
        -2:
    ]  # those beyond are taken with the largest batch
    if len(pair) < 2:
        return None
    costs = running.tracker.costs.between(*pair)
    time = step_time(costs, speed_of(find(asked.gpu).name)) if costs.calls else None
    if time is None:
        return None
    followed = running.tracker.compiled and running.tracker.compiled.graphs
    return time.to_mapping() | (
        {"range": None, "basis": f"{time.basis}; without the compiler"} if followed else {}
    )


LARGEST = 40  # tensors at the peak that an answer lists


def by_module(tensors: list[dict[str, Any]]) -> dict[str, int]:
    """Bytes at the peak by module, the numbers of layers left out, the largest first."""
    found: dict[str, int] = {}
    for row in tensors:
        name = ".".join("*" if part.isdigit() else part for part in row["module"].split("."))
        found[name] = found.get(name, 0) + row["bytes"]
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def torchrun_variables(gpus: int, rank: int = 0) -> dict[str, str]:
    """What ``torchrun --standalone --nproc_per_node=N`` tells one of its processes."""
    sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE"), str(gpus))
    ranks = dict.fromkeys(("RANK", "LOCAL_RANK", "ROLE_RANK"), str(rank)) | {
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
    }
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        "TORCHELASTIC_RUN_ID": "none",
        **sizes,
        **ranks,
    }


# --- when it takes too long, or fails -----------------------------------------------------------------------------


def watch(asked: ProgramRequest, result: Path) -> None:
    """Write what the program did last, when its time is over, and end the process."""
    main = threading.main_thread().ident

    def over() -> None:
        from .places import described, is_library

        frame = sys._current_frames().get(main)
        while frame is not None and is_library(frame):
            frame = frame.f_back
        write_json(
            result,
            {"outcome": "too long", "line": described(frame), "seconds": asked.limits.seconds},
        )
        os._exit(4)

    timer = threading.Timer(asked.limits.seconds, over)
    timer.daemon = True
    timer.start()


def main() -> None:
    asked = ProgramRequest.from_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    result = Path(sys.argv[2])
    held = enter([Path(folder) for folder in asked.writable], network=asked.network)
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # it warns of a package for CPUs while it is imported
    watch(asked, result)
    try:
        found = run(asked, partial(result.with_suffix(".stand").write_text, encoding="utf-8"))
    except BaseException as error:
        cause = error.__cause__ if isinstance(error, Unfinished) else error
        print_error(cause)
        found = {"outcome": "failed", **failure(cause), "reads": [], "ran_out": []}
        if isinstance(error, Unfinished):
            found |= {"reads": error.reads, "ran_out": error.ran_out}
    write_json(result, found | {"held": asdict(held)})
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(
        0
    )  # not through the interpreter's end: foreign threads and exchanged functions may trip it


def print_error(error: BaseException) -> None:
    """As Python prints it, from the program's first line on."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith(
        (OWN, "<frozen runpy>")
    ):
        trace = trace.tb_next
    traceback.print_exception(error.with_traceback(trace or error.__traceback__))


def own_place(error: BaseException) -> TracebackType | None:
    """Where an exception came through the program's own code, the innermost."""
    from .places import is_library

    own, trace = None, error.__traceback__
    while trace is not None:
        if not is_library(trace.tb_frame) and not trace.tb_frame.f_code.co_filename.startswith(
            ("<", OWN)
        ):
            own = trace
        trace = trace.tb_next
    return own


def program_line(error: BaseException) -> str:
    """``file:line in function`` of the program's own line that an exception came through last."""
    from .places import short_path

    place = own_place(error)
    if place is None:
        return ""
    code = place.tb_frame.f_code
    return f"{short_path(code.co_filename)}:{place.tb_lineno} in {code.co_name}"


def _text(error: BaseException) -> str:
    """What an exception says; without a text, such as an assertion, the program's line itself."""
    said, place = " ".join(str(error).split())[:400], own_place(error)
    if said or place is None:
        return said
    return linecache.getline(place.tb_frame.f_code.co_filename, place.tb_lineno).strip()


def failure(error: BaseException) -> dict[str, Any]:
    """An error of the program as values: what it is, and the line of the program's own that led there."""
    from dryfit.engine.errors import CompiledError, StepError, TraceError, ValuesNeeded, step_error

    if isinstance(error, UserError):
        return {"problem": error.problem, "line": "", "hint": error.write or ""}
    if isinstance(error, SystemExit):
        said = f"status {error.code}" if isinstance(error.code, int) else f"the words: {error.code}"
        return {
            "problem": f"The program ended itself before its first update, with {said}.",
            "line": program_line(error),
        }
    if isinstance(error, Exception) and not isinstance(error, TraceError):
        told, kind = step_error(error), type(error).__name__
        problem, hint = told.problem, told.hint
        if type(told) is StepError and problem.startswith("The step can't be traced"):
            problem, hint = f"The program failed: {kind}: {_text(error)}", ""
        line = program_line(error) or told.line
        if isinstance(told, ValuesNeeded):
            problem = f"The line chooses by values ({str(error).splitlines()[0][:200]}), and nobody knows them here."
            hint = f"the share of all elements that is chosen, as in --answer {line.partition(' in ')[0]}=0.25"
        return {
            "problem": problem,
            "line": line,
            "hint": hint,
            "kind": kind,
            "text": str(error)[:500],
        }
    found = {
        "problem": str(error) or type(error).__name__,
        "line": program_line(error),
        "kind": type(error).__name__,
    }
    if isinstance(error, TraceError):
        found |= {"problem": error.problem, "hint": error.hint}
    if isinstance(error, CompiledError) and not _has_triton():
        found["problem"] = (
            "The program compiles its step, which is followed with Triton, and Triton is not installed."
        )
        found["hint"] = 'Linux, and: pip install "dryfit[run]"'
    return found


if __name__ == "__main__":
    main()
