"""A model's id on the Hub is as good as a name: the catalogue answers first, then the Hub, and each failure says why.

The Hub is a server on loopback that speaks its protocol; each question is a process of its own, since the library
reads its settings when it is imported.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dryfit.scenario.hub import (
    INDEX,
    MODELS,
    HubId,
    catalogued,
    named_repository,
    nearest,
    profiled,
)
from tests.dryfit.scenario.models_server import COMMIT, ModelsServer

ROOT = Path(__file__).resolve().parents[3]
CONFIG = json.loads((MODELS / "qwen3-0.6b.json").read_text(encoding="utf-8"))
ASK = """
import json, sys
from dryfit.common.errors import UserError
from dryfit.scenario.model import read_model
try:
    model, name = read_model(sys.argv[1], "scenario.yaml")
    print(json.dumps({"hidden_size": model["hidden_size"], "name": name}))
except UserError as error:
    print(error)
"""


OTHER_KIND = """
import sys
from dryfit.common.errors import UserError
from dryfit.recipes.models import find
try:
    find(sys.argv[1])
except UserError as error:
    print(error)
"""


def ask(model: str, endpoint: str, cache: Path, program: str = ASK, **environment: str) -> str:
    """What reading a model by its id prints."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
        **environment,
    }
    done = subprocess.run(
        [sys.executable, "-c", program, model],
        cwd=ROOT,
        env={**kept, **settings},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("hub", "name"),
    [
        ("Qwen/Qwen3-8B", "qwen3-8b"),
        ("qwen/qwen3-8b", "qwen3-8b"),
        ("unsloth/Llama-3.2-1B-Instruct-bnb-4bit", "llama-3.2-1b"),
        ("unsloth/Meta-Llama-3.1-8B-Instruct-unsloth-bnb-4bit", "llama-3.1-8b"),
        ("NousResearch/Llama-2-7b-hf", "llama-2-7b"),
        ("somebody/Qwen3-8B", None),
        ("Qwen/Qwen3-9B", None),
    ],
)
def test_the_catalogue_knows_ids_and_copies(hub: str, name: str | None) -> None:
    assert catalogued(HubId.read(hub)) == name


@pytest.mark.parametrize(
    ("model", "folder", "asked"),
    [
        ("qwen3-8b", "qwen3-8b", False),
        ("Qwen/Qwen3-8B", "qwen3-8b", False),
        ("gemma-3-12b-it", "gemma-3-12b", False),
        ("Qwen/Qwen3-8B@v2", "qwen--qwen3-8b-v2", True),
        ("Owner/A_b.c", "owner--a_b.c", True),
        ("gemma-4-e4b", "gemma-4-e4b", True),
        ("no-such-name", "no-such-name", False),
    ],
)
def test_a_profiled_model_has_a_folder_and_the_hub_is_asked_where_it_has_to_be(
    model, folder, asked
) -> None:
    name, hub = profiled(model)
    assert (name, hub is not None) == (folder, asked) and re.fullmatch(r"[A-Za-z0-9][\w.-]*", name)


@pytest.mark.parametrize(
    "text", ["model", "./config.json", "a/b/c", "a/b c", "/home/x", "../x", ""]
)
def test_what_is_no_id_is_not_taken_for_one(text: str) -> None:
    assert HubId.read(text) is None


def test_ids_and_what_the_index_leads_to() -> None:
    assert HubId.read("owner/name@refs/pr/1") == HubId("owner/name", "refs/pr/1")
    index = yaml.safe_load(INDEX.read_text(encoding="utf-8"))
    assert sum("licence" in entry for entry in index["models"].values()) >= 40
    assert len(index["fetched"]) >= 20 and not set(index["fetched"]) & set(index["models"])
    known = {hub.lower() for entry in index["models"].values() for hub in entry["hub"]}
    for name, entry in index["fetched"].items():
        assert (
            named_repository(name) == HubId(entry["hub"], None)
            and entry["hub"].lower() not in known
        )
    assert named_repository("Gemma-4-E4B") == HubId("google/gemma-4-E4B-it", None)
    assert named_repository("qwen2.5-Coder-7B-instruct") == HubId(
        "Qwen/Qwen2.5-Coder-7B-Instruct", None
    )
    assert named_repository("no-such-name") is None


def test_each_configuration_has_ids_and_two_sources() -> None:
    index = yaml.safe_load(INDEX.read_text(encoding="utf-8"))
    assert set(index["models"]) == {path.stem for path in MODELS.glob("*.json")}
    assert len(index["models"]) >= 50
    for name, entry in index["models"].items():
        whole = (
            set(entry["sources"]) & set(index["keeps_the_file"])
            and entry["billions"]
            and entry["licence"]
        )
        assert entry["hub"] and (whole or len(set(entry["sources"])) >= 2), name
        assert set(entry["sources"]) <= set(index["sources"]), name
    ids = [hub.lower() for entry in index["models"].values() for hub in entry["hub"]]
    assert len(ids) == len(set(ids))


