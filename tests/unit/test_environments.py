"""The environments of pip and conda hold the same versions, all that the rules import, and nothing else."""

import re
import subprocess
import sys
from functools import cache
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from envs.install import direct_lines
from scripts.common.code_digests import imported_packages

ROOT = Path(__file__).resolve().parents[2]
RULE_FILES = [ROOT / "Snakefile", *sorted((ROOT / "rules").glob("*.smk"))]

# Required, but imported by no module of this project.
NOT_IMPORTED = {
    "snakemake": "reads the Snakefile",
    "accelerate": "transformers places a model's weights with it",
    "bitsandbytes": "transformers quantizes with it",
    "gguf": "transformers reads GGUF files with it",
    "pyarrow": "pandas reads and writes Parquet with it",
    "shfmt-py": "a program: the second opinion on what parses as Bash",
    "expecttest": "the list of operators of PyTorch imports it",
    "hypothesis": "a test library",
    "pygments": "snakemake --report colours code with it",
    "pytest": "runs the tests",
    "pytest-xdist": "runs them on all cores",
    "ruff": "a program: lints",
    "selenium": "drives the browser of tests",
    "snakefmt": "a program: formats the Snakefile",
    "tensorboard": "PyTorch writes its files with it, and a test reads them",
}

# Imported where a setting asks for it, and the extra that brings it. A message says what to install.
OPTIONAL = {
    **{name: name for name in ("deepspeed", "trl", "mcp")},
    "shtab": "completion",
    **{"diffusers": "diffusion", "sentence_transformers": "embeddings", "timm": "vision"},
    **dict.fromkeys(("torchao", "galore_torch"), "optimizers"),
    **dict.fromkeys(("triton", "liger_kernel", "cut_cross_entropy", "fla"), "run"),
}
PACKAGES = {
    "fla": "fla-core",
    "sentence_transformers": "sentence-transformers",
}  # whose name is not that of what they bring
# Where something of the library stands in for what a program imports, or follows an import of the program's own.
EXTENSIONS = (
    "causal_conv1d_cuda",
    "flash_attn_2_cuda",
    "flash_attn_interface",
    "selective_scan_cuda",
    "wkv_cuda",
)
STOOD_IN = {
    **dict.fromkeys((*EXTENSIONS, "kernels"), "dryfit/engine/extensions.py"),
    "pynvml": "dryfit/program/nvml.py",
    "tiktoken": "dryfit/program/data.py",
}


def pins(lines: list[str]) -> dict[str, str]:
    """Requirement lines by normalized package name."""
    wanted = [line.partition(" #")[0].strip() for line in lines]
    return {
        canonicalize_name(Requirement(line).name): line
        for line in wanted
        if line and line[0] not in "#-"
    }


def requirements(group: str = "run") -> dict[str, str]:
    return pins(direct_lines(group, is_extra=False))


@cache
def environment(path: Path) -> tuple[dict, dict[str, str]]:
    """An environment file as a mapping, and the lines of its ``pip:`` section by package."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    (section,) = [entry["pip"] for entry in content["dependencies"] if isinstance(entry, dict)]
    return content, pins(section)


@cache
def rules() -> dict[str, tuple[Path, Path]]:
    """Each rule's environment file and script."""
    found = {}
    start = r"^[ ]*(?:rule|checkpoint|use rule|def|if|else)\b"
    for file in RULE_FILES:
        for block in re.split(f"(?m)(?={start})", file.read_text(encoding="utf-8")):
            name = re.match(r"\s*(?:rule|checkpoint) (\w+):", block)
            paths = {
                key: re.search(rf'(?m)^\s+{key}:\s+"([^"]+)"', block) for key in ("conda", "script")
            }
            if name and paths["script"]:
                assert paths["conda"], (
                    f"{file.name}: rule {name[1]} has a script, but no conda environment"
                )
                found[name[1]] = tuple(
                    (file.parent / paths[key][1]).resolve() for key in ("conda", "script")
                )
    return found


provided_by = cache(packages_distributions)


def distributions(imported: frozenset[str]) -> set[str]:
    """Names of the packages to install for what is imported."""
    provided = provided_by()
    imported = imported - {
        "envs",
        "tests",
        *OPTIONAL,
        *STOOD_IN,
    }  # the first two are this project's, like scripts
    unknown = [name for name in imported if name not in provided]
    assert not unknown, f"not installed here: {unknown}"
    return {canonicalize_name(provided[name][0]) for name in imported}


