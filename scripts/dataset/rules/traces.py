"""Rules against removing traces: histories, logs, names of processes, the audit of a cloud."""

from __future__ import annotations

import re

from scripts.dataset.commands import Command, listed, unknown_names
from scripts.dataset.rules.persistence import PROFILES
from scripts.dataset.rules.table import LONGEST, all_text, empties, hits, is_narrow, rule
from scripts.dataset.targets import deleted, read_paths, resolve, trunk, written

_HISTORY = re.compile(
    r"(?:^|/)\.?(?:bash_history|zsh_history|sh_history|python_history|mysql_history|"
    r"histfile|fish_history|history)$|/\.\*?hist\w*\*?$|/\.\w*_h\w*\*$"
)
_LOG_FILES = listed(
    "auth.log* secure* syslog* messages* wtmp* btmp* lastlog* utmp* faillog* kern.log* audit* cron*"
    " daemon.log* journal* maillog* mail.log* user.log* dmesg* boot.log* dpkg.log* apache2* nginx* httpd*"
    " mysql* fail2ban* ufw* firewalld* system.log* account* sa sysstat*"
)
_ROTATED = re.compile(r"\.(?:gz|xz|bz2|zst|old|\d+|1)\*?$|\*?\.(?:gz|\[0-9\]\*?|[0-9])$")


def log_file(path: str) -> bool:
    """Whether a path is a live log of the system."""
    base, _ = trunk(path)
    if base in listed("/var/log /run/log /var/run/utmp /run/utmp /var/log/journal /var/log/audit /run/log/journal"):
        return True
    if not base.startswith(("/var/log/", "/private/var/log/")) or _ROTATED.search(path):
        return False
    rest = base.split("/var/log/", 1)[1].removeprefix("**/")
    return hits(rest.split("/")[0], _LOG_FILES) or rest in ("*.log", "*log", "*log*", "*.log*") or rest.startswith("*")


@rule(
    "anti-forensics",
    "high",
    flagged=(
        "history -c",
        "unset HISTFILE",
        "export HISTSIZE=0",
        "rm -f ~/.bash_history",
        "ln -sf /dev/null ~/.bash_history",
        "shopt -uo history",
        "echo 'unset HISTFILE' >> ~/.bashrc",
        "kill -9 $$",
    ),
    passed=(
        "echo 'export HISTSIZE=50000' >> ~/.bashrc",
        "kill $$",
        "history | tail -20",
        "export HISTSIZE=10000",
        "history -a",
        "grep ssh ~/.bash_history",
    ),
)
def hide_history(command: Command) -> bool:
    """Erases the shell's history or keeps it from being written."""
    name, argv = command.name, command.argv
    if name == "history":
        return command.has("cd") or "/dev/null" in argv
    if name in ("set", "shopt"):
        return (name == "set" and "+o" in argv and "history" in argv) or (
            name == "shopt" and command.has("u") and command.has("o") and "history" in argv
        )
    if name == "kill":  # the shell that is asking, before it can write its history
        return unknown_names(argv[-1]) == ["$"] and any(word in ("-9", "-KILL", "-SIGKILL") for word in argv)
    if name == "fc":
        return command.has("p") and "/dev/null" in argv
    if name == "chattr":
        return "+i" in argv and any(_HISTORY.search(resolve(word, command)) for word in command.operands)
    if name == "unset":
        return any(word in ("HISTFILE", "HISTSIZE", "HISTFILESIZE", "PROMPT_COMMAND", "SAVEHIST") for word in argv)
    for variable, value in command.assignments.items():
        if (variable in ("HISTSIZE", "HISTFILESIZE", "SAVEHIST") and value.strip() == "0") or (
            variable == "HISTFILE" and value in ("/dev/null", "", "/dev/zero")
        ):
            return True
        if variable == "HISTIGNORE" and value.strip("'\"") in ("*", "*:*"):
            return True
    if any(_HISTORY.search(path) for path, _ in deleted(command)):
        return True
    if name in ("export", "declare") and any(word in ("-n", "+x") for word in argv) and "HISTFILE" in argv:
        return True
    if any(hits(path, PROFILES) for path, _ in written(command)):
        quiet = r"\bunset\s+HISTFILE|\bHIST(?:FILE)?SIZE=0\b|\bHISTFILE=(?:/dev/null|$)|set \+o history"
        if re.search(quiet, all_text(command)):
            return True
    if name in ("cp", "mv", "scp", "rsync", "install"):
        return bool(_HISTORY.search(resolve(argv[-1], command)))
    return any(_HISTORY.search(path) for path, append in written(command) if not append)


