"""``python -m scripts.screen``: the shell task's screen by its short name, which is a contract."""

from dryfit.common.terminal import command
from scripts.tasks.shell.screen.__main__ import main

if __name__ == "__main__":
    command(main)
