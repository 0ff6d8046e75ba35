"""The answer to a question: what `predict` says, or without torch the analytic estimate alone."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from dryfit.analytic.certainty import Needs, peak_bound
from dryfit.analytic.decoder import NotDescribed
from dryfit.analytic.estimate import analytic_estimate, estimate
from dryfit.ask.question import Question
from dryfit.cards import sentences
from dryfit.cards.beside import Process
from dryfit.cards.gpus import UNMODELLED, Gpu, catalogue, named, what_limits
from dryfit.cards.verdict import Verdict, Word, is_lower_bound, verdict
from dryfit.common.errors import UserError
from dryfit.common.terminal import left_out_if_it_fails
from dryfit.common.text import GIB
from dryfit.common.versions import INSTALL_TRACE, can_trace
from dryfit.derived.step import if_recorded, is_recorded, why_unusable
from dryfit.evidence.nearest import evidence
from dryfit.hours.run_time import RunTime, order, run_time
from dryfit.hours.step_time import speeds
from dryfit.planner.compare import NOT_MEASURED, Comparison, compare, nearly_full
from dryfit.planner.omissions import of_an_older_loss, of_older_tools, omissions
from dryfit.planner.tools import by_tool, other_verdicts
from dryfit.readers.reading import EITHER_WAY, TOO_HIGH, Reading
from dryfit.readers.request import ScenarioRequest, parse_request
from dryfit.scenario.model import LOOP
from dryfit.scenario.scenario import Scenario
from dryfit.scenario.strategies import REPLICATED
from dryfit.tracing import scenario_trace

NOT_TRACED = "not traced: --quick asks the analytic estimate alone"


def predict(scenario: Scenario, where: object = "scenario") -> dict[str, Any]:
    """What the workflow's rules say about a scenario, one after the other."""
    return _compared(scenario, where).to_mapping()


def _compared(scenario: Scenario, where: object) -> Comparison:
    return compare(estimate(scenario, where), scenario_trace.traced(scenario, where), where=where)


def whole_answer(
    request: ScenarioRequest,
    where: object = "scenario",
    shown: Callable[[dict[str, Any]], None] | None = None,
    watch: Callable[[str, int, Sequence[Any]], None] | None = None,
    *,
    suggested: bool = True,
    readings: Sequence[Reading] = (),
) -> dict[str, Any]:
    """The whole answer: what the rules say, what was assumed, the other way to use several GPUs, and other scripts.

    Parameters
    ----------
    shown
        Called with the answer as soon as its verdict stands, before what takes traces of its own.
    watch
        Hears of each search for a suggestion (:func:`dryfit.planner.suggestions.suggest`).
    suggested
        Whether to search for what would fit, which takes traces of its own.
    readings
        Other tools' files that were read; what they say and the step can't counts against the verdict.
    """
    compared = _compared(request.scenario, where)
    left_out = omissions(readings, request.scenario, {"trace": compared.traced.trace})
    compared = replace(compared, verdict=compared.verdict.leaving_out(left_out))
    older = []
    if compared.verdict.fits and compared.gpu:
        room = compared.gpu.usable_bytes
        older = list(
            of_older_tools(
                readings, request.scenario, room, lambda other: _required_bytes(other, where)
            )
        )
        older += of_an_older_loss(readings, request.scenario, compared.traced.trace, room)
    answer = compared.to_mapping(suggested=False) | request.origin_fields()
    _add_tools(answer, request, where)
    answer["warnings"] = [
        *older,
        *request.warnings,
        *answer["warnings"],
        *without_masters(request.scenario, where),
    ]
    answer["strategies"] = {}
    if shown:
        shown(answer)
    if "parallel" in request.assumed:
        if watch:
            watch("the same with DDP", 0, [])
        parallel = {"strategy": REPLICATED, "gpus": request.scenario.parallel.gpus}
        try:
            other = _compared(request.scenario.changed(parallel=parallel), where)
        except UserError as error:  # such as DDP's own, where a step doesn't use all that it trains
            answer["warnings"].append(f"the same with DDP has no answer: {error.problem}")
        else:
            size = other.traced.trace["required_bytes"]
            answer["strategies"][REPLICATED] = {"required_bytes": size, **other.verdict.fields()}
    failed: list[str] = []
    answer["other_kernels"] = []
    with left_out_if_it_fails("other kernels", failed):
        answer["other_kernels"] = _other_kernels(compared, where)
    if suggested:
        with left_out_if_it_fails("suggestions", failed):
            answer["suggestions"] = compared.suggestions(watch, failed)
    answer["searches_failed"] = failed
    return answer


