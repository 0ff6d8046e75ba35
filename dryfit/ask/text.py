"""An answer as text, for every command that prints one: the verdict first, then how it came about. In GiB."""

from collections.abc import Callable, Mapping, Sequence
from textwrap import wrap
from typing import Any

from dryfit.ask import run_cost
from dryfit.ask.question import Question
from dryfit.ask.words import suggested
from dryfit.cards.gpus import EXPANDABLE_LINE
from dryfit.cards.sentences import card, said, which
from dryfit.common.errors import UserError
from dryfit.common.text import GIB, gib, printable, yaml_text
from dryfit.planner.omissions import bound_bytes
from dryfit.planner.tools import TITLES, tool_lines
from dryfit.scenario.description import goes_without_saying
from dryfit.scenario.fields import BY_NAME
from dryfit.scenario.fields import line as step_line  # what an answer is for
from dryfit.scenario.model import PACKAGE_TITLES

NAMES = {
    "rule_of_thumb": "rule of thumb",
    "analytic": "analytic estimate",
    "trace": "trace of the step",
    "measurement": "measurement",
}
WORDS = {
    "weights_4bit": "weights in 4 bits",
    "weights_8bit": "weights in 8 bits",
    "quantization_state": "their scales",
    "weights_bf16": "weights in bf16",
    "weights_fp16": "weights in fp16",
    "weights_fp32": "weights in fp32",
    "weights_other": "other weights",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer_states": "optimizer states",
    "activations": "activations kept for backward",
    "inputs": "the batch",
    "logits_and_loss": "logits and loss",
    "weight_casts": "16-bit copies of weights",
    "temporaries": "temporaries",
    "workspaces": "cuBLAS workspaces",
    "unsharded_parameters": "layers gathered from other GPUs",
    "collective_buffers": "buffers between GPUs",
    "loading": "loading",
    "allocator_rounding": "rounding of blocks",
    "overhead": "overhead",
}


def head(answer: Mapping[str, Any], like: str = "like: ", file: str | None = None) -> list[str]:
    """The verdict, what other tools' scripts take, what the answer is for, what `like` set, and which defaults it took.

    ``like``: how a tool is named where this is shown; ``file``: what was asked about.
    """
    about = [f"file: {file}"] if file else []
    lines = [
        answer["sentence"],
        *tool_lines(answer, like),
        *about,
        f"for: {step_line(answer['scenario'])}",
    ]
    if answer.get("like"):
        lines.append(
            f"as {TITLES[answer['like']['tool']]} has it: {_fields(answer['like']['fields'])}"
        )
    if defaults := defaults_used(answer):
        lines.append(defaults)
    return lines


def defaults_used(answer: Mapping[str, Any]) -> str | None:
    """The settings that nobody named and that decide, the sizes first; None: all are named."""
    scenario, assumed = answer["scenario"], answer.get("assumed") or {}
    rows = "row" if assumed.get("micro_batch") == 1 else "rows"
    sizes = {"sequence_length": "{:,} tokens a row", "micro_batch": f"{{}} {rows} a micro-batch"}
    parts = [text.format(assumed[name]) for name, text in sizes.items() if assumed.get(name)]
    others = {}
    for name, value in assumed.items():
        field = BY_NAME[name]
        if name in sizes or goes_without_saying(field, value, scenario):
            continue
        if isinstance(value, Mapping):
            quiet = [
                part.name
                for part in field.parts
                if goes_without_saying(part, value[part.name], scenario)
            ]
            value = {key: own for key, own in value.items() if key not in quiet}
        others[name] = value
    parts += [_fields(others)] if others else []
    tool = answer.get("assumed_by")
    return f"defaults {f'of {tool} ' if tool else ''}used: {', '.join(parts)}" if parts else None


def _fields(values: Mapping[str, Any]) -> str:
    def shown(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: item for key, item in value.items() if item is not None}
        return value

    return ", ".join(
        f"{name} {yaml_text(shown(value))}" for name, value in values.items() if value is not None
    )


def answers(answer: Mapping[str, Any]) -> list[str]:
    """The four answers, one a line."""
    lines = []
    for name, title in NAMES.items():
        peak = answer[name]
        if peak is None:
            reason = answer["reasons"].get(name, "not asked for")
            lines.append(
                f"  {title:<20}{reason.replace('the analytic estimate does not describe', 'not available for')}"
            )
            continue
        text = f"  {title:<20}{gib(peak['peak_allocated_bytes']):>10} at the peak"
        replayed = name == "trace" and (answer["gpu"] or {}).get("is_modelled", True)
        if replayed:
            text += f", {gib(peak['peak_reserved_bytes'])} reserved on a GPU with memory to spare"
        lines.append(text)
        if name == "analytic" and (told := certainty_text(peak)):
            lines.append(f"  {'':<20}{told}")
        if replayed:
            lines.append(f"  {'needs':<20}{gib(peak['required_bytes']):>10} free")
            own = answer["scenario"]["allocator"]["expandable_segments"]
            lines += allocators(answer.get("allocators") or {}, own)
    return lines


