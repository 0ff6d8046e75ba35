"""Where a run came from: configuration, code, software, hardware, and the digest of all that went in and came out.

Files at the top of a run, from the same facts:

``record.json``                what each stage reported, for the run's documents; ``summary.txt`` has it in a few lines
``provenance.json``            for people and for the model card's short form
``bill-of-materials.cdx.json`` the packages with their versions and licences, the model and the dataset (CycloneDX)

Nothing here is measured again: versions of the torch stack are those that the stages wrote down, since this rule may
run in an environment without it.
"""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import uuid
from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dryfit.common.files import sealed_files, write_report, write_text
from dryfit.common.terminal import log
from dryfit.common.versions import VERSION
from scripts.common.code_digests import ROOT
from scripts.common.job import job
from scripts.common.reports import CARRIED, carry
from scripts.documents.terminal_summary import run_lines

NAME = "SecureCLI-Tuner"
COMMAND = "SECURECLI_COMMAND"  # the Snakefile puts the command line of the whole run there
SOURCES = (
    "acquire",
    "description",
    "weights",
)  # reports of what went into the run; the others came out of it
NOT_READ = ("executed", "unread")  # inputs that no document reads
# A name for what is derived from content, so that the same bill has the same serial number.
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://spdx.org/licenses/Apache-2.0#securecli-tuner")


def source(root: Path = ROOT) -> dict[str, Any]:
    """Version, commit and whether the working tree had changes; commit None outside a git checkout."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ("git", "-C", str(root), *arguments), capture_output=True, text=True, timeout=30
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # A copy of the project inside another repository is not that repository's commit.
    top = git("rev-parse", "--show-toplevel")
    here = top is not None and Path(top).resolve() == root.resolve()
    status = git("status", "--porcelain", "--untracked-files=no") if here else None
    return {
        "clean": None if status is None else status == "",
        "commit": git("rev-parse", "HEAD") if here else None,
        "name": NAME,
        "version": VERSION,
    }


def hardware() -> dict[str, Any]:
    """The machine: processor, cores that this process may use, memory in bytes, operating system."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cores = os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        memory = None
    return {
        "cores": cores,
        "machine": platform.machine(),
        "memory_bytes": memory,
        "processor": _processor(),
        "system": f"{platform.system()} {platform.release()}",
    }


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        model_name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    except OSError:
        model_name = None
    return model_name[1].strip() if model_name else platform.processor() or platform.machine()


