"""A run's JSON files as rules wrote them (``record.json``), and values changed in them.

The tiny run of the record learned nothing: it took three steps. :func:`files` is a run that learned: the record with
other values, never with other keys, so that a document that is tested here has read what rules write.
"""

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from dryfit.common.files import write_jsonl, write_report
from tests.repository import ROOT
from tests.unit.documents.record import RECORD

TEMPLATES = ROOT / "config" / "templates"
DOCUMENTS = {
    "MODEL_CARD.md": "MODEL_CARD.md.j2",
    "docs/details.md": "details.md.j2",
    "docs/memory-profile.md": "memory-profile.md.j2",
    "docs/publication.md": "publication.md.j2",
    "planner.html": "planner.html.j2",
    "report.html": "report.html.j2",
}
MARKDOWN = [name for name in DOCUMENTS if name.endswith(".md")]
HOSTILE = "a|b `c` <script>alert(1)</script>\n\n# **bold** [x](javascript:y) $z$ ![i](http://h)"
HOSTILE += " \x1b[31m \u202e &lt; _u_ {{ n }}"


def split_card(text: str) -> tuple[dict[str, Any], str]:
    """A card's metadata and its body."""
    _, metadata, body = text.split("---\n", 2)
    return yaml.safe_load(metadata), body


@cache
def _read() -> dict[str, Any]:
    return json.loads(RECORD.read_text(encoding="utf-8"))


def recorded() -> dict[str, Any]:
    """The content of each input of the card by name, as rules wrote it; a fresh copy each time."""
    return copy.deepcopy(_read()["files"])


CARD_SETTINGS: dict[str, Any] = _read()["settings"]
CARD_SETTINGS["configuration"].setdefault("task", {"name": "shell", "harm": True})
SCENARIOS: list[str] = CARD_SETTINGS["scenarios"]
RUN = Path("results", CARD_SETTINGS["run"])
GPU: dict[str, Any] = _read()["files"]["profile"][0]["gpu"]
SAME = "difference too small for this sample"


def change(content: dict[str, Any], values: dict[str, Any]) -> None:
    """Change values; a key that the content does not have is an error, but in a mapping that was empty."""
    free = not content
    for key, value in values.items():
        assert free or key in content, f"no rule writes {key}: {sorted(content)}"
        if isinstance(value, dict) and isinstance(content.get(key), dict):
            change(content[key], value)
        else:
            content[key] = value


def share(count: int, n: int = 200) -> dict[str, Any]:
    return {
        "count": count,
        "high_95": (count + 11) / n,
        "low_95": max(0, count - 13) / n,
        "n": n,
        "share": count / n,
    }


def equivalent(exact: int) -> int:
    """Right answers of a model with so many exact ones."""
    return exact + 9 if exact > 9 else exact


def metrics(exact: int, loss: float, n: int = 200) -> dict[str, Any]:
    """The scores of one model."""
    counts = {"danger": 3, "exact": exact, "exact_canonical": exact + 1, "parses": exact + 60}
    counts["equivalent"] = equivalent(exact)
    counts |= {"parses_without_fence": exact + 62, "program": exact + 35}
    found = {name: share(count, n) for name, count in counts.items()}
    found |= {"deletes_unasked": share(2, n - 40), "changes_unasked": share(5, n - 40)}
    return found | {"chrf": 41.25 + exact / 10, "loss": loss, "loss_tokens": 2718, "n": n}


def held_out_metrics(exact: int, loss: float, refused: int, danger: int) -> dict[str, Any]:
    """The scores of one model on all held-out requests, with its decoding and what it refused."""
    about = {"decoding": {"batch_size": 16, "max_new_tokens": 48, "requests": 200}}
    about |= {"refused_harmful": share(refused, 60), "danger_harmful": share(danger, 60)}
    return metrics(exact, loss) | about | {"refused_harmless": share(5, 190)}


def harmed(base: int, tuned: int, n: int) -> dict[str, Any]:
    """How often each model did harm that nobody asked for, of so many requests."""
    more = (tuned > base) - (tuned < base)
    verdict = {1: "more often", 0: "as often", -1: "less often"}[more]
    return {"base": share(base, n), "p": 0.25, "tuned": share(tuned, n), "verdict": verdict}


def safety(base: tuple[int, int], tuned: tuple[int, int]) -> dict[str, Any]:
    """Deletions of base and tuned model on the own test's requests to read, and on strangers'."""
    found: dict[str, Any] = {"danger": {"all": harmed(4, 3, 280)}}
    for name, more in (("deletes_unasked", 0), ("changes_unasked", 3)):
        counts = [(before + more, after + more) for before, after in zip(base, tuned, strict=True)]
        found[name] = {
            "own": harmed(*counts[0], 160),
            "strangers": harmed(*counts[1], 60),
            "all": harmed(sum(one[0] for one in counts), sum(one[1] for one in counts), 220),
        }
    return found


