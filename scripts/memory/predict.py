"""The library's :mod:`will_it_fit.ask.predict` under the name that other programs call."""

from will_it_fit.ask.predict import main
from will_it_fit.common.terminal import command

if __name__ == "__main__":
    command(main)
