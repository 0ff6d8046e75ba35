"""Rules against becoming root and giving rights away."""

from __future__ import annotations

import itertools
import posixpath
import re

from scripts.dataset.commands import Command, listed
from scripts.dataset.rules.table import (
    LONGEST,
    all_text,
    as_root,
    from_terminal,
    hits,
    is_interpreter,
    is_shell,
    operands_of_shell,
    origins,
    own_words,
    rule,
)
from scripts.dataset.targets import plain, resolve, written

_SHELL_FILE = re.compile(r"(?:^|/)(?:bash|sh|dash|zsh|python[\d.]*|perl|find|vim|cp|nmap|env)$")


@rule(
    "privilege-escalation",
    "high",
    flagged=(
        "sudo -i",
        "sudo su -",
        "sudo bash",
        "su - root",
        "sudo find . -exec /bin/sh \\;",
        "sudo vim -c ':!sh'",
        "sudo zip /tmp/a.zip /etc/hosts -T -TT 'sh #'",
        "sudo gdb -nx -ex '!bash' -ex quit",
        "sudo mysql -e '\\! bash'",
        "sudo ssh -o ProxyCommand=';bash 0<&2 1>&2' host",
        "sudo make --eval=$'x:\\n\\t-/bin/sh' x",
        "sudo LD_PRELOAD=/tmp/x.so id",
        "sudo python3",
        "sudo script -q /dev/null",
        "./bash -p",
        "sudo tclsh <<< 'exec sh <@stdin >@stdout'",
        "sudo certbot certonly -d x --pre-hook '/bin/sh 1>&0'",
        "sudo octave-cli --eval 'system(\"/bin/bash\")'",
        "echo 'execute_process(COMMAND /bin/sh)' > CMakeLists.txt; sudo cmake CMakeLists.txt",
        "sudo chroot / sh",
        "awk 'BEGIN { system(\"/bin/sh\") }'",
        "python3 -c 'import pty; pty.spawn(\"/bin/bash\")'",
        "LD_PRELOAD=/tmp/x.so ls",
        "touch -- '--checkpoint-action=exec=sh x.sh'",
    ),
    passed=(
        "sudo -u postgres psql",
        "sudo apt update",
        "sudo bash install.sh",
        "sudo -l",
        "su - deploy -c 'ls'",
        "sudo mysql -e 'SELECT 1'",
        "sudo gdb -p 4242",
        "sudo tcpdump -i eth0 -w dump.pcap -z gzip",
        "sudo rsync -a -e 'ssh -p 2222' build/ host:/srv/",
        "sudo LD_LIBRARY_PATH=/opt/app/lib /opt/app/bin/app --version",
        "sudo python3 setup.py build",
        "sudo make install",
        "sudo usermod -s /bin/bash bob",
        "sudo ls -l /bin/sh",
        "find . -name '*.sh' -exec sh {} \\;",
        'awk \'{ print "mv " $1 " old" | "sh" }\' names.txt',
        "echo 'sh run.sh' > all.sh; sudo cp all.sh /usr/local/bin/",
    ),
)
def root_shell(command: Command) -> bool:
    """Opens a shell as root, where anything can follow unseen."""
    name, argv = command.name, command.argv
    if name in ("sudo", "doas"):
        users = _users(command)
        if any(user in ("#-1", "#4294967295") for user in users):
            return True
        other = [user for user in users if user not in ("root", "0", "#0")]
        flags = [
            word for word in own_words(command)[1:] if re.fullmatch(r"-[A-Za-z]*[is][A-Za-z]*|--login|--shell", word)
        ]
        first = plain(command, "-u -g -h -p -C -U -D -R -T --user --group")
        if flags and not first and not other:
            return True
        return any(
            (variable == "LD_PRELOAD" and not re.match(r"/(?:usr/lib|lib|opt)", value))
            or (variable in _LOADED_FROM and re.match(r"/tmp|/var/tmp|/dev/shm|\ue002", value))
            or (variable in ("LD_LIBRARY_PATH", "LD_AUDIT", "PATH") and re.match(r"\.", value))
            for variable, value in command.assignments.items()
        )
    if name == "su":
        if command.value("-c", "--command"):
            return False
        users = [word for word in plain(command, "-s -g -G --shell --group") if word != "-"]
        return not users or users[0] == "root"
    if name == "pkexec" and len(argv) == 1:
        return True
    if name in ("newgrp", "sg"):
        return any(word in ("root", "sudo", "wheel", "docker", "disk") for word in argv[1:])
    if name == "chroot" and as_root(command) and resolve((plain(command) or ["x"])[0], command) == "/":
        return True
    if (
        is_shell(command)
        and command.wrappers
        and command.wrappers[-1] in _NO_LAUNCHERS
        and len(command.wrappers) == 1
        and command.code is None
        and command.script is None
        and command.stdin is None
        and all(word.startswith("-") for word in argv[1:])
        and not any(_PIPES_TO_SHELL.search(other.code or "") for other in command.reading.commands)
    ):
        return True
    if (
        is_shell(command)
        and from_terminal(command)
        and command.code is None
        and (command.script is None or command.script is command.stdin)
    ):
        if as_root(command) and "chroot" not in command.wrappers and not _other_user(command):
            return True
        return command.has("p") and name in ("bash", "sh", "dash", "ksh", "zsh") and len(argv) <= 3
    if is_shell(command) and command.has("p") and argv[1:2] == ["-p"] and name in ("bash", "sh", "dash"):
        return True
    if any(
        word == "-p" and re.fullmatch(r"(?:/usr)?/bin/(?:ba|da|z|k)?sh", shell)
        for shell, word in itertools.pairwise(argv)
    ):
        return True
    if name == "run0" and len(argv) == 1:
        return True
    made = [redirect.target for redirect in command.redirects] + (
        argv[1:] if name in ("touch", "tee", "mv", "cp") else []
    )
    if any("--checkpoint-action=exec" in word for word in made):  # waits for somebody's tar cf x.tar *
        return True
    if re.match(r"/tmp/|/var/tmp/|/dev/shm/", command.assignments.get("LD_PRELOAD", "")):
        return True
    if len(argv) == 2 and argv[1] == "-p" and re.match(r"(?:/tmp|/var/tmp|/dev/shm)/", argv[0]):
        return True  # a copy of a shell that keeps the rights of its owner
    if as_root(command) and "chroot" not in command.wrappers and not _other_user(command):
        # sudo -S takes the password from its standard input, and what follows goes to the shell.
        asked = any(
            other.name == "sudo" and re.match(r"-[A-Za-z]*S", " ".join(other.argv[1:2]))
            for other in command.reading.commands
        )
        if is_shell(command) and asked and not operands_of_shell(command):
            return True
        if (
            name in ("tmux", "screen", "byobu", "unshare", "wish", "jjs", "pry", "irb", "cpan", "ghci")
            and len(argv) == 1
        ):
            return True
        if name in ("script", "scriptreplay") and command.code is None and not command.value("-c", "--command"):
            return name == "script"
        if (
            name in ("tmux", "screen")
            and not plain(command, "-S -s -t -n -c -L -f -x -y -e")[1 if name == "tmux" else 0 :]
        ):
            return argv[1:2] in (["new"], ["new-session"], ["-S"], ["-s"]) and not {
                "-ls",
                "-r",
                "-x",
                "-X",
                "-d",
            } & set(argv)
        asks = all(word in ("-i", "-q", "-a") for word in argv[1:])
        if asks and is_interpreter(command) and command.stdin is None:
            return True
        if _root_trick(command) or _hands_shell(command):
            return True
        if name in ("elvish", "posh", "rc", "sash", "xonsh", "pwsh", "nu", "es", "osh") and len(argv) == 1:
            return True
        if name == "systemd-run" and command.has("S", "shell"):
            return True
    return bool(
        command.code and re.search(r"set(?:re)?s?[ug]id\s*\(?\s*0|setresuid\(0|change_privilege\(\s*0", command.code)
    )


