"""Rule ``check_resources``: what every stage of a run needs, against what there is, before any of them costs time.

Beside the training step stand the stages around it: after training, people run out of memory in the evaluation, and
then of disk. The evaluation's batches are followed as they will run; the rest is computed or estimated, and says so.
:mod:`scripts.gate.decision` decides: a stage that does not fit ends the run, with the smallest change that would.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from dryfit.cards.gpus import Gpu
from dryfit.cards.verdict import verdict
from dryfit.common.files import read_folder, read_json, read_jsonl, read_report, write_report
from dryfit.common.terminal import log
from dryfit.common.text import gib
from dryfit.hours.step_time import Speed, speed_of
from dryfit.scenario.scenario import Scenario
from dryfit.tracing import imports
from dryfit.tracing.hosts import LAUNCHER_BYTES, PROCESS_BYTES, loading_bytes, started_bytes
from dryfit.tracing.scenario_trace import Traced
from scripts.common import disk
from scripts.common.job import job
from scripts.common.machine import host_memory, pick_device
from scripts.common.reports import CARRIED, carry
from scripts.common.requests import SHOTS, nearest_rows, requests_of, shots_of
from scripts.common.requests import asked as questions
from scripts.common.resource_table import (
    IN_PART,
    NOT_REACHED,
    NOT_RUN,
    TOO_SMALL,
    Stage,
    judged,
    refused,
    table,
)
from scripts.gate.batch_times import batch_shapes, evaluation_seconds, longest_batch
from scripts.gate.decision import Decision, StepDecision, chosen_gpu, decide_step, hours_of
from scripts.runs.cluster import evaluation_bytes

# The merge streams and loads no transformers: 0.25 GB in all.
MERGE_BYTES = 300_000_000
GPU, HOST = "GPU", "host memory"
NO_HOURS = "how long the run takes is not known, since the speed of its GPU or CPU is not"


def to_mapping(decision: Decision) -> dict[str, Any]:
    """What run.json holds of a decision about every stage of a run."""
    return {
        "fits": decision.fits,
        "gpu": decision.step.gpu.to_mapping() if decision.step.gpu else None,
        "hours": decision.hours.to_mapping() if decision.hours else None,
        "limit_hours": decision.limit_hours,
        "overridden": decision.overridden,
        "override": decision.override,
        "stages": [asdict(stage) for stage in decision.stages],
    }


class Machine(NamedTuple):
    """What there is: the GPU (None: the stages run on the CPU), and bytes of host memory (None: not known)."""

    gpu: Gpu | None
    host_bytes: int | None
    speed: Speed | None = None  # of the GPU, or the CPU

    @property
    def place(self) -> str:
        return GPU if self.gpu else HOST

    @property
    def target(self) -> str:
        return "cuda" if self.gpu else "cpu"

    @property
    def has_bytes(self) -> int | None:
        return self.gpu.usable_bytes if self.gpu else self.host_bytes

    def needed(self, traced: Mapping[str, Any]) -> int:
        """Of what a trace found: from the GPU's allocator, or from the host with the process around the tensors."""
        if self.gpu is None:
            return traced["peak_allocated_bytes"] + PROCESS_BYTES
        return self.gpu.usable_bytes - verdict(traced, self.gpu).headroom_bytes

    def lacks(self, needed: int) -> bool:
        return self.has_bytes is not None and needed > self.has_bytes


class Results(NamedTuple):
    """The disk for results: its free bytes, and the stages whose files it holds already."""

    free_bytes: int
    there: Sequence[str] = ()


