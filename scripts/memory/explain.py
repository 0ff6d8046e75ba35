"""An old name of ``will-it-fit WHAT --explain --count N``, with its options and its JSON object as they were."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from will_it_fit.ask.explain import explain, table
from will_it_fit.ask.options import whole_number
from will_it_fit.ask.question import Options, question
from will_it_fit.common.errors import UserError
from will_it_fit.common.terminal import command, moved


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.memory.explain", description=__doc__)
    parser.add_argument("scenario", type=Path, metavar="SCENARIO.yaml")
    parser.add_argument("--count", type=whole_number, default=10, metavar="N", help="how many tensors (default: 10)")
    parser.add_argument("--layers", action="store_true", help="one line for tensors that differ in their layer alone")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    options = parser.parse_args(arguments)
    moved("scripts.memory.explain", f"will_it_fit.ask {options.scenario} --explain --count {options.count or 10}")
    if options.count is None:
        raise UserError("There is nothing to show.", where="--count", allowed="1, 2, 3, ...", write="--count 10")
    scenario = question([options.scenario], Options()).scenario
    tensors = explain(scenario, options.scenario, count=options.count, layers=options.layers)
    print(json.dumps(tensors, indent=2, sort_keys=True) if options.json else table(tensors))
    return 0


if __name__ == "__main__":
    command(main)
