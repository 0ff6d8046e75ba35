"""The planner's page, opened in a real browser: no error, what is chosen is shown, the numbers are the planner's."""

import json
import random
import re
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import yaml
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from tests.browser import errors, needs_browser, opened
from tests.repository import ROOT
from tests.will_it_fit.decoders import LLAMA_3_LAYERS
from will_it_fit.cards.gpus import catalogue, find
from will_it_fit.common.errors import UserError
from will_it_fit.common.files import read_json
from will_it_fit.engine.components import COLOURS, GROUPS
from will_it_fit.planner import plan
from will_it_fit.planner.calibrated import CalibratedEstimator, anchored
from will_it_fit.planner.changes import apply, as_method
from will_it_fit.planner.largest_fit import LENGTH_STEP, MOST
from will_it_fit.planner.page import TITLES, page
from will_it_fit.planner.page_data import LAYOUTS, choices, layout_of
from will_it_fit.scenario.model import MODELS
from will_it_fit.scenario.scenario import Scenario

OTHERS = ("qwen2.5-coder-14b", "mistral-7b-v0.1")
METHODS = ("full", "lora", "qlora")
PICTURES = "return ['parts', 'border', 'cards'].map((id) => document.getElementById(id).innerHTML)"


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    return Scenario.from_mapping({"model": LLAMA_3_LAYERS, "model_name": "tiny", "sequence_length": 256})


@pytest.fixture(scope="module")
def estimates(scenario) -> dict[str, CalibratedEstimator]:
    return {method: anchored(scenario, as_method(scenario, method))[1] for method in METHODS}


@pytest.fixture(scope="module")
def data(scenario, estimates) -> dict:
    methods = {method: as_method(scenario, method) for method in METHODS}
    models = {name: read_json(MODELS / f"{name}.json") for name in OTHERS}
    traced = {(method, "1"): estimate for method, estimate in estimates.items()}
    return choices(scenario, methods, traced, catalogue()["t4"], models)


