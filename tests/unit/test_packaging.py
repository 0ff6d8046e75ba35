"""What the project is handed on with: container file, locked versions, profiles, workflow catalog."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]


def pins(name: str) -> dict[str, str]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    found = (Requirement(line) for line in lines if line and not line.startswith("-"))
    return {canonicalize_name(item.name): str(item.specifier) for item in found}


@pytest.mark.parametrize(
    "name", ["requirements.txt", "requirements-dev.txt", "requirements-publish.txt", "requirements-slurm.txt"]
)
def test_locked_versions_are_those_required(name: str) -> None:
    locked = pins("constraints.txt")
    for package, specifier in pins(name).items():
        if package != "torch":  # which build is right depends on the machine
            assert locked.get(package) == specifier, f"{package}: `make lock` renews constraints.txt"
    assert not {"torch", "triton"} & set(locked) and not any(name.startswith("nvidia") for name in locked)


def test_the_locked_version_of_an_extra_lies_within_its_range() -> None:
    locked = pins("constraints.txt")
    (extra,) = (Requirement(f"{name}{given}") for name, given in pins("requirements-deepspeed.txt").items())
    assert locked[extra.name].removeprefix("==") in extra.specifier


def test_the_image_copies_what_is_there_and_installs_what_is_locked() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = re.search(r"^COPY (.+) \./$", text, re.MULTILINE)[1].split()
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    for name in copied:
        assert (ROOT / name).is_file() and f"!{name}" in ignored
    torch = next(line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("torch"))
    assert f'TORCH="{torch}"' in text
    assert "-c constraints.txt -r requirements.txt" in text
    python = re.search(r"^FROM python:3\.(\d+)", text, re.MULTILINE)[1]
    assert int(python) >= 11


@pytest.mark.parametrize("profile", ["slurm", "kubernetes"])
def test_profiles_rerun_by_the_same_rules(profile: str) -> None:
    def read(name: str) -> dict:
        return yaml.safe_load((ROOT / "profiles" / name / "config.yaml").read_text(encoding="utf-8"))

    default, other = read("default"), read(profile)
    for key in ("rerun-triggers", "rerun-incomplete", "show-failed-logs"):
        assert other[key] == default[key]
    assert other["executor"] == profile


def test_the_catalog_entry_says_how_it_is_used() -> None:
    entry = yaml.safe_load((ROOT / ".snakemake-workflow-catalog.yml").read_text(encoding="utf-8"))
    assert entry["usage"]["software-stack-deployment"]["conda"] is True
    assert entry["usage"]["report"] is True