# Programs that somebody has start a shell only where none may be started, or to keep the rights they run with.
_NO_LAUNCHERS = frozenset(
    "awk gawk mawk nawk find vim vi nvim view ex ed man less more python python2 python3 perl ruby lua php node tar zip"
    " nmap gdb mysql psql sqlite3 ftp sed git expect tcpdump split irb tclsh cpan make".split()
)
_PIPES_TO_SHELL = re.compile(r"\|&?\s*[\"'](?:/bin/)?(?:ba|da)?sh\b")  # awk's print | "sh" feeds it
_LOADED_FROM = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "PERL5LIB", "RUBYLIB", "PERL5OPT", "NODE_PATH", "LD_AUDIT")


# A shell as a command: the end of a word, or before what says where it reads and writes.
_SHELL_WORD = re.compile(
    r"(?:^(?:-\w)?|[\s=:,;&|!'\"`(@>{])(?:/usr)?/bin/(?:ba|da|z|k)?sh(?:\s+-[isp]+)?\s*(?:$|[0-9]?[<>]"
    r"|[#;,)'\"`}&|\]]|-c\b|-s\b|-i\b)"
)
# Programs to which the path of a shell is only a file or a setting.
_SHELL_AS_DATA = frozenset(
    "useradd usermod adduser chsh ls file cp mv chmod chown which type stat ldd readlink realpath ln dpkg cat test ["
    " grep sed tee echo printf install getent update-alternatives rpm rm find head tail diff md5sum sha256sum strings"
    " setfacl getfacl chattr lsattr docker podman kubectl nerdctl oc lxc crictl ssh chroot su sudo doas runuser git"
    " rsync tar sysctl setcap getcap auditctl semanage apparmor_parser aa-exec aa-status chcon restorecon awk perl"
    " python3 debootstrap crontab jq yq vim vi nano ansible adb sshpass mosh login agetty getty visudo patch gdb"
    " valgrind strace timeout xargs newusers chpasswd env nohup nice ionice time watch at batch flock"
    " setsid".split()
)


