"""The pipeline as a module of another workflow: from a checkout and from a git URL, with a partial configuration."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.workflow.plan import snakemake

ROOT = Path(__file__).resolve().parents[2]
CONFIGURATION = {
    "run": {"name": "imported"},
    "dataset": {
        "name": "few",
        "sources": [{"type": "embedded", "license": "Apache-2.0", "seed": 42, "pairs": 200}],
    },
    "lora": {"rank": 8},
}


def workflow(folder: Path, snakefile: str, configuration: dict) -> Path:
    """A workflow that imports this one and puts all of it below tuner/."""
    (folder / "Snakefile").write_text(
        "module tuner:\n"
        f"    snakefile: {snakefile}\n"
        f"    config: {configuration!r}\n"
        '    prefix: "tuner"\n'
        "use rule * from tuner as tuner_*\n"
    )
    return folder


@pytest.mark.thorough
def test_from_a_checkout(tmp_path: Path) -> None:
    importer = workflow(tmp_path, repr(str(ROOT / "Snakefile")), CONFIGURATION)
    results = importer / "tuner" / "results"
    wanted = (
        results / "imported-r8/memory/qlora/estimate.json",
        results / "dataset/few/clean.json",
    )
    done = snakemake(importer, *(path.relative_to(importer) for path in wanted))
    assert done.returncode == 0, done.stderr[-3000:]
    estimate, cleaned = (json.loads(path.read_text()) for path in wanted)
    assert estimate["scenario"]["lora"]["rank"] == 8
    assert estimate["scenario"]["lora"]["target_modules"] == "all-linear", (
        "what the importer leaves out is the project's own"
    )
    assert cleaned["kept"] == 200
    assert not (importer / "results").exists()


@pytest.mark.thorough
def test_a_score_that_is_there_is_found_behind_the_prefix(tmp_path: Path) -> None:
    benchmark = yaml.safe_load((ROOT / "config/cpu-hour.yaml").read_text())["dataset"]["benchmark"]
    configuration = CONFIGURATION | {"dataset": CONFIGURATION["dataset"] | {"benchmark": benchmark}}
    importer = workflow(tmp_path, repr(str(ROOT / "Snakefile")), configuration)
    score = "tuner/results/imported-r8/evaluation/execution.json"
    (importer / score).parent.mkdir(parents=True)
    (importer / score).touch()  # without the rows behind it, which no job makes
    done = snakemake(importer, "--dry-run", "tuner/results/imported-r8/MODEL_CARD.md")
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert "tuner_record_provenance" in said and f"{score}l" in said


@pytest.mark.thorough
@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_from_a_git_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What github() fetches, served by a bare repository on this machine."""

    def git(*arguments: str | Path) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(("git", *identity, *map(str, arguments)), check=True, capture_output=True)

    work, bare, importer = tmp_path / "work", tmp_path / "bare.git", tmp_path / "importer"
    work.mkdir()
    shutil.copy(ROOT / "Snakefile", work)
    for name in ("rules", "scripts", "dryfit", "config", "envs"):
        shutil.copytree(ROOT / name, work / name, ignore=shutil.ignore_patterns("__pycache__"))
    git("init", "-b", "main", work)
    git("-C", work, "add", ".")
    git("-C", work, "commit", "-m", "all")
    git("-C", work, "tag", "v1")
    git("clone", "--bare", work, bare)
    shutil.rmtree(work)
    importer.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", f"url.{bare.as_uri()}.insteadOf")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "https://github.com/somebody/tuner")
    workflow(importer, 'github("somebody/tuner", path="Snakefile", tag="v1")', CONFIGURATION)
    done = snakemake(importer, "tuner/results/dataset/few/clean.json")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert (
        json.loads((importer / "tuner/results/dataset/few/clean.json").read_text())["kept"] == 200
    )
    again = snakemake(importer, "--dry-run", "tuner/results/dataset/few/clean.json")
    assert "Nothing to be done" in again.stdout + again.stderr
    # As the main file, where nothing is unpacked yet: names of the workflow are Snakemake's own names then.
    (tmp_path / "main").mkdir()
    (tmp_path / "main" / "few.yaml").write_text(json.dumps(CONFIGURATION))
    main = snakemake(
        tmp_path / "main",
        "--snakefile",
        "gh:somebody/tuner@v1:Snakefile",
        "--configfile",
        "few.yaml",
        "-n",
    )
    assert main.returncode == 0 and "render_documents" in main.stdout, (main.stdout + main.stderr)[
        -3000:
    ]
