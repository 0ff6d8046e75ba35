"""How many modules somebody has to read who follows one question: those of which a function is called."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import json, sys
library, entered = sys.argv[1], set()

def called(frame, event, _):
    code = frame.f_code  # flag 1: a function, not the body of a module or a class
    comprehension = code.co_name in ("<genexpr>", "<listcomp>", "<dictcomp>", "<setcomp>")
    if code.co_flags & 1 and not comprehension and code.co_filename.startswith(library):
        entered.add(code.co_filename[len(library):])

sys.settrace(called)  # of Python's functions alone, and of their calls alone
from dryfit.ask.command import main
main(sys.argv[2:])
sys.settrace(None)
print(json.dumps(sorted(entered)), file=sys.stderr)
"""


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("options", "most"), [(("--quick",), 55), ((), 105)], ids=["quick", "traced"]
)
def test_a_question_about_a_file_enters_few_modules(tmp_path, options, most) -> None:
    file = tmp_path / "step.yaml"
    file.write_text("model: smollm2-135m\nsequence_length: 256\n")
    words = [f"{ROOT / 'dryfit'}{os.sep}", str(file), "--gpu", "rtx-4090", *options]
    made = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], cwd=ROOT, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    entered = json.loads(made.stderr.splitlines()[-1])
    assert len(entered) <= most, "\n".join(entered)
