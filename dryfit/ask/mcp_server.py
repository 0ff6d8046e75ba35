"""``dryfit mcp``: three tools of the Model Context Protocol, for assistants that write training code.

* ``dryfit``: whether a step fits a GPU, with the measured steps that are like it;
* ``what_fits``: what to change so that it fits, or which GPUs it fits;
* ``explain_difference``: why one step takes more than another, or more was measured than predicted.

It speaks over standard input and output, needs the package ``mcp``, and computes on this machine alone. Unknown fields
are refused. A refusal is a tool's error, with what is allowed and what to write next.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any

from dryfit.ask import answer
from dryfit.ask.diff import compare_steps
from dryfit.ask.explain_measurement import difference
from dryfit.ask.options import METHODS
from dryfit.ask.question import Question, QuestionOptions, question
from dryfit.ask.text import defaults_used
from dryfit.ask.words import suggested
from dryfit.common.errors import UserError
from dryfit.common.schema import validate
from dryfit.common.text import size_text
from dryfit.common.versions import VERSION
from dryfit.readers.request import LIKE

_MOST = 5  # of what a list of an answer holds
_INSTRUCTIONS = (
    "Ask dryfit before you propose or start a fine-tuning: it traces the training step without a GPU. `model` is"
    " an id on the Hub, a name, or the path of a training file of axolotl, LLaMA-Factory or TRL. If a step does not"
    " fit, ask what_fits. Sizes are bytes on one GPU. `verdict` is fits, too_close or does_not_fit; do not soften it."
)
_STEP: dict[str, Any] = {
    "model": {
        "type": "string",
        "description": "Hub id, name, or a training file",
        "examples": ["Qwen/Qwen3-8B"],
    },
    "gpu": {
        "type": "string",
        "description": "4090, 'A100 80GB', 2x3090, 24GiB",
        "examples": ["rtx-4090"],
    },
    "method": {"enum": list(METHODS), "examples": ["qlora"]},
    "sequence_length": {"type": "integer", "minimum": 1, "examples": [2048]},
    "micro_batch": {"type": "integer", "minimum": 1, "examples": [4]},
    "like": {
        "enum": list(LIKE),
        "description": "take unset fields from this tool's defaults",
        "examples": ["trl"],
    },
    "settings": {
        "type": "object",
        "description": 'any other fields of a scenario: {"lora.rank": 64, "optimizer": "adamw_8bit"}',
        "examples": [{"lora.rank": 64}],
    },
}


def _object(properties: Mapping[str, Any], *required: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": [*required],
        "additionalProperties": False,
    }


_SIZE = {"type": ["integer", "null"]}
_TEXTS = {"type": "array", "items": {"type": "string"}}
_ANSWER = {
    "verdict": {"type": ["string", "null"]},
    "sentence": {"type": "string"},
    "fits": {"type": ["boolean", "null"]},
    "required_bytes": _SIZE,
    "headroom_bytes": _SIZE,
    "peak_allocated_bytes": _SIZE,
    "seconds_per_step": {"type": ["number", "null"]},
    "components": {"type": "object"},
    "assumed": {"type": "string"},
    "evidence": {"type": "string"},
    "warnings": _TEXTS,
    "next": {"type": "string"},
}


def _asked(given: Mapping[str, Any]) -> Question:
    return question([given["model"]], QuestionOptions.of(given))


def _short(answered: Mapping[str, Any]) -> dict[str, Any]:
    trace = answered["trace"]
    parts = sorted(trace["components"].items(), key=lambda item: -item[1])
    return {
        "verdict": answered["verdict"],
        "sentence": answered["sentence"],
        "fits": answered["fits"],
        "required_bytes": trace["required_bytes"],
        "headroom_bytes": answered["headroom_bytes"],
        "peak_allocated_bytes": trace["peak_allocated_bytes"],
        "seconds_per_step": (answered.get("time") or {}).get("seconds_per_step"),
        "components": dict(parts[:_MOST]),
        "assumed": defaults_used(answered) or "",
        "evidence": answered["evidence"]["text"],
        "warnings": list(answered["warnings"])[:_MOST],
        "next": {
            True: "Start it; but ask again with what differs from `assumed`, if anything does.",
            False: "Ask what_fits with the same fields.",
            None: "Name a gpu for a verdict, or ask what_fits without one for the GPUs that it fits."
            if answered["gpu"] is None
            else "It may run out: ask what_fits with the same fields for what fits for sure.",
        }[answered["fits"]],
    }


def fit(given: Mapping[str, Any]) -> dict[str, Any]:
    return _short(answer.traced(_asked(given), suggested=False))


def what_fits(given: Mapping[str, Any]) -> dict[str, Any]:
    asked = _asked(given)
    if asked.gpu is None:
        rows = sorted(answer.on_all_gpus(asked), key=lambda row: row["usable_bytes"])
        cards = [
            {
                "gpu": row["gpu"],
                "headroom_bytes": row["headroom_bytes"],
                "required_bytes": row["required_bytes"],
            }
            for row in rows
            if row["fits"]
        ]
        next_step = (
            "Take the first, or ask again with a gpu."
            if cards
            else "Ask with gpu: 2xh100-80gb, which shards it."
        )
        return {"fits": bool(cards), "gpus": cards[:_MOST], "changes": [], "next": next_step}
    answered = answer.traced(asked)
    words = [given["model"], *QuestionOptions.of(given).words]
    changes = [
        {
            "changes": one["changes"],
            "cost": one["cost"],
            "headroom_bytes": one["headroom_bytes"],
            "command": suggested(words, one["changes"]),
        }
        for one in answered["suggestions"][:_MOST]
    ]
    if answered["fits"]:
        next_step = "It fits as it is: nothing has to change."
    else:
        next_step = (
            "Apply one of the changes, and ask dryfit."
            if changes
            else "No change helps: ask without a gpu."
        )
    return {"fits": answered["fits"], "gpus": [], "changes": changes, "next": next_step}


def explain_difference(given: Mapping[str, Any]) -> dict[str, Any]:
    after, measured = given.get("after"), given.get("measured")
    if (after is None) == (measured is None):
        raise UserError(
            "A difference needs a second step, or what was measured.",
            where="the call",
            allowed="`after` (a step's fields), or `measured`",
            write='measured: "nvidia-smi=14.2GiB"',
        )
    before = _asked(given["before"])
    if measured is not None:
        said = difference(before, answer.traced(before, suggested=False), measured)
        return {
            "text": said,
            "more_bytes": None,
            "settings": [],
            "components": {},
            "fits": None,
            "next": "Try the first cause, and measure again.",
        }
    found = compare_steps(before, _asked(after))
    return {
        "text": found.sentence(),
        "more_bytes": found.more_bytes,
        "settings": [
            {"change": str(one), "adds": None if one.bytes is None else size_text(one.bytes)}
            for one in found.settings
        ],
        "components": dict(list(found.components.items())[:_MOST]),
        "fits": found.after["fits"],
        "next": "Ask what_fits with the second step."
        if found.after["fits"] is False
        else "Nothing has to change.",
    }


Tool = tuple[str, dict[str, Any], dict[str, Any], Callable[[Mapping[str, Any]], dict[str, Any]]]
TOOLS: dict[str, Tool] = {
    "dryfit": (
        "Whether a fine-tuning step fits a GPU: the step itself is traced without one, in 5 to 60 seconds.",
        _object(_STEP, "model"),
        _object(_ANSWER, *_ANSWER),
        fit,
    ),
    "what_fits": (
        "What to change so that the step fits the GPU, the cheapest first; without `gpu` the GPUs that it fits.",
        _object(_STEP, "model"),
        _object(
            {
                "fits": _ANSWER["fits"],
                "gpus": {"type": "array"},
                "changes": {"type": "array"},
                "next": {"type": "string"},
            },
            "fits",
            "gpus",
            "changes",
            "next",
        ),
        what_fits,
    ),
    "explain_difference": (
        "Why one step takes more memory than another, setting by setting; or why more was measured than predicted.",
        _object(
            {
                "before": _object(_STEP, "model"),
                "after": _object(_STEP, "model"),
                "measured": {
                    "type": "string",
                    "description": "nvidia-smi=, allocated=, reserved= or oom= and a size",
                    "examples": ["nvidia-smi=14.2GiB"],
                },
            },
            "before",
        ),
        _object(
            {
                "text": {"type": "string"},
                "more_bytes": _SIZE,
                "settings": {"type": "array"},
                "components": {"type": "object"},
                "fits": _ANSWER["fits"],
                "next": {"type": "string"},
            },
            "text",
            "more_bytes",
            "settings",
            "components",
            "fits",
            "next",
        ),
        explain_difference,
    ),
}


def called(name: str, arguments: Mapping[str, Any] | None) -> tuple[dict[str, Any], bool]:
    """A tool's answer, and whether it is a refusal: ``problem``, ``where``, ``found``, ``allowed``, ``write``."""
    try:
        if name not in TOOLS:
            raise UserError(
                "There is no such tool.", found=name, allowed=", ".join(TOOLS), write="dryfit"
            )
        _, taken, _, answer = TOOLS[name]
        validate(dict(arguments or {}), taken, f"the call of {name}")
        return answer(arguments or {}), False
    except UserError as error:
        parts = error.parts or (error,)
        fields = ("problem", "where", "found", "allowed", "write")
        refusals = [{field: _plain(getattr(part, field)) for field in fields} for part in parts]
        return {
            "refused": refusals,
            "next": "Correct the call as `write` says, and ask again.",
        }, True


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


