"""The calculator in a real browser, and the documents' pages: ``make test-site``.

The site is built once, and served by a server that can go away; the Hub is one on loopback that speaks its protocol.
"""

import http.server
import json
import random
import re
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlencode

import pytest

from dryfit.cards.gpus import catalogue
from dryfit.scenario.hub import MODELS
from dryfit.site.answer import reply
from dryfit.site.build import ROOT, calculator
from dryfit.site.documents import documents
from tests.browser import errors, needs_browser, opened
from tests.dryfit.scenario.models_server import ModelsServer
from tests.local_server import LocalServer, QuietHandler

CONFIG = json.loads((MODELS / "qwen3-0.6b.json").read_text(encoding="utf-8"))
LLAMA = json.loads((MODELS / "llama-3.2-1b.json").read_text(encoding="utf-8"))
AXOLOTL = "base_model: Qwen/Qwen3-8B\nadapter: qlora\nload_in_4bit: true\nlora_r: 16\nlora_target_linear: true\n"
LOADING = 60  # seconds that Python may take to load, on a busy machine
CHOICES = 40  # of each seed


@pytest.fixture(scope="session")
def hub() -> Iterator[ModelsServer]:
    models: dict[str, dict | str] = {
        f"own/model-{n}": CONFIG | {"num_hidden_layers": n} for n in range(1, 9)
    }
    models |= {
        "own/llama": LLAMA,
        "own/renamed": "-> own/llama",
        "own/gated": "gated",
        "own/often": "limited",
        "own/broken": "broken",
        "own/adapter": "empty",
        "own/slow": "slow",
        "own/strange": {
            "model_type": "strange",
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "vocab_size": 100,
        },
        "own/unnamed": {"hidden_size": 64},
        "own/packed": LLAMA | {"quantization_config": {"quant_method": "gptq"}},
    }
    with ModelsServer(models) as server:
        yield server