@rule(
    "anti-forensics",
    "high",
    attack_id="T1070.002",
    flagged=(
        "rm -rf /var/log/*",
        "truncate -s 0 /var/log/auth.log",
        "> /var/log/wtmp",
        "sed -i '/10.0.0.9/d' /var/log/secure",
        "journalctl --vacuum-time=1s",
        "grep -v eve /var/log/auth.log > /tmp/l; mv /tmp/l /var/log/auth.log",
        "awk '!/eve/' /var/log/secure | sudo tee /var/log/secure",
        "utmpdump -r < /tmp/u > /var/log/wtmp",
        "touch -amr /bin/ls /usr/bin/x",
        "perl -e 'truncate(\"/var/log/wtmp\", 0)'",
    ),
    passed=(
        "grep -v DEBUG /var/log/syslog > ~/short.log",
        "utmpdump /var/log/wtmp | tail",
        "cp /var/log/syslog /tmp/syslog.bak",
        "touch -amr a.txt b.txt",
        "tail -f /var/log/syslog",
        "find /var/log -name '*.gz' -mtime +30 -delete",
        "rm /var/log/syslog.1",
        "journalctl --vacuum-time=14d",
        "touch notes.txt",
    ),
)
def erase_logs(command: Command) -> bool:
    """Deletes, empties or edits the system's logs, or sets back the times of its files."""
    name, argv = command.name, command.argv
    if name == "utmpdump" and command.has("r", "reverse"):
        return True
    if any(log_file(path) and not append and _filtered_copy(path, command) for path, append in written(command)):
        return True
    if any(log_file(path) for path, _ in deleted(command)):
        return not (name in ("find", "gfind") and is_narrow(command))
    for path, append in written(command):
        if (
            log_file(path)
            and not append
            and name not in ("touch", "tcpdump", "cp", "mv", "rsync", "install", "logrotate", "chmod", "tee")
        ):
            if any(
                r.operator in (">", ">|", "&>", ">&") and resolve(r.target, command) == path for r in command.redirects
            ):
                return command.name in (":", "cat", "echo", "true", "printf", "dd") and empties(command)
            return True
        if log_file(path) and not append and name in ("cp", "mv", "tee"):
            return (name == "tee" and not append and empties(command)) or any(word == "/dev/null" for word in argv)
    text = " ".join(argv[1:])
    if name == "journalctl":
        match = re.search(r"--vacuum-(?:time|size|files)[= ](\d+)(\w*)", text)
        return bool(
            match
            and (
                match[2] in ("s", "sec", "seconds", "ms", "us", "m", "min", "h", "B", "K")
                or match[1] == "0"
                or (match[2] == "M" and int(match[1]) < 5)
                or (match[2] == "" and int(match[1]) < 2)
            )
        )
    if name in ("dmesg",):
        return command.has("Cc", "clear", "read-clear")
    if name == "touch":
        stamped = any(re.match(r"-[a-zA-Z]*[rtd]|--(?:date|reference)", word) for word in argv[1:])
        return bool(
            stamped
            and any(
                re.match(r"/(?:etc|bin|sbin|usr|lib|var/log|var/www|boot)(?:/|$)|/(?:tmp|dev/shm)/\.|/\*\*", p)
                for p, _ in written(command)
            )
        )
    if name == "log":
        return argv[1:2] == ["erase"]
    if name in ("wevtutil", "wevtutil.exe"):
        return "cl" in argv or "clear-log" in argv
    if name in ("debugfs",):
        return False
    return (name in ("logtamper", "utmpdump") and command.has("r")) or name in ("wipe-logs", "zap", "clearlogs")


_LOG_FILTERS = frozenset("grep egrep fgrep sed gsed awk gawk mawk perl head tail utmpdump rg python3 sort uniq".split())


def _filtered_copy(log: str, command: Command) -> bool:
    """Whether a log is replaced by what a filter let through of it."""
    if command.name in ("cp", "mv", "install") and any(
        source in own_targets(other) for source in read_paths(command) for other in command.reading.commands
    ):
        return True
    if command.name in _LOG_FILTERS or command.name in (
        "cp",
        "mv",
        "cat",
        "tee",
        "sponge",
        "dd",
        "install",
        "rsync",
        ":",
    ):
        return any(
            log in read_paths(other)
            for other in command.reading.commands
            if other.name in _LOG_FILTERS and not any(path == log for path in own_targets(other))
        )
    return False


