"""A small benchmark in the form of the real one's wheel."""

import json
import zipfile
from pathlib import Path

ROWS = [
    ("show the greeting", "cat /data/greeting", "sed -n p /data/greeting", 0),
    ("count the files in /data", "ls /data | wc -l", "find /data -type f | wc -l", 1),
    (
        "make a copy of the greeting in /data/copy",
        "cp /data/greeting /data/copy",
        "cat /data/greeting > /data/copy",
        0,
    ),
    ("do nothing that can be seen", "true", "sync", 2),
    ("show the colour", "echo $COLOUR", "printenv COLOUR", 2),
    ("use a program that no host has", "no-such-program /data", "no-such-program --all /data", 1),
]


def write_wheel(path: Path, rows: list[tuple[str, str, str, int]] = ROWS) -> Path:
    """Write the wheel; the rows lie in two file systems by turns."""
    assets = "icalfa/assets"
    with zipfile.ZipFile(path, "w") as archive:
        for number in (1, 2):
            part = rows[number - 1 :: 2]
            named = [
                dict(zip(("query", "gold", "gold2", "difficulty"), row, strict=True))
                for row in part
            ]
            archive.writestr(f"{assets}/datasets/nl2bash_fs_{number}.json", json.dumps(named))
            archive.writestr(
                f"{assets}/docker/setup_nl2b_fs_{number}.sh",
                '#!/bin/bash\nmkdir /data\necho "it\'s me" > /data/greeting\n',
            )
            archive.writestr(
                f"{assets}/docker/nl2bash{number}.Dockerfile", 'FROM x\nENV COLOUR="dark red"\n'
            )
        archive.writestr("icalfa-0.3.6.dist-info/licenses/LICENSE.txt", "MIT")
    return path