@pytest.fixture(scope="session")
def folder(hub: ModelsServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The calculator, with the loopback's Hub and little patience."""
    made = tmp_path_factory.mktemp("site")
    calculator(made / "calculator", ROOT / ".venv-site")
    page = made / "calculator" / "index.html"
    text = page.read_text(encoding="utf-8").replace("https://huggingface.co", hub.endpoint)
    page.write_text(text.replace('data-wait="15000"', 'data-wait="1500"'), encoding="utf-8")
    return made


class _Files(QuietHandler, http.server.SimpleHTTPRequestHandler):
    pass


def serving(folder: Path) -> LocalServer:
    return LocalServer(partial(_Files, directory=str(folder)))


@pytest.fixture(scope="session")
def page(folder: Path) -> Iterator[Any]:
    """A browser in which Python has come."""
    with serving(folder) as server, opened(f"{server.endpoint}/calculator/") as browser:
        browser.set_script_timeout(180)
        browser.endpoint = server.endpoint
        wait_for_python(browser)
        yield browser


def until(browser: Any, condition: str, seconds: float = 60) -> Any:
    """Wait until an expression in the page is true; its value."""
    from selenium.webdriver.support.ui import WebDriverWait

    said = "document.getElementById('verdict').innerText"
    wait = WebDriverWait(browser, seconds, poll_frequency=0.05)
    return wait.until(
        lambda _: browser.execute_script(f"return {condition}"),
        browser.execute_script(f"return {said}"),
    )


def wait_for_python(browser: Any) -> None:
    until(browser, "document.getElementById('progress').hidden && window.calculator", LOADING)
    browser.execute_async_script(
        "calculator.ask({ask: 'gpus', model: 'qwen3-8b'}).then(arguments[0])"
    )


def verdict(browser: Any, **choice: str) -> str:
    """The verdict on a choice that a link holds."""
    mark = "document.getElementById('verdict')"
    # where the link is the same, the browser makes no event
    again = "if (location.hash.slice(1) === arguments[0]) dispatchEvent(new Event('hashchange'))"
    script = f"{mark}.replaceChildren('waiting'); {again}; else location.hash = arguments[0]"
    browser.execute_script(script, urlencode(choice))
    return until(browser, f"!/^waiting|is asked for/.test({mark}.innerText) && {mark}.innerText")


def typed(browser: Any, **fields: str) -> None:
    """Type into fields of the form, and leave none of them."""
    for name, value in fields.items():
        script = "const field = document.getElementById(arguments[0]); field.value = arguments[1];"
        browser.execute_script(
            f"{script} field.dispatchEvent(new Event('input', {{bubbles: true}}))", name, value
        )


def in_browser(browser: Any, requests: list[dict]) -> list[str]:
    """The page's answers, some at a time: the driver waits two minutes for each."""
    script = (
        "Promise.all(JSON.parse(arguments[0]).map((one) => calculator.ask(one))).then(arguments[1])"
    )
    found: list[str] = []
    for at in range(0, len(requests), 20):
        some = json.dumps(requests[at : at + 20])  # the driver would sort a mapping's keys
        found += browser.execute_async_script(script, some)
    return found


def in_python(request: dict) -> str:
    return reply(json.dumps(request | {"fetched": {}}))


def random_choice(dice: random.Random) -> dict:
    """A choice as the form makes it; some are refused."""
    settings = {
        "lora.rank": dice.choice([4, 16, 64]),
        "lora.target_modules": dice.choice(["all-linear", "[q_proj, v_proj]"]),
        "optimizer": dice.choice(["adamw", "adamw_fused", "adamw_8bit", "paged_adamw_8bit"]),
        "loss": dice.choice(["full", "chunked", "liger"]),
        "attention": dice.choice(["eager", "sdpa", "flash"]),
        "gradient_checkpointing": dice.choice([True, False, "reentrant"]),
        "lora.dropout": dice.choice([0, 0.05]),
        "precision": dice.choice(["bf16", "fp32", "bf16-mixed"]),
        "attention_mask": dice.choice(["none", "padding"]),
    }
    method, gpus = dice.choice(["", "full", "lora", "qlora"]), dice.choice([1, 1, 1, 2, 8])
    if method == "full":
        settings = {name: value for name, value in settings.items() if not name.startswith("lora.")}
    file = dice.random() < 0.15 and {
        "name": "",
        "text": AXOLOTL + f"sequence_len: {dice.choice([512, 4096])}\n",
    }
    return {
        "ask": "answer",
        "model": "" if file else dice.choice(sorted(MODELS.glob("*.json"))).stem,
        "file": file or None,
        "method": method,
        "gpu": dice.choice([*catalogue(), "24GiB", "4090", ""]),
        "gpus": gpus,
        "strategy": "" if gpus == 1 else dice.choice(["", "ddp", "fsdp2", "zero3"]),
        "sequence_length": dice.choice([None, 100, 512, 2048, 8192]),
        "micro_batch": dice.choice([None, 1, 3, 16]),
        "settings": {
            key: settings[key] for key in dice.sample(sorted(settings), dice.randrange(4))
        },
        "run": dice.choice(
            [{}, {}, {"rows": "50000"}, {"rows": "900", "deadline": "3h"}, {"epochs": "2"}]
        ),
    }


def first_difference(browser: Any, request: dict) -> str:
    (text,), expected = in_browser(browser, [request]), in_python(request)
    at = next(
        (at for at, (one, other) in enumerate(zip(text, expected, strict=False)) if one != other), 0
    )
    return f"{text[at - 100 : at + 80]!r} instead of {expected[at - 100 : at + 80]!r}"


@needs_browser
@pytest.mark.parametrize(
    "seed", [25, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(26, 30))]
)
def test_random_choices_equal_pythons_to_the_byte(
    page: Any, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("cards.sentences", "ask.answer"):  # a browser can't trace, and says so
        monkeypatch.setattr(f"dryfit.{module}.can_trace", lambda: False)
    dice = random.Random(seed)
    requests = [random_choice(dice) for _ in range(CHOICES)]
    requests += [
        requests[0] | more
        for more in (
            {"ask": "gpus"},
            {"ask": "others"},
            {"ask": "methods"},
            {"ask": "changes"},
            {"ask": "longest", "rows": 2},
        )
    ]
    found = in_browser(page, requests)
    differ = [
        request for request, text in zip(requests, found, strict=True) if text != in_python(request)
    ]
    assert not differ, (
        f"{len(differ)} differ, the first: {differ[0]}; {first_difference(page, differ[0])}"
    )
    assert sum('"answer"' in text for text in found) > CHOICES / 2, (
        "most were refused: the test says little"
    )


@needs_browser
@pytest.mark.parametrize(
    ("model", "words"),
    [
        *((f"own/model-{n}", "FITS: about") for n in range(1, 9)),
        ("own/llama", "FITS"),
        ("own/renamed", "FITS"),
        ("own/llama@v2", "FITS"),
        ("own/llama@v3", "no such revision"),
        ("own/gated", "The model is gated"),
        ("own/nothing", "no such model"),
        ("own/often", "too often"),
        ("own/broken", "answers with an error (500)"),
        ("own/adapter", "no config.json"),
        ("own/slow", "can't be reached"),
        ("own/strange", "strange"),
        ("own/unnamed", "model_type"),
        ("own/packed", "FITS"),
        ("Qwen/Qwen3-8B", "FITS"),
    ],
)
def test_a_hub_id_is_answered_or_refused_in_words(
    page: Any, hub: ModelsServer, model: str, words: str
) -> None:
    before = len(hub.requests)
    found = verdict(page, model=model, gpu="rtx-4090", gpus="1")
    assert words in found
    assert (len(hub.requests) == before) == (model == "Qwen/Qwen3-8B")  # which is listed


@needs_browser
def test_typing_asks_at_once_and_the_hub_only_when_told(page: Any, hub: ModelsServer) -> None:
    verdict(page, model="qwen2.5-coder-7b", gpu="rtx-4090", gpus="1", sequence_length="2048")
    before = len(hub.requests)
    typed(page, model="own/model-3x")
    until(page, "document.getElementById('verdict').innerText.includes('is not listed')")
    assert len(hub.requests) == before
    typed(page, model="qwen3-8b", length="100000")
    until(page, "document.getElementById('verdict').className.includes('error')")
    assert "sequence_length" in page.execute_script(
        "return document.getElementById('verdict').innerText"
    )


@needs_browser
def test_the_border_is_a_picture_with_a_table_beside_it_and_both_choose(
    page: Any, folder: Path
) -> None:
    verdict(
        page, model="qwen3-8b", gpu="rtx-4090", gpus="1", sequence_length="512", micro_batch="1"
    )
    tracks = "[...document.querySelectorAll('#border .track')]"
    until(
        page,
        "!document.querySelector('.old') && document.querySelector('#cards .chosen').innerText.includes('4090')",
    )
    pieces = page.execute_script(
        f"return {tracks}.map((one) => [...one.children].map((each) => each.offsetWidth))"
    )
    assert [fits for fits, _, _ in pieces] == sorted(
        fits for fits, _, _ in pieces
    )  # fewer rows, longer ones
    label = page.execute_script(
        "return document.querySelector('#border .map').getAttribute('aria-label')"
    )
    longest = json.loads(
        in_python({"ask": "longest", "rows": 4, "model": "qwen3-8b", "gpu": "rtx-4090"})
    )["longest"]
    assert f"micro-batch 4: should fit up to {longest['fits']} tokens" in label
    page.execute_script(
        "document.querySelector('#border-block details').open = true;"
        "document.querySelectorAll('#longest tbody tr')[2].querySelector('button').focus();"
        "document.activeElement.click()"
    )
    chosen = "document.getElementById('step').innerText"
    until(page, f"{chosen}.includes('4 x {longest['fits']:,} tokens')")
    page.execute_script(
        "document.querySelector('#cards button').click()"
    )  # the smallest GPU of the table
    until(page, "document.getElementById('command').innerText.includes('--gpu rtx-3060')")


@needs_browser
def test_the_rows_of_a_run_are_in_the_command_and_in_the_link(page: Any) -> None:
    choice = {
        "model": "qwen3-8b",
        "gpu": "l40s",
        "gpus": "1",
        "run.rows": "50000",
        "run.price": "0.86",
    }
    verdict(page, **choice)
    command, hours = (
        page.execute_script(f"return document.getElementById('{name}').innerText")
        for name in ("command", "hours")
    )
    assert command.endswith("--price l40s=0.86 --rows 50000") and "50,000 steps" in hours
    assert "run.rows=50000" in page.current_url
    assert "--price needs --rows" in verdict(page, **{**choice, "run.rows": ""})
    verdict(page, model="qwen3-8b", gpu="l40s", gpus="1")  # the page is every test's


@needs_browser
def test_a_file_that_is_no_yaml_is_refused_in_words_and_a_link_holds_one(page: Any) -> None:
    page.execute_script(
        "document.forms.form.source.value = 'file'; const text = document.getElementById('text');"
        "text.value = 'a: [1'; text.dispatchEvent(new Event('change', {bubbles: true}))"
    )
    until(page, "document.getElementById('verdict').innerText.includes('YAML')")
    page.execute_script(
        "const text = document.getElementById('text'); text.value = arguments[0];"
        "text.dispatchEvent(new Event('change', {bubbles: true}))",
        AXOLOTL,
    )
    until(page, "document.getElementById('read').innerText.includes('read as axolotl')")
    link = page.current_url
    assert "file=" in link
    with opened(link) as another:
        wait_for_python(another)
        until(another, "document.getElementById('read').innerText.includes('read as axolotl')")
        assert another.execute_script("return document.getElementById('text').value") == AXOLOTL
    with opened(re.sub("file=[^&]+", "file=damaged", link)) as another:
        wait_for_python(another)
        until(another, "document.getElementById('verdict').className.includes('error')")


@needs_browser
def test_the_page_needs_a_network_once(folder: Path) -> None:
    server = serving(folder)
    with server, opened(f"{server.endpoint}/calculator/") as browser:
        wait_for_python(browser)
        browser.execute_async_script("navigator.serviceWorker.ready.then(() => arguments[0]())")
        until(browser, "navigator.serviceWorker.controller")
        server.shutdown(), server.server_close()
        browser.get(
            f"{server.endpoint}/calculator/#model=qwen3-8b&gpu=t4&gpus=1&sequence_length=512"
        )
        browser.refresh()
        wait_for_python(browser)
        until(browser, "document.getElementById('step').innerText.includes('qwen3-8b')")


@needs_browser
def test_without_webassembly_or_without_its_files_the_page_says_so(
    folder: Path, tmp_path: Path
) -> None:
    with serving(folder) as server, opened(f"{server.endpoint}/calculator/") as browser:
        without = {"source": "delete globalThis.WebAssembly"}
        browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", without)
        browser.refresh()
        until(browser, "document.getElementById('verdict').innerText.includes('no WebAssembly')")
    broken = tmp_path / "site" / "calculator"
    broken.mkdir(parents=True)
    for path in (folder / "calculator").iterdir():
        if path.name != "project.zip":
            (broken / path.name).symlink_to(path)
    with serving(broken.parent) as server, opened(f"{server.endpoint}/calculator/") as browser:
        until(
            browser,
            "document.getElementById('verdict').innerText.includes('could not be loaded')",
            LOADING,
        )


@needs_browser
def test_every_field_has_a_label_and_nothing_is_wider_than_a_telephone(page: Any) -> None:
    verdict(page, model="qwen2.5-coder-7b", gpu="rtx-4090", gpus="1")
    page.execute_script(
        "document.querySelectorAll('details').forEach((one) => { one.open = true })"
    )
    unnamed = "[...document.querySelectorAll('input, select, textarea')].filter((one) => !one.labels.length).length"
    assert page.execute_script(f"return {unnamed}") == 0
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    assert page.execute_script("return document.documentElement.scrollWidth") == 390
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    own = [
        line for line in errors(page) if "status of" not in line
    ]  # what the Hub refuses stands there too
    assert not own, own


# --- the documents -------------------------------------------------------------------------------------------------


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list) -> None:
        given = dict(attributes)
        self.places.add(given.get("id", ""))
        self.links += [given[name] for name in ("href", "src") if given.get(name)]


