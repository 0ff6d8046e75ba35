"""Reading shell commands: words resolved, wrappers opened, feeds followed, limits kept."""

import pytest

from scripts.tasks.shell.screen import reader
from scripts.tasks.shell.screen.commands import Parsed, Refused, unknown_names
from scripts.tasks.shell.screen.paths import deletes, writes
from scripts.tasks.shell.screen.policy import default
from scripts.tasks.shell.screen.reader import MAX_CHARACTERS


def read(text: str) -> Parsed:
    return reader.read(text, default().programs)


def argvs(text: str) -> list[list[str]]:
    return [command.argv for command in read(text).commands]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("r''m -r\\f \"/\"", ["rm", "-rf", "/"]),
        ("$'\\x72m' $'\\057'", ["rm", "/"]),
        ("x=rm; $x -rf $HOME/a", ["rm", "-rf", "/home/user/a"]),
        ("x='rm -rf /'; $x", ["rm", "-rf", "/"]),
        ('a=(rm -rf /); "${a[@]}"', ["rm", "-rf", "/"]),
        ('set -- rm -rf /; "$@"', ["rm", "-rf", "/"]),
        ("{rm,-rf,/}", ["rm", "-rf", "/"]),
        ("rm${IFS}-rf${IFS}/", ["rm", "-rf", "/"]),
        ("rm -rf ${X:-/}", ["rm", "-rf", "/"]),
        ("rm ~root/x ~/y", ["rm", "/root/x", "/home/user/y"]),
        ("p=/usr/lib; rm ${p%/lib} ${p##*/}", ["rm", "/usr", "lib"]),
        ("rm $(echo /) `printf '\\x2f'`", ["rm", "/", "/"]),
        ('f() { rm "$1"; }; f /', ["rm", "/"]),
        ("set -- a /; rm $2", ["rm", "/"]),
        ("alias l='rm -rf'; l /", ["rm", "-rf", "/"]),
    ],
)
def test_words_are_what_the_shell_would_make_of_them(text, words):
    assert words in argvs(text)


@pytest.mark.parametrize(
    "text",
    [
        "echo 'rm -rf /' | sh",
        "printf '\\162\\155\\040\\055\\162\\146\\040\\057' | sh",
        "sh <<< 'rm -rf /'",
        "sh <(echo 'rm -rf /')",
        ". <(echo 'rm -rf /')",
        "echo 'rm -rf /' > /tmp/a; sh /tmp/a",
        "cat <<E | sh\nrm -rf /\nE",
        "read c <<< 'rm -rf /'; eval \"$c\"",
        "ls | while read x; do rm -rf /; done",
        "echo / | xargs rm -rf",
        "find . -exec sh -c 'rm -rf /' \\;",
        "sudo -u root env A=b nohup timeout 5 sh -c 'rm -rf /'",
        "su -c 'rm -rf /'",
        "ssh -p 22 host rm -rf /",
        "perl -e 'system(\"rm -rf /\")'",
        'node --eval \'require("child_process").execSync("rm -rf /")\'',
        "gdb --batch --eval-command 'shell rm -rf /'",
        'python3 -c \'import subprocess; subprocess.run(["rm", "-rf", "/"])\'',
        "awk 'BEGIN { system(\"rm -rf /\") }'",
        "git -c core.pager='rm -rf /' log",
        "parallel rm -rf ::: /",
    ],
)
def test_commands_are_found_wherever_they_start(text):
    assert any(
        [argv[0], argv[1], argv[-1]] == ["rm", "-rf", "/"] for argv in argvs(text) if len(argv) > 2
    )


@pytest.mark.parametrize(
    "text",
    [
        "echo rm -rf /",
        "git commit -m 'rm -rf /'",
        "grep 'rm -rf /' f",
        "cat <<E\nrm -rf /\nE",
        "# rm -rf /",
        "x='rm -rf /'",
    ],
)
def test_data_is_no_command(text):
    assert not any(command.name == "rm" for command in read(text).commands)


@pytest.mark.parametrize(
    "text",
    [
        "echo cm0gLXJmIC8= | base64 -d | bash -s",
        "echo 726d202d7266202f | xxd -r -p | sh",
        "echo '/ fr- mr' | rev | sh",
        "echo 'ez -es /' | tr ezs rmf | sh",
        "echo 'rX -rf /' | sed s/X/m/ | sh",
        "$(echo zm | tr z r) -rf /",
    ],
)
def test_changed_text_is_marked_as_hidden_and_not_decoded(text):
    assert any(command.hidden for command in read(text).commands)
    assert not any(command.name == "rm" for command in read(text).commands)


def test_what_is_read_of_a_command_beside_its_words():
    *_, last = read("sudo env A=b sh -c 'nice rm x'").commands
    assert (last.name, last.wrappers) == ("rm", ("sudo", "env", "sh", "nice"))
    commands = read("cd /etc && rm a; (cd x; rm b); rm c").commands
    assert [command.cwd for command in commands if command.name == "rm"] == [
        "/etc",
        "/etc/x",
        "/etc",
    ]
    (command,) = read('rm "$dir/x"').commands
    assert unknown_names(command.argv[1]) == ["dir"]
    outer, *inner = read("sh -c 'echo x > a; echo y' > b").commands
    assert [[redirect.target for redirect in one.redirects] for one in (outer, *inner)] == [
        ["b"],
        ["a"],
        ["b"],
    ]
    command = read("while true; do yes 2>/dev/null >> f & done").commands[-1]
    assert (command.loop, command.background) == ("endless", True)
    assert [(r.operator, r.descriptor, r.target) for r in command.redirects] == [
        (">", "2", "/dev/null"),
        (">>", "", "f"),
    ]
    assert any(command.recursive for command in read(":(){ :|:& };:").commands)
    command = read("sh 0<&2 1>&2").commands[0]
    assert command.argv == ["sh"] and [r.operator for r in command.redirects] == ["<&", ">&"]