def allocators(both: Mapping[str, Any], own: bool) -> list[str]:
    """What is needed by the other setting of expandable segments than its ``own``, and how to get it."""
    other = both.get("default" if own else "expandable_segments")
    if not other:
        return []
    how = f"{'without' if own else 'with'} {EXPANDABLE_LINE}"
    return [f"  {'':<20}{gib(other['required_bytes']):>10} {how}{which(other['verdict'])}"]


def certainty_text(analytic: Mapping[str, Any]) -> str:
    """How near the trace the analytic estimate is, as far as that is known."""
    if recorded := analytic.get("recorded_with"):
        return f"equal to the trace with transformers {recorded['transformers']} and torch {recorded['torch']}"
    return bound_text(analytic["bound"]) if "bound" in analytic else ""


def bound_text(bound: Mapping[str, Any]) -> str:
    """Where traced peaks lay beside the estimate's (:func:`dryfit.analytic.certainty.peak_bound`)."""
    return (
        f"{bound['steps']} traced peaks lay from {100 * bound['low']:+.1f} % to {100 * bound['high']:+.1f} % of it"
        f" ({bound['of']})"
    )


def evidence_lines(answer: Mapping[str, Any]) -> list[str]:
    """The measured steps that are like this one, or what they differ in."""
    found = answer.get("evidence")
    return [f"evidence: {found['text']}"] if found else []


def time_lines(answer: Mapping[str, Any]) -> list[str]:
    """How long a step takes."""
    time = answer.get("time")
    if time is None:
        reason = answer["reasons"].get("time")
        return [f"time of a step: {reason}"] if answer["gpu"] and reason else []
    rate = f"{time['tokens_per_second']:,.0f} tokens a second"
    lines = [f"time of a step: {seconds(time)}, {rate}; limited by {time['limited_by']}"]
    if not time["range"]:
        lines.append("  not validated on this GPU: use it to compare settings, not to plan")
    exchanged = time.get("exchanges")
    return [*lines, *exchange_lines(exchanged)] if exchanged else lines


def seconds(time: Mapping[str, Any], unknown: str = "") -> str:
    """A step's seconds with their range; ``unknown``: what stands where nobody knows it."""
    between = " ({:.3g} to {:.3g})".format(*time["range"]) if time["range"] else unknown
    return f"{time['seconds_per_step']:.3g} s{between}"


def other_ways(answer: Mapping[str, Any]) -> list[str]:
    """The other way to use several GPUs."""
    lines = []
    for strategy, other in (answer.get("strategies") or {}).items():
        lines.append(
            f"  {'with ' + strategy.upper():<20}{gib(other['required_bytes']):>10} on each GPU{which(other['verdict'])}"
        )
    return lines


def other_kernels(answer: Mapping[str, Any]) -> list[str]:
    """The same step by other kernels: without packages that can be missed in silence, and with them."""
    lines, own = [], answer["trace"] and answer["trace"]["required_bytes"]
    for other in answer.get("other_kernels") or []:
        names = " and ".join(
            PACKAGE_TITLES.get(name, name) for name in other["packages"] or other["without"]
        )
        how = f"{'with' if other['packages'] else 'without'} {names}"
        size = f"{'at least ' if other['lower_bound'] else ''}{gib(other['required_bytes'])}"
        lines.append(
            f"  {how}: {size} ({(other['required_bytes'] - own) / GIB:+.2f} GiB){which(other['verdict'])}"
        )
    return lines


def suggestions(answer: Mapping[str, Any], shown: Callable[[Mapping[str, Any]], str]) -> list[str]:
    """What would fit; ``shown`` makes the line to type."""
    failed = answer.get("searches_failed")
    left_out = (
        [f"left out, since its search failed: {', '.join(failed).replace('_', ' ')}"]
        if failed
        else []
    )
    if not answer["suggestions"]:
        return left_out
    lines = ["what would fit, the cheapest first:"]
    for item in answer["suggestions"]:
        lines.append(
            f"  {shown(item)}\n      {item['cost']}; {gib(item['headroom_bytes'])} to spare"
        )
    return lines + left_out


