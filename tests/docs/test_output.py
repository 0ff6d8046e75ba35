"""What the README shows as the command's output is its output, word for word."""

import os
import re
import shlex
import subprocess
from pathlib import Path

from tests.warm import launchers

ROOT = Path(__file__).resolve().parents[2]


def test_the_readme_shows_what_the_command_prints(tmp_path: Path) -> None:
    readme = (ROOT / "dryfit" / "README.md").read_text(encoding="utf-8")
    command, shown = re.search(
        r"```bash\ndryfit ([^\n]+)\n```\n+```text\n(.*?)```", readme, re.DOTALL
    ).groups()
    own = {"DRYFIT_CACHE": "", "DRYFIT_MEASURED": str(tmp_path / "none.csv"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [f"{launchers()}/python", "-m", "scripts.ask", *shlex.split(command)],
        cwd=ROOT,
        env=os.environ | own,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == shown