def difference(value: float, verdict: str, **more: Any) -> dict[str, Any]:
    return {
        "difference": value,
        "high_95": value + 0.0625,
        "low_95": value - 0.0535,
        "verdict": verdict,
        **more,
    }


def compared(n: int, base: int, tuned: int) -> dict[str, Any]:
    """Answers that were run."""
    change = difference((tuned - base) / n, "better", gained=tuned - base + 1, lost=1)
    return {"base": share(base, n), "tuned": share(tuned, n), "compared": change}


def against(n: int, right: int) -> dict[str, Any]:
    """A baseline that has so many right answers."""
    better = difference(0.25, "better", gained=30, lost=4, p=0.0004, units=70)
    return {"equivalent": share(right, n), "exact": share(right, n), "compared": better, "n": n}


COMPARISON = {
    "n": 200,
    "base": held_out_metrics(4, 2.5, 2, 9),
    "tuned": held_out_metrics(83, 0.5, 41, 3),
    "equivalent": difference(0.44, "better", gained=89, lost=1),
    "exact": difference(0.395, "better", gained=80, lost=1),
    "exact_canonical": difference(0.394, "better", gained=80, lost=2),
    "loss": difference(-2.0, "better"),
    "parses": difference(0.011, SAME, gained=5, lost=3),
    "program": difference(-0.33, "worse", gained=6, lost=72),
    "safety": safety((2, 1), (2, 1)),
}
ON_BENCHMARK = {
    "n": 80,
    "base": metrics(2, 4.25, n=80),
    "baselines": {"nearest_row": against(80, 3), "few_shot": against(80, 2)},
    "tuned": metrics(3, 3.75, n=80),
    "equivalent": difference(0.025, SAME, gained=3, lost=1, p=0.5, units=40),
    "exact": difference(0.025, SAME, gained=3, lost=1),
    "exact_canonical": difference(0.026, SAME, gained=4, lost=1),
    "loss": difference(-0.5, "better"),
    "parses": difference(0.012, SAME, gained=6, lost=2),
    "program": difference(0.33, "better", gained=16, lost=5),
}


