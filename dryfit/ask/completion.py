"""``dryfit --print-completion SHELL``: the script with which a shell completes this command, made by shtab.

The commands and their options are those of :mod:`dryfit.ask.options`; models and GPUs come from the catalogues.
"""

import argparse
from typing import Any

from dryfit.ask import options
from dryfit.common.errors import UserError

INSTALL = 'pip install "dryfit[completion]"'
# What names a WHAT: a model of the catalogue, or a file. ``{names}`` stands for the names.
_WHAT = {
    "bash": '_dryfit_what() {{ compgen -W "{names}" -- "$1"; compgen -f -- "$1"; }}',
    "zsh": "_dryfit_what() {{ compadd {names}; _files }}",
    "fish": "",
}


def script(shell: str) -> str:
    """The script for a shell.

    UserError: for a shell that has none, or if shtab is not installed.
    """
    try:
        import shtab
    except ImportError:
        raise UserError(
            "The package shtab is not installed, which makes the script.",
            where="--print-completion",
            write=INSTALL,
        ) from None
    if shell not in _WHAT:
        raise UserError(
            "Completion is for three shells.",
            where="--print-completion",
            found=shell,
            allowed=", ".join(_WHAT),
            write=f"{options.PROGRAM} --print-completion bash",
        )
    from dryfit.scenario.hub import MODELS

    names = " ".join(sorted(path.stem for path in MODELS.glob("*.json")))
    whole = _whole_parser(
        {"bash": "_dryfit_what", "zsh": "_dryfit_what", "fish": shtab.FILE["fish"]}
    )
    return shtab.complete(
        whole, shell, preamble={one: text.format(names=names) for one, text in _WHAT.items()}
    )


def _whole_parser(what: dict[str, str]) -> argparse.ArgumentParser:
    """All commands in one parser. ``fit`` is the whole command's too, since the word may be left out."""
    from dryfit.cards.gpus import catalogue

    made = argparse.ArgumentParser(prog=options.PROGRAM, description=options.COMMANDS["fit"].about)
    made.add_argument("--version", action="store_true", help="versions")
    options.add_options(made, "fit")
    adds = made.add_subparsers()
    for name, command in options.COMMANDS.items():
        parent: Any = options.own_parser(name)
        for action in parent._actions:
            if action.dest == "what":
                action.complete = what
            elif action.dest == "gpu":
                action.choices = list(catalogue())
        added = adds.add_parser(
            name, help=command.about.replace("%", "%%"), add_help=False, parents=[parent]
        )
        added.prog = f"{options.PROGRAM} {name}"
    return made