def _required_bytes(scenario: Scenario, where: object) -> int:
    return scenario_trace.traced(scenario, where).trace["required_bytes"]


def _other_kernels(compared: Comparison, where: object) -> list[dict[str, Any]]:
    """The same step without the packages whose kernels its model's code asks for, and with all of them.

    transformers takes such a package where it can import it, and says nothing where it can't.
    """
    scenario, trace = compared.traced.scenario, compared.traced.trace
    ran, others = trace.get("packages") or {}, []
    here = [name for name, way in ran.items() if way != LOOP]
    for packages in ([], list(ran)):
        if ran and packages != here:
            changed = scenario.changed(kernels="transformers", packages=packages)
            other = scenario_trace.traced(changed, where).trace
            others.append(
                {
                    "packages": packages,
                    "without": [name for name in ran if name not in packages],
                    "peak_allocated_bytes": other["peak_allocated_bytes"],
                    "required_bytes": other["required_bytes"],
                    "lower_bound": is_lower_bound(other),
                    **verdict(other, compared.gpu, Process.of(changed)).fields(),
                }
            )
    return others


# What a tool's own kernels and casts can do and ours can't: the change that the trace's error asks for, which way the
# answer then errs, and why.
_NEAREST: dict[tuple[str, Any], tuple[str, str]] = {
    ("attention", "sdpa"): (TOO_HIGH, "this kernel takes what ours does not; read as sdpa"),
    ("attention", "eager"): (TOO_HIGH, "this architecture's own attention, read as eager"),
    ("method", "lora"): (
        EITHER_WAY,
        "bitsandbytes packs no layer of this architecture, so its weights count whole",
    ),
    ("autocast", "bf16"): (
        EITHER_WAY,
        "products of different dtypes are cast; counted under autocast",
    ),
}


def traced(
    asked: Question,
    shown: Callable[[Mapping[str, Any]], None] | None = None,
    watch: Callable[[str, int, Sequence[Any]], None] | None = None,
    *,
    suggested: bool = True,
) -> dict[str, Any]:
    """`predict`'s object, with another tool's settings and what was assumed.

    ``shown`` is called with it as soon as the verdict stands, ``watch`` hears of each search for a suggestion.
    """
    from dryfit.tracing.imports import import_quietly

    import_quietly(asked.scenario)

    def answer() -> dict[str, Any]:
        step = replace(asked.asked, scenario=asked.scenario)
        return _more(
            whole_answer(
                step, asked.where, shown, watch, suggested=suggested, readings=asked.readings
            ),
            asked,
        )

    for _ in _NEAREST:
        try:
            return answer()
        except UserError as error:
            name, value = change = next(iter((error.change or {"": None}).items()))
            if asked.reading is None or change not in [
                *_NEAREST
            ]:  # a value may be a mapping, which has no hash
                raise
            errs, why = _NEAREST[change]
            asked.reading.approximates(name, getattr(asked.scenario, name), errs, why)
            asked.scenario = asked.scenario.changed(**{name: value})
    return answer()


