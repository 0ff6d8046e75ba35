"""will-it-fit: whether a fine-tuning step fits a GPU, asked in one line.

    will-it-fit Qwen/Qwen2.5-Coder-7B-Instruct --gpu 4090
    will-it-fit qwen2.5-coder-7b --method lora --gpu 2x3090 -s 2048 -b 4 --set lora.rank=64
    will-it-fit my-axolotl.yaml --gpu 24GiB
    will-it-fit qwen2.5-coder-7b --gpu 4070 --longest
    will-it-fit qwen2.5-coder-7b --all-gpus --rows 50000 --epochs 3 --price a100-80gb=1.29 --deadline 24h

WHAT is a model (a name in config/models/, an id on the Hub, a folder, a config.json), a scenario, a run's settings, or
a file of axolotl, LLaMA-Factory or TRL; a Python program or notebook with TRL or Unsloth; an adapter_config.json. Files
of accelerate, DeepSpeed or PEFT may follow. Nothing is executed. Exit status: 0 fits (or no GPU is named), 1 does not
fit, not by the deadline, or with --quick is too close to call, 2 something is wrong in the question, 3 no answer.
"""

from __future__ import annotations

import argparse
import re
from typing import NoReturn

from will_it_fit.common.errors import UserError
from will_it_fit.readers import TOOLS
from will_it_fit.readers.request import LIKE
from will_it_fit.scenario.strategies import STRATEGIES

METHODS = ("full", "lora", "qlora")


class Parser(argparse.ArgumentParser):
    """Errors of the command line in the form of all others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(
            f"The command line is wrong: {message}.", where="the command line",
            allowed="will-it-fit --help lists all options", write="will-it-fit qwen2.5-coder-7b --gpu 4090",
        )  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """All options."""
    made = Parser(prog="will-it-fit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("what", nargs="+", metavar="WHAT", help="a model or a file; then files beside it")
    step = made.add_argument_group("the step")
    step.add_argument("--gpu", help="4090, 'A100 80GB', 2x3090, 24GiB, ...")
    step.add_argument("--method", choices=METHODS)
    step.add_argument("-s", "--sequence-length", type=whole_number, metavar="TOKENS")
    step.add_argument("-b", "--micro-batch", type=whole_number, metavar="ROWS")
    step.add_argument("--strategy", choices=STRATEGIES, help="how several GPUs are used (fsdp2 if --gpu names several)")
    step.add_argument("--like", choices=LIKE, help="take unset fields from this tool's defaults")
    step.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="any field of a scenario")
    step.add_argument("--from", dest="tool", choices=TOOLS, help="tool that the file belongs to")
    form = made.add_argument_group("the answer")
    form.add_argument("--json", action="store_true", help="for programs: the object of will_it_fit.ask.predict")
    form.add_argument("--yaml", action="store_true", help="print the scenario as YAML and exit")
    form.add_argument("--quick", action="store_true", help="the analytic estimate alone, at once and without torch")
    form.add_argument("--fresh", action="store_true", help="ask anew, though an answer is kept from an earlier time")
    form.add_argument("--explain", action="store_true", help="what is alive at the peak")
    form.add_argument("--count", type=whole_number, metavar="N", help="with --explain or --json: the N largest tensors")
    form.add_argument("--layers", action="store_true", help="the same, one line for tensors alike in all layers")
    kinds = made.add_mutually_exclusive_group()
    kinds.add_argument("--longest", action="store_true", help="the longest sequence that fits")
    kinds.add_argument("--largest-batch", action="store_true", help="the largest micro-batch that fits")
    kinds.add_argument("--all-gpus", action="store_true", help="every GPU of the catalogue")
    kinds.add_argument("--compare", metavar="nvidia-smi=14.2GiB", help="explain the gap to your own measurement")
    kinds.add_argument("--serve", action="store_true", help="serving the model instead of training it")
    run = made.add_argument_group("the run", "hours, cost and energy, with --gpu or --all-gpus")
    run.add_argument("--rows", type=whole_number, metavar="N", help="rows of the training data")
    run.add_argument("--tokens-per-row", metavar="N", help="mean row length (default: the sequence length)")
    run.add_argument("--epochs", metavar="N", help="number of epochs (default: 1)")
    run.add_argument("--price", action="append", default=[], metavar="PER_HOUR",
                     help="price per GPU-hour, any currency: a number, NAME=1.29, or a YAML file of them")  # fmt: skip
    run.add_argument("--deadline", metavar="24h", help="the run has to end within it: 90min, 24h, 3d")
    run.add_argument("--grams-per-kwh", metavar="GRAMS", help="CO2 of the electricity")
    serve = made.add_argument_group("with --serve")
    serve.add_argument("--requests", type=whole_number, default=1, metavar="N", help="requests at once (1)")
    serve.add_argument("--weights", default=None, help="bf16, fp16, nf4, or a GGUF quantization such as q4_k_m")
    return made


def whole_number(text: str) -> int | None:
    """A count as it is written on a command line, thousands set apart or not; None for anything else."""
    plain = re.sub(r"(?<=\d)[,_](?=\d{3})", "", text.strip())
    return int(plain) if re.fullmatch(r"[1-9]\d*", plain) else None