def software(reports: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Versions by package: what the stages' reports say, and of the pinned packages what is installed here."""
    pinned = "".join(
        (ROOT / "envs" / name).read_text(encoding="utf-8") for name in ("light.yaml", "torch.yaml")
    )
    versions = {"python": platform.python_version()}
    for name in ["snakemake", *re.findall(r"^ +- ([A-Za-z0-9._-]+)[=>]=", pinned, re.MULTILINE)]:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    for report in reports:
        versions |= {
            name: version for name, version in report.get("versions", {}).items() if version
        }
    return dict(sorted(versions.items()))


def digests(entries: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 by path: of carried files, and of those that a report among them lists.

    A report is believed for what it lists: gigabytes of weights were read when it was written, and by all who used them
    since.
    """
    reports = [entry["path"] for entry in entries if entry["path"].endswith(".json")]
    listed = ChainMap(*(sealed_files(path) for path in reports if Path(path).is_file()))
    found = {
        str(file): {"bytes": file.stat().st_size, "sha256": digest}
        for file, digest in listed.items()
        if file.is_file()
    }
    found |= {
        entry["path"]: {"bytes": entry["bytes"], "sha256": entry["sha256"]} for entry in entries
    }
    return dict(sorted(found.items()))


def bill_of_materials(record: Mapping[str, Any]) -> str:
    """The bill of materials as CycloneDX JSON: packages, base model, dataset sources.

    The serial number follows from the content and there is no time of writing, so that the same run writes the same
    bytes.
    """
    from cyclonedx.model import HashAlgorithm, HashType, Property
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.model.license import LicenseExpression
    from cyclonedx.output.json import JsonV1Dot6
    from packageurl import PackageURL

    def licenses(text: str | None) -> list:
        return [LicenseExpression(text)] if text and re.fullmatch(r"[A-Za-z0-9.+-]+", text) else []

    bom = Bom(serial_number=uuid.uuid5(_NAMESPACE, json.dumps(record, sort_keys=True)))
    bom.metadata.timestamp = None
    bom.metadata.tools.tools.clear()
    configuration = record["configuration"]
    pipeline = Component(
        name=NAME,
        version=record["source"]["version"],
        type=ComponentType.APPLICATION,
        bom_ref=NAME,
        licenses=licenses("Apache-2.0"),
        properties=[
            Property(name="commit", value=record["source"]["commit"] or "not in a git checkout")
        ],
    )
    bom.metadata.component = pipeline
    for name, version in record["software"].items():
        bom.components.add(
            Component(
                name=name,
                version=version,
                type=ComponentType.PLATFORM if name == "python" else ComponentType.LIBRARY,
                bom_ref=f"{name}=={version}",
                purl=None
                if name == "python"
                else PackageURL("pypi", name=name.lower(), version=version),
                licenses=licenses(_package_license(name)),
            )
        )
    model = configuration["model"]
    bom.components.add(
        Component(
            name=model["name"],
            type=ComponentType.MACHINE_LEARNING_MODEL,
            bom_ref=f"model:{model['name']}",
            licenses=licenses(model["license"]),
            hashes=[
                HashType(alg=HashAlgorithm.SHA_256, content=entry["sha256"])
                for path, entry in record["inputs"].items()
                if path.endswith("/model.safetensors")
            ],
        )
    )
    for number, data in enumerate(configuration["dataset"]["sources"], 1):
        name = data.get("repository") or ", ".join(data.get("paths", [])) or f"{data['type']} rows"
        bom.components.add(
            Component(
                name=name,
                type=ComponentType.DATA,
                bom_ref=f"data:{number}",
                licenses=licenses(data.get("license")),
            )
        )
    bom.register_dependency(pipeline, bom.components)
    content = json.loads(JsonV1Dot6(bom).output_as_string())
    content["metadata"].pop("timestamp", None)
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _package_license(name: str) -> str | None:
    try:
        return importlib.metadata.metadata(name).get("License-Expression")
    except importlib.metadata.PackageNotFoundError:
        return None


def main(
    inputs: Mapping[str, Any],
    run: str,
    configuration: Mapping[str, Any],
    written: Mapping[str, str],
    command: str | None,
) -> None:
    """Write what the stages reported for the documents of a run, in a few lines too, and where the run came from.

    Parameters
    ----------
    inputs
        The last reports of each line, and rows that documents show, by name.
    configuration
        As resolved.
    written
        Paths of ``record``, ``summary``, ``provenance`` and ``materials``.
    command
        The command line of the whole run, if it is known.
    """
    carried = carry(**{name: value for name, value in inputs.items() if name not in NOT_READ})
    del carried["drawn"]
    write_report(written["record"], {CARRIED: carried}, indent=None)
    by_name = {name: some if isinstance(some, list) else [some] for name, some in carried.items()}
    contents = {entry["path"]: entry["content"] for some in by_name.values() for entry in some}
    lines = run_lines(run, [entry["path"] for entry in by_name["profile"]], contents.get)
    write_text(written["summary"], "\n".join(lines) + "\n")
    reports = [content for content in contents.values() if isinstance(content, Mapping)]
    record = {
        "command": command,
        "configuration": configuration,
        "hardware": hardware(),
        "inputs": digests([entry for name in SOURCES for entry in by_name[name]]),
        "outputs": digests(
            [entry for name, some in by_name.items() if name not in SOURCES for entry in some]
        ),
        "software": software(reports),
        "source": source(),
    }
    record["hardware"]["device"] = next(
        (report["device"] for report in reports if isinstance(report.get("device"), str)), None
    )
    write_text(written["materials"], bill_of_materials(record))
    write_report(written["provenance"], record, written["materials"])
    counts = (len(record[name]) for name in ("inputs", "outputs", "software"))
    log.info("%d files in, %d files out, %d packages", *counts)


if __name__ == "__main__":
    with job(snakemake):
        main(
            dict(snakemake.input.items()),
            snakemake.wildcards.run,
            snakemake.params.configuration,
            snakemake.output,
            os.environ.get(COMMAND),
        )