def field_lines() -> list[str]:
    """The fields that ``--set`` sets: their values, or one, and what they are."""
    lines = []
    for field in BY_NAME.values():
        for part in field.parts or (field,):
            name = field.name if part is field else f"{field.name}.{part.name}"
            values = ", ".join(map(yaml_text, part.words)) or f"such as {yaml_text(part.example)}"
            lines += [
                f"{name}: {values}",
                *wrap(part.about, 116, initial_indent="    ", subsequent_indent="    "),
            ]
    return lines


def explanation(answer: Mapping[str, Any]) -> list[str]:
    """What is alive at the peak, in words."""
    shown = answer["trace"] or answer["analytic"]
    lines = [f"alive at the peak, in the {shown.get('peak_phase') or shown.get('phase')} phase:"]
    total = shown["peak_allocated_bytes"]
    for part, size in sorted(shown["components"].items(), key=lambda item: -item[1]):
        if size >= 2**20:
            lines.append(
                f"  {WORDS.get(part, part):<34}{gib(size):>11}{100 * size / total:>6.0f} %"
            )
    return lines


def table(name: str, answer: dict[str, Any]) -> str:
    """The answer to a scenario's file as text for a terminal."""
    lines = [
        *head(answer, file=name),
        *_how_it_came_about(answer),
        *other_kernels(answer),
        *other_ways(answer),
    ]
    lines += [*explanation(answer), *suggestions(answer, lambda item: item["write"])]
    return printable("\n".join(lines))


def _how_it_came_about(answer: Mapping[str, Any], readings: Sequence[str] = ()) -> list[str]:
    """What stands behind the verdict; ``readings``: lines on the files that it was read from."""
    traced = answer["trace"] or {}
    saved, host = traced.get("checkpoint"), traced.get("host")
    return [
        *answers(answer),
        *(cycle_lines(answer) if answer.get("phases_of_cycle") else ()),
        *evidence_lines(answer),
        *time_lines(answer),
        *(checkpoint_lines(saved) if saved else ()),
        *(host_lines(host) if host else ()),
        *readings,
        *(f"  note: {note}" for note in traced.get("notes", ())),
        *warning_lines(answer),
    ]


def warning_lines(answer: Mapping[str, Any]) -> list[str]:
    return [f"  warning: {warning}" for warning in answer.get("warnings") or ()]


# --- a reinforcement step's cycle -------------------------------------------------------------------------------------


def cycle_lines(answer: Mapping[str, Any]) -> list[str]:
    """The phases, what the server's cache holds, and what to turn."""
    cycle = answer["phases_of_cycle"]
    lines = ["the cycle, in GiB:"]
    for phase in cycle["phases"]:
        place = "" if phase["card"] == "trainer" else " (a server's card)"
        parts = (
            f"{name.removesuffix('_bytes').replace('_', ' ')} {_between(size)}"
            for name, size in phase["owners"].items()
            if size[1] >= GIB / 100
        )
        lines.append(
            f"  {phase['phase'] + place:<30}{_between([phase['least_bytes'], phase['most_bytes']]):>13}"
            f"   {', '.join(parts)}"
        )
    lines += _time_lines(cycle["time"]) if cycle["time"] else []
    server = cycle.get("server")
    if not server:
        return lines
    low, high = server["rows_at_once"]
    at_once = f"{low}" if low == high else f"{low} to {high}"
    lines.append(
        f"the server: {gib(server['budget_bytes'])} of the card, {at_once} rows of {server['row_tokens']:,} tokens at"
        f" once (the cache holds {cycle['most_answers_at_once']}); rows of {cycle['longest_row_tokens']:,} tokens would"
        " still run all at once"
    )
    if cycle["largest_utilization"] is not None:
        lines.append(
            f"the largest utilization with which the cycle fits for sure: {cycle['largest_utilization']:g}"
        )
    for knob in cycle["knobs"]:
        parts = ", ".join(
            f"{name}: {yaml_text(value)}" for name, value in knob["changes"]["generation"].items()
        )
        word = "fits" if knob["fits"] else "does not fit for sure"
        slower = knob["more_seconds"]
        time = "" if slower is None or abs(slower) < 0.005 else f"; {slower:+.3g} s a cycle"
        lines.append(
            f"  saves {gib(knob['saves_bytes'])}: generation {{{parts}}}; {word}\n      {knob['cost']}{time}"
        )
    return lines