def test_every_link_of_the_documents_leads_somewhere(tmp_path: Path) -> None:
    documents(tmp_path, "")
    pages: dict[Path, _Links] = {}
    for path in tmp_path.rglob("*.html"):
        pages[path] = _Links()
        pages[path].feed(path.read_text(encoding="utf-8"))
    assert len(pages) > 15
    for path, page in pages.items():
        for link in page.links:
            target, _, place = link.partition("#")
            if re.match(r"\w+:|//|/", target) or target.rstrip("/").endswith("calculator"):
                continue
            there = (path.parent / unquote(target)).resolve() if target else path
            there = there / "index.html" if there.is_dir() else there
            assert there.is_file(), f"{path.relative_to(tmp_path)} links to {link}"
            assert not place or unquote(place) in pages[there].places, (
                f"{path.relative_to(tmp_path)}: {link}"
            )
    assert not re.search(
        r"https?://(?!www.w3.org)[^\"']*\.(js|css|woff2?)\b", (tmp_path / "index.html").read_text()
    )


@needs_browser
def test_a_telephone_sees_the_verdict_after_tapping(page: Any) -> None:
    """390 x 844 points, as most telephones have: the whole verdict lies on the screen, without scrolling."""
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        verdict(page, model="qwen3-8b", gpu="rtx-4090", gpus="1", sequence_length="2048")
        for before in ("window.scrollTo(0, 0)", "document.getElementById('more').open = true"):
            page.execute_script(
                f"{before}; document.querySelector('form button[type=submit]').click()"
            )
            place = "document.getElementById('verdict').getBoundingClientRect()"
            seen = f"(({{ top, bottom, height }}) => height > 20 && top >= 0 && bottom <= innerHeight)({place})"
            until(
                page,
                f"/^(FITS|TOO|DOES)/.test(document.getElementById('verdict').innerText) && {seen}",
            )
        assert page.execute_script("return document.documentElement.scrollWidth <= 390")
    finally:
        page.execute_script("document.getElementById('more').open = false")
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@needs_browser
def test_an_error_leaves_nothing_of_the_answer_before(page: Any) -> None:
    verdict(page, model="qwen3-8b", gpu="rtx-4090", gpus="1", sequence_length="2048")
    until(page, "!document.getElementById('answer').hidden")
    verdict(page, model="qwen3-8b", gpu="rtx-9999", gpus="1", sequence_length="2048")
    until(page, "document.getElementById('answer').hidden")