def quick(asked: Question, *, others: bool = True, recorded: bool = True) -> dict[str, Any]:
    """The same object from the analytic estimate alone. Its ``verdict`` is clear where the estimate can
    tell, else too close to call; the trace's where the estimate is derived from a record. Where there is no estimate,
    it is that the step does not fit, if the weights alone are too large, else None.

    ``analytic`` has ``required_bytes`` too, where that is near what the GPU has, and without a GPU ``enough_bytes``,
    what the smallest GPU known has that surely suffices (None: none does).
    Without ``others`` nothing is said about other tools' scripts, which takes an estimate for each. Without
    ``recorded`` no record is asked: replays in Python take a browser seconds.
    """
    estimated = estimate(asked.scenario, asked.where, blocks=False, recorded=recorded)
    if estimated.analytic is None and (plain := described(asked)) is not asked:
        asked, estimated = (
            plain,
            estimate(plain.scenario, asked.where, blocks=False, recorded=recorded),
        )
    gpu, analytic, judged = asked.gpu, estimated.analytic, Verdict()
    capability = gpu and gpu.capability
    exact = if_recorded(asked.scenario, capability) if recorded and analytic else None
    figures = ("allocated", "reserved") if exact else ("estimate", "allocated", "reserved")
    if exact:
        analytic = {**analytic, **exact.capacities.to_mapping()}
    elif analytic:
        bound = peak_bound(asked.scenario.method, analytic["parameters"]["total"])
        analytic = {**analytic, "bound": bound._asdict()}
    needs = analytic and Needs(asked.scenario, analytic["peak_allocated_bytes"], capability, exact)
    if needs and gpu is None:
        analytic = {
            **analytic,
            "enough_bytes": needs.smallest(card.usable_bytes for card in catalogue().values()),
        }
    if needs and gpu:
        of_trace = (
            exact and not gpu.pool_bytes
        )  # which also knows what loading takes of a shared memory
        judged = (
            verdict(analytic, gpu, Process.of(asked.scenario)) if of_trace else needs.verdict(gpu)
        )
        # Else it lies far from what the GPU has, and only a bound is known.
        if gpu.is_modelled and needs.roughly(gpu.usable_bytes) is None:
            analytic = {**analytic, "required_bytes": needs.required_bytes(gpu.usable_bytes)}
        judged = judged.leaving_out(
            omissions(asked.readings, asked.scenario, {"analytic": analytic})
        )
    left_out = omissions(asked.readings, asked.scenario, {}) if gpu and analytic is None else ()
    if (
        gpu
        and gpu.usable_bytes < estimated.least_bytes
        and all(one.too_high_bytes == 0 for one in left_out)
    ):
        judged = Verdict(
            gpu.usable_bytes - estimated.least_bytes, estimated.least_bytes, is_lower_bound=True
        )
    reasons = {"trace": NOT_TRACED, "measurement": NOT_MEASURED, "analytic": estimated.reason}
    answer = asked.asked.origin_fields() | {
        "rule_of_thumb": estimated.rule_of_thumb,
        "analytic": analytic,
        "trace": None,
        "measurement": None,
        "differences": {},
        "evidence": evidence(asked.scenario, gpu).to_mapping(figures),
        **judged.to_mapping(),
        "gpu": gpu.to_mapping() if gpu else None,
        "reasons": {name: reason for name, reason in reasons.items() if reason},
        "scenario": asked.scenario.to_mapping(),
        "suggestions": [],
        "versions": analytic["recorded_with"] if exact else {},
        "warnings": [
            *asked.asked.warnings,
            *filter(None, [why_unusable(asked.scenario)]),
            *(what_limits({}, gpu) if gpu else ()),
            *without_masters(asked.scenario, asked.where),
        ],
    }
    answer["sentence"] = sentences.of_step(answer)
    if others:
        _add_tools(answer, asked.asked, asked.where)
    return _more(answer, asked)


def described(asked: Question) -> Question:
    """The question; of a tool that nobody chose the plain step, where the estimate describes that alone."""
    if not asked.asked.like_is_default:
        return asked
    own = estimate(asked.scenario, asked.where, blocks=False)
    if own.analytic:
        return asked
    try:
        plain = parse_request(asked.asked.mapping, asked.where)
    except UserError:  # such as a strategy that needs the tool's precision
        return asked
    if estimate(plain.scenario, asked.where, blocks=False).analytic is None:
        return asked
    told = (
        f"estimated with this project's own defaults, since TRL's are not described: {own.reason}"
    )
    plain = replace(plain, warnings=(*asked.asked.warnings, told))
    return replace(asked, asked=plain, scenario=plain.scenario)


def without_masters(scenario: Scenario, where: object = "scenario") -> list[str]:
    """That full fine-tuning in 16 bits keeps no fp32 copy of its weights, and what the usual recipe takes instead.

    DeepSpeed keeps one itself, so nothing is said there.
    """
    pure = scenario.method == "full" and scenario.precision in ("bf16", "fp16")
    if not pure or scenario.parallel.zero_stage or scenario.aim.trainer:
        return []
    half, usual = scenario.precision, f"{scenario.precision}-mixed"
    kept = f"weights, gradients and the optimizer's states are all in {half}"
    if scenario.has_wider_states:
        kept = f"weights and gradients are in {half}, the optimizer's states in fp32"
    text = (
        f"{kept}: no fp32 copy of the weights is kept, as"
        f" most recipes of full fine-tuning keep one (precision: {usual}, fp32 weights under autocast)"
    )
    with suppress(NotDescribed, UserError):
        changed = scenario.changed(precision=usual, autocast=None)
        gpu = named(scenario.gpu, where)
        form = analytic_estimate(
            changed, where, capability=gpu.capability if gpu else None, blocks=False
        )
        peak = f"{form['peak_allocated_bytes'] / GIB:.2f} GiB at the peak"
        text += f". With fp32 master weights about {peak} (--set precision={usual})"
    return [text]


