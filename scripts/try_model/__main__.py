"""Ask the model of a finished run: what it answers, and what to know before using the answer.

    make ask Q="find log files larger than 10 MB"
    python -m scripts.try_model --run results/smollm2-135m-r16 "count the lines of notes.txt"

Without a request it asks for one after another until Ctrl-D; from a pipe it reads one request a line. An answer is
shown and judged, and never run.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dryfit.common.errors import UserError
from dryfit.common.files import read_folder, read_report
from dryfit.common.terminal import command as command_line
from dryfit.common.terminal import log
from dryfit.common.text import printable
from scripts.tasks.support import keys, registry
from scripts.tasks.text import Task

RESULTS = Path("results")
LEVEL_STYLES = {"ok": "green", "caution": "yellow", "danger": "bold red", "unknown": "magenta"}
INDENT = "  "


class FinishedRun(NamedTuple):
    """A finished run: its folder, its task, and how evaluation asked its model."""

    folder: Path
    task: Task
    system: str
    max_new_tokens: int
    sequence_length: int


def finished_runs(results: Path) -> list[Path]:
    """Folders of finished runs that hold a merged model, the newest last."""
    folders = []
    for provenance in results.glob("*/provenance.json"):
        if (provenance.parent / "merged" / "manifest.json").is_file():
            folders.append(provenance.parent)
    return sorted(folders, key=lambda folder: (folder / "provenance.json").stat().st_mtime)


def chosen_folder(wanted: str | None, results: Path = RESULTS) -> Path:
    """The folder of the run that is named, or of the last one.

    UserError: where there is no such run, or none at all.
    """
    runs = finished_runs(results)
    names = ", ".join(str(folder) for folder in runs)
    if wanted is None:
        if runs:
            return runs[-1]
        raise UserError(
            "No run is finished, so there is no model to ask.",
            where=f"the folder {results}",
            allowed="a run's folder with provenance.json and merged/",
            write="make run",
        )
    for folder in (Path(wanted), results / wanted):
        if folder in runs or (folder / "merged" / "manifest.json").is_file():
            return folder
    raise UserError(
        "This folder holds no finished run.",
        where="--run",
        found=wanted,
        allowed=names or "no run is finished here: make run",
    )


def read_run(folder: Path) -> FinishedRun:
    """What a finished run's files say about asking its model."""
    if not (folder / "provenance.json").is_file():
        raise UserError(
            "This run is not finished, so its model was never evaluated.",
            where=folder,
            write="make run  # or the snakemake command that started it",
        )
    configuration = read_report(folder / "provenance.json")["configuration"]
    metrics = read_report(folder / "evaluation" / "metrics.json")
    return FinishedRun(
        folder,
        registry.task(registry.checked(configuration["task"]), "advice"),
        metrics["prompt"]["system"],
        metrics["decoding"]["max_new_tokens"],
        configuration["training"]["sequence_length"],
    )


class Model:
    """A run's merged model, ready to answer."""

    def __init__(self, run: FinishedRun, device: str) -> None:
        from scripts.common.machine import pick_device
        from scripts.common.tokenizer import read_tokenizer
        from scripts.evaluation.evaluate import load

        self.run = run
        folder = run.folder / "merged"
        read_folder(folder / "manifest.json")
        self.tokenizer = read_tokenizer(folder)
        self.model = load(folder, pick_device(device))

    def tokens_of(self, request: str) -> list[int]:
        """Token ids of the prompt, as training and evaluation write it.

        UserError: for a request that is longer than the model was trained to read.
        """
        from dryfit.common.chat import render_prompt

        prompt = render_prompt(self.tokenizer, self.run.system, request)
        tokens = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if len(tokens) > self.run.sequence_length:
            raise UserError(
                f"The request is too long: with its prompt it has {len(tokens)} tokens.",
                where="the request",
                found=request[:60] + "...",
                allowed=f"at most {self.run.sequence_length} tokens, as in training",
            )
        return tokens

    def answer(self, request: str) -> str:
        """The model's greedy answer to a request."""
        import torch

        tokens = self.tokens_of(request)
        prompt = torch.tensor([tokens], device=self.model.device)
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=self.run.max_new_tokens,
                do_sample=False,
                pad_token_id=self.tokenizer.eos_token_id,
            )
        text = self.tokenizer.decode(output[0, len(tokens) :], skip_special_tokens=True)
        return text.replace("\0", " ").strip()


def checked_request(run: FinishedRun, text: str) -> str:
    """The request as the dataset's rows are cleaned.

    UserError: for an empty one, one of control characters, or one that is far too long.
    """
    request = run.task.clean_request(text)
    problem = keys.defect(request, "answer")
    if problem is not None:
        raise UserError(
            f"This can't be asked: the {problem}.",
            where="the request",
            found=printable(request[:60]),
            allowed=f"1 to {keys.MAXIMUM_CHARACTERS} characters of text",
        )
    return request


def show(console: Any, run: FinishedRun, answer: str) -> None:
    """Print an answer, and below it the verdict and the reason."""
    from rich.text import Text

    advice = run.task.advice(answer)
    console.print(Text(printable(answer), style="bold"), soft_wrap=True)
    line = Text(INDENT)
    line.append(advice.verdict, style=LEVEL_STYLES[advice.level])
    line.append(f": {printable(advice.reason)}")
    console.print(line, soft_wrap=True)


def requests_to_answer(given: Sequence[str]) -> Iterator[str]:
    """The request on the command line, or one after another from a terminal or a pipe."""
    if given:
        yield " ".join(given)
        return
    if not sys.stdin.isatty():
        for line in sys.stdin:
            if line.strip():
                yield line
        return
    import readline  # noqa: F401  the prompt then has a history and can be edited

    log.info("What do you want to do? One request a line; Ctrl-D ends.")
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        if line.strip():
            yield line


def main() -> int:
    """Command line: status 0, or 2 for a request or a run that can't be used."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.try_model", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("request", nargs="*", help="what to ask; without it, a prompt that stays")
    parser.add_argument("--run", metavar="FOLDER", help="a finished run (default: the last one)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    options = parser.parse_args()
    run = read_run(chosen_folder(options.run))
    if options.request:
        checked_request(run, " ".join(options.request))  # before the weights are read
    from rich.console import Console

    console = Console(highlight=False)
    log.info("Asking %s. Answers are shown, never run.", run.folder)
    os.environ["TQDM_DISABLE"] = "1"  # reading the weights takes a second: no bar of transformers
    model = Model(run, options.device)
    status = 0
    for text in requests_to_answer(options.request):
        try:
            answer = model.answer(checked_request(run, text))
        except UserError as error:
            print(error, file=sys.stderr)
            status = 2
            continue
        show(console, run, answer)
    return status


if __name__ == "__main__":
    command_line(main)