def _time_lines(time: Mapping[str, Any]) -> list[str]:
    """Seconds of a cycle by phase, and how fast answers come."""
    parts = ", ".join(
        f"{phase} {seconds:.3g}" for phase, seconds in time["seconds_by_phase"].items()
    )
    updates = f"{time['updates_per_cycle']:g} update{'s' * (time['updates_per_cycle'] != 1)}"
    lines = [f"a cycle of {updates} takes {time['seconds_per_cycle']:.3g} s: {parts}"]
    rate = time["answer_tokens_per_second_of_generation"]
    if rate:
        waves = f", in {time['waves']} waves" if (time["waves"] or 1) > 1 else ""
        lines.append(
            f"  while it generates {rate:,.0f} tokens a second{waves}; each answer counts as the longest"
        )
    return [*lines, f"  not counted: {time['not_counted']}"]


def _between(size: list[int]) -> str:
    low, high = (f"{each / GIB:.2f}" for each in size)
    return low if low == high else f"{low} to {high}"


# --- several GPUs: what they exchange, how they save and load ---------------------------------------------------------


def exchange_lines(exchanges: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a GPU exchanges in a step, a line for each group that talks."""
    lines = []
    for row in exchanges:
        where = (
            "in a node"
            if row["on_node"] == row["gpus"]
            else f"{row['on_node']} in a node, over the network"
        )
        lines.append(
            f"  {row['axis']}, {row['gpus']} GPUs, {where}: {row['sent_bytes'] / 1e9:,.2f} GB sent by each in"
            f" {row['collectives']:,} collectives, {row['seconds']:.3g} s"
        )
    return ["exchanged in a step:", *lines] if lines else []


def host_lines(host: Mapping[str, Any]) -> list[str]:
    """What the processes of a host take of its memory."""
    count, process = host["processes"], host["process_bytes"]
    each = [
        f"{gib(process + host['loading_bytes'])} each while they load",
        f"{gib(process + host['step_bytes'])} then",
    ]
    return [
        f"host memory: {count} processes on a host, {', '.join(each)}; with the job that starts them"
        f" {gib(host['peak_bytes'])} at most, while {_WHILE[host['peak_phase']]}"
    ]


_WHILE = {"loading": "they load", "step": "they train", "saving": "rank 0 saves a full state dict"}


def _copies(size: int) -> str:
    if not size:
        return "no copy per process"
    return f"{gib(size)} of each process, or of rank 0 alone with cpu_ram_efficient_loading"


def checkpoint_lines(found: Mapping[str, Any]) -> list[str]:
    """What saving a full state dict and loading take."""
    return [
        f"saving a full state dict: {gib(found['saved_bytes'])} on rank 0's host, {gib(found['saving_gpu_bytes'])} more"
        f" on each GPU; without cpu_offload {gib(found['saving_on_gpu_bytes'])} more on each GPU",
        f"host memory while loading: {_copies(found['loading_host_bytes'])}; {gib(found['file_pages_bytes'])} of"
        " evictable page cache on each host",
    ]


# --- the answer to a question ---------------------------------------------------------------------------


def reading_lines(asked: Question, answer: Mapping[str, Any]) -> list[str]:
    """The settings that another tool's file has, and those of them that are not described."""
    lines = []
    for reading in asked.readings:
        if reading.tool != "Hub":
            count = len(reading.understood)
            lines.append(
                f"read as {reading.tool} {reading.version}: {reading.file} ({count} settings)"
            )
        for remark in reading.remarks:
            size = bound_bytes(remark.bound, asked.scenario, answer)
            most = f" by up to {gib(size)}" if size else ""
            lines.append(f"  not described: {remark}{most}")
        for key, near in reading.unknown.items():
            lines.append(
                f"  unknown: {key}"
                + (f" (is {near} meant?)" if near else "")
                + ", which is left out"
            )
        lines += [f"  note: {note}" for note in reading.notes]
    return lines


def first_text(asked: Question, answer: Mapping[str, Any]) -> str:
    """The verdict, and how it came about: all that stands as soon as the step is traced."""
    return printable(
        "\n".join(
            [*head(answer, "--like "), *_how_it_came_about(answer, reading_lines(asked, answer))]
        )
    )


def rest_text(asked: Question, answer: Mapping[str, Any], command: Sequence[str]) -> str:
    """What takes traces of its own: the other way to use several GPUs, the run, and what would fit; "" for nothing."""
    lines = [*other_kernels(answer), *other_ways(answer)]
    if asked.run:
        lines += run_cost.run_lines(answer.get("run"), asked.run)
        lines += run_cost.sooner_lines(
            answer.get("sooner") or [], lambda item: suggested(command, item["changes"])
        )
    lines += suggestions(answer, lambda item: suggested(command, item["changes"]))
    return printable("\n".join(lines))


def cards_text(
    asked: Question, rows: Sequence[Mapping[str, Any]], is_estimated: bool | None
) -> str:
    """Which GPUs the step fits, a line each; with a run its hours and cost too."""
    fitting = sum(row["fits"] is True for row in rows)
    known = [row for row in rows if row["required_bytes"] is not None]
    by = (
        " by the analytic estimate"
        if is_estimated and not all(row["recorded"] for row in known)
        else ""
    )
    lines = [f"FITS {fitting} of {len(rows)} GPUs{by}: {step_line(asked.scenario.to_mapping())}"]
    for row in rows:
        if row["required_bytes"] is None:
            lines.append(
                f"  {row['gpu']:<20}{'no record':>12} of {gib(row['usable_bytes']):>11}   ask without --quick"
            )
            continue
        spare = f"{row['headroom_bytes'] / GIB:+.2f} GiB{run_cost.cells(row['run']) if 'run' in row else ''}"
        lines.append(f"{card_line(row, 21)}{spare}")
    return "\n".join([*lines, *(run_cost.ranked(rows) if asked.run else ())])


def card_line(row: Mapping[str, Any], width: int = 0) -> str:
    """A GPU with what is needed and what it has."""
    sizes = f"{gib(row['required_bytes']):>12} of {gib(row['usable_bytes']):>11}"
    return f"  {row['gpu']:<20}{sizes}   {said(row['verdict']):<{width}}"


def largest_text(asked: Question, field: str, largest: Mapping[str, Any]) -> str:
    """The longest rows, or the most, that fit; by an estimate also from where on nothing does."""
    on, value = card(asked.gpu.to_mapping()), largest["value"]
    if "headroom_bytes" not in largest:  # of a cycle beside a server, by its phases
        found = f"answers of {value:,} tokens fit" if value else "NOTHING FITS"
        return f"{found} {on}, in steps of 256\nfor: {step_line(asked.scenario.to_mapping())}"
    what = "tokens" if field == "sequence_length" else "rows"
    step = step_line(asked.scenario.changed(**{field: max(value, 1)}).to_mapping())
    end = "; the model's positions end it" if largest["limited_by_positions"] else ""
    spare = f", {gib(largest['headroom_bytes'])} to spare{end}" if value else ""
    if "too_large" in largest:
        by = "by a record of its trace" if largest["recorded"] else "by the analytic estimate"
        too_large = largest["too_large"]
        lines = [
            f"{value:,} {what} fit {on} {by}{spare}"
            if value
            else f"NOTHING FITS {on} for sure {by}"
        ]
        lines += (
            [f"{too_large:,} {what} don't fit; ask without --quick for what lies between"]
            if too_large
            else []
        )
        if value and value == largest.get("recorded_to") and not largest["limited_by_positions"]:
            lines.append(f"more {what} have no record; ask without --quick for them")
        return "\n".join([*lines, f"for: {step}"])
    if not value:
        return f"NOTHING FITS {on}, not even the smallest: {step}"
    grown = asked.scenario.allocator.expandable_segments
    other = f"{largest['with_other_allocator']:,} {what} {'without' if grown else 'with'} {EXPANDABLE_LINE}"
    more = (
        f"everything below fits as well; more {what} may fit by chance, depending on fragmentation"
    )
    return "\n".join(
        [
            f"{value:,} {what} fit {on}{spare}",
            other,
            f"for: {step}",
            *([] if grown or end else [more]),
        ]
    )


def full_text(asked: Question, answer: Mapping[str, Any], command: Sequence[str]) -> str:
    """The whole answer."""
    return "\n".join(filter(None, (first_text(asked, answer), rest_text(asked, answer, command))))


def scenario_yaml(mapping: dict[str, Any], asked: str) -> str:
    """The scenario as a file; fields as the defaults have them are left out, the model stands by its name if it can."""
    import yaml

    from dryfit.scenario.fields import scenario_defaults
    from dryfit.scenario.model import read_model

    defaults = scenario_defaults()
    kept = {
        name: value
        for name, value in mapping.items()
        if value is not None and value != defaults.get(name)
    }
    kept = {"model": kept.pop("model"), **kept}
    try:
        if asked and read_model(asked, "the scenario")[0] == mapping["model"]:
            kept["model"] = asked
            kept.pop("model_name", None)
    except UserError:
        pass
    return yaml.safe_dump(kept, sort_keys=False, default_flow_style=None, width=100).rstrip()