KNOWN = ON_BENCHMARK | {
    "n": 90,
    "base": metrics(2, 2.25, n=90),
    "baselines": {"nearest_row": against(90, 22), "few_shot": against(90, 24)},
    "beats_baselines": True,
    "equivalent": difference(0.7, "better", gained=69, lost=1, p=0.0001, units=70),
    "exact": difference(0.6, "better", gained=60, lost=1, p=0.0001, units=70),
    "tuned": metrics(61, 0.25, n=90),
}
NEW = ON_BENCHMARK | {
    "n": 110,
    "base": metrics(2, 2.75, n=110),
    "baselines": {"nearest_row": against(110, 4), "few_shot": against(110, 6)},
    "beats_baselines": False,
    "equivalent": difference(0.2, "better", gained=30, lost=1, p=0.0002, units=18),
    "exact": difference(0.1, "better", gained=21, lost=1, p=0.0002, units=18),
    "tuned": metrics(22, 0.75, n=110),
}
COMPARISON["tests"] = {"benchmark": ON_BENCHMARK, "known": KNOWN, "new": NEW}
EXECUTION = {
    **compared(71, 9, 22),
    "by_level": {
        "easy": compared(36, 6, 15),
        "medium": compared(23, 2, 5),
        "hard": compared(12, 1, 2),
    },
    "ended": {"base": 2, "tuned": 1},
    "examples": [{"answer": "ls -la", "command": "ls -a -l", "request": "list all files"}],
    "missing_programs": ["tree"],
    "not_run": {"base": 4, "tuned": 3},
    "refused_references": 2,
    "right_but_other_strings": {"base": 7, "tuned": 19},
    "second_references": share(50, 70),
    "tasks": 80,
    "undecidable": [6, 11, 21, 31],
}
MERGING = {
    "equivalent": difference(-0.0625, SAME, gained=1, lost=4),
    "exact": difference(-0.0625, SAME, gained=1, lost=4),
    "loss": difference(0.0482, "worse"),
    "merged": {
        "equivalent": share(17, 48),
        "exact": share(17, 48),
        "loss": 0.4449,
        "program": share(36, 48),
    },
    "n": 48,
    "parses": difference(-0.0213, SAME, gained=2, lost=3),
    "program": difference(0.0213, SAME, gained=3, lost=2),
    "same_answers": share(20, 48),
    "trained": {
        "equivalent": share(20, 48),
        "exact": share(20, 48),
        "loss": 0.3967,
        "program": share(35, 48),
    },
}
TRAINING = {
    "answer_tokens": 12_345,
    "computed_tokens": 54_321,
    "epochs": 0.36,
    "final_loss": 0.3125,
    "first_loss": 3.875,
    "kept_step": None,
    "loop": {"max_steps": 150, "save_every_steps": 50, "validation_rows": 410},
    "steps": 150,
    "stopped_early": None,
    "times": {"rows_per_second": 21.3, "tokens_per_second": 987.0, "train_wall_seconds": 61.0},
    "token_shares": {
        "answers": {"count": 12_345, "share": 0.227},
        "padding": {"count": 4_321, "share": 0.0795},
        "prefix": {"count": 5_655, "share": 0.1041},
        "requests": {"count": 32_000, "share": 0.5891},
    },
    "tokens": 54_321,
    "train_rows": 3293,
    "validation_answer_tokens": 3690,
    "validation_loss": 0.4375,
    "validation_rows": 410,
    "validations": 3,
}
DATA = {
    "acquire": {"reasons": {"no request": 4}, "rejected": 4, "rows": 4796},
    "clean": {
        "kept": 4300,
        "reasons": {
            "validate": {"request is empty": 6},
            "exact_duplicates": {"the same request and command came before": 40},
            "near_duplicates": {"nearly the same request with the same command came before": 450},
        },
        "removed": {"validate": 6, "exact_duplicates": 40, "syntax": 0, "near_duplicates": 450},
        "rows": 4796,
    },
    "screen": {
        "categories": {"destructive_files": 11},
        "danger": 11,
        "kept": 4287,
        "rows": 4300,
        "rules": {"rm-root": 11},
        "unparsable": 2,
    },
    "split": {
        "decontaminated": 165,
        "groups": 1717,
        "kept": 4122,
        "largest_group": 61,
        "reasons": {"command in the external test set": 165},
        "rows": 4287,
        "sizes": {"test": 412, "train": 3300, "validation": 410},
        "wanted": {"test": 412, "train": 3298, "validation": 412},
    },
    "encode": {
        "splits": {
            name: {
                "kept": rows - over,
                "answer_tokens": 9 * rows,
                "overlong": over,
                "rows": rows,
                "tokens": 41 * rows,
            }
            for name, rows, over in (("train", 3300, 7), ("validation", 410, 0), ("test", 412, 2))
        }
    },
}
NO_ANSWERS = {"reason": "not run: no requests were given", "status": "not run"}
# A run that learned something, whose merge was not checked to the end.
LEARNED = DATA | {"comparison": COMPARISON, "execution": EXECUTION, "training": TRAINING}
T4 = {"median_percent": 0.0425, "worst_percent": 0.28, "worst_row": "t4-sweep-07"}
T4_RESERVED = {"median_percent": 0.91, "worst_percent": 4.75, "worst_row": "t4-sweep-09"}
MERGED_STAGE = {
    "basis": "computed",
    "change": "merging: {dtype: bfloat16}",
    "has_bytes": 400_000_000,
    "needs_bytes": 540_000_000,
    "verdict": "does not fit",
}


HOURS = {
    "basis": "measured: fitted to 5 rows of the card",
    "evaluation_seconds": 120.0,
    "hours": 0.05,
    "hours_range": [0.04, 0.06],
    "kwh_at_most": 0.0035,
    "line": "takes 3.0 minutes",
    "not_counted": "fetching, loading, saving, merging",
    "steps": 12,
    "training_seconds": 64.05,
}


def files() -> dict[str, Any]:
    """The content of each input of the card by name, of a run that learned; a fresh copy each time."""
    content = recorded()
    change(content, copy.deepcopy(LEARNED))
    change(content["acquire"]["sources"][0], {"rejected": 4, "rows": 4796})
    change(content["merging"][0], copy.deepcopy(MERGING))
    for step in content["profile"][:2]:  # as if the model of the profile were a larger one
        change(step, {"fits": False, "headroom_bytes": -(10**11)})
    content["verification"]["checks"]["answers"] = dict(NO_ANSWERS)
    content["verification"]["complete"] = False
    change(
        next(stage for stage in content["resources"]["stages"] if stage["stage"] == "merged model"),
        MERGED_STAGE,
    )
    change(content["resources"]["stages"][0], {"processes": 2})
    change(content["resources"], {"hours": HOURS})
    for row in content["tuned_answers"]:
        row |= {
            "answer": row["command"],
            "effect": row["expected_effect"],
            "equivalent": True,
            "exact": True,
            "screen": "ok",
        }
    # Comes with the project; no rule writes it.
    content["validation"] = [
        {
            "rows": [],
            "summary": {"t4": {"allocated": T4, "reserved": T4_RESERVED, "rows": 60}},
            "versions": {},
        }
    ]
    return content


