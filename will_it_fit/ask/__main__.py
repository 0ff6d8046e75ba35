"""``python -m will_it_fit.ask``: the command line, :mod:`will_it_fit.ask.command`."""

from will_it_fit.ask.command import run

run()
