"""``divide`` and its ``--fewest``: among how many GPUs, and divided how."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dryfit.ask.options import json_line
from dryfit.ask.question import Question
from dryfit.ask.text import exchange_lines, step_line
from dryfit.cards.sentences import card, said, title
from dryfit.common.errors import UserError
from dryfit.common.terminal import now_doing, working
from dryfit.common.text import gib, yaml_text
from dryfit.planner import divisions


def print_divisions(asked: Question, watch: Callable[..., None], as_json: bool) -> int:
    """The asked way to divide a step, then the best ones in a table; exit status 0 where any fits."""
    gpu = asked.gpu
    if asked.scenario.parallel.gpus < 2:
        raise UserError(
            "`dryfit divide` is for several GPUs, and one was asked for.",
            where="the command line",
            allowed="--gpu with a count, or --fewest",
            change={"gpu": f"8x{gpu.name}"},
        )

    def shown(one: divisions.Division) -> None:
        now_doing("")
        print(
            f"{title(one.verdict)} as asked, {one.way}: {gib(one.required_bytes)} of {gib(gpu.usable_bytes)}"
        )
        print(f"for: {step_line(asked.scenario.to_mapping())}", flush=True)

    with working("tracing the step as asked"):
        found = divisions.divide(asked.scenario, gpu, watch, None if as_json else shown)
    fits = any(row["fits"] for row in found["divisions"])
    if as_json:
        print(json_line(found | {"gpu": gpu.to_mapping()}, asked.read_as))
        return 0 if fits else 1
    print(
        f"traced {len(found['divisions'])} of {found['considered']} ways on {found['gpus']} GPUs, the best first:"
    )
    for row in found["divisions"]:
        print(_line(row))
    if fits:
        best = found["divisions"][0]
        print(f"write: {_write(best, asked)}")
        print(*exchange_lines(best["exchanges"]), sep="\n")
    print(*_left_out(found), sep="\n")
    return 0 if fits else 1


def print_fewest(asked: Question, watch: Callable[..., None], as_json: bool) -> int:
    """The least number of GPUs that hold a step; exit status 0 where there is one."""
    gpu = asked.gpu
    with working("looking for the fewest GPUs"):
        found = divisions.fewest(asked.scenario, gpu, watch)
    if as_json:
        print(json_line(found | {"gpu": gpu.to_mapping()}, asked.read_as))
        return 0 if found["gpus"] else 1
    if not found["gpus"]:
        word = "NO WAY WAS FOUND that fits" if found["not_traced"] else "NOTHING FITS"
        print(f"{word} {card(gpu.to_mapping())}: up to {found['counts'][-1]} of them were tried")
        print(*_left_out(found), sep="\n")
        return 1
    one, of = found["division"], f"{gpu.title}{'s' * (found['gpus'] > 1)}"
    print(
        f"{found['gpus']} {of} hold the step, {one['way']}: {gib(one['headroom_bytes'])} to spare on each"
    )
    print(_line(one))
    for row in found["tried"]:
        print(_line(row))
    print(f"write: {_write(one, asked)}")
    print(*_left_out(found), sep="\n")
    return 0


def _left_out(found: Mapping[str, Any]) -> Iterator[str]:
    if found.get("ruled_out"):
        rows = ", ".join(
            f"{row['way']} (at least {gib(row['at_least_bytes'])})" for row in found["ruled_out"]
        )
        yield f"can't fit, since weights, gradients and states alone are too much: {rows}"
    if found["not_traced"]:
        rows = ", ".join(
            f"{row['way']} (roughly {gib(row['rough_bytes'])})" for row in found["not_traced"]
        )
        yield f"not traced, since a rough estimate puts them behind the others: {rows}"
    if found.get("not_sharded"):
        yield f"FSDP2 was not tried: {found['not_sharded']}"
    if found.get("refused"):
        yield f"the installed libraries can't run: {', '.join(found['refused'])}"


def _line(row: Mapping[str, Any]) -> str:
    word = said(row["verdict"])
    speed = (
        f"{row['tokens_per_second']:>10,.0f} tokens/s" if row["tokens_per_second"] else f"{'':>19}"
    )
    place = f"   {row['place']} needs most" if row["place"] else ""
    needs = f"{row['parallel']['gpus']:>4} GPUs {gib(row['required_bytes']):>12}"
    return f"  {row['way']:<38}{needs}  {word:<20}{speed}{place}"


def _write(row: Mapping[str, Any], asked: Question) -> str:
    more = (
        f", gradient_accumulation: {row['gradient_accumulation']}"
        if row["gradient_accumulation"] > 1
        else ""
    )
    more += f", loss: {row['loss']}" if row["loss"] != asked.scenario.loss else ""
    return f"parallel: {yaml_text(divisions.written(row))}{more}"
