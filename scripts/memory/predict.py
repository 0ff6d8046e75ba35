"""The library's :mod:`dryfit.ask.predict` under the name that other programs call."""

from dryfit.ask.predict import main
from dryfit.common.terminal import command

if __name__ == "__main__":
    command(main)
