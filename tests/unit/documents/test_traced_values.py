"""Each number of a document is listed with the files and keys that it came from, and follows these alone."""

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.documents import render
from scripts.documents.context import derive
from scripts.documents.traced_values import (
    MARKS,
    NUMBER,
    collect,
    count_of,
    dump_yaml,
    mark_sources,
    plain,
    sourced,
)
from tests.unit.documents import inputs

TEMPLATES = Path(__file__).resolve().parents[3] / "config" / "templates"
DOCUMENTS = (
    "MODEL_CARD.md",
    "details.md",
    "memory-profile.md",
    "planner.html",
    "publication.md",
    "report.html",
)
LISTS_OF_FILES = ("merging", "profile", "validation")
# What words and rows are chosen by: another value makes another sentence, not another number.
CHOOSING = re.compile(
    r"/precision$|/gpu/name$|^/feasibility/\d+/gpu$|^/sweep/\d+/(micro_batch|sequence_length)$|^/scenario/micro_batch$"
    r"|^/scenario/parallel/"  # of one GPU nothing is divided
    r"|^/stages/[1-9]\d*/processes$"  # one, which is not shown; the first stage has two
)
PLAN = inputs.files()["plan"]
# Of the planner's rows the documents show those of the scenario's own size. A length that is the same in all sections
# stands once, so it changes in all of them.
TOGETHER = {
    ("plan", "scenario", "sequence_length"): [
        ("plan", "sweep", number, "sequence_length")
        for number, row in enumerate(PLAN["sweep"])
        if row["sequence_length"] == PLAN["scenario"]["sequence_length"]
    ]
}
LENGTHS = [
    ("profile", number, "scenario", "sequence_length")
    for number in range(len(inputs.files()["profile"]))
]
for length in LENGTHS:
    TOGETHER[length] = [other for other in LENGTHS if other != length]

Place = tuple[Any, ...]
Rendered = dict[str, tuple[str, list[dict[str, Any]]]]


def file_of(place: Place) -> tuple[str, str]:
    """The file and the key of a place in the content of all inputs."""
    length = 2 if place[0] in LISTS_OF_FILES else 1
    return "-".join(map(str, place[:length])) + ".json", "".join(
        f"/{part}" for part in place[length:]
    )


def files_of(content: dict[str, Any]) -> dict[str, tuple[Any, Any, Any]]:
    """By input: what it was read from, its values with their sources, its path or paths."""
    found = {}
    for name, value in content.items():
        if name in LISTS_OF_FILES:
            paths = [file_of((name, place))[0] for place in range(len(value))]
            found[name] = value, [sourced(*one) for one in zip(value, paths, strict=True)], paths
        else:
            path = file_of((name,))[0]
            found[name] = value, sourced(value, path), path
    return found


def rendered(
    content: dict[str, Any], known: dict[str, tuple[Any, Any, Any]] | None = None
) -> Rendered:
    """All documents of a run with their numbers; ``known``: files that have been read already."""
    known = known or {}
    other = {
        name: value
        for name, value in content.items()
        if name not in known or known[name][0] is not value
    }
    files = known | files_of(other)
    values, paths = ({name: files[name][part] for name in content} for part in (1, 2))
    context = derive(values, render.from_rule(inputs.CARD_SETTINGS), paths)
    context["figures"] = dict.fromkeys(
        ("memory", "timeline", "training_curve", "evaluation"), "figure.png"
    )
    return {name: render.render(TEMPLATES / f"{name}.j2", context) for name in DOCUMENTS}