def _add_tools(answer: dict[str, Any], request: ScenarioRequest, where: object) -> None:
    """What other tools' training would take, and the first line with it."""
    answer["tools"] = by_tool(request, where, answer["verdict"])
    answer["scripts_would_take"] = {
        row["tool"]: row["peak_allocated_bytes"] for row in answer["tools"]
    }
    answer["sentence"] += other_verdicts(answer)


def _more(answer: dict[str, Any], asked: Question) -> dict[str, Any]:
    if asked.run and asked.gpu:
        time, step = answer.get("time"), asked.run.typical_step(asked.scenario)
        if time and step != asked.scenario:
            time = _time_of(step, asked.gpu)
        answer["run"] = _run(time, asked.gpu, asked)
        late = answer["fits"] and (answer["run"] or {}).get("in_time") is False
        answer["sooner"] = []
        with left_out_if_it_fails("sooner", answer.setdefault("searches_failed", [])):
            answer["sooner"] = (
                _sooner(answer, asked) if late and asked.scenario.aim.trainer is None else []
            )
    if asked.readings:
        answer["read"] = [reading.to_mapping() for reading in asked.readings]
    return answer


def _sooner(answer: Mapping[str, Any], asked: Question) -> list[dict[str, Any]]:
    """What makes the run end in time on this GPU, or at least sooner."""
    from dryfit.planner.calibrated import CalibratedEstimator
    from dryfit.planner.deadline import sooner

    known = answer["trace"] | {"time": answer["time"]}
    estimate = CalibratedEstimator(asked.scenario, asked.gpu, known)
    return [item.to_mapping() for item in sooner(asked.scenario, asked.gpu, asked.run, estimate)]


def exit_status(answer: Mapping[str, Any]) -> int:
    """As `predict`'s: 0 fits or no GPU is named, 1 does not fit, or without the trace it is too close to call.

    Also 1: the run that was asked about does not end by its deadline.
    """
    if answer["gpu"] is None:
        return 0
    return 0 if answer["fits"] and (answer.get("run") or {}).get("in_time") is not False else 1


def on_all_gpus(asked: Question, *, estimated: bool = False) -> list[dict[str, Any]]:
    """The step on each GPU of the catalogue, traced once for each compute capability, or estimated; the best first.

    A card whose record says the same as the trace is not traced. If a run is asked about, each GPU has its hours too,
    and each is traced for its time. ``recorded``: whether a record answered.
    """
    if estimated:
        return _estimated_rows(described(asked))
    _refuse_a_server(asked, None, "`dryfit gpus`")
    known: dict[str, dict[str, Any]] = {}
    by_capability: dict[Any, list[Gpu]] = {}
    for card in catalogue().values():
        if not asked.run and (row := _recorded_row(asked, card)):
            known[card.name] = row
        else:
            by_capability.setdefault(card.capability, []).append(card)
    if not by_capability:
        return list(known.values())
    from dryfit.tracing.imports import import_quietly

    import_quietly(asked.scenario)
    from dryfit.tracing.trace import trace

    traces = {
        capability: trace(
            asked.scenario,
            capability=capability,
            timeline=False,
            timed_on=asked.run and speeds(cards, asked.scenario),
        )
        for capability, cards in by_capability.items()
    }
    typical = {}
    if asked.run and (step := asked.run.typical_step(asked.scenario)) != asked.scenario:
        typical = {
            capability: _times(step, capability, cards)
            for capability, cards in by_capability.items()
        }
    rows = []
    for card in catalogue().values():
        if card.name in known:
            rows.append(known[card.name])
            continue
        step_trace = traces[card.capability]
        judged = verdict(step_trace, card, Process.of(asked.scenario))
        row = {
            "gpu": card.name,
            "title": card.title,
            "required_bytes": step_trace["required_bytes"],
            "usable_bytes": card.usable_bytes,
            **judged.fields(),
            "recorded": False,
        }
        if asked.run:
            time, full = step_trace["times"][card.name], nearly_full(step_trace, card)
            row |= {
                "time": time,
                "run": _run(
                    typical.get(card.capability, step_trace["times"])[card.name], card, asked
                ),
            }
            row["warnings"] = [*(time["warnings"] if time else ()), *([full] if full else ())]
        rows.append(row)
    if asked.run:
        rows.sort(key=lambda row: order(row["fits"], row["run"] and RunTime(**row["run"])))
    return rows


