"""The server over standard input and output, asked by the package's own client: ``make test-mcp``."""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from mcp.client.client import Client
from mcp.client.stdio import StdioServerParameters, stdio_client

from dryfit.ask.mcp_server import TOOLS

ROOT = Path(__file__).resolve().parents[2]
STEP = {"model": "smollm2-135m", "sequence_length": 128}


def session(talk: Callable[[Client], Awaitable[Any]]) -> Any:
    """Start a server, and talk with it."""

    async def connected() -> Any:
        server = StdioServerParameters(
            command=sys.executable, args=["-m", "dryfit.ask", "mcp"], cwd=ROOT
        )
        async with Client(stdio_client(server)) as client:
            return await talk(client)

    return asyncio.run(connected())


def test_a_session_lists_three_tools_answers_each_and_refuses_what_is_wrong() -> None:
    async def talk(client: Client) -> dict[str, Any]:
        ask = client.call_tool
        return {
            "tools": (await client.list_tools()).tools,
            "fits": await ask("dryfit", STEP | {"gpu": "t4"}),
            "unknown": await ask("dryfit", STEP | {"gup": "t4"}),
            "wrong": await ask("dryfit", STEP | {"sequence_length": "long"}),
            "field": await ask("dryfit", STEP | {"settings": {"lora.rnak": 8}}),
            "changes": await ask("what_fits", STEP | {"gpu": "0.5GiB", "method": "full"}),
            "differs": await ask(
                "explain_difference", {"before": STEP, "after": STEP | {"micro_batch": 8}}
            ),
            "half": await ask("explain_difference", {"before": STEP}),
            "again": await ask("dryfit", STEP),
        }

    said = session(talk)
    assert {tool.name for tool in said["tools"]} == set(TOOLS) and len(said["tools"]) == 3
    for tool in said["tools"]:
        assert (
            tool.input_schema["additionalProperties"] is False
            and tool.output_schema
            and tool.description
        )
    answers = {
        name: one.structured_content
        for name, one in said.items()
        if name != "tools" and not one.is_error
    }
    assert set(answers) == {"fits", "changes", "differs", "again"}
    assert answers["fits"]["fits"] is True and answers["fits"]["verdict"] == "fits"
    assert answers["fits"]["sentence"].startswith("FITS: ")
    assert (
        answers["fits"]["evidence"].startswith("No measured step")
        and len(json.dumps(answers["fits"])) < 2500
    )
    assert answers["again"]["fits"] is None and "Name a gpu" in answers["again"]["next"]
    assert answers["changes"]["fits"] is False and answers["changes"]["changes"][0][
        "command"
    ].startswith("dryfit")
    assert answers["differs"]["more_bytes"] > 0 and answers["differs"]["settings"][0][
        "change"
    ].startswith("micro_batch")
    refusals = {
        name: json.loads(said[name].content[0].text)["refused"][0]
        for name in ("unknown", "wrong", "field", "half")
    }
    assert (
        refusals["unknown"]["write"] == "gpu: t4"
        and "did you mean `gpu`" in refusals["unknown"]["problem"]
    )
    assert "sequence_length" in refusals["wrong"]["problem"] and refusals["half"][
        "write"
    ].startswith("measured:")
    assert "rank" in refusals["field"]["allowed"] or "rank" in refusals["field"]["write"]