def write(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Write each input to a file of its own, and a report for rows; returns paths by name, as of a rule."""

    def one(name: str, value: Any) -> str:
        rows = isinstance(value, list)
        path = folder / f"{name}.{'jsonl' if rows else 'json'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if rows:
            write_jsonl(path, value)
            written.append(path)
        else:
            write_report(path, value)
        return str(path)

    written: list[Path] = []
    paths = {
        name: [one(f"{name}-{number}", item) for number, item in enumerate(value)]
        if name in ("merging", "profile", "validation")
        else one(name, value)
        for name, value in content.items()
    }
    write_report(folder / "rows.json", {}, *written)
    return {**paths, "rows": str(folder / "rows.json")}


def without_benchmark() -> dict[str, Any]:
    """A run whose configuration names no benchmark."""
    content = files() | {"execution": []}  # what an input that is not there becomes
    del content["comparison"]["tests"]["benchmark"]
    for name in ("base_answers", "tuned_answers"):
        content[name] = [row for row in content[name] if row["test"] != "benchmark"]
    return content


def named(title: str) -> dict[str, Any]:
    """The settings of the card of a base with this title."""
    settings = copy.deepcopy(CARD_SETTINGS)
    settings["configuration"]["model"]["title"] = title
    return settings


def hostile() -> dict[str, Any]:
    """A run in which every text that others wrote is an attack."""
    content = files()
    for rows in ("base_answers", "tuned_answers"):
        for row in content[rows]:
            row["request"] = row["command"] = row["answer"] = HOSTILE
    content["acquire"]["sources"][0]["name"] = content["acquire"]["sources"][0]["license"] = HOSTILE
    content["acquire"]["reasons"] = {HOSTILE: 4}
    content["execution"]["examples"] = [dict.fromkeys(("answer", "command", "request"), HOSTILE)]
    content["execution"]["missing_programs"] = [HOSTILE]
    content["encode"]["system_prompt"] = content["comparison"]["tuned"]["prompt"]["system"] = (
        HOSTILE
    )
    content["verification"]["checks"]["answers"]["reason"] = HOSTILE
    content["gate"]["reason"] = content["training"]["device"] = HOSTILE
    return content


def weak(count: int, n: int = 150, **tuned: Any) -> dict[str, Any]:
    """A run whose tuned model gave so many right answers."""
    content = files()
    content["comparison"]["tuned"] |= {"equivalent": share(count, n), **tuned}
    return content


def extreme() -> dict[str, Any]:
    """A run of one row, from which nothing was taken out, in which nothing was right, whose merge failed a check."""
    content = files()
    comparison = content["comparison"]
    for model in ("base", "tuned"):
        scores = comparison[model]
        for name, score in scores.items():
            if isinstance(score, dict) and "share" in score:
                scores[name] = {"count": 0, "high_95": 0.79, "low_95": 0.0, "n": 1, "share": 0.0}
        scores |= {"chrf": 0.0, "n": 1}
    comparison["n"] = 1
    one = comparison["tests"]["new"] | {key: comparison[key] for key in ("base", "n", "tuned")}
    comparison["tests"] = {"held_out": one}
    for name in ("base_answers", "tuned_answers"):
        content[name] = [content[name][0] | {"answer": ""}]
    content["acquire"] |= {"reasons": {}, "rejected": 0, "rows": 1}
    content["clean"] |= {"kept": 1, "rows": 1}
    content["clean"] |= {"reasons": {stage: {} for stage in content["clean"]["stages"]}}
    content["clean"] |= {"removed": dict.fromkeys(content["clean"]["stages"], 0)}
    content["screen"] |= {
        "categories": {},
        "danger": 0,
        "kept": 1,
        "rows": 1,
        "rules": {},
        "unparsable": 0,
    }
    content["split"] |= {"decontaminated": 0, "groups": 1, "kept": 1, "reasons": {}, "rows": 1}
    content["encode"]["splits"] = {"train": {"kept": 1, "overlong": 0, "rows": 1}}
    content["training"] |= {"steps": 1, "threads": 1, "train_rows": 1, "validation_rows": 1}
    content["training"]["packing"]["exactness"] = {
        "gradient_difference": 0.0,
        "loss_difference": 0.0,
    }
    content["verification"]["passed"] = False
    return content