def _time_of(step: Scenario, gpu: Gpu) -> Mapping[str, Any] | None:
    """The time of a step on a GPU; of one that generates, of an update with its share of the cycle."""
    if not step.aim.generates:
        return _times(step, gpu.capability, [gpu])[gpu.name]
    from dryfit.tracing.cycle import cycle

    timed = cycle(step, scenario_trace.traced(step).trace, gpu).time
    return timed.of_an_update() if timed else None


def _times(
    step: Scenario, capability: tuple[int, int] | None, cards: Sequence[Gpu]
) -> Mapping[str, Any]:
    """The time of a step on GPUs that are alike to the trace, by their names."""
    from dryfit.tracing.trace import trace

    return trace(step, capability=capability, timeline=False, timed_on=speeds(cards, step))["times"]


def _run(time: Mapping[str, Any] | None, gpu: Gpu, asked: Question) -> dict[str, Any] | None:
    """The run of steps that take so long; None where the GPU's speed is not known."""
    return run_time(time, gpu, asked.scenario, asked.run).to_mapping() if time else None


def largest_that_fits(
    asked: Question, field: str, alone: Question | None = None, *, estimated: bool = False
) -> dict[str, Any]:
    """The longest sequence, or the largest micro-batch, that fits the GPU: traced, or estimated.

    ``alone``: the same step of a single row, where that differs in more than its rows: it carries no mask of padding.
    """
    if not asked.gpu.is_modelled:
        raise UserError(
            f"Nothing can be said to fit this GPU: {UNMODELLED[asked.gpu.allocator]}.",
            where="the command line",
            found=asked.gpu.name,
            allowed="`dryfit fit`, which gives the allocated bytes",
        )
    if estimated:
        return _largest_estimated(asked, field)
    if asked.scenario.generation.engine == "vllm":
        _refuse_a_server(asked, field == "sequence_length", "`dryfit batch`")
        return _longest_answer(asked)
    from dryfit.planner.feasibility import largest

    largest_fit = largest(asked.scenario, asked.gpu, field)
    if (
        largest_fit["value"] > 1
        or alone is None
        or alone.scenario.attention_mask == asked.scenario.attention_mask
    ):
        return largest_fit
    single = largest(alone.scenario, asked.gpu, field, most=1)
    asked.scenario = alone.scenario
    return single


def _estimated_rows(asked: Question) -> list[dict[str, Any]]:
    """A row for each card; where a record alone answers, those whose kernels it does not know have no figures."""
    if not recorded_alone(asked):
        return [_estimated_row(asked, card) for card in catalogue().values()]
    rows = []
    for card in catalogue().values():
        step = asked.scenario.changed(gpu=card.setting)
        rows.append(
            _estimated_row(asked, card)
            if is_recorded(step, card.capability)
            else {
                "gpu": card.name,
                "title": card.title,
                "required_bytes": None,
                "usable_bytes": card.usable_bytes,
                "verdict": None,
                "fits": None,
                "headroom_bytes": None,
                "recorded": False,
            }
        )
    if not any(row["recorded"] for row in rows):
        _estimated(asked)  # which says why there is no answer
    return rows


def recorded_alone(asked: Question) -> bool:
    """Whether the closed form knows nothing of a step, so that only a record answers without a trace."""
    try:
        analytic_estimate(asked.scenario, asked.where, blocks=False)
    except NotDescribed:
        return True
    return False


def _estimated_row(asked: Question, card: Gpu) -> dict[str, Any]:
    answer = _estimated(replace(asked, gpu=card, scenario=asked.scenario.changed(gpu=card.setting)))
    needed = answer["analytic"].get("required_bytes", answer["analytic"]["peak_allocated_bytes"])
    judged = {name: answer[name] for name in ("verdict", "fits", "headroom_bytes")}
    sizes = {"required_bytes": needed, "usable_bytes": card.usable_bytes}
    return {
        "gpu": card.name,
        "title": card.title,
        **sizes,
        **judged,
        "recorded": bool(answer["versions"]),
    }