def leaves(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every number, and every text with a digit in it, with its place."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*place, key))
    elif not isinstance(value, bool) and (
        isinstance(value, int | float) or (value and NUMBER.search(value))
    ):
        yield place, value


def changed(value: Any, share: float) -> Any:
    """Another value of the same kind."""
    if isinstance(value, str):
        return re.sub(r"\d", lambda digit: str((int(digit[0]) + 1) % 10), value)
    return (
        value + round(value * share) + 1 if isinstance(value, int) else value * (1 + share) + 0.011
    )


def with_changes(content: dict[str, Any], places: list[Place], share: float) -> dict[str, Any]:
    """The content with other values at these places; what lies not on the way to one is shared, not copied."""
    made = dict(content)
    for place in places:
        node = made
        for key in place[:-1]:
            node[key] = copy.copy(node[key])
            node = node[key]
        node[place[-1]] = changed(node[place[-1]], share)
    return made


def words(text: str) -> str:
    """A document without its numbers and their signs."""
    return re.sub("[−+-]#", "#", NUMBER.sub("#", text))


@pytest.fixture(scope="module")
def original() -> Rendered:
    return rendered(inputs.files())


def listed_at(documents: Rendered, place: Place) -> set[tuple[str, int]]:
    """The numbers that name this place as a source."""
    file, key = file_of(place)
    return {
        (name, number)
        for name, (_, numbers) in documents.items()
        for number, entry in enumerate(numbers)
        if key in entry["from"].get(file, ())
    }


def shown_otherwise(before: Rendered, after: Rendered) -> set[tuple[str, int]]:
    """The numbers that differ between two renderings that have the same words."""
    return {
        (name, number)
        for name in DOCUMENTS
        for number, (one, other) in enumerate(zip(before[name][1], after[name][1], strict=True))
        if one["shown"] != other["shown"]
    }


def same_words(before: Rendered, after: Rendered) -> bool:
    return all(words(before[name][0]) == words(after[name][0]) for name in DOCUMENTS)


def test_every_number_has_a_source(original: Rendered) -> None:
    for name, (text, numbers) in original.items():
        lost = [(entry["line"], entry["shown"]) for entry in numbers if not entry["from"]]
        assert not lost, f"{name}: {lost}"
        lines = text.splitlines()
        assert len(numbers) > (30 if name == "planner.html" else 100)
        assert all(entry["shown"] in lines[entry["line"] - 1] for entry in numbers)
        assert not set(MARKS) & set(text)
    templates = {
        file: keys
        for _, numbers in original.values()
        for entry in numbers
        for file, keys in entry["from"].items()
    }
    assert any(
        file.endswith("MODEL_CARD.md.j2") and keys[0].startswith("line ")
        for file, keys in templates.items()
    )


def apart(places: dict[Place, set[tuple[str, int]]], size: int = 80) -> Iterator[list[Place]]:
    """Groups of places of which no two are named by one number: what each changes can be told."""
    groups: list[tuple[list[Place], set[tuple[str, int]]]] = []
    for place, named in places.items():
        for members, taken in groups:
            if len(members) < size and not taken & named:
                members.append(place)
                taken |= named
                break
        else:
            groups.append(([place], set(named)))
    yield from (members for members, _ in groups)


@pytest.mark.thorough
def test_a_changed_value_changes_the_numbers_that_name_it_and_no_others(original: Rendered) -> None:
    content = inputs.files()
    original_files = files_of(content)
    named, unnamed = {}, []
    for place, value in leaves(content):
        if CHOOSING.search(file_of(place)[1]):
            continue
        if numbers := listed_at(original, place):
            named[place] = numbers
        elif value and place not in TOGETHER:
            unnamed.append(place)

    left = {place: set(numbers) for place, numbers in named.items()}

    def change(places: list[Place], share: float) -> None:
        together = [place for one in places for place in (one, *TOGETHER.get(one, []))]
        after = rendered(with_changes(content, together, share), original_files)
        if same_words(original, after):
            moved = shown_otherwise(original, after)
            allowed = set().union(*(named.get(place, set()) for place in together))
            assert moved <= allowed, (
                f"one of {places} changes {sorted(moved - allowed)[:3]}, which do not name it"
            )
            for place in places:
                left[place] -= moved

    for places in apart(named):
        change(places, 0.031)
    for share in (
        0.031,
        1.3,
        -0.23,
        9.0,
        -4.0,
        1e3,
        1e5,
        -1e5,
    ):  # one may be lost in rounding, another turn a word
        for place in [place for place, numbers in left.items() if numbers]:
            change([place], share)
    silent = {place: sorted(numbers)[:3] for place, numbers in left.items() if numbers}
    assert not silent, f"These are named by a number and do not change it: {silent}"
    assert len(named) > 200 and len(unnamed) > 50
    assert rendered(with_changes(content, unnamed, 0.031)) == original, (
        "a value that no number names is shown"
    )


def test_sources_survive_what_templates_and_python_do_with_values() -> None:
    report = sourced({"a": 3, "b": 1.5, "name": "v1.2", "rows": [1, 2], "a/b": {"~": 7}}, "x.json")

    def keys(text: str) -> list[list[str]]:
        return [entry["from"].get("x.json", []) for entry in collect(text)[1]]

    assert keys(
        f"{report['a'] / 2 + report['b']:.1f} {-report['b']} {round(report['b'])} {abs(report['a']):,}"
    ) == [
        ["/a", "/b"],
        ["/b"],
        ["/b"],
        ["/a"],
    ]
    assert (
        keys(f"{1000 / report['a']:.0f} {2 - report['a']} {divmod(report['a'], 2)[1]}")
        == [["/a"]] * 3
    )
    assert keys(
        f"{sum([report['a'], report['b']])} {report['name'].upper()} {'at ' + report['name']}"
    ) == [["/a", "/b"], ["/name"], ["/name"]]
    assert keys(f"{count_of(report['rows'])} {report['a/b']['~']} {list(report)[4]}9") == [
        ["/rows"],
        ["/a~1b/~0"],
        [],
    ]
    assert (
        report["a"] == 3
        and report["b"] == 1.5
        and report["name"] == "v1.2"
        and copy.deepcopy(report) == report
    )
    assert "text" in mark_sources("text", report["a"]) and mark_sources(
        "text", 3
    ) == "text" == plain(mark_sources("text", report["a"]))


def test_only_values_with_a_source_are_marked() -> None:
    text, numbers = collect(f"{sourced({'name': 'a &#64; 7 &#8217;'}, 'x.json')['name']}")
    assert [entry["shown"] for entry in numbers] == ["7"] and "&#64;" in text
    # Who knows how sources are carried could else have a request claim a figure for a file.
    forged = "".join(MARKS[:1] + "0" + MARKS[1] + "99" + MARKS[2])
    report = sourced({"request": forged, forged: 1}, "answers.jsonl")
    text, numbers = collect(f"{report['request']} {list(report)[1]}")
    assert not set(MARKS) & set(text) and "\\u{fdd0}0\\u{fdd1}99" in text
    assert {file for entry in numbers for file in entry["from"]} == {"answers.jsonl"}
    value = {
        "n": 3,
        "x": 1e-05,
        "y": 2.0,
        "version": "1.0",
        "text": "- a: b",
        "on": True,
        "none": None,
        "l": ["7", 7],
    }
    text, numbers = collect(dump_yaml(sourced(value, "c.yaml")))
    assert text == dump_yaml(value) and yaml.safe_load(text) == value
    assert [entry["from"]["c.yaml"] for entry in numbers] == [
        ["/n"],
        ["/x"],
        ["/y"],
        ["/version"],
        ["/l/0"],
        ["/l/1"],
    ]
