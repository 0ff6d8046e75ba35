"""An old name of :mod:`will_it_fit.planner.plan`."""

from will_it_fit.common.terminal import command, moved
from will_it_fit.planner.plan import main

if __name__ == "__main__":
    moved("scripts.planner.plan", "will_it_fit.planner.plan")
    command(main)