def training_stages(
    traced: Traced, longest: Scenario, decision: StepDecision, machine: Machine, stored: str
) -> list[Stage]:
    """The training step as configured, and at the longest batch of the data; ``stored``: the dtype of the base."""
    import torch

    from dryfit.tracing.trace import trace

    configured, rows, dtype = traced.scenario, [], getattr(torch, stored)
    processes = (
        1 if machine.gpu else configured.parallel.gpus
    )  # each has a GPU of its own; on the CPU they share
    for name, step in (
        ("training step, as configured", configured),
        ("training step, longest batch", longest),
    ):
        if machine.gpu and step == configured:
            traced_step = decision.configured
        elif rows and step == configured:
            continue  # the longest batch is as long as the configuration allows
        else:
            sizes = [machine.gpu.usable_bytes] if machine.gpu else ()
            traced_step = trace(
                step,
                machine.target,
                capability=machine.gpu and machine.gpu.capability,
                timeline=False,
                sizes=sizes,
            )
        size, needs = (
            f"{step.micro_batch} x {step.sequence_length} tokens",
            machine.needed(traced_step),
        )
        if processes > 1:
            size += " in each process"
            needs = (
                processes * max(needs, PROCESS_BYTES + started_bytes(step, traced_step, dtype))
                + LAUNCHER_BYTES
            )
        rows.append(
            judged(
                name, machine.place, needs, machine.has_bytes, "traced", size, processes=processes
            )
        )
    if refused(rows[:1]) and rows[1:] and not refused(rows[1:]):
        rows[0] = replace(rows[0], verdict=NOT_REACHED)
    first = next(iter(decision.suggestions), None)
    if first is None:
        return rows
    own = first.changes and "gpu" not in first.changes  # of the step, not of what it runs on
    change = f"training: {{{first.write}}}" if own else first.write
    return [replace(row, change=change) if row.verdict == TOO_SMALL else row for row in rows]


def evaluation_stages(name: str, evaluation: Any, machine: Machine) -> list[Stage]:
    """The batch of the evaluation that needs the most; where it does not fit, the largest batch size that would."""
    from dryfit.engine.errors import TraceError
    from dryfit.tracing.evaluation_memory import trace_evaluation

    def traced_at(size: int, speed: Speed | None = None) -> dict[str, Any]:
        capability = machine.gpu.capability if machine.gpu else None
        return trace_evaluation(
            evaluation._replace(batch_size=size), machine.target, capability, speed
        )

    def smaller(fits: Callable[[dict[str, Any]], bool]) -> str | None:
        size = evaluation.batch_size
        while size > 1:
            size //= 2
            if fits(traced_at(size)):
                return f"evaluation: {{batch_size: {size}}}"
        return None

    try:
        traced = traced_at(evaluation.batch_size, machine.speed)
    except TraceError as error:
        reason = f"not traced: {str(error).splitlines()[0]}"
        return [judged(name, machine.place, None, machine.has_bytes, "traced", reason)]
    detail = (
        f"{traced['rows']} requests at once, answers of up to {evaluation.max_new_tokens} tokens"
    )
    if not traced["exact"]:
        detail += "; answers as one pass over rows of full length"
    needs = machine.needed(traced)
    seconds = traced["seconds_at_most"] and 2 * traced["seconds_at_most"]  # of base and tuned
    row = judged(
        name, machine.place, needs, machine.has_bytes, "traced", detail, seconds_at_most=seconds
    )
    if not machine.lacks(needs):
        return [row]
    change = smaller(lambda other: not machine.lacks(machine.needed(other)))
    if change or machine.gpu is None:
        return [replace(row, change=change)]
    # Weights that are larger than the GPU: the evaluation keeps some of them in host memory and copies them for each
    # pass. Then keys, values and logits have to fit beside the largest part and the next.
    weights, parts = traced["weights_bytes"], 2 * traced["largest_module_bytes"]
    outside = needs + parts - machine.has_bytes
    detail += (
        f"; {gib(outside)} of the weights stay in host memory and are copied for each pass: slow"
    )
    row = replace(row, detail=detail, verdict=IN_PART, seconds_at_most=None)
    if machine.lacks(needs - weights + parts):
        change = smaller(lambda other: not machine.lacks(machine.needed(other) - weights + parts))
        row = replace(row, verdict=TOO_SMALL, change=change)
    rest = "the weights that the GPU does not hold"
    return [row, judged(name, HOST, outside + PROCESS_BYTES, machine.host_bytes, "estimated", rest)]


