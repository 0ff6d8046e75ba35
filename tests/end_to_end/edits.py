"""Edit a value in each JSON file that a job of a finished run reads, one at a time, and run that job again.

    python -m tests.end_to_end.edits FOLDER CONFIGFILE     a line of JSON for each job and file: rule, path, said

Which job reads what is Snakemake's own answer, so that a rule that is new is tried too. Each job runs in a child of
this process, which has loaded the heavy packages once; it writes into a scratch folder, so that one that notices
nothing does no harm. ``said`` is the job's log, None where it ended without an error.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from scripts.common import code_digests
from scripts.runs import alone
from scripts.runs.alone import jobs, script_of

ENDINGS = (".json", ".jsonl")
PATIENCE_SECONDS = 60


def changed(value: Any) -> Any:
    """A value with its last leaf changed: a figure by one, a text by a letter."""
    if isinstance(value, dict) and value:
        key = sorted(value)[-1]
        key = "seed" if "seed" in value else key
        return {**value, key: changed(value[key])}
    if isinstance(value, list) and value:
        return [*value[:-1], changed(value[-1])]
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int | float) else f"{value or ''}x"


def edit(path: Path) -> None:
    """Change a value; the file is replaced, since another folder may have a link to it. Its time stays."""
    text, times = path.read_text(encoding="utf-8"), path.stat()
    if path.suffix == ".json":
        text = json.dumps(changed(json.loads(text)), indent=2, sort_keys=True) + "\n"
    else:
        first, end, rest = text.partition("\n")
        text = json.dumps(changed(json.loads(first or '{"request": ""}'))) + (end or "\n") + rest
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, encoding="utf-8")
    os.utime(new, ns=(times.st_atime_ns, times.st_mtime_ns))
    os.replace(new, path)


def run(job: Any, scratch: Path) -> int:
    """Run a job's script in a child of this process; returns its exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        import signal

        signal.alarm(PATIENCE_SECONDS)
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        alone.run(job, scratch, [str(scratch / "log")])
        os._exit(0)
    except SystemExit as error:
        os._exit(error.code if isinstance(error.code, int) else 1)
    except BaseException as error:
        with open(scratch / "log", "a") as said:
            said.write(f"\n{type(error).__name__}: {error}")
        os._exit(3)


def main(folder: Path, configuration: Path) -> None:
    """Try each pair of a job and a JSON file that it reads."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    import pandas  # noqa: F401

    tried = set()  # documents of one script read the same
    for heavy, job in sorted(
        ((code_digests.environment_of(script_of(job)), job) for job in jobs(configuration)), key=str
    ):
        if heavy == "torch":
            import peft  # noqa: F401
        for path in map(Path, job.input):
            pair = (job.rule.script, path)
            if path.suffix not in ENDINGS or path.parts[0] != "results" or pair in tried:
                continue
            if str(path) in job.input.get(
                "unread", []
            ):  # asked for, so that it is made again when it is missing
                continue
            tried.add(pair)
            kept, times = path.read_bytes(), path.stat()
            with tempfile.TemporaryDirectory() as scratch:
                edit(path)
                try:
                    status = run(job, Path(scratch))
                finally:
                    path.unlink()
                    path.write_bytes(kept)
                    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
                said = (
                    Path(scratch, "log").read_text(encoding="utf-8", errors="replace")
                    if status
                    else None
                )
            print(json.dumps({"path": str(path), "rule": job.rule.name, "said": said}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
