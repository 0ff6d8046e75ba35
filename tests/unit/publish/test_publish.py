"""Publishing on the Hub: what is listed, what is refused, what is uploaded, and that no token is written anywhere."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dryfit.common.errors import UserError
from dryfit.common.files import read_json, read_report, write_json, write_jsonl, write_report
from scripts.publish import prepare
from scripts.tasks.support import registry
from tests.unit.documents import inputs
from tests.unit.publish.hub_server import HubServer

ROOT = Path(__file__).resolve().parents[3]
TOKEN = "hf_plantedTokenThatMustNotBeSeen"
PUBLISH = {
    "adapter": "owner/adapter",
    "dataset": "owner/pairs",
    "merged": "owner/merged",
    "private": True,
    "thresholds": {"better": ["loss"], "least_exact": 0.1, "most_danger": 0.05},
}
ABOUT = {
    "dataset": "embedded",
    "model": {"license": "apache-2.0", "title": "SmolLM2-135M-Instruct"},
    "run": "small-r16",
    "task": registry.checked("shell"),
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A finished run, its weights some bytes; the inputs of the rule that lists it."""
    monkeypatch.chdir(tmp_path)
    content, place = inputs.files(), Path("results/small-r16")
    for folder in ("adapter", "merged", "docs", "figures", "data"):
        (place / folder).mkdir(parents=True)
    named: dict[str, Any] = {"card": str(place / "MODEL_CARD.md")}
    Path(named["card"]).write_text(
        "---\nlicense: apache-2.0\n---\n\n# The card\n", encoding="utf-8"
    )
    (place / "docs" / "memory-profile.md").write_text("# Memory\n", encoding="utf-8")
    (place / "figures" / "memory.png").write_bytes(b"\x89PNG")
    for name in ("acquire", "comparison", "description", "verification"):
        named[name] = str(place / f"{name}.json")
        write_report(named[name], content[name])
    named |= {"adapter": str(place / "adapter/adapter_model.safetensors")}
    named |= {
        "settings": str(place / "adapter/adapter_config.json"),
        "training": str(place / "training.json"),
    }
    Path(named["adapter"]).write_bytes(bytes(range(256)) * 50)
    write_json(named["settings"], {"r": 16})
    write_report(named["training"], content["training"], named["adapter"], named["settings"])
    weights = place / "merged" / "model.safetensors"
    weights.write_bytes(bytes(range(256)) * 600)  # 153,600 bytes: four parts
    (place / "merged" / "config.json").write_text("{}\n", encoding="utf-8")
    named["merged"] = str(place / "merged")
    write_report(
        place / "merged" / "manifest.json",
        {"weights": [weights.name]},
        weights,
        weights.with_name("config.json"),
    )
    named["splits"] = [str(place / "data" / f"{name}.jsonl") for name in prepare.SPLITS]
    for path in named["splits"]:
        write_jsonl(path, [{"command": "ls", "request": f"list {path}"}] * 30)
    named["split"] = str(place / "data" / "split.json")
    write_report(named["split"], content["split"], *named["splits"])
    return named


def listed(run: dict[str, Any], **changes: Any) -> dict[str, Any]:
    plan = Path(run["card"]).parent / "publish" / "plan.json"
    prepare.main(run, str(plan), {**PUBLISH, **changes}, ABOUT, ROOT / "config" / "templates")
    return read_report(plan)["repositories"]


def uploaded(server: HubServer, token: str | None = TOKEN) -> subprocess.CompletedProcess:
    """The upload in a process of its own, as a rule's script runs, at full verbosity."""
    code = (
        "from dryfit.common.errors import UserError\nfrom scripts.publish import upload\nimport sys, logging\n"
        "logging.basicConfig(level=logging.DEBUG)\n"
        "try:\n    upload.main('results/small-r16/publish/plan.json', 'results/small-r16/publish/published.json')\n"
        "except UserError as error:\n    sys.exit(str(error))\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": server.endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(ROOT),
    }
    environment |= {"HF_HOME": str(Path("hf").resolve()), "HF_DEBUG": "1"} | (
        {"HF_TOKEN": token} if token else {}
    )
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600
    )


