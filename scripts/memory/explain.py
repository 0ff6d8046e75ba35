"""An old name of :mod:`will_it_fit.ask.explain`."""

from will_it_fit.ask.explain import main
from will_it_fit.common.terminal import command, moved

if __name__ == "__main__":
    moved("scripts.memory.explain", "will_it_fit.ask.explain")
    command(main)