def comparison_stage(
    stored: int, dtype: str, adapter_bytes: int, requests: int, machine: Machine
) -> Stage:
    """The comparison after the merge: in the first place that has the room, and left out where none has."""
    from scripts.merging.logits import choose_device, comparison_bytes

    name, sizes = "comparison after the merge", comparison_bytes(stored, dtype, adapter_bytes)
    free = {GPU: machine.gpu and machine.gpu.usable_bytes, HOST: machine.host_bytes}
    free = {place: size for place, size in free.items() if size is not None}
    chosen = choose_device(sizes, free)
    if not requests or chosen is None:
        reason = (
            "no requests asked for"
            if not requests
            else "no room: logits and answers will not be compared"
        )
        return judged(
            name, HOST, sizes[dtype], machine.host_bytes, "computed", reason, verdict=NOT_RUN
        )
    place, computed_in = chosen
    return judged(name, place, sizes[computed_in], free[place], "computed", f"in {computed_in}")


def host_stages(
    source: str,
    base_bytes: int,
    largest_bytes: int,
    there: bool,
    machine: Machine,
    step: Scenario,
    stored: str,
) -> list[Stage]:
    """What fetching, loading and merging take of the host's memory."""
    rows = []
    if not there:
        whole = source == "wheel"  # a GGUF file is unpacked in memory
        needs = PROCESS_BYTES + (base_bytes if whole else 0)
        detail = "the whole model, unpacked" if whole else "as it arrives"
        rows.append(
            judged("fetching the base", HOST, needs, machine.host_bytes, "estimated", detail)
        )
    if machine.gpu is not None:
        import torch

        processes = step.parallel.gpus
        needs = PROCESS_BYTES + loading_bytes(step, getattr(torch, stored), largest_bytes)
        by_parts = step.parallel.sharded or step.parallel.by_plan
        detail = "the whole model, before it is divided" if by_parts else "tensor by tensor"
        if processes > 1:
            needs = processes * needs + LAUNCHER_BYTES
            detail += ", in each process"
        rows.append(
            judged(
                "loading for the GPU",
                HOST,
                needs,
                machine.host_bytes,
                "estimated",
                detail,
                processes=processes,
            )
        )
    return [
        *rows,
        judged("merging", HOST, MERGE_BYTES, machine.host_bytes, "estimated", "block by block"),
    ]


def check_run(
    traced: Traced,
    longest: Scenario,
    evaluations: Mapping[str, Any],
    settings: Mapping[str, Any],
    machine: Machine,
    *,
    results: Results,
    evaluation_machine: Machine | None = None,
) -> Decision:
    """Hold the stages of a run against what there is.

    Parameters
    ----------
    longest
        The step at the longest batch of the data (:func:`scripts.gate.batch_times.longest_batch`).
    evaluations
        By the stage's name, each a :class:`dryfit.tracing.evaluation_memory.Evaluation`.
    settings
        ``override``, ``source`` of the model, ``merging``.
    machine, evaluation_machine
        What there is; the evaluation and the comparison, which use one GPU, may have another.
    results
        The disk that the results lie on.
    """
    decision = decide_step(traced, machine.gpu, longest)
    model = traced.scenario
    base, merged = (
        settings["source"]["dtype"],
        settings["merging"]["dtype"] or settings["source"]["dtype"],
    )
    counts = traced.trace["parameters"], traced.trace["trainable_parameters"]
    sizes = disk.ParameterCounts.of(model.to_mapping(), base, merged, *counts)
    base_bytes = sizes.parameters * sizes.base_width
    stored = sizes.parameters * max(sizes.base_width, sizes.merged_width)
    embedding = (
        model.size("vocab_size") * model.size("hidden_size") * sizes.base_width
    )  # the largest tensor
    alone, there = evaluation_machine or machine, "base model" in results.there
    stages = [
        *host_stages(
            settings["source"]["type"], base_bytes, embedding, there, machine, model, base
        ),
        *training_stages(traced, longest, decision, machine, base),
        comparison_stage(
            stored,
            merged,
            sizes.trainable * sizes.adapter_width,
            settings["merging"]["verify"]["prompts"],
            alone,
        ),
        *(
            stage
            for name, evaluation in evaluations.items()
            for stage in evaluation_stages(name, evaluation, alone)
        ),
        *disk.stages(sizes, results.free_bytes, results.there),
    ]
    return Decision(decision, settings["override"], stages)