def assert_no_token(done: subprocess.CompletedProcess) -> None:
    assert TOKEN not in done.stdout + done.stderr
    for path in Path(".").rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def test_the_dry_run_lists_every_file_with_its_size_and_each_repository_has_its_card(
    run: dict[str, Any],
) -> None:
    plan = listed(run)
    assert {kind: planned["repository"] for kind, planned in plan.items()} == {
        kind: PUBLISH[kind] for kind in ("adapter", "merged", "dataset")
    }
    paths = {kind: {file["path"] for file in planned["files"]} for kind, planned in plan.items()}
    assert paths["adapter"] == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert {
        "README.md",
        "model.safetensors",
        "config.json",
        "manifest.json",
        "figures/memory.png",
    } < paths["merged"]
    assert paths["dataset"] == {"README.md", *(f"data/{name}.jsonl" for name in prepare.SPLITS)}
    for planned in plan.values():
        assert all(
            file["bytes"] == Path(file["file"]).stat().st_size > 0 for file in planned["files"]
        )
    cards = Path("results/small-r16/publish/cards")
    metadata, body = inputs.split_card(
        (cards / "adapter" / "README.md").read_text(encoding="utf-8")
    )
    assert (
        metadata["library_name"] == "peft"
        and metadata["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    )
    assert "had 92 right (the base 4)" in body and "owner/merged" in body
    metadata, body = inputs.split_card(
        (cards / "dataset" / "README.md").read_text(encoding="utf-8")
    )
    assert (
        metadata["license"] == ["apache-2.0"]
        and metadata["configs"][0]["data_files"][0]["split"] == "train"
    )
    assert "4,122 pairs in 1,717 groups" in body


def test_an_adapter_of_a_model_on_the_hub_says_so(run: dict[str, Any]) -> None:
    description = read_json(run["description"])
    description["source"]["hub_id"] = "owner/base"
    write_report(run["description"], description)
    listed(run, dataset=None)
    text = Path("results/small-r16/publish/cards/adapter/README.md").read_text(encoding="utf-8")
    metadata, body = inputs.split_card(text)
    assert metadata["base_model"] == "owner/base" and metadata["base_model_relation"] == "adapter"
    assert (
        'from_pretrained("owner/base")' in body and 'from_pretrained(base, "owner/adapter")' in body
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda report: report["loss"].update(verdict="worse"), "loss is not better"),
        (
            lambda report: report["tuned"]["exact"].update(share=0.05),
            "0.050 of the answers are exact, asked for are 0.1",
        ),
        (
            lambda report: report["tuned"]["danger"].update(share=0.5),
            "0.500 of the answers are dangerous",
        ),
    ],
)
def test_thresholds_that_do_not_hold_stop_it(run: dict[str, Any], change: Any, words: str) -> None:
    report = read_json(run["comparison"])
    change(report)
    write_report(run["comparison"], report)
    with pytest.raises(UserError, match=words):
        listed(run)
    assert not Path("results/small-r16/publish/plan.json").exists()


def test_what_was_not_verified_or_has_no_licence_or_no_repository_is_refused(
    run: dict[str, Any],
) -> None:
    with pytest.raises(UserError, match="names no repository"):
        listed(run, adapter=None, merged=None, dataset=None)
    acquired = read_json(run["acquire"])
    acquired["sources"][0]["license"] = "unknown"
    write_report(run["acquire"], acquired)
    with pytest.raises(UserError, match=r"(?s)licence of some of it is unknown.*dataset: null"):
        listed(run)
    write_report(run["verification"], {**read_json(run["verification"]), "passed": False})
    with pytest.raises(UserError, match="did not pass its verification"):
        listed(run, dataset=None)