def _recorded_row(asked: Question, card: Gpu) -> dict[str, Any] | None:
    """What a record says of a card, which a trace would say too; None: there is none, or loading decides as well."""
    if card.pool_bytes or not card.is_modelled:
        return None
    step = asked.scenario.changed(gpu=card.setting)
    return _estimated_row(asked, card) if if_recorded(step, card.capability) else None


def _largest_estimated(asked: Question, field: str) -> dict[str, Any]:
    """The longest sequence, or the largest micro-batch, that surely fits the GPU by the peak of the analytic estimate.

    ``too_large``: the least that was tried and surely doesn't fit; what lies between is too close to call.
    ``recorded``: the value's answer is a record's, and no estimate. ``recorded_to``: where records alone answer, the
    largest value that has one.
    """
    from dryfit.planner.largest_fit import steps

    asked, tried = described(asked), dict[int, dict[str, Any]]()
    limit = (
        asked.scenario.size("max_position_embeddings", 131_072)
        if field == "sequence_length"
        else 4096
    )
    values, more = steps(field, limit), {}
    last = values[-1]
    if recorded_alone(asked):
        at = lambda value: asked.scenario.changed(**{field: value})  # noqa: E731
        values = [value for value in values if is_recorded(at(value), asked.gpu.capability)]
        if not values:
            _estimated(asked)  # which says why there is no answer, if this step has none
        values = values or [getattr(asked.scenario, field)]
        more = {"recorded_to": values[-1]}

    def word(value: int) -> str:
        step = replace(asked, scenario=asked.scenario.changed(**{field: value}))
        form = estimate(step.scenario, asked.where, blocks=False).analytic
        exact = if_recorded(step.scenario, asked.gpu.capability)
        needs = (
            form
            and not exact
            and Needs(step.scenario, form["peak_allocated_bytes"], asked.gpu.capability)
        )
        if (
            needs and (rough := needs.word(asked.gpu, replayed=False)) is Word.TOO_CLOSE
        ):  # a replay would take seconds
            return rough.value
        tried[value] = _estimated(step)
        return tried[value]["verdict"]

    sure = bisect_left(values, True, key=lambda value: word(value) != "fits")
    large = bisect_left(values, True, lo=sure, key=lambda value: word(value) == "does_not_fit")
    value = values[sure - 1] if sure else 0
    return {
        "value": value,
        "headroom_bytes": tried[value]["headroom_bytes"] if value else None,
        "verified": False,
        "too_large": values[large] if large < len(values) else None,
        "recorded": bool(value and tried[value]["versions"]),
        **more,
        "limited_by_positions": field == "sequence_length"
        and sure == len(values)
        and values[-1] == last,
    }


def _estimated(asked: Question) -> dict[str, Any]:
    """The estimate of a step.

    UserError: if the step is not described.
    """
    answer = quick(asked, others=False)
    if answer["analytic"] is None:
        how = "the same line without --quick" if can_trace() else INSTALL_TRACE
        raise UserError(
            f"NO ANSWER without the trace: {answer['reasons']['analytic']}.",
            where="--quick",
            allowed="a trace",
            write=how,
        )
    return answer


def _longest_answer(asked: Question) -> dict[str, Any]:
    """The longest answer to a prompt with which a cycle beside vLLM fits, as tokens of a row."""
    from dryfit.planner.cycle import longest_completion

    scenario = asked.scenario
    prompt = scenario.sequence_length - scenario.completion_length
    longest = longest_completion(
        scenario, asked.gpu, scenario.size("max_position_embeddings", 32_768) - prompt
    )
    return {"value": longest or 0, "verified": True}


def _refuse_a_server(asked: Question, known: bool | None, wanted: str) -> None:
    """A question that knows no server beside a training."""
    if asked.scenario.generation.engine == "vllm" and not known:
        raise UserError(
            f"{wanted} knows nothing of the share of a card that vLLM takes.",
            where="the command line",
            found="generation.engine: vllm",
            allowed="`dryfit longest`, or one card with --gpu, whose answer has `largest_utilization` and `knobs`",
            write="--gpu h100-80gb",
        )