@pytest.fixture(scope="module")
def file(data, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("planner") / "planner.html"
    path.write_text(page(data), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser(file):
    with opened(file.as_uri()) as found:
        ready(found)
        yield found


def ready(browser) -> None:
    WebDriverWait(browser, 60).until(lambda page: page.execute_script("return document.body.dataset.ready"))


def text(browser, name: str) -> str:
    return browser.find_element(By.ID, name).text


def test_everything_chosen_from_has_a_surface_and_traces_are_the_models_own(data) -> None:
    for model in data["models"]:
        for method, layout in product(data["methods"], data["layouts"]):
            for gpu in data["gpus"]:
                key = f"{model['name']}|{method['name']}|{layout['name']}|{gpu['capability']}"
                assert data["surfaces"][data["surface_of"][key]]["parts"]
    assert set(data["traced"]) == {f"tiny|{method}|1" for method in METHODS}
    assert all(len(points) == 2 for points in data["traced"].values())
    assert data["chosen"] == {
        "model": "tiny", "method": "qlora", "layout": "1", "gpu": "t4", "sequence_length": 256, "micro_batch": 1,
    }  # fmt: skip


@needs_browser
def test_a_page_is_one_file_that_asks_for_nothing(browser, file) -> None:
    assert browser.execute_script("return performance.getEntriesByType('resource').map(({name}) => name)") == []
    text = file.read_text(encoding="utf-8")
    assert "default-src 'none'" in text and "unsafe-eval" not in text
    drawn_alike = (ROOT / "will_it_fit" / "data" / "page" / "drawing.js").read_text(encoding="utf-8")
    assert drawn_alike in text  # tests/site looks for it in the calculator


@needs_browser
def test_numbers_are_the_planners_to_the_byte(browser, scenario, estimates) -> None:
    chance = random.Random(7)
    for _ in range(18):
        model, method = chance.choice(("tiny", *OTHERS)), chance.choice(METHODS)
        gpu = chance.choice(list(catalogue().values()))
        base = scenario if model == "tiny" else scenario.changed(model=model, model_name=None)
        layout = chance.choice(list(LAYOUTS))
        _, strategy, count = LAYOUTS[layout]
        parallel = {"parallel": {"strategy": strategy, "gpus": count}}
        step = apply(base, {**as_method(base, method), **parallel})
        length = int(2 ** chance.uniform(4, 10 if model == "tiny" else 13))
        step = replace(step, sequence_length=length, micro_batch=int(2 ** chance.uniform(0, 7)))
        traced = model == "tiny" and layout == "1"
        estimate = (estimates[method] if traced else CalibratedEstimator(step)).on(gpu)
        choice = {"model": model, "method": method, "layout": layout, "gpu": gpu.name}
        choice |= {"sequence_length": length, "micro_batch": step.micro_batch}
        shown = browser.execute_script("return answer(arguments[0])", choice)
        assert shown["required"] == estimate(step), choice
        assert shown["peak"] == estimate.formula(step) == sum(shown["groups"].values())
        assert shown["headroom"] == gpu.usable_bytes - estimate(step)
        for field, unit, most in (("micro_batch", 1, MOST), ("sequence_length", LENGTH_STEP, step_positions(step))):
            value = shown[f"largest_{field}"]
            assert value % unit == 0
            assert not value or estimate(replace(step, **{field: value})) <= gpu.usable_bytes, choice
            if value + unit <= most:
                assert estimate(replace(step, **{field: value + unit})) > gpu.usable_bytes, choice


def test_the_page_has_the_seconds_of_the_traced_steps(data, estimates) -> None:
    step, (few, many) = estimates["qlora"], data["seconds"]["tiny|qlora|1|l40s"]
    assert [tokens for tokens, _ in (few, many)] == [256, 16 * 256] and few[1] <= many[1]
    assert few[1] == step.times[0][1]["l40s"]
    assert "tiny|qlora|1|t4" not in data["seconds"]  # its kernels are not the traced ones
    errors = {gpu["name"]: gpu["time_error"] for gpu in data["gpus"]}
    assert errors["l40s"] == 0.3 and errors["rtx-4090"] is None


@needs_browser
def test_hours_lie_between_the_traced_steps_and_follow_the_rows(browser, data) -> None:
    choice = {"model": "tiny", "method": "qlora", "layout": "1", "gpu": "l40s", "sequence_length": 256}
    for rows, (_, seconds) in zip((1, 16), data["seconds"]["tiny|qlora|1|l40s"], strict=True):
        found = browser.execute_script("return secondsOf(arguments[0], 1600)", {**choice, "micro_batch": rows})
        assert found == pytest.approx(1600 / rows * seconds)
    other = {**choice, "gpu": "t4", "micro_batch": 1}
    assert browser.execute_script("return secondsOf(arguments[0], 1)", other) is None
    browser.execute_script("choose({gpu: 'l40s'}); element('rows').value = 3600000; show()")
    assert text(browser, "hours").endswith(" h") and " to " in text(browser, "hours_range")
    assert "all rows once in" in text(browser, "cards")
    browser.execute_script("choose({gpu: 't4'}); element('rows').value = 10000; show()")
    assert not browser.find_element(By.ID, "time").is_displayed()


def step_positions(step: Scenario) -> int:
    return step.size("max_position_embeddings") or 2**20


@needs_browser
def test_a_changed_choice_changes_the_picture(browser) -> None:
    before, word = browser.execute_script(PICTURES), text(browser, "word")
    assert len(before) == 3 and "Fits Tesla T4" in word and "2 traces" in text(browser, "source")
    slider = browser.find_element(By.ID, "micro_batch_slider")
    slider.send_keys(*[Keys.PAGE_UP] * 4)
    rows = int(browser.find_element(By.ID, "micro_batch").get_attribute("value"))
    assert rows > 1
    WebDriverWait(browser, 30).until(
        lambda page: all(new != old for new, old in zip(page.execute_script(PICTURES), before, strict=True))
    )
    assert f"micro_batch: {rows}\n" in text(browser, "scenario")
    for name, value in (("model", "qwen2.5-coder-14b"), ("method", "full")):
        browser.find_element(By.CSS_SELECTOR, f"#{name} option[value='{value}']").click()
    assert "Does not fit Tesla T4" in text(browser, "word")
    assert "not traced for this page" in text(browser, "source")
    assert {"model=qwen2.5-coder-14b", f"micro_batch={rows}"} < set(browser.current_url.partition("#")[2].split("&"))
    browser.find_element(By.CSS_SELECTOR, "#layout option[value='fsdp2-8']").click()
    assert "8 × Tesla T4" in text(browser, "word")
    assert "parallel: {strategy: fsdp2, gpus: 8}" in text(browser, "scenario")
    assert "gpu: {name: t4, count: 8}" in text(browser, "scenario")
    browser.find_element(By.CSS_SELECTOR, "#method option[value='qlora']").click()
    assert "quantization: {storage: bf16}" in text(browser, "source")
    assert errors(browser) == []


@needs_browser
@pytest.mark.parametrize("width", [1400, 420])
def test_between_a_traced_border_and_the_peak_it_is_too_close_to_call(scenario, tmp_path, width) -> None:
    gpu = replace(find({"vram_gib": 2}), name="small")
    row = {"method": "qlora", "gpu": "small", "gpus": 1, "largest_micro_batch": 90, "largest_sequence_length": 1024}
    methods = {method: as_method(scenario, method) for method in ("lora", "qlora")}
    data = choices(
        scenario, methods, {}, gpu, models={}, rows=[row, {**row, "method": "lora", "largest_micro_batch": 0}]
    )
    (tmp_path / "page.html").write_text(page(data), encoding="utf-8")
    with opened((tmp_path / "page.html").as_uri()) as browser:
        browser.set_window_size(width, 900)
        browser.refresh()
        ready(browser)

        def word(**changes) -> str:
            browser.execute_script("choose(arguments[0])", changes)
            return text(browser, "word").partition(" ")[0]

        sure, most = browser.execute_script("const {sure, most} = answer(state); return [sure, most]")
        assert sure["micro_batch"] == 90 < most["micro_batch"] and sure["sequence_length"] == 1024
        assert word(micro_batch=90) == "Fits" and not browser.find_element(By.ID, "close").is_displayed()
        for rows in (91, most["micro_batch"]):
            assert word(micro_batch=rows) == "Too"
        assert "will_it_fit.ask.predict --table mine.yaml" in text(browser, "close")
        assert "expandable_segments:True" in text(browser, "close")
        assert text(browser, "most_micro_batch") == f"too close to call up to {most['micro_batch']}"
        assert word(micro_batch=most["micro_batch"] + 1) == "Does"
        assert word(micro_batch=15, sequence_length=512) == "Fits"  # by its peak, which is smaller
        assert word(method="lora", micro_batch=1, sequence_length=1024) == "Fits"
        page_width = browser.execute_script("return document.documentElement.scrollWidth")
        assert page_width <= browser.execute_script("return innerWidth")
        assert errors(browser) == []


@needs_browser
def test_a_click_on_a_field_of_the_border_chooses_it(browser) -> None:
    state = "return {...state}"
    before = browser.execute_script(state)
    track = browser.find_element(By.CSS_SELECTOR, "#border .track[data-rows='4']")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", track)
    ActionChains(browser).move_to_element_with_offset(track, -100, 0).click().perform()
    after = browser.execute_script(state)
    assert after["sequence_length"] != before["sequence_length"] and after["micro_batch"] == 4
    # The table beside the map chooses by keyboard.
    browser.execute_script("document.querySelectorAll('details').forEach((one) => { one.open = true })")
    first = browser.find_element(By.CSS_SELECTOR, "#longest tbody td button")
    first.send_keys(Keys.ENTER)
    chosen = browser.execute_script(state)
    assert chosen["micro_batch"] == 1 and f"{chosen['sequence_length']:,} tokens" in text(browser, "longest")
    assert errors(browser) == []


@needs_browser
def test_the_border_map_has_the_verdicts_of_its_steps(browser) -> None:
    chosen = {"model": OTHERS[1], "method": "lora", "gpu": "rtx-5090", "layout": "1", "sequence_length": 512}
    browser.execute_script("choose(arguments[0])", chosen)
    bands = browser.execute_script("return bandsOf(state)")
    assert [band["rows"] for band in bands[:4]] == [1, 2, 4, 8] and bands[-1]["may_fit"] == 0
    verdict = "const step = {...state, ...arguments[0]}; return verdictOf(step, needed(step))"
    seen = set()
    for band in bands:
        for length, state in ((band["fits"], "fits"), (band["fits"] + LENGTH_STEP, None), (band["may_fit"], None),
                              (band["may_fit"] + LENGTH_STEP, "too-large")):  # fmt: skip
            if length:
                step = {"micro_batch": band["rows"], "sequence_length": length}
                found = browser.execute_script(verdict, step)
                assert state is None or found == state, step
                seen.add(found)
    assert seen == {"fits", "close", "too-large"}
    pieces = "return [...document.querySelectorAll('#border .track i')].map((one) => one.className)"
    assert browser.execute_script(pieces) == ["fits", "close", "too-large"] * len(bands)
    label = browser.find_element(By.CSS_SELECTOR, "#border .map").get_attribute("aria-label")
    assert f"micro-batch 1: fits up to {bands[0]['fits']} tokens" in label


@needs_browser
def test_an_address_opens_what_it_names_and_nonsense_in_it_is_left_out(file) -> None:
    with opened(file.as_uri() + "#model=tiny&method=lora&gpu=no-such&sequence_length=x&micro_batch=-4") as page:
        ready(page)
        assert page.execute_script("return {...state}") == {
            "model": "tiny", "method": "lora", "layout": "1", "gpu": "t4", "sequence_length": 256, "micro_batch": 1,
        }  # fmt: skip
    with opened(
        file.as_uri() + "#model=tiny&method=lora&layout=fsdp2-4&gpu=a100-80gb&sequence_length=99999&micro_batch=2.6"
    ) as page:
        ready(page)
        state = page.execute_script("return {...state}")
        assert state == {
            "model": "tiny", "method": "lora", "layout": "fsdp2-4", "gpu": "a100-80gb", "sequence_length": 1024,
            "micro_batch": 3,
        }  # fmt: skip
        assert errors(page) == []


UNUSUAL = {
    "a GPU's size, a changed model": {
        "model": {**LLAMA_3_LAYERS, "_name_or_path": "a/model"},
        "quantization": {"double": False, "storage": "bf16"},
        "kbit_preparation": "peft",
        "gradient_accumulation": 4,
        "gpu": {"vram_gib": 20.5},
    },
    "mixed precision, weights kept gathered": {
        "method": "full",
        "precision": "fp16-mixed",
        "loop": "manual",
        "parallel": {"strategy": "fsdp2", "gpus": 2, "reshard_after_forward": False},
        "gpu": {"name": "t4", "count": 2},
    },
    "an adapter of PEFT's": {"adapter": {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"]}},
}


@needs_browser
@pytest.mark.parametrize("fields", UNUSUAL.values(), ids=UNUSUAL)
def test_what_the_page_says_to_write_is_the_step_that_it_shows(fields, tmp_path) -> None:
    own = Scenario.from_mapping({"model": LLAMA_3_LAYERS, "sequence_length": 256, **fields})
    gpu = find(own.gpu) if own.gpu else None
    data = choices(own, {method: as_method(own, method) for method in METHODS}, {}, gpu, models={})
    (tmp_path / "page.html").write_text(page(data), encoding="utf-8")
    with opened((tmp_path / "page.html").as_uri()) as browser:
        WebDriverWait(browser, 60).until(lambda page: text(page, "scenario"))
        for method, layout in product(METHODS, LAYOUTS):
            written = browser.execute_script(
                "choose(arguments[0]); return scenarioText()", {"method": method, "layout": layout}
            )
            if "FSDP" in text(browser, "source"):  # the page says that there is no such step
                continue
            read = Scenario.from_mapping(yaml.safe_load(written))
            _, strategy, count = LAYOUTS[layout]
            kept = asdict(own.parallel) if own.parallel.strategy == strategy else {}
            asked = {**as_method(own, method), "parallel": {**kept, "strategy": strategy, "gpus": count}}
            asked["gpu"] = own.gpu and {**own.gpu, "count": count}
            expected = apply(own, asked).to_mapping()
            same = {name for name, value in read.to_mapping().items() if value == expected[name]}
            assert set(expected) - same <= {"gpu", "model_name"}, (method, layout)
            if own.gpu:
                assert find(read.gpu) == find({**own.gpu, "count": count})
        assert errors(browser) == []


def test_a_model_that_is_called_like_another_is_not_taken_for_it() -> None:
    own = Scenario.from_mapping({"model": {**LLAMA_3_LAYERS, "_name_or_path": "qwen2.5-coder-7b"}})
    names = {"qwen2.5-coder-7b": read_json(MODELS / "qwen2.5-coder-7b.json")}
    found = choices(own, {"lora": as_method(own, "lora")}, {}, models=names)
    models = {model["name"]: model for model in found["models"]}
    assert found["chosen"]["model"] == "qwen2.5-coder-7b (changed)"
    assert models["qwen2.5-coder-7b (changed)"]["written"] == own.model
    assert (
        models["qwen2.5-coder-7b"]["parameters"] == 7_615_616_512 != models["qwen2.5-coder-7b (changed)"]["parameters"]
    )


@pytest.mark.parametrize(
    ("parallel", "layout", "opens"),
    [
        ({"strategy": "none", "gpus": 1}, "1", "1"),
        ({"strategy": "ddp", "gpus": 4}, "ddp", "ddp"),
        ({"strategy": "fsdp2", "gpus": 4}, "fsdp2-4", "fsdp2-4"),
        ({"strategy": "fsdp2", "gpus": 3}, None, "fsdp2-2"),
        ({"strategy": "fsdp1", "gpus": 2}, None, "1"),
    ],
)
def test_traces_of_several_gpus_are_not_taken_for_one(scenario, monkeypatch, parallel, layout, opens) -> None:
    own = apply(scenario, {"method": "lora", "parallel": parallel})
    assert layout_of(own.parallel) == layout
    monkeypatch.setattr(plan, "choices", partial(choices, models={}))  # not the whole catalogue
    data = plan.page_data(own, {"lora": (own, CalibratedEstimator(own))})
    assert data["chosen"]["layout"] == opens
    assert set(data["traced"]) == ({f"tiny|lora|{layout}"} if layout else set())


def test_groups_have_a_title_and_a_colour_each() -> None:
    assert list(TITLES) == list(COLOURS) == list(GROUPS)


def test_what_has_no_estimate_says_why(scenario) -> None:
    odd = scenario.changed(use_cache=True)
    found = choices(odd, {"lora": as_method(odd, "lora")}, {}, models={})
    assert found["surfaces"] == [] and "use_cache" in found["reasons"]["tiny|lora|1"]


def test_a_place_that_takes_no_page_is_said(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("will_it_fit.planner.page.page", lambda data: "page")
    monkeypatch.setattr(plan, "page_data", lambda *_, **__: {})
    with pytest.raises(UserError, match="can't be written: Is a directory") as error:
        plan.main(["--page", "--without-traces", "--output", str(tmp_path)])
    assert f"--output {tmp_path}" in str(error.value) and not list(tmp_path.parent.glob("*.partial"))
    with pytest.raises(UserError) as error:
        plan.main(["--page", "--without-traces", "--gpu", "nosuch"])
    assert error.value.where == "--gpu"


def test_a_page_is_made_alone(tmp_path, capsys) -> None:
    output = tmp_path / "own.html"
    assert plan.main(["--page", "--without-traces", "--output", str(output)]) == 0
    data = re.search(r'id="data">(.*?)</script>', output.read_text(encoding="utf-8"), re.DOTALL)[1]
    assert json.loads(data)["chosen"]["model"] == "qwen2.5-coder-7b"
    assert str(output) in capsys.readouterr().out