def _hands_shell(command: Command) -> bool:
    """Whether a program gets a shell as a command to start, in its words or in a file written on the way."""
    name, argv = command.name, command.argv
    if name in _SHELL_AS_DATA or is_shell(command) or _other_user(command):
        return False
    for before, word in itertools.pairwise(argv):
        if "sh" in word and _SHELL_WORD.search(word):
            return word == argv[-1] or before.startswith("-") or not re.fullmatch(r"(?:/usr)?/bin/\w+", word)
    if command.stdin is not None and command.stdin.text and _SHELL_WORD.search(command.stdin.text):
        return True
    if command.reading.files:
        for word in argv[1:]:
            path = re.sub(r"^-{1,2}[\w-]*=", "", word)
            feed = command.reading.files.get(posixpath.normpath(path)) if path else None
            if (
                feed is not None
                and feed.text
                and re.search(r"(?:/bin/|exec\s+|^)(?:ba|da|z)?sh\b(?!\s+\S+\.sh)", feed.text)
            ):
                return True
    return False


def _root_trick(command: Command) -> bool:
    """What runs a stranger's file or waits for an escape to the shell, with no other use as root."""
    name, text = command.name, " ".join(command.argv[1:])
    made = [other for other in origins(command, *command.argv[1:]) if other.name == "mktemp"]
    elsewhere = r"(?:^|[\s=@])(?:/tmp|/var/tmp|/dev/shm)(?:/|\s|$)"
    if name == "nmap":
        return "--interactive" in command.argv or bool("--script" in text and (made or re.search(elsewhere, text)))
    if name == "git":
        return command.argv[1:2] in (["-p"], ["--paginate"]) and "help" in text
    if name in ("pip", "pip3", "easy_install", "gem", "npm") and "install" in command.argv:
        return bool(made or re.search(elsewhere, text))
    if name in ("systemctl", "tcpdump", "scp", "wget", "aria2c", "openvpn", "facter", "ansible-playbook", "yum", "dnf"):
        options = {
            "tcpdump": r"(?:^|\s)-z\s",
            "scp": r"(?:^|\s)-S\s",
            "wget": r"--use-askpass",
            "aria2c": r"--on-",
            "yum": r"-c\s",
            "dnf": r"-c\s",
            "systemctl": r"\b(?:link|enable|start)\b",
            "openvpn": r"--(?:up|config)\b",
            "facter": r"--custom-dir",
        }
        return bool(re.search(options.get(name, "."), text) and (made or re.search(elsewhere, text)))
    if name in ("ssh-keygen", "openssl", "curl"):  # a library that is loaded
        return bool(re.search(r"(?:^|\s)(?:-D|--?engine)\s*(?:\./|/tmp|/dev/shm)", text))
    if name == "snap":
        return "--dangerous" in text and "--devmode" in text
    return name == "byebug"


