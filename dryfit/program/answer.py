"""What a program's run means: `predict`'s form, for the card that was asked about and for all others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from dryfit.cards.beside import Process
from dryfit.cards.gpus import Gpu, catalogue, find
from dryfit.cards.verdict import Omission, Verdict, verdict, verdicts_by_allocator
from dryfit.common.errors import UserError
from dryfit.common.text import GIB, gib, size_text
from dryfit.evidence.nearest import program_evidence
from dryfit.program.request import ProgramRequest

TRAINING = ("forward", "backward", "optimizer")


def answer(asked: ProgramRequest, found: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to a request from what its process found.

    Returns
    -------
    dict
        ``trace`` as `predict` has it, for the whole program; ``training`` and ``evaluation`` with
        ``peak_allocated_bytes`` (None where the program does not evaluate); ``fits``, ``headroom_bytes``, ``gpu``;
        ``time`` of a step as `predict` has it, without the loading of data; None where it isn't known;
        ``evidence``, the measured programs that are like this one;
        ``rank``, the process that this is of; ``program`` with ``updates``, ``outcome``, ``peak_line``, ``reads``,
        ``written``, ``made_up``, ``not_followed`` (what the peak does not cover, in words), ``growth_bytes`` (by which
        memory grows with each update), ``ran_out`` (lines at which memory ran out, where the program went on) and
        ``share_bytes`` (of the card, by ``set_per_process_memory_fraction``);
        ``host``, what the run took here (``peak_bytes``, ``seconds``); ``warnings``.

    Raises :class:`UserError` if the program came to no update, with what stopped it and what to write.
    """
    if found["outcome"] not in ("stopped", "ended") or not found["updates"]:
        raise refusal(asked, found)
    gpu = find(asked.gpu) if asked.gpu else None
    trace = dict(found["trace"])
    phases, graphs = trace["phases"], (trace.get("compiled") or {}).get("graphs")
    process = _process(asked.gpus, trace, found["expandable_segments"], asked.recipe)
    own = "expandable_segments" if found["expandable_segments"] else "default"
    told = (
        "updates",
        "outcome",
        "peak_line",
        "library_line",
        "reads",
        "written",
        "made_up",
        "not_followed",
        "growth_bytes",
        "ran_out",
        "share_bytes",
    )
    program = {name: found[name] for name in told} | {
        name: found[name] for name in ("adds",) if name in found
    }
    judged = _judged(trace, program, gpu, process)
    return {
        "trace": trace,
        "training": {"peak_allocated_bytes": max(phases.get(phase, 0) for phase in TRAINING)},
        "evaluation": {"peak_allocated_bytes": phases["evaluation"]}
        if "evaluation" in phases
        else None,
        **judged.to_mapping(),
        "gpu": gpu.to_mapping() if gpu else None,
        "gpus": asked.gpus,
        "rank": asked.rank,
        "allocators": {"own": own, **verdicts_by_allocator(trace, gpu, process)},
        "time": found["time"],
        "evidence": program_evidence(asked.gpus, bool(graphs), gpu).to_mapping(
            ("allocated", "reserved")
        ),
        "program": program
        | {
            "name": asked.program,
            "arguments": list(asked.arguments),
            "network": found["network"],
            "held": found["held"],
        },
        "host": found["host"],
        "warnings": _warnings(found),
    }


def _process(
    gpus: int, trace: Mapping[str, Any], expandable_segments: bool, recipe: bool
) -> Process:
    """The process that runs a program: what is beside its tensors on the card."""
    compiled = bool((trace.get("compiled") or {}).get("graphs"))
    return Process(
        gpus,
        int(gpus > 1),
        expandable_segments=expandable_segments,
        compiled=compiled,
        recipe=recipe,
    )


def _judged(
    trace: Mapping[str, Any], program: Mapping[str, Any], gpu: Gpu | None, process: Process
) -> Verdict:
    """The verdict with what was not followed. What a program allows itself is a border too."""
    judged = verdict(trace, gpu, process)
    share = program["share_bytes"]
    if share is not None and gpu is not None:
        judged = replace(
            judged, headroom_bytes=min(judged.headroom_bytes, share - judged.needed_bytes)
        )
    return judged.leaving_out(_omissions(program, judged.headroom_bytes))