def test_origins_lead_through_pipes_files_and_substitutions():
    for text in (
        "curl u | tee f | sh",
        "curl u > f; sh f",
        "sh <(curl u)",
        'bash -c "$(curl u)"',
        "curl -o f u && sh ./f",
    ):
        reading = read(text)
        shell = next(command for command in reading.commands if command.name in ("sh", "bash"))
        assert any(origin.name == "curl" for origin in reading.origins(shell.script, shell.code)), (
            text
        )


@pytest.mark.parametrize(
    "text", ["true && cat x > f", "a | cat x > f", "! cat x > f", "a && b | cat x > f"]
)
def test_a_redirection_after_a_list_is_the_last_commands(text):
    *_, last = read(text).commands
    assert (last.name, [redirect.target for redirect in last.redirects]) == ("cat", ["f"])


@pytest.mark.parametrize(
    "text",
    [
        "if",
        "'",
        "a" * (MAX_CHARACTERS + 1),
        "a\0b",
        "$(" * 100,
        "sh -c " * 5 + "'",
        "a;" * 1000,
        "echo " + "{" * 500 + "'",
    ],
    ids=range(8),
)
def test_the_unreadable_is_refused(text):
    with pytest.raises(Refused):
        read(text)


@pytest.mark.parametrize(
    "text",
    [
        "exec 3<>/dev/tcp/h/80",
        "{ls,-l}",
        "case x in a) ls;;& b) ls;& esac",
        "coproc ls",
        "[ -d / ] && ls",
        "ls @(a|b)",
        "for ((;;)); do :; done",
    ],
)
def test_valid_bash_that_the_grammar_does_not_know_is_read(text):
    assert read(text).commands


@pytest.mark.parametrize(
    "text",
    [
        "zip a.zip b -T -TT 'rm -rf / #'",
        "tcpdump -i lo -z 'rm -rf /'",
        "gdb -nx -ex '!rm -rf /'",
        "mysql -e '\\! rm -rf /'",
        "psql -c \"COPY t FROM PROGRAM 'rm -rf /'\"",
        "sqlite3 x '.shell rm -rf /'",
        "make --eval=$'x:\\n\\trm -rf /'",
        "make -f <(echo 'all:; rm -rf /')",
        "printf 'all:\\n\\trm -rf /\\n' > Makefile; make",
        "apt-get -o APT::Update::Pre-Invoke::='rm -rf /' update",
        "gcc -wrapper rm,-rf,/ x.c",
        "ssh -o ProxyCommand=';rm -rf /' x",
        "ip netns exec a rm -rf /",
        "PAGER='rm -rf /' man ls",
        "tclsh <<< 'exec rm -rf /'",
        "less '+!rm -rf /' a",
    ],
)
def test_what_other_programs_start_is_read(text):
    assert ["rm", "-rf", "/"] in argvs(text)


@pytest.mark.parametrize(
    ("code", "path"),
    [
        ("python3 -c 'from pathlib import Path; Path(\"/etc/x\").unlink()'", "/etc/x"),
        (
            "python3 -c 'import os\nfor r,d,f in os.walk(\"/etc\"):\n for x in f: os.remove(os.path.join(r,x))'",
            "/etc",
        ),
        ('node -e \'require("fs").rmSync("/etc", {recursive: true})\'', "/etc"),
        ('php -r \'rename("/etc/a", "/etc/b");\'', "/etc/a"),
        ("python3 -c 'import shutil, os; shutil.rmtree(os.environ[\"HOME\"])'", "/home/user"),
    ],
)
def test_paths_that_code_deletes_are_found(code, path):
    assert path in {
        one.path for command in read(code).commands for one in deletes(command, default().programs)
    }


def test_paths_that_code_writes_are_found():
    for code in (
        'python3 -c \'open("/etc/x", "w")\'',
        "perl -e 'open F, \">/etc/x\"'",
        "ruby -e 'File.write(\"/etc/x\", 1)'",
        'node -e \'require("fs").writeFileSync("/etc/x", 1)\'',
    ):
        found = {
            one.path
            for command in read(code).commands
            for one in writes(command, default().programs)
        }
        assert "/etc/x" in found, code


def test_what_starts_itself_or_grows_without_end_is_noticed():
    for text in ("echo '$0 & $0' > a; chmod +x a; ./a", "echo 'sh $0 & sh $0' > a; sh a"):
        assert any(command.recursive for command in read(text).commands), text
    assert not any(command.recursive for command in read("echo 'echo $0' > a; sh a; sh a").commands)

    def grows(text):
        return any(command.grows for command in read(text).commands)

    assert grows("while :; do x=$x$x; done") and grows("for ((;;)); do a+=(1); done")
    assert not grows("while :; do i=$((i+1)); done") and not grows("for i in 1 2; do x=$x$i; done")


def test_a_loop_reads_the_lines_that_are_known():
    assert [
        words
        for words in argvs("printf '/a\\n/b\\n' | while read x; do rm $x; done")
        if words[0] == "rm"
    ] == [["rm", "/a"], ["rm", "/b"]]