@needs_browser
def test_a_model_is_searched_on_the_hub_by_its_name_when_told(page: Any, hub: ModelsServer) -> None:
    verdict(page, model="llama-of-mine", gpu="rtx-4090", gpus="1")
    search = "document.querySelector('#found button')"
    until(page, f"{search}?.innerText.includes('llama-of-mine')")
    assert not any("/api/models" in path for _, path, _ in hub.requests)
    page.execute_script(f"{search}.click()")
    until(page, "document.getElementById('found').innerText.includes('has no model named')")
    verdict(page, model="renamed", gpu="rtx-4090", gpus="1")
    page.execute_script(f"{search}.click()")
    until(page, f"{search}?.innerText === 'own/renamed'")
    page.execute_script(f"{search}.click()")
    until(page, "/^FITS/.test(document.getElementById('verdict').innerText)")
    assert page.execute_script("return document.getElementById('found').children.length") == 0


@needs_browser
def test_a_card_is_picked_with_one_tap_and_parts_differ_in_colour(page: Any) -> None:
    verdict(page, model="qwen3-8b", gpu="rtx-4090", gpus="1", sequence_length="2048")
    page.execute_script("document.querySelector('[data-gpu=t4]').click()")
    until(page, "document.getElementById('command').innerText.includes('--gpu t4')")
    colours = page.execute_script(
        "return [...document.querySelectorAll('#parts .swatch')].map((one) =>"
        " getComputedStyle(one).backgroundColor)"
    )
    assert len(colours) == len(set(colours)) > 5