@pytest.mark.thorough
def test_a_name_without_a_configuration_is_asked_of_the_hub(tmp_path: Path) -> None:
    with ModelsServer({"google/gemma-4-E4B-it": CONFIG}) as server:
        assert json.loads(ask("gemma-4-e4b", server.endpoint, tmp_path)) == {
            "hidden_size": 1024,
            "name": "gemma-4-E4B-it",
        }
    assert "google/gemma-4-E4B-it" in ask("gemma-4-e4b", "http://127.0.0.1:9", tmp_path / "other")


@pytest.mark.parametrize(
    ("typed", "first"),
    [
        ("qwen3-9b", "qwen3.5-9b"),
        ("Qwen/Qwen3-9B", "Qwen/Qwen3.5-9B"),
        ("Lama-3.1-8B", "llama-3.1-8b"),
    ],
)
def test_a_slip_finds_the_nearest(typed: str, first: str) -> None:
    assert nearest(typed)[0] == first


@pytest.mark.thorough
def test_the_configuration_alone_is_fetched_and_kept(tmp_path: Path) -> None:
    with ModelsServer({"owner/tiny": CONFIG}) as server:
        assert json.loads(ask("owner/tiny", server.endpoint, tmp_path)) == {
            "hidden_size": 1024,
            "name": "tiny",
        }
        # `/api/` is where the library asks for lists of its own.
        paths = {path for _, path, _ in server.requests if not path.startswith("/api/")}
        assert paths == {"/owner/tiny/resolve/main/config.json"}
        assert {authorization for _, _, authorization in server.requests} == {None}
        endpoint = server.endpoint
    offline = ask("owner/tiny", endpoint, tmp_path, HF_HUB_OFFLINE="1")
    gone = ask("owner/tiny", endpoint, tmp_path)
    assert json.loads(offline) == json.loads(gone) == {"hidden_size": 1024, "name": "tiny"}


@pytest.mark.thorough
def test_revision_token_and_a_new_name_are_the_librarys(tmp_path: Path) -> None:
    with ModelsServer({"owner/tiny": CONFIG, "owner/old": "-> owner/tiny"}) as server:
        assert "1024" in ask("owner/tiny@v2", server.endpoint, tmp_path, HF_TOKEN="hf_secret_token")
        assert "1024" in ask(f"owner/tiny@{COMMIT}", server.endpoint, tmp_path)
        assert "1024" in ask("owner/old", server.endpoint, tmp_path)
        assert "Bearer hf_secret_token" in {
            authorization for _, _, authorization in server.requests
        }
        assert "/owner/tiny/resolve/v2/config.json" in {path for _, path, _ in server.requests}


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("held", "model", "said"),
    [
        ("gated", "owner/tiny", ["gated", "HF_TOKEN", "https://huggingface.co/owner/tiny"]),
        ({}, "owner/other", ["no such model", "private", "HF_TOKEN"]),
        (
            {},
            "Qwen/Qwen3-9B",
            ["no such model", "nearest: Qwen/Qwen3.5-9B", "write:   model: Qwen/Qwen3.5-9B"],
        ),
        (CONFIG, "owner/tiny@nosuch", ["no such revision", "owner/tiny@nosuch"]),
        ("empty", "owner/tiny", ["no config.json", "GGUF"]),
        ("limited", "owner/tiny", ["too often (429)", "HF_TOKEN"]),
        ("broken", "owner/tiny", ["(500)", "another try"]),
    ],
)
def test_what_goes_wrong_says_what_to_do(
    held: dict | str, model: str, said: list[str], tmp_path: Path
) -> None:
    with ModelsServer({"owner/tiny": held}) as server:
        text = ask(
            model,
            server.endpoint,
            tmp_path,
            HF_TOKEN="hf_secret_token" if model == "owner/other" else "",
        )
    assert "Traceback" not in text and "hf_secret_token" not in text
    for part in [*said, "where:   scenario.yaml"]:
        assert part in text


@pytest.mark.thorough
def test_no_network_and_offline_mode_are_told_apart(tmp_path: Path) -> None:
    nobody = "http://127.0.0.1:9"
    text = ask("owner/tiny", nobody, tmp_path)
    assert "can't be reached" in text and "HF_ENDPOINT" in text
    text = ask("owner/tiny", nobody, tmp_path, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE=0" in text and "not in the cache" in text


def test_a_hub_that_is_not_there_is_asked_once_for_each_file_of_a_model_of_another_kind(
    tmp_path: Path,
) -> None:
    """huggingface_hub's own download repeats for half a minute, and prints each try."""
    text = ask("hunyuanvideo-community/HunyuanVideo-9", "http://127.0.0.1:9", tmp_path, OTHER_KIND)
    assert "its configuration is not at hand" in text and "Retrying" not in text
