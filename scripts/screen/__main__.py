"""``python -m scripts.screen`` reads commands from standard input, one a line, and prints for each, in order, ``ok``,
``danger<TAB>category<TAB>rule`` or ``unparsable``."""

from __future__ import annotations

import argparse
import json
import sys

from scripts.common.job import command as command_line
from scripts.screen.measure import evaluate, labelled, table
from scripts.screen.policy import UNPARSABLE, build


def main() -> int:
    """Command line: status 0 whatever the verdicts, 2 for a wrong file or policy."""
    parser = argparse.ArgumentParser(prog="python -m scripts.screen", description=__doc__.split("\n")[0])
    parser.add_argument("--policy", metavar="FILE.yaml", action="append", default=[], help="laid over the own one")
    parser.add_argument("--check", action="store_true", help="hold the policy against its schema and examples")
    parser.add_argument("--evaluate", metavar="FILE.tsv", help="show how a labelled set comes out")
    parser.add_argument("--json", action="store_true", help="JSON rather than lines or Markdown")
    options = parser.parse_args()
    policy = build(*options.policy)
    if options.check:
        print(f"{len(policy.rules)} rules, each with its examples as it says")
        return 0
    if options.evaluate:
        result = evaluate(labelled(options.evaluate), policy)
        print(json.dumps(result, indent=2, sort_keys=True) if options.json else table(result))
        return 0
    for line in sys.stdin.buffer:
        try:
            verdict = policy.judge(line.decode("utf-8").rstrip("\r\n"))
        except UnicodeDecodeError:
            verdict = UNPARSABLE
        if options.json:
            told = {key: getattr(verdict, key) for key in ("attack", "category", "level", "rule", "status", "title")}
            print(json.dumps(told, sort_keys=True))
        else:
            print(verdict.line())
    return 0


if __name__ == "__main__":
    command_line(main)
