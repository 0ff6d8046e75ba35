"""Kill the tiny chain at random, and let its disk fill up: what stands at the end is what an undisturbed run leaves.

    python -m tests.benchmarks.kills --folder /tmp/kills --kills 30 --disks 10 --seed 0

Kills: the chain runs in a checkout, its whole process group gets SIGKILL at a random moment, and the same command is
given again, several times over, until it ends. Full disks (as root, on Linux): the checkout lies on a small tmpfs; when
a run fails, what it said is looked through for a message about the disk, the tmpfs is enlarged, and the same command is
given again. After each, adapter, merged model, answers and traces are compared byte for byte with an undisturbed
run's, which stays in the folder for the next call, and what lies there that it does not have is named. Each
disturbance is a line of JSON on standard output; at the end there is the tally. Exit status 1: something differed.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts.common.files import sha256_file
from tests.end_to_end.chain import CONFIGURATION, ROOT, checkout

COMPARED = ("**/adapter/*", "**/merged/*", "**/answers.jsonl", "**/memory/**/trace.json")
COMMAND = [sys.executable, "-m", "snakemake", "--cores", "2", "--configfile", str(CONFIGURATION.relative_to(ROOT))]
KILLS_EACH = 10  # of one chain, before it may end: then kills reach its last jobs too
PATIENCE_SECONDS = 1200  # a run that takes longer is stuck
FULL = ("the disk filled up", "the disk is too small", "no space left on device", "disk is full")
MIB = 2**20


def start(project: Path, log: Path) -> subprocess.Popen:
    """Give the command, in a process group of its own; what it says goes to the end of ``log``."""
    with open(log, "ab") as said:
        return subprocess.Popen(COMMAND, cwd=project, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)


def finish(run: subprocess.Popen, seconds: float) -> bool:
    """Wait for a run; kill its group if it has not ended by then. Returns whether it ended by itself."""
    try:
        run.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        return False
    return True


def digests(project: Path) -> dict[str, str]:
    """SHA-256 of each file that has to be the same, by its path below ``results/``."""
    results = project / "results"
    files = {path for pattern in COMPARED for path in results.glob(pattern) if path.is_file()}
    return {str(path.relative_to(results)): sha256_file(path) for path in sorted(files) if "/kept/" not in str(path)}


def left_behind(project: Path, reference: Path) -> list[str]:
    """Paths below ``results/`` that an undisturbed run does not have: partial files, half-made folders."""
    paths = ({path.relative_to(folder) for path in (folder / "results").rglob("*")} for folder in (project, reference))
    disturbed, undisturbed = paths
    return sorted(map(str, disturbed - undisturbed))


def judge(project: Path, reference: Path, expected: dict[str, str]) -> dict:
    """What differs from the undisturbed run, and what was left behind."""
    found = digests(project)
    differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    return {"compared": len(expected), "differing": differing, "left_behind": left_behind(project, reference)}


def say(**line: object) -> None:
    print(json.dumps(line, sort_keys=True), flush=True)


def last_jobs(log: Path, begin: int) -> str:
    """What a run did last, from the place in its log where it began: its last rule and its last line."""
    lines = [line for line in log.read_bytes()[begin:].decode(errors="replace").splitlines() if line.strip()]
    rules = [line.split()[1].rstrip(":") for line in lines if line.startswith(("rule ", "localrule "))]
    return f"{rules[-1] if rules else 'before any job'}: {lines[-1].strip()[:120] if lines else ''}"


def undisturbed(folder: Path) -> tuple[dict[str, str], float]:
    """Digests of a run that nobody disturbs, and the seconds it took; made once."""
    project, took = folder / "undisturbed", folder / "undisturbed.json"
    if not took.is_file():
        shutil.rmtree(project, ignore_errors=True)
        project.mkdir(parents=True)
        run, begun = start(checkout(project), folder / "undisturbed.log"), time.monotonic()
        if not finish(run, PATIENCE_SECONDS) or run.returncode:
            sys.exit(f"The undisturbed run failed; see {folder / 'undisturbed.log'}")
        took.write_text(json.dumps({"seconds": time.monotonic() - begun}))
    return digests(project), json.loads(took.read_text())["seconds"]


def killed_chain(folder: Path, number: int, kills: int, draw: random.Random, seconds: float, expected: dict) -> dict:
    """One chain with some kills, from an empty checkout to its end."""
    project, log = folder / f"killed-{number}", folder / f"killed-{number}.log"
    shutil.rmtree(project, ignore_errors=True)
    log.unlink(missing_ok=True)
    checkout(project)
    made = 0
    while True:
        begin = log.stat().st_size if log.exists() else 0
        moment = draw.uniform(0, 2 * seconds / (kills + 1)) if made < kills else PATIENCE_SECONDS
        run = start(project, log)
        if finish(run, moment):
            if run.returncode:
                return {"chain": number, "failed": last_jobs(log, begin), "kills": made}
            break
        if made == kills:
            return {"chain": number, "failed": "it did not end", "kills": made}
        made += 1
        say(chain=number, kill=made, after_seconds=round(moment, 1), at=last_jobs(log, begin))
    outcome = {"chain": number, "kills": made, **judge(project, folder / "undisturbed", expected)}
    if not outcome["differing"]:
        shutil.rmtree(project)
    return outcome


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[None]:
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "kills", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def full_disks(folder: Path, number: int, most: int, draw: random.Random, needed: int, expected: dict) -> dict:
    """One chain on a disk that is too small at first, and is enlarged each time that it has filled up."""
    place, log = folder / f"disk-{number}", folder / f"disk-{number}.log"
    log.unlink(missing_ok=True)
    size, full, unclear = draw.randint(4 * MIB, needed // most), 0, []
    with small_disk(place, size):
        project = checkout(place / "checkout")
        while True:
            begin = log.stat().st_size if log.exists() else 0
            run = start(project, log)
            if not finish(run, PATIENCE_SECONDS):
                return {"disk": number, "failed": "it did not end", "full": full}
            if run.returncode == 0:
                break
            free = shutil.disk_usage(place).free
            text = log.read_bytes()[begin:].decode(errors="replace").lower()
            clear = next((words for words in FULL if words in text), None)
            full += 1
            at = last_jobs(log, begin)
            say(disk=number, full=full, size_mib=size // MIB, free_mib=free // MIB, said=clear, at=at)
            if clear is None:
                unclear.append(at)
            if size > 2 * needed:
                return {"disk": number, "failed": at, "full": full}
            size += draw.randint(needed // (2 * most), 2 * needed // most)
            subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], check=True)
        return {"disk": number, "full": full, "unclear": unclear, **judge(project, folder / "undisturbed", expected)}


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.kills", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where checkouts and logs go (some GB)")
    parser.add_argument("--kills", type=int, default=0, help="how many kills to make, over several chains")
    parser.add_argument("--disks", type=int, default=0, help="how many full disks to meet, over several chains")
    parser.add_argument("--seed", type=int, default=0, help="decides the moments and the sizes")
    arguments = parser.parse_args()
    draw, outcomes = random.Random(arguments.seed), []
    arguments.folder.mkdir(parents=True, exist_ok=True)
    folder = arguments.folder.resolve()
    expected, seconds = undisturbed(folder)
    needed = size_of(folder / "undisturbed")
    say(files=len(expected), megabytes=needed // 10**6, undisturbed_seconds=round(seconds))
    while (left := arguments.kills - sum(outcome.get("kills", 0) for outcome in outcomes)) > 0:
        kills = min(left, KILLS_EACH)
        outcomes.append(killed_chain(folder, len(outcomes) + 1, kills, draw, seconds, expected))
        say(**outcomes[-1])
        if "failed" in outcomes[-1]:
            break
    while (left := arguments.disks - sum(outcome.get("full", 0) for outcome in outcomes)) > 0:
        outcomes.append(full_disks(folder, len(outcomes) + 1, min(left, KILLS_EACH), draw, needed, expected))
        say(**outcomes[-1])
        if "failed" in outcomes[-1]:
            break
    left = sum(bool(outcome.get("left_behind")) for outcome in outcomes)
    tally = {key: sum(outcome.get(key, 0) for outcome in outcomes) for key in ("kills", "full")}
    wrong = [outcome for outcome in outcomes if "failed" in outcome or outcome["differing"]]
    say(chains=len(outcomes), chains_that_differ_or_failed=len(wrong), chains_with_leftovers=left, **tally)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