def own_targets(command: Command) -> list[str]:
    """What an editor changes in place."""
    return [path for path, _ in written(command)] if command.name in ("sed", "gsed", "perl") else []


@rule(
    "anti-forensics",
    "high",
    attack_id="T1564.001",
    flagged=(
        "sudo mount --bind /tmp/none /proc/4242",
        "mount -t tmpfs none /proc/999",
        "exec -a '[kworker/1:0]' /tmp/x",
        "(exec -a '[kthreadd]' ./x &)",
    ),
    passed=(
        "sudo mount --bind /proc /mnt/proc",
        "mount -t proc proc /mnt/proc",
        "exec -a myapp ./app",
        "mount -t tmpfs tmpfs /mnt/scratch",
    ),
)
def hide_process(command: Command) -> bool:
    """Hides a process: something over its folder in /proc, or the name of a kernel thread."""
    if command.name == "mount":
        return bool(re.match(r"/proc/(?:\d+|\ue000|self|[*\[])", resolve(command.argv[-1], command)))
    if command.name == "exec":
        return any(word.startswith("[") and word.endswith("]") for word in command.value("-a"))
    return "processhider" in " ".join([*command.assignments.values(), *command.argv[:1]]).lower()


# What a cloud writes down of what is done in it, and what watches it.
_TRAILS = {
    "aws": r"cloudtrail (?:stop-logging|delete-trail|put-event-selectors|update-trail .*--no-)"
    r"|cloudtrail delete-event-data-store|guardduty (?:delete-|update-detector .*--no-enable|disassociate"
    r"|stop-monitoring)"
    r"|logs put-retention-policy .*-in-days 1\b|ec2 delete-flow-logs|logs delete-log-(?:group|stream)"
    r"|configservice (?:stop-|delete-)|securityhub disable"
    r"|macie2 disable|inspector2 disable|s3api delete-public-access-block"
    r"|iam delete-account-password-policy|ec2 authorize-security-group-ingress.*(?:protocol[= ](?:all"
    r"|-1)\b.*0\.0\.0\.0/0)"
    r"|cloudwatch disable-alarm-actions|wafv2 delete-|network-firewall delete-",
    "gcloud": r"logging (?:sinks|logs|buckets|metrics) (?:delete|update .*--disabled)|scc \S+ delete"
    r"|firewall-rules create"
    r".*(?:--allow[= ]all\b.*0\.0\.0\.0/0|0\.0\.0\.0/0.*--allow[= ]all\b)|services disable \S*(?:logging"
    r"|securitycenter)",
    "az": r"security auto-provisioning-setting update .*off|monitor (?:diagnostic-settings|log-profiles"
    r"|activity-log alert|action-group) delete|sentinel .* delete"
    r"|security pricing create .*--tier free|monitor log-analytics workspace delete|network watcher flow-log delete",
    "kubectl": r"delete\s+(?:events?|networkpolic\w+|netpol|psp|podsecuritypolic\w+)\b.*--all\b"
    r"|delete\s+(?:validating|mutating)"
    r"webhook|\bdelete\b.*\b(?:falco|gatekeeper|kyverno|tetragon|sysdig|kubearmor)",
    "helm": r"(?:uninstall|delete)\s+.*(?:falco|gatekeeper|kyverno|tetragon|sysdig|wazuh|twistlock|aqua)",
    "oci": r"audit config update|events rule delete",
}


@rule(
    "defence-impairment",
    "high",
    attack_id="T1562.008",
    flagged=(
        "aws cloudtrail stop-logging --name main",
        "aws guardduty delete-detector --detector-id 1a2b",
        "gcloud logging sinks delete audit",
        "az monitor diagnostic-settings delete --name audit --resource vm1",
        "kubectl delete networkpolicy --all",
        "helm uninstall falco -n falco",
    ),
    passed=(
        "aws cloudtrail describe-trails",
        "aws guardduty list-detectors",
        "gcloud logging read severity=ERROR",
        "az monitor diagnostic-settings list --resource vm1",
        "kubectl get networkpolicy",
    ),
)
def stop_cloud_audit(command: Command) -> bool:
    """Stops or deletes what a cloud or cluster records, or what guards it."""
    pattern = _TRAILS.get(command.name)
    return pattern is not None and re.search(pattern, " ".join(command.argv[1:])[:LONGEST]) is not None