@pytest.mark.parametrize(
    "path", sorted({conda for conda, _ in rules().values()}), ids=lambda path: path.name
)
def test_environment_file_repeats_the_pins(path: Path) -> None:
    content, pip = environment(path)
    pinned = requirements()
    drifted = {name: line for name, line in pip.items() if line != pinned.get(name)}
    assert not drifted, f"{path.name} and pyproject.toml differ: {drifted}"
    assert content["channels"] == ["conda-forge"]
    conda = {
        re.match(r"[\w-]+", entry)[0] for entry in content["dependencies"] if isinstance(entry, str)
    }
    assert conda == {"python", "pip"}, "what conda installs itself has no pin in pyproject.toml"


def test_versions_are_pinned_and_extras_are_there() -> None:
    for name, line in requirements("dev").items():
        operators = sorted(specifier.operator for specifier in Requirement(line).specifier)
        assert operators == (["<", ">="] if name == "torch" else ["=="]), line
    files = [
        *(ROOT / "dryfit").rglob("*.py"),
        *(ROOT / "docs").glob("*.md"),
        ROOT / "dryfit" / "README.md",
    ]
    texts = [path.read_text(encoding="utf-8") for path in files]
    named = {
        name for text in texts for name in re.findall(r"dryfit\[(\w+)\]|the extra `(\w+)`", text)
    }
    assert {"run", "trl"} < (found := {one or other for one, other in named})
    assert all(direct_lines(name, is_extra=True) for name in found)


def test_every_rule_with_a_script_is_seen() -> None:
    """The other tests rely on reading the rule files as text: no script may hide from that."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in RULE_FILES)
    assert len(re.findall(r"(?m)^\s+script:", text)) == len(rules()) > 0


@pytest.mark.parametrize(
    "script", sorted({script for _, script in rules().values()}), ids=lambda path: path.stem
)
def test_script_can_stand_behind_snakemakes_preamble(script: Path) -> None:
    """Snakemake puts lines of its own before a rule's script, which ``from __future__`` would have to precede."""
    assert "from __future__" not in script.read_text(encoding="utf-8")


@pytest.mark.few(6)
@pytest.mark.parametrize("rule", sorted(rules()))
def test_environment_has_what_the_rule_imports(rule: str) -> None:
    conda, script = rules()[rule]
    missing = distributions(imported_packages(script)) - set(environment(conda)[1])
    assert not missing, (
        f"{script.relative_to(ROOT)} or a module below it imports {missing}; {conda.name} lacks it"
    )


def test_no_rule_has_a_larger_environment_than_it_needs() -> None:
    smallest = sorted(
        {conda for conda, _ in rules().values()}, key=lambda path: len(environment(path)[1])
    )
    for rule, (conda, script) in rules().items():
        needed = distributions(imported_packages(script))
        enough = [path.name for path in smallest if needed <= set(environment(path)[1])]
        assert "light.yaml" not in enough or conda.name == "light.yaml", (
            f"{rule} needs no more than light.yaml"
        )


@pytest.mark.thorough
def test_requirements_hold_nothing_that_nobody_imports() -> None:
    files = [path for folder in ("scripts", "tests") for path in (ROOT / folder).rglob("*.py")]
    imported = distributions(frozenset().union(*(imported_packages(path) for path in files)))
    assert set(requirements("dev")) - imported - set(NOT_IMPORTED) - {"shtab", "trl"} == set()


def test_the_snakefile_needs_nothing_beside_snakemake() -> None:
    """Users may have Snakemake alone in an environment and leave all else to --use-conda."""
    todo, brought = ["snakemake"], set()
    while todo:
        name = todo.pop()
        if name not in brought:
            brought.add(name)
            needs = [Requirement(line) for line in distribution(name).requires or []]
            todo += [
                canonicalize_name(need.name)
                for need in needs
                if not need.marker or need.marker.evaluate()
            ]
    text = "\n".join(path.read_text(encoding="utf-8") for path in RULE_FILES)
    statements = re.findall(r"(?m)^\s*(from scripts[\w.]* import [\w, ]+)$", text)
    assert statements
    program = "\n".join(
        [*statements, "import sys", "print(*{name.partition('.')[0] for name in sys.modules})"]
    )
    loaded = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    third_party = frozenset(loaded.stdout.split()) & provided_by().keys() - sys.stdlib_module_names
    assert distributions(frozenset(third_party)) - brought <= {
        "pip",
        "setuptools",
        "dryfit",
    }  # what site loads by itself


@pytest.mark.parametrize("package", OPTIONAL)
def test_an_extra_brings_each_optional_package(package: str) -> None:
    name = canonicalize_name(PACKAGES.get(package, package))
    assert (
        name in pins(direct_lines(OPTIONAL[package], is_extra=True)) and name not in requirements()
    )