def _users(command: Command) -> list[str]:
    """Whom ``sudo -u`` names."""
    own = Command(command.name, own_words(command))
    return [user.lstrip("=") for user in own.value("-u", "--user")]


def _other_user(command: Command) -> bool:
    for outer in command.reading.commands:
        if outer.name in ("sudo", "doas"):
            users = _users(outer)
            if users and users[0] not in ("root", "0", "#0"):
                return True
        if outer.name == "su" and plain(outer, "-c --command -s --shell -g -G")[:1] not in ([], ["-"], ["root"]):
            return True
    return False


# A program's source that becomes root and starts something.
_SETS_UID = re.compile(r"(?s)set(?:res|re|e)?uid\(\s*0.*\b(?:system|exec[lv]p?e?)\s*\(")


@rule(
    "privilege-escalation",
    "high",
    attack_id="T1548.001",
    flagged=(
        "chmod u+s /bin/bash",
        "chmod 4755 /tmp/x",
        "setcap cap_setuid+ep /usr/bin/python3",
        "install -m 4755 sh /tmp/sh",
        "echo 'int main(){setuid(0);system(\"/bin/sh\");}' > /tmp/s.c",
    ),
    passed=("chmod +x run.sh", "chmod 755 run.sh", "chmod g+s shared", "chmod 1777 /tmp/x", "getcap -r /usr"),
)
def set_uid(command: Command) -> bool:
    """Makes a program run with somebody else's rights: set-uid, capabilities."""
    if command.name in ("chmod", "install", "mkdir"):
        modes = command.value("-m", "--mode") if command.name != "chmod" else [w for w in command.argv[1:] if w != "--"]
        for mode in modes:
            if re.fullmatch(r"0?[4567]\d{3}", mode) and command.name != "mkdir":
                return True
            if re.fullmatch(r"(?:[ugoa]*[+=][rwxXst]*,?)+", mode) and re.search(
                r"(?:^|,)(?:[ugo]*[ua][ugo]*|)[+=][rwxX]*s", mode
            ):
                return True
            if mode == "g+s" and any(_SHELL_FILE.search(word) for word in command.argv):
                return True
    if written(command) and _SETS_UID.search(all_text(command)[:LONGEST]):
        return True
    if command.name == "setcap":
        return bool(
            re.search(
                (
                    r"cap_(?:setuid|setgid|sys_admin|dac_override|dac_read_search|sys_ptrace|sys_module|"
                    r"chown|fowner|setfcap)|\ball\b|=ep"
                ),
                " ".join(command.argv),
            )
        )
    return bool(
        command.code
        and re.search(r"chmod\s*\(?.{0,80}?0?o?[4-7]7[0-7]{2}\b", command.code)
        and re.search(r"0?o?[46][0-7]{3}", command.code)
        and "/bin" in command.code
    )


_SAVES = re.compile(r"-[oOW]|-oG|-Logfile|--(?:out|log|save|write|dump|junit)[\w-]*")  # options that name an output
ACCOUNTS = listed(
    "/etc/passwd /etc/shadow /etc/group /etc/gshadow /etc/sudoers /etc/sudoers.d/* /etc/doas.conf"
    " /etc/pam.d/* /etc/polkit-1/* /etc/security/*"
)