def _omissions(program: Mapping[str, Any], headroom_bytes: int | None) -> Iterator[Omission]:
    """What the peak does not cover: by unknown sizes, but for memory that grows, which fills every card."""
    growth = program["growth_bytes"]
    if growth and headroom_bytes is not None and headroom_bytes >= 0:
        updates = headroom_bytes // growth + 1
        yield Omission(
            f"{updates:,} more updates that keep {size_text(growth)} each", updates * growth
        )
    for what in program["not_followed"]:
        yield Omission(what, None, decides=what in program.get("adds", ()))


def of_ranks(answers: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """The answer of the process that needs most, by the answers of those that ran.

    ``rank`` says which it is. ``ranks`` has a mapping for each: ``rank``, ``required_bytes``, ``fits``,
    ``peak_allocated_bytes``, ``peak_reserved_bytes`` and ``peak_phase``.
    """
    told = ("required_bytes", "peak_allocated_bytes", "peak_reserved_bytes", "peak_phase")
    rows = [
        {
            "rank": rank,
            "verdict": each["verdict"],
            "fits": each["fits"],
            **{name: each["trace"][name] for name in told},
        }
        for rank, each in answers.items()
    ]
    most = max(
        rows, key=lambda row: (row["required_bytes"], row["peak_allocated_bytes"], -row["rank"])
    )["rank"]
    return answers[most] | {"rank": most, "ranks": rows}


def on_all_gpus(answered: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The verdict for each card of the catalogue: of one trace, whose kernels are those of the card that was asked."""
    rows = []
    expandable = answered["allocators"]["own"] == "expandable_segments"
    process = _process(answered["gpus"], answered["trace"], expandable, "recipe" in answered)
    for card in catalogue().values():
        judged = _judged(answered["trace"], answered["program"], card, process)
        rows.append(
            {
                "gpu": card.name,
                "title": card.title,
                "required_bytes": answered["trace"]["required_bytes"],
                "usable_bytes": card.usable_bytes,
                **judged.fields(),
            }
        )
    return rows


def _warnings(found: Mapping[str, Any]) -> list[str]:
    told = list(found["trace"].get("warnings", ()))
    if growth := found["growth_bytes"]:
        told.append(
            f"memory grows by {size_text(growth)} with each update; a program that keeps a loss or an output keeps what"
            " it was computed of (loss.item() and .detach() do not)"
        )
    for line, times in Counter(found["ran_out"]).items():
        told.append(
            f"the card's memory ran out {times} times at {line}, and the program went on with less"
        )
    if found["share_bytes"] is not None:
        told.append(
            f"set_per_process_memory_fraction: the program allows itself {gib(found['share_bytes'])} of the card"
        )
    told += [
        f"{read['line']} decides by the value of a tensor, which nobody knows; {read['value']:g} was taken. For another"
        f" value: --answer {_place(read)}=VALUE"
        for read in _deciding(found)
    ]
    for line in found["received"]:
        told.append(
            f"{line} receives objects of another process, which did not run; the program went on with what it had"
        )
    for name in found["made_up"]["weights"]:
        told.append(
            f"the weights of {name} are not at hand: its configuration gave their names and sizes"
        )
    if names := found["made_up"]["data"]:
        told.append(
            f"made up, as --batch says, because it is not at hand: {', '.join(dict.fromkeys(names))}"
        )
    if could := [words for name, words in _NOT_HELD.items() if not _holds(found, name)]:
        told.append(f"this platform did not keep the program from {'; '.join(could)}")
    return told


# What a program could do that was not kept from it, by :class:`~dryfit.program.confinement.Held`.
_NOT_HELD = {
    "network": "the network",
    "files": "writing elsewhere",
    "metadata": "changing permissions, owners and times of your files",
    "processes": "ending your other processes",
    "sockets": "asking your servers (tmux, D-Bus, Docker)",
    "abstract_sockets": "asking servers with abstract names (X11)",
}


def _holds(found: Mapping[str, Any], name: str) -> bool:
    return found["held"][name] or (name == "network" and found["network"] == "allowed")


def _deciding(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The lines of the program's own at which a number that nobody knows decided."""
    return [read for read in found.get("reads", ()) if read["decided"] and not read["by_library"]]


def _place(read: Mapping[str, Any]) -> str:
    return read["line"].partition(" in ")[0]


# --- programs that came to no update -------------------------------------------------------------------------------


def refusal(asked: ProgramRequest, found: Mapping[str, Any]) -> UserError:
    """Why there is no answer, and what to write."""
    outcome, line = found["outcome"], found.get("line") or None
    if outcome == "too long":
        return UserError(
            f"The program took no update of an optimizer within {found['seconds']} seconds.",
            where=line,
            allowed="a program that trains; more time",
            write=f"dryfit run --seconds {4 * found['seconds']} ...",
        )
    if outcome in ("stopped", "ended") and (deciding := _deciding(found)):
        read = deciding[-1]
        other = 0 if read["value"] else 1
        return UserError(
            f"The program ended without an update, after this line decided by a number that nobody knows;"
            f" {read['value']:g} was taken.",
            where=read["line"],
            allowed="another value for this line",
            write=f"dryfit run --answer {_place(read)}={other} ...",
        )
    if outcome in ("stopped", "ended"):
        return UserError(
            "The program ended, and no optimizer of PyTorch's took a step.",
            where=asked.program,
            allowed="a program that trains: one that calls step() of a torch.optim.Optimizer",
        )
    if outcome == "killed":
        limit, status = asked.limits.memory_bytes / GIB, found["status"]
        if status >= 0:  # it ended by itself, such as by os._exit
            return UserError(
                f"The program's process ended with status {status} before its answer.",
                where=asked.program,
                allowed="what it said last stands above; a program that lets Python end",
            )
        return UserError(
            f"The program's process was killed (status {status}): mostly for want of this machine's memory.",
            where=asked.program,
            found=f"a limit of {limit:g} GiB",
            write=f"dryfit run --memory {2 * limit:g}GiB ...",
        )
    return _failed(asked, found, line)


# By a word of the error's kind or text: what is missing, and what helps.
_REASONS = (
    (
        ("jax", "flax", "optax"),
        "The program is written for JAX, and only PyTorch is followed.",
        "a program that trains with PyTorch",
        None,
    ),
    (
        ("ModuleNotFoundError", "ImportError"),
        "The program needs a package that is not installed here",
        "the environment that the program runs in, with dryfit installed in it",
        None,
    ),
    (
        ("MemoryError", "DefaultCPUAllocator", "can't allocate memory"),
        "The program needs more of this machine's memory than it may use",
        "more memory; a model that is built by from_pretrained takes next to none",
        "dryfit run --memory 32GiB ...",
    ),
    (
        (
            "Couldn't reach '",
            "DatasetNotFound",
            "Couldn't find a dataset",
            "Couldn't find any data",
        ),
        "The program's data set is not at hand",
        "made up rows of a size; the data set in the cache of the Hub; --network",
        "dryfit run --batch 8x512 ...",
    ),
    (
        ("FileNotFoundError", "No such file", "data_files"),
        "The program's data is not at hand",
        "the data in its place; or made up batches of a size",
        "dryfit run --batch 8x1024 ...",
    ),
    (
        (
            "OfflineMode",
            "LocalEntryNotFound",
            "Cannot find the requested files",
            "ConnectionError",
            "NetworkUnreachable",
            "couldn't connect",
            "Network is unreachable",
            "Temporary failure in name resolution",
            "offline mode",
        ),
        "The program asks for the network, which it does not have here",
        "the files in the cache of the Hub; or the network",
        "dryfit run --network ...",
    ),
    (
        ("GatedRepo", "401 Client Error", "HF_TOKEN", "api_key"),
        "The program needs a token",
        "the token in its variable of the environment, and the network",
        "dryfit run --network ...",
    ),
    (
        ("PermissionError", "Permission denied", "Read-only file system"),
        "The program may not open a file: it writes in its own folder alone",
        "paths below its folder; or further folders that it may write in",
        "dryfit run --write FOLDER ...",
    ),
    (
        ("File too large",),
        "The program writes a larger file than it may",
        "a larger limit",
        "dryfit run --file-size 20GiB ...",
    ),
)


def _failed(asked: ProgramRequest, found: Mapping[str, Any], line: str | None) -> UserError:
    text = f"{found.get('kind', '')} {found.get('text', '')} {found['problem']}"
    for words, problem, allowed, write in _REASONS:
        if any(word in text for word in words):
            if asked.batch and write and "--batch" in write:
                allowed, write = (
                    "the missing file at that path: rows that are made up do not replace it",
                    None,
                )
            told = next(
                filter(None, map(str.strip, found.get("text", "").splitlines())), found["problem"]
            )
            return UserError(
                f"{problem.rstrip('.')}: {told.rstrip('.')}.",
                where=line,
                allowed=allowed,
                write=write,
            )
    return UserError(found["problem"], where=line, allowed=found.get("hint") or None)