def main(
    inputs: Mapping[str, str], settings: Mapping[str, Any], cluster: Sequence[Any], output: str
) -> None:
    """Check the run, write the table and show it; refuse what does not fit."""
    base, traced = Path(inputs["config"]).parent, Traced.read(inputs["trace"])
    imports.import_quietly(traced.scenario)  # before modules that import transformers whole
    if settings["gate"]["gpu"] == settings["device"] == "auto" and not cluster:
        pick_device("auto")  # a GPU that PyTorch can't use is an error before any weight is fetched

    from dryfit.common.chat import encode_pairs
    from dryfit.step.batches import Row
    from dryfit.tracing.evaluation_memory import Evaluation
    from scripts.common.tokenizer import read_tokenizer

    read_folder(inputs["description"])
    read_report(inputs["encoded"], inputs["train"])
    read_report(
        inputs["split"], *(inputs[name] for name in ("test", "trained", "harmful", "benchmark"))
    )
    carried = carry(
        splits_check=inputs["check"], encode=inputs["encoded"], description=inputs["description"]
    )
    named = settings["gate"]["gpu"]
    gpu = evaluation_gpu = None
    if named != "auto" or settings["device"] != "cpu":
        gpu = chosen_gpu(named, cluster, traced.trace["required_bytes"], traced)
        weights = traced.trace["parameters"] * disk.WIDTHS[settings["source"]["dtype"]]
        evaluation_gpu = chosen_gpu(
            named, cluster, evaluation_bytes(weights)
        )  # of a machine's the first
    host = None if cluster else host_memory()
    answers, tokenizer, config = (
        settings["evaluation"],
        read_tokenizer(base),
        read_json(inputs["config"]),
    )

    # As evaluate.py asks the base, which is also shown training rows; the tuned model takes less.
    asked = requests_of(
        list(read_jsonl(inputs["test"])), list(read_jsonl(inputs["benchmark"])), answers
    )
    trained, harmful = list(read_jsonl(inputs["trained"])), list(read_jsonl(inputs["harmful"]))
    near = nearest_rows(
        [row["request"] for row in asked], [row["request"] for row in trained], SHOTS
    )
    every = [*asked, *harmful, *asked]
    pairs, shots = questions(every, [*[()] * (len(every) - len(near)), *shots_of(near, trained)])
    rows = [
        Row(*row) for row in encode_pairs(tokenizer, settings["prompt"]["system"], pairs, shots)
    ]
    lengths = answers["batch_size"], answers["max_new_tokens"]
    dtype = settings["source"]["dtype"] if answers["dtype"] == "auto" else answers["dtype"]
    evaluations = {"evaluation of base and tuned": Evaluation(config, dtype, rows, *lengths)}
    shapes = batch_shapes(inputs["train"], traced.scenario, settings["loop"])
    machine = Machine(gpu, host, gpu and speed_of(gpu.name))
    checked = check_run(
        traced,
        longest_batch(shapes, traced.scenario),
        evaluations,
        {**settings, "override": settings["gate"]["override"]},
        machine,
        evaluation_machine=Machine(
            evaluation_gpu, host, evaluation_gpu and speed_of(evaluation_gpu.name)
        ),
        results=Results(
            disk.free_bytes(output), ["base model"] if (base / "weights.json").is_file() else []
        ),
    )
    hours = hours_of(
        shapes, traced.scenario, machine.speed, gpu, evaluation_seconds(checked.stages)
    )
    checked = replace(checked, hours=hours, limit_hours=settings["gate"]["hours"])
    for line in [*table(checked.stages), f"the run {hours.line}" if hours else NO_HOURS]:
        log.info("%s", line)
    checked.enforce()
    write_report(output, {CARRIED: carried, **to_mapping(checked)})


if __name__ == "__main__":
    with job(snakemake):
        imports.ends_with_its_answer = True
        main(
            dict(snakemake.input.items()),
            snakemake.params.settings,
            snakemake.params.cluster,
            snakemake.output.resources,
        )