async def _serve() -> None:
    from mcp import types
    from mcp.server.lowlevel import Server
    from mcp.server.stdio import stdio_server

    one_at_a_time = asyncio.Lock()  # a trace exchanges functions of PyTorch while it runs

    async def listed(context: Any, params: Any) -> types.ListToolsResult:
        tools = [
            types.Tool(name=name, description=about, input_schema=taken, output_schema=given)
            for name, (about, taken, given, _) in TOOLS.items()
        ]
        return types.ListToolsResult(tools=tools)

    async def call(context: Any, params: types.CallToolRequestParams) -> types.CallToolResult:
        async with one_at_a_time:
            answer, refused = await asyncio.to_thread(called, params.name, params.arguments)
        text = json.dumps(answer, sort_keys=True, default=str)
        content = [types.TextContent(type="text", text=text)]
        return types.CallToolResult(
            content=content,
            structured_content=None if refused else json.loads(text),
            is_error=refused,
        )

    server = Server(
        "dryfit",
        version=VERSION,
        instructions=_INSTRUCTIONS,
        on_list_tools=listed,
        on_call_tool=call,
    )
    async with stdio_server() as (reading, writing):
        await server.run(reading, writing, server.create_initialization_options())


def main(_: argparse.Namespace) -> int:
    """The command ``dryfit mcp``."""
    try:
        import mcp  # noqa: F401
    except ModuleNotFoundError:
        raise UserError(
            "The package mcp is not installed.",
            where="dryfit mcp",
            allowed="mcp 2",
            write='pip install "dryfit[mcp]"',
        ) from None
    asyncio.run(_serve())
    return 0
