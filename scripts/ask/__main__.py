"""``python -m scripts.ask``: the command line, :mod:`scripts.ask.command`."""

from scripts.ask.command import run

run()