@needs_browser
def test_another_method_and_its_smallest_card_are_chosen_with_one_click(page: Any) -> None:
    verdict(page, model="qwen3-8b", gpu="t4", gpus="1", sequence_length="1024")
    rows = "[...document.querySelectorAll('#methods tbody tr')]"
    until(page, f"!document.querySelector('.old') && {rows}.length === 3")
    words = page.execute_script(f"return {rows}.map((row) => row.innerText)")
    assert [text.split()[0] for text in words] == [
        "full",
        "lora",
        "qlora",
    ] and "does not fit" in words[0]
    page.execute_script(f"{rows}[1].querySelector('td:last-child button').click()")
    until(
        page,
        "document.getElementById('command').innerText.includes('--gpu h100-80gb --method lora')",
    )


def test_start_page_calculator_and_command_say_the_same_and_link_to_each_other() -> None:
    from dryfit.site.build import first_answer, page
    from dryfit.site.documents import installation, start_page

    peak = first_answer()["answer"]["analytic"]["peak_allocated_bytes"] / 2**30
    start, made = start_page(), page()
    shown = re.search(r"analytic estimate: ([\d.]+) GiB", start)[1]
    assert f"{peak:.2f} GiB" in first_answer()["verdict"] and f"{peak:.2f}" == shown
    # README's answer is what the card needs, with the gaps between blocks: a little more than the peak.
    needed = float(re.search(r"needs ([\d.]+) of", start)[1])
    assert 0 < needed - peak < 0.5
    assert (
        "(calculator/)" in start
        and installation() in start
        and installation() in made
        and 'href="../"' in made
    )
