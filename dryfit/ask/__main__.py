"""``python -m dryfit.ask``: the command line, :mod:`dryfit.ask.command`."""

from dryfit.ask.command import run

run()
