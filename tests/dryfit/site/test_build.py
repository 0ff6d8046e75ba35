"""What the site is built from: Pyodide as it is pinned, documents whose links hold, a reference of what there is."""

import hashlib
import json
from pathlib import Path

import pytest

from dryfit.common.errors import UserError
from dryfit.scenario.fields import FIELDS
from dryfit.site import python, reference
from dryfit.site.build import first_answer, page
from dryfit.site.documents import MORE, sections, staged
from tests.local_server import LocalServer, QuietHandler


class _Registry(QuietHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(b"evil")


def test_another_archive_than_the_pinned_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LocalServer(_Registry) as server:
        monkeypatch.setenv("NPM_CONFIG_REGISTRY", server.endpoint)
        with pytest.raises(UserError, match="not the pinned one"):
            python.pyodide(tmp_path)
    with pytest.raises(UserError, match="can't be fetched"):  # the server has gone
        python.pyodide(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_archive_that_is_kept_needs_no_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import base64
    import io
    import tarfile

    with tarfile.open(tmp_path / f"pyodide-{python.VERSION}.tgz", "w:gz") as packed:
        for name in python.PYODIDE:
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(name)
            packed.addfile(member, io.BytesIO(name.encode()))
    content = next(tmp_path.iterdir()).read_bytes()
    digest = base64.b64encode(hashlib.sha512(content).digest()).decode()
    monkeypatch.setattr(python, "INTEGRITY", f"sha512-{digest}")
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "http://127.0.0.1:1")
    assert python.pyodide(tmp_path) == {name: name.encode() for name in python.PYODIDE}


def test_the_page_holds_its_first_answer_and_a_field_for_each_setting() -> None:
    text = page()
    assert (
        first_answer()["verdict"] in text
        and "<script>" not in text
        and "http://" not in text.replace("http://www.w3", "")
    )
    for name in ("optimizer", "lora.rank", "quantization.double", "gradient_checkpointing", "loss"):
        assert f'data-set="{name}"' in text


def test_links_that_leave_the_documents_lead_to_the_code_or_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    staged(tmp_path / "plain", "")
    assert not any(
        "](../dryfit/" in path.read_text() for path in (tmp_path / "plain").rglob("*.md")
    )
    monkeypatch.setenv("GITHUB_SERVER_URL", "https://example.org")
    monkeypatch.setenv("GITHUB_REPOSITORY", "own/er")
    staged(tmp_path / "linked", "c0ffee")
    texts = [path.read_text() for path in (tmp_path / "linked").rglob("*.md")]
    assert any(
        "](https://example.org/own/er/blob/c0ffee/dryfit/data/gpus.yaml)" in text for text in texts
    )


def test_a_finished_run_is_the_example(tmp_path: Path) -> None:
    run = tmp_path / "tiny-r4"
    texts = {
        "MODEL_CARD.md": "---\ntags:\n- bash\n---\n# Tiny\n| a |\n| --- |\n| `ls \\| wc` |\n\n"
        "[details](docs/details.md) ![a](figures/a.png)\n",
        "docs/details.md": "# Details\n[card](../MODEL_CARD.md)\n",
        "figures/a.png": "",
        "report.html": "",
        "planner.html": "",
        "provenance.json": json.dumps(
            {"command": "snakemake --cores 2", "source": {"commit": "c0ffee"}}
        ),
    }
    for name, text in texts.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(text)
    (sweep := tmp_path / "tiny-sweep").mkdir()
    (sweep / "sweep.html").write_text("compared")
    alone = staged(tmp_path / "alone", "", run)
    assert "sweep.html" not in (tmp_path / "alone/example/index.md").read_text()
    pages = staged(tmp_path / "docs", "", run, sweep)
    assert pages == alone and (tmp_path / "docs/example/sweep.html").read_text() == "compared"
    assert "[Sweep](sweep.html)" in (tmp_path / "docs/example/index.md").read_text()
    assert [*pages["Example"]] == [
        "example/index.md",
        "example/MODEL_CARD.md",
        "example/docs/details.md",
    ]
    start = (tmp_path / "docs/example/index.md").read_text()
    assert "snakemake --cores 2" in start and "c0ffee" in start and "tiny-r4" in start
    card = (tmp_path / "docs/example/MODEL_CARD.md").read_text()
    assert (
        card.startswith("# Tiny") and "| `ls | wc` |" in card
    )  # Python-Markdown would show a backslash
    assert "[details](docs/details.md)" in card


def test_every_document_and_field_has_a_place() -> None:
    found = sections({"index.md": "Start", "new.md": "A new one"})
    assert found["Start"] == {"index.md": "Start"} and found[MORE] == {"new.md": "A new one"}
    scenario = reference.scenario()
    assert all(f"| `{field.name}` |" in scenario for field in FIELDS) and "`lora.rank`" in scenario
    assert "--sequence-length" in reference.command_line()
    engine = reference.engine()
    assert all(
        f"## `{name}`" in engine for name in ("trace_step", "Report", "trace_trainer", "StepError")
    )
    assert "**Parameters**" in engine and ":class:" not in engine


def test_the_readme_gets_the_sites_address_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dryfit.site.build import _fill_in
    from dryfit.site.documents import with_address

    text = (python.ROOT / "dryfit" / "README.md").read_text(encoding="utf-8")
    filled = with_address(text, "https://somebody.example/tuner/")
    assert "[the calculator](https://somebody.example/tuner/calculator/)" in filled

    def outside(page):
        return page.partition("<!-- site: begin -->")[0] + page.partition("<!-- site: end -->")[2]

    assert (
        outside(filled) == outside(text)
        and with_address(filled, "https://somebody.example/tuner") == filled
    )
    copy = tmp_path / "README.md"
    copy.write_text(text, encoding="utf-8")
    _fill_in(copy, "https://somebody.example/tuner")
    assert copy.read_text(encoding="utf-8") == filled
    with pytest.raises(UserError, match="no address"):
        _fill_in(copy, "javascript:alert(1)")
