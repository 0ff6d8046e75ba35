"""``python -m dryfit.recorder FAMILY [...]``: record families for the derived form, or those variants that are missing.

It runs in one process and takes 2 to 120 CPU seconds for each variant. It prints where numbers change the events.
"""

import argparse
import json
import sys
import time
import zipfile
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import transformers

from dryfit.common.files import sha256_file
from dryfit.common.versions import STACK, versions
from dryfit.data import data_path
from dryfit.derived.families import FAMILIES, ModelFamily
from dryfit.derived.form import FORMAT, Form
from dryfit.recorder.fitting import NotFitted
from dryfit.recorder.teaching import OtherEvents, alike, alike_keys, base_key, checked, taught
from dryfit.recorder.variants import BEFORE_8, OPTIONS, Variant, variants_of

_CODE = (
    "models/{0}/modeling_{0}.py",
    "masking_utils.py",
)  # of transformers, that a record was made with


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m dryfit.recorder", description=__doc__)
    options.add_argument("families", nargs="+", choices=sorted(FAMILIES), metavar="FAMILY")
    options.add_argument(
        "--anew", action="store_true", help="every variant, and not only those that are missing"
    )
    options.add_argument(
        "--options", nargs="*", choices=[*OPTIONS, BEFORE_8], help="only with these sets of options"
    )
    asked = options.parse_args()
    for name in asked.families:
        record(
            FAMILIES[name],
            lambda variant: asked.options is None or variant.called in asked.options,
            asked.anew,
        )
    return 0


def record(
    family: ModelFamily,
    wanted: Callable[[Variant], bool] = lambda variant: True,
    anew: bool = False,
) -> None:
    """Record the variants of a family that are wanted and missing; the file is whole after each of them.

    What no variant asks for any more is left out of it.
    """
    path = data_path("records", f"{family.name}.zip")
    members, files = ({}, {}) if anew else _read(path)
    library: list[Any] = []
    for text in files.values():
        library += [one for one in json.loads(text)["sizes"] if one not in library]
    variants = list(variants_of(family))
    if pruned(family, variants, members, files):
        _write(path, family, members, files)
    written = {*members}
    for variant in filter(wanted, variants):
        began, member = time.process_time(), base_key(family, variant).key()
        if member not in members:
            try:
                content = checked(family, variant, taught(family, variant, library), print)
            except (NotFitted, OtherEvents) as error:
                print(f"{family.name}, {variant}: not recorded, {error}", flush=True)
                continue
            members[member] = member
            files[member] = json.dumps(content, separators=(",", ":"))
            library += [one for one in content["sizes"] if one not in library]
        text = files[members[member]]
        form = cache(lambda text=text: Form(json.loads(text)))
        members |= dict.fromkeys(alike(family, variant, form, {*members}, print), members[member])
        if written >= {*members}:
            continue
        _write(path, family, members, files)
        written = {*members}
        print(
            f"{family.name}, {variant}: {len(text)} characters, {time.process_time() - began:.0f} CPU s",
            flush=True,
        )


def pruned(
    family: ModelFamily, variants: Iterable[Variant], members: dict[str, str], files: dict[str, str]
) -> list[str]:
    """Take from members and files what none of these variants and of the models that are alike asks for.

    It returns the names of the files that it took.
    """
    asked: set[str] = set()
    for variant in variants:
        asked |= {base_key(family, variant).key(), *alike_keys(family, variant)}
    for key in {*members} - asked:
        del members[key]
    dropped = sorted({*files} - {*members.values()})
    for name in dropped:
        del files[name]
    return dropped


def _read(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Which variant answers which key, and the variants; nothing where they were made with other versions."""
    if not path.is_file():
        return {}, {}
    with zipfile.ZipFile(path) as file:
        index = json.loads(file.read("record.json"))
        current = index["format"] == FORMAT and index["versions"] == _versions()
        files = {name: file.read(f"{name}.json").decode() for name in {*index["members"].values()}}
    return (index["members"], files) if current else ({}, {})


def _versions() -> dict[str, str]:
    installed = versions(STACK)
    return {name: str(installed[name]).partition("+")[0] for name in STACK}


def _write(path: Path, family: ModelFamily, members: dict[str, str], files: dict[str, str]) -> None:
    folder = Path(transformers.__file__).parent
    code = [name.format(family.model_type.removesuffix("_text")) for name in _CODE]
    index: dict[str, Any] = {
        "format": FORMAT,
        "versions": _versions(),
        "code": {name: sha256_file(folder / name) for name in code},
        "members": dict(sorted(members.items())),
    }
    path.parent.mkdir(exist_ok=True)
    beside = path.with_suffix(".new")
    texts = {
        "record.json": json.dumps(index, indent=1),
        **{f"{name}.json": files[name] for name in sorted(files)},
    }
    with zipfile.ZipFile(beside, "w") as file:
        for (
            name,
            text,
        ) in texts.items():  # with one date, so that the same records are the same bytes
            file.writestr(
                zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), text, zipfile.ZIP_DEFLATED, 9
            )
    beside.replace(path)


if __name__ == "__main__":
    sys.exit(main())