@rule(
    "privilege-escalation",
    "high",
    attack_id="T1548.003",
    flagged=(
        "echo 'bob ALL=(ALL) NOPASSWD:ALL' >> /etc/sudoers",
        "usermod -aG sudo bob",
        "echo root:x | chpasswd",
        "useradd -o -u 0 evil",
        "usermod -p '' root",
        "kubectl create clusterrolebinding x --clusterrole=cluster-admin --user=eve",
        "sudo mount -o bind /tmp/passwd /etc/passwd",
        "echo x | sudo iconv -o /etc/sudoers",
        'awk \'BEGIN { print "x::0:0::/:/bin/sh" >> "/etc/passwd" }\'',
    ),
    passed=("sudo visudo -c", "usermod -aG docker bob", "useradd -m bob", "passwd bob", "cut -d: -f1 /etc/passwd"),
)
def grant_rights(command: Command) -> bool:
    """Gives an account root's rights, or changes who may log in as whom."""
    name, argv = command.name, command.argv
    if name == "ln" and any(word == "/dev/null" for word in argv):
        return False
    if name == "visudo":
        editors = [command.assignments.get(name, "vi") for name in ("EDITOR", "VISUAL", "SUDO_EDITOR")]
        return not all(
            re.fullmatch(r"(?:/usr/bin/)?(?:g?vim?|nvim|nano|pico|emacs|micro|joe|ne|code --wait)", e) for e in editors
        )
    for option, word in itertools.pairwise(argv):
        if word.startswith("/etc/") and _SAVES.fullmatch(option) and hits(word, ACCOUNTS):
            return True
    if any(hits(path, ACCOUNTS) for path, _ in written(command)) and name not in ("touch", "truncate", "shred"):
        return not any(word in ("/dev/null",) for word in argv) and name != ":" and name != "rsync"
    words = command.operands
    groups = [
        group for value in command.value("-aG", "-G", "-a", "--groups", "-g", "--append") for group in value.split(",")
    ]
    power = ("sudo", "wheel", "root", "admin", "shadow", "disk")
    if name == "groupmod":
        return bool(command.value("-U", "--users")) and words[-1:] != [] and words[-1] in power
    if name in ("usermod", "useradd", "adduser", "gpasswd", "addgroup"):
        if name == "usermod" and words[-1:] == ["root"] and command.value("-p", "--password"):
            return True
        zero = any(value.lstrip("=") == "0" for value in command.value("-u", "--uid", "-g", "--gid", "-ou"))
        joined = re.search(r"-[a-zA-Z]*G\b", " ".join(argv)) and any(
            part in power for word in words for part in word.split(",")
        )
        if zero or any(group in power for group in groups) or joined:
            return True
        return (
            name in ("adduser", "gpasswd", "addgroup")
            and len(words) > 1
            and words[-1] in power
            and not command.has("d")
        ) or (name == "gpasswd" and any(w in power for w in words) and command.has("aAM"))
    if name == "passwd":
        return command.has("d", "delete") or ("root" in words and not command.has("Sluxe", "status", "lock", "unlock"))
    if name == "chpasswd":
        text = command.stdin.text if command.stdin else None
        return text is None or text.startswith("root:")
    if name == "aws":
        return bool(re.search(r"\b(?:attach|put)-\w+-policy\b.*AdministratorAccess", " ".join(argv)))
    if name == "kubectl":
        return "create" in argv and "clusterrolebinding" in argv and any("cluster-admin" in word for word in argv)
    if name == "mount":  # something else in the place of a program or of the accounts
        target = resolve(argv[-1], command)
        return (command.has("B", "bind") or "bind" in command.value("-o")) and bool(
            re.match(r"/(?:usr/)?s?bin/.|/etc/(?:passwd|shadow|sudoers|pam\.d)", target)
        )
    text = " ".join(argv[1:])[:LONGEST]
    if name == "pw":
        return bool(re.search(r"\buser(?:add|mod)\b.*-[gG]\s*(?:wheel|0)\b|-u\s*0\b", text))
    if name in ("dscl", "sysadminctl"):
        return bool(re.search(r"/Groups/admin\b.*Member|UniqueID\s+\"?0\b|(?:^|\s)-admin\b", text))
    return name == "dsenableroot" or (name in ("dseditgroup",) and "admin" in argv)