def test_everything_is_uploaded_in_one_commit_each_and_no_token_is_written(
    run: dict[str, Any],
) -> None:
    plan = listed(run, dataset=None)
    with HubServer(TOKEN) as server:
        done = uploaded(server)
        assert done.returncode == 0, done.stderr[-3000:]
        assert len(server.commits) == 2 and all(server.private.values())
        for planned in plan.values():
            held = server.repositories[f"model/{planned['repository']}"]
            assert held == {
                file["path"]: Path(file["file"]).read_bytes() for file in planned["files"]
            }
        assert {number for _, number in server.parts} >= {0, 1, 2, 3, 4}, (
            "the weights went in several parts"
        )
        published = read_report("results/small-r16/publish/published.json")["published"]
        assert [published[kind]["commit"] for kind in plan] == server.commits
        assert_no_token(done)
        puts = server.puts
        again = uploaded(server)
        assert again.returncode == 0, again.stderr[-2500:]
        assert server.puts == puts and len(server.commits) == 2


@pytest.mark.thorough
def test_a_large_file_that_breaks_off_half_way_leaves_no_commit_and_the_same_command_goes_on(
    run: dict,
) -> None:
    listed(run, dataset=None, adapter=None)
    with HubServer(TOKEN) as server:
        server.break_at = 3  # of the weights' four parts
        done = uploaded(server)
        assert (
            done.returncode == 1
            and "Published: nothing. Not published: merged (owner/merged)." in done.stderr
        )
        assert server.repositories["model/owner/merged"] == {} and not server.commits
        assert_no_token(done)
        server.break_at = None
        again = uploaded(server)
        assert again.returncode == 0, again.stderr[-2500:]
        assert len(server.commits) == 1


@pytest.mark.thorough
def test_an_upload_that_breaks_off_publishes_nothing_by_halves_and_goes_on(
    run: dict[str, Any],
) -> None:
    listed(run, dataset=None)
    with HubServer(TOKEN) as server:
        server.refuse = {"model/owner/merged"}
        done = uploaded(server)
        assert done.returncode == 1 and "broke off" in done.stderr
        assert (
            "The Hub " in done.stderr or "may not write there" in done.stderr
        )  # what its answer means
        assert (
            f"Published: owner/adapter at {server.commits[0]}. Not published: merged (owner/merged)."
            in done.stderr
        )
        assert not Path("results/small-r16/publish/published.json").exists()
        assert_no_token(done)  # the server even sent it back
        server.refuse, before = set(), server.puts
        again = uploaded(server)
        assert again.returncode == 0, again.stderr[-2500:]
        assert (
            len(server.commits) == 2
            and server.repositories["model/owner/merged"]["model.safetensors"]
        )
        assert server.puts > before


@pytest.mark.thorough
def test_without_a_token_or_with_a_wrong_one_nothing_is_uploaded(run: dict[str, Any]) -> None:
    listed(run, dataset=None)
    with HubServer("another") as server:
        for token, words in ((None, "export HF_TOKEN"), (TOKEN, "Published: nothing.")):
            done = uploaded(server, token)
            assert done.returncode == 1 and words in done.stderr and not server.commits
            assert_no_token(done)


@pytest.mark.thorough
def test_nothing_goes_to_a_public_repository_when_it_is_to_be_private(run: dict[str, Any]) -> None:
    listed(run, dataset=None)
    with HubServer(TOKEN) as server:
        server.repositories["model/owner/merged"], server.private["model/owner/merged"] = {}, False
        done = uploaded(server)
        assert (
            done.returncode == 1 and "owner/merged is public" in done.stderr and not server.commits
        )
        server.private["model/owner/merged"] = True
        again = uploaded(server)
        assert again.returncode == 0 and len(server.commits) == 2, again.stderr[-2500:]


def test_a_file_that_changed_after_the_list_is_not_uploaded(run: dict[str, Any]) -> None:
    listed(run, dataset=None)
    Path("results/small-r16/merged/config.json").write_text("[]\n", encoding="utf-8")
    with HubServer(TOKEN) as server:
        done = uploaded(server)
        assert (
            done.returncode == 1
            and "has changed since it was listed" in done.stderr
            and not server.repositories
        )
