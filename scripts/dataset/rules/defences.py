"""Rules against opening firewalls and stopping what guards a machine."""

from __future__ import annotations

import posixpath
import re

from scripts.dataset.commands import Command
from scripts.dataset.rules.table import all_text, origins, rule
from scripts.dataset.targets import deleted, plain, resolve, written

_GUARDS = re.compile(
    r"(?i)(?:firewalld|ufw|iptables|ip6tables|nftables|fail2ban|auditd|apparmor|rsyslogd?|"
    r"syslog(?:-ng|d)?|clamav\S*|clamd|clamscan|auditctl|selinux|crowdsec|falcon-sensor|"
    r"osqueryd?|wazuh\S*|ossec\S*|suricata|snort|aide|sysmon|auditbeat|filebeat|mdatp|"
    r"sophos\S*|cbagentd|falcond?|tripwire|rkhunter|"
    r"systemd-journald|sshguard|denyhosts|windefend|clamav-daemon|freshclam|security-agent|"
    r"crowdstrike|falconctl|sentinel(?:one|d|ctl|agent)\S*|cbdaemon|cb-?psc\S*|cbsensor|carbonblack\S*|xagt|fireeye\S*|"
    r"ds_agent|tmxbc|esets|eraagent|eea|mfe\w+|mcafee\S*|isectpd?|symantec\S*|symcfgd|rtvscand|sisidsagent|cylance\S*|"
    r"traps\w*|cortex-?xdr|xdr\S*|elastic-?(?:agent|endpoint)|packetbeat|falco\S*|sysdig\S*|tetragon"
    r"|qualys\S*|splunkforwarder|"
    r"splunkd|ir_agent|rapid7\S*|tanium\S*|aliyun\S*|aliyundun\S*|aegis\S*|cloudmonitor\S*|qcloud\S*"
    r"|yd(?:service|live)|"
    r"datacollector|lacework|threatstack\S*|uptycs\S*|samhain|chkrootkit|maldet|zeek|psad|portsentry"
    r"|usbguard|fapolicyd|"
    r"nessusagent|osquerybeat|kubearmor|google-cloud-ops-agent|amazon-cloudwatch-agent)(?:\.service|\.socket)?"
)
_VENDORS = re.compile(
    r"(?i)crowdstrike|littlesnitch|cloudsink\.net|falcon(?:[-_/ ]|d\b|$)|sentinelone|carbon ?black|wazuh|ossec|osquery"
    r"|auditd|clamd|clamav"
    r"|freshclam|sophos|"
    r"mdatp|defender|fireeye|xagt|trendmicro|ds_agent|mcafee|symantec|cylance|elastic-?(?:agent|endpoint)"
    r"|sysdig|falco\b|"
    r"qualys|tanium|aliyun|aegis|rkhunter|tripwire|snort|suricata|rsyslog|syslogd|fail2ban"
)


@rule(
    "defence-impairment",
    "high",
    flagged=(
        "iptables -F",
        "iptables -P INPUT ACCEPT",
        "ufw disable",
        "systemctl stop firewalld",
        "nft flush ruleset",
        "iptables-restore < /dev/null",
        "ufw allow from any to any",
        "ipfw -q flush",
    ),
    passed=(
        "iptables -L",
        "iptables -A INPUT -p tcp --dport 443 -j ACCEPT",
        "ufw allow 22/tcp",
        "ufw status",
        "systemctl restart firewalld",
    ),
)
def open_firewall(command: Command) -> bool:
    """Switches the firewall off, empties it or lets everything in."""
    name, argv = command.name, command.argv
    text = " ".join(argv[1:])
    if name in ("iptables", "ip6tables", "iptables-legacy", "iptables-nft", "ebtables", "arptables"):
        if any(
            word in ("-F", "--flush", "-X", "--delete-chain") or re.fullmatch(r"-[A-Z]*F", word) for word in argv[1:]
        ):
            return not ("-X" in argv and "-F" not in argv and len(command.operands) > 0)
        if re.search(r"(?:-P|--policy)\s+(?:INPUT|FORWARD|OUTPUT)\s+ACCEPT", text):
            return "OUTPUT" not in text
        added = re.search(r"(?:^|\s)(?:-A|-I|--append|--insert)\s+(?:INPUT|FORWARD)\b", text)
        narrow = re.search(
            r"(?:^|\s)(?:-p|-s|-d|-i|-m|--dport|--source|--in-interface|--protocol|--destination|-o|--match)(?:\s|=)",
            text,
        )
        anywhere = re.search(r"(?:-s|--source)\s+(?:0\.0\.0\.0/0|any)", text) and not re.search(r"dport|-p |-m ", text)
        return bool(added and re.search(r"(?:-j|--jump)\s+ACCEPT", text) and (not narrow or anywhere))
    if name in ("ufw",):
        return argv[1:3] == ["logging", "off"] or bool(
            re.search(
                (
                    r"\b(?:disable|reset)\b|default allow(?:\s+(?:incoming|in))?\s*$|"
                    r"default allow incoming|allow (?:from any(?: to any)?|in|from 0\.0\.0\.0/0)\s*$"
                ),
                text,
            )
        )
    if name in ("iptables-restore", "ip6tables-restore"):
        given = command.stdin
        if given is None or (given.text is None and given.path != "/dev/null"):
            return "/dev/null" in argv
        return not re.search(r"(?m)^\s*-A\b|:INPUT DROP", given.text or "")
    if name == "ipfw":
        return "flush" in argv or bool(re.search(r"\badd\b.*\ballow\s+(?:ip|all)\s+from\s+any\s+to\s+any", text))
    if name == "nft":
        return bool(re.search(r"\b(?:flush|delete|destroy)\s+(?:ruleset|table|chain)\b", text))
    if name == "firewall-cmd":
        return bool(
            re.search(
                (
                    r"--set-default-zone[= ]trusted|--panic-off|--remove-service=ssh\b.*--remove|"
                    r"--set-target=ACCEPT|--add-port=(?:0|1)-65535|add-rich-rule.*0\.0\.0\.0/0.*accept\b(?!.*port)"
                ),
                text,
            )
        )
    if name in ("pfctl",):
        return command.has("dF")
    if name in ("netsh",):
        return bool(re.search(r"(?i)state off|firewall set opmode disable", text))
    return _stops(
        command, ("firewalld", "ufw", "iptables", "ip6tables", "nftables", "netfilter-persistent", "shorewall", "pf")
    )


def _stops(command: Command, services: tuple[str, ...]) -> bool:
    """Whether a command stops, disables, masks, kills or removes one of the services."""
    name, argv = command.name, command.argv
    words = {word.rpartition("/")[2].removesuffix(".service").removesuffix(".socket") for word in argv[1:]}
    named = words & set(services)
    if name in ("pkill", "killall", "skill"):
        return bool(set(re.split(r"[|()^$ ]+|\[(?=\w\])|(?<=\w)\]", "|".join(argv[1:]))) & set(services))
    if name in ("systemctl", "rc-service", "initctl", "launchctl", "sv", "sc", "sc.exe"):
        return bool(named and words & {"stop", "disable", "mask", "kill", "unload", "down"})
    if name in ("service", "invoke-rc.d"):
        return bool(named and "stop" in words)
    if name in ("chkconfig", "update-rc.d"):
        return bool(named and words & {"off", "disable", "remove"})
    if name in ("pkill", "killall", "skill"):
        return bool(named)
    if name == "kill":
        return any(
            o.name in ("pidof", "pgrep") and set(o.argv[1:]) & set(services) for o in origins(command, *argv[1:])
        )
    if name in ("apt", "apt-get", "yum", "dnf", "pacman", "zypper", "apk", "dpkg", "rpm"):
        return bool(
            named
            and words & {"remove", "purge", "erase", "del", "autoremove", "-R", "-e", "-r", "-P", "--purge", "-Rns"}
        )
    return posixpath.basename(name) in services and "stop" in words


@rule(
    "defence-impairment",
    "high",
    attack_id="T1562.001",
    flagged=(
        "setenforce 0",
        "systemctl disable --now auditd",
        "auditctl -e 0",
        "pkill -9 rsyslogd",
        "pkill -f 'wazuh|osqueryd'",
        "ps aux | grep falcon-sensor | awk '{print $2}' | xargs kill -9",
        "sentinelctl unload -k x",
        "sudo yum remove -y crowdstrike-falcon",
        "rm -rf /var/ossec",
        "mount -t tmpfs none /x; grubby --update-kernel ALL --args selinux=0",
        "echo 'kernel.yama.ptrace_scope = 0' >> /etc/sysctl.conf",
        "sed -i 's/.*Storage=.*/Storage=none/' /etc/systemd/journald.conf",
        "semanage permissive -a sshd_t",
        "sysctl -w kernel.randomize_va_space=0",
    ),
    passed=(
        "getenforce",
        "systemctl status auditd",
        "pgrep -fl osqueryd",
        "ps aux | grep node | awk '{print $2}' | xargs kill",
        "sudo sed -i 's/^#Storage=.*/Storage=persistent/' /etc/systemd/journald.conf",
        "sentinelctl status",
        "sysctl kernel.yama.ptrace_scope",
        "systemctl restart rsyslog",
        "sysctl -w net.ipv4.ip_forward=1",
        "auditctl -l",
    ),
)
def stop_guards(command: Command) -> bool:
    """Stops what watches or protects the system: SELinux, AppArmor, auditing, logging, scanners."""
    name, argv = command.name, command.argv
    text = " ".join(argv[1:])
    parts = [word.rpartition("/")[2].removesuffix(".service").removesuffix(".socket") for word in argv[1:]]
    if name in ("pkill", "killall", "skill"):
        parts = [part for word in argv[1:] for part in re.split(r"[|()^$ ]+|\[(?=\w\])|(?<=\w)\]", word)]
    guards = tuple(part for part in parts if _GUARDS.fullmatch(part))
    for other in origins(command, *argv[1:]) if name == "kill" else ():
        if other.name in ("pgrep", "pidof", "grep", "egrep", "awk") and not other.has("v", "invert-match"):
            words = [re.sub(r"\[(\w)\]", r"\1", word) for word in other.argv[1:]]  # [a]uditd does not find itself
            guards += tuple(word for word in words if _VENDORS.search(word) or _GUARDS.fullmatch(word))
    if guards and (name == "kill" or _stops(command, guards)):
        return not any(word in ("-0", "-l", "-HUP", "-1") for word in argv[1:2])
    removers = ("remove", "purge", "erase", "-e", "-r", "--purge", "-P", "uninstall", "-R", "-Rns", "del", "autoremove")
    if name in ("apt", "apt-get", "yum", "dnf", "rpm", "dpkg", "zypper", "pacman", "apk") and set(argv) & set(removers):
        return any(_VENDORS.search(word) and word not in ("rsyslog",) for word in command.operands)
    if name in ("rmmod", "modprobe", "launchctl"):
        off = (
            name == "rmmod"
            or command.has("r", "remove")
            or bool({"unload", "bootout", "remove", "disable"} & set(argv))
        )
        return off and any(_VENDORS.search(word) for word in argv[1:])
    tool = posixpath.basename(name)
    if tool in _AGENT_TOOLS:
        return bool(re.search(_AGENT_TOOLS[tool], text))
    if "uninstall" in tool.lower():
        return bool(re.search(r"(?i)qcloud|cloudmonitor", argv[0]) or _VENDORS.search(argv[0]))
    if _GUARDS.fullmatch(posixpath.basename(name)) and re.fullmatch(
        r"(?:.*\s)?(?:stop|disable|teardown|uninstall)", text
    ):
        return True
    if name == "semanage":
        return argv[1:2] == ["permissive"] and command.has("a", "add")
    if name in ("grubby", "grub2-editenv", "kernelstub", "rpm-ostree"):
        return bool(re.search(r"(?:selinux|apparmor|audit|enforcing)=(?:0|off)\b", text))
    if name == "ln" and argv[-1].startswith("/etc/apparmor.d/disable"):
        return True
    if name == "setenforce":
        return bool(argv[1:] and argv[1].lower() in ("0", "permissive"))
    if name in ("auditctl",):
        return command.has("D") or bool(re.search(r"-e\s*0", text))
    if name in ("aa-teardown", "aa-disable", "aa-complain"):
        return True
    if name in ("csrutil", "spctl"):
        return "disable" in text
    if name == "apparmor_parser":
        return command.has("R", "remove")
    if name in ("sysctl",):
        return bool(_SOFTENED.search(text))
    if name in ("pwsh", "powershell", "powershell.exe", "Set-MpPreference"):
        return bool(re.search(r"(?i)DisableRealtimeMonitoring", text))
    if name == "mokutil":
        return "--disable-validation" in argv
    if name in ("iptables", "ip6tables", "route", "ip") and re.search(r"DROP|REJECT|blackhole|\breject\b", text):
        return any(_VENDORS.search(word) for word in argv[1:])
    for path, append in written(command):
        if path.startswith(("/etc/sysctl.conf", "/etc/sysctl.d/")) and _SOFTENED.search(all_text(command)):
            return True
        if path == "/etc/hosts" and append and re.search(r"(?:127\.|0\.0\.0\.0|::1)", all_text(command)):
            return bool(_VENDORS.search(all_text(command)))
        if path in ("/etc/ufw/ufw.conf", "/etc/default/ufw") and "ENABLED=no" in all_text(command):
            return True
        if path.startswith("/etc/default/grub") and re.search(r"(?:selinux|apparmor|audit)=0", all_text(command)):
            return True
        if (
            path.startswith("/etc/fail2ban")
            and name in ("sed", "gsed")
            and re.search(r"/enabled = false", all_text(command))
        ):
            return True
        if path.startswith("/etc/systemd/journald") and re.search(r"(?i)Storage=none", all_text(command)):
            return True
        if path.startswith(("/etc/rsyslog", "/etc/audit/", "/etc/syslog")) and name in ("sed", "gsed"):
            return any(re.search(r"s(.)\^?.*\1#&?.*\1|(?:^|/|\d)\s*d$", word) for word in command.operands[:1])
        if re.match(
            (
                r"/proc/sys/kernel/(?:randomize_va_space|yama/|kptr_restrict|core_pattern|modprobe)|"
                r"/sys/fs/selinux/enforce|/selinux/enforce|/sys/kernel/uevent_helper|/proc/sys/fs/binfmt_misc/register"
            ),
            path,
        ):
            return True
        if path in ("/etc/selinux/config", "/etc/sysconfig/selinux") and re.search(
            r"(?i)disabled|permissive", all_text(command)
        ):
            return True
        if path.startswith("/etc/ssh/sshd_config"):
            weak = (
                r"(?i)PermitRootLogin\s+yes|PermitEmptyPasswords\s+yes|StrictModes\s+no|"
                r"LogLevel\s+QUIET|PasswordAuthentication\s+yes.*PermitRoot"
            )
            if re.search(weak, all_text(command)):
                return True
        if (
            path.startswith(("/etc/audit/", "/etc/rsyslog", "/etc/fail2ban"))
            and name in (":", "truncate", "echo", "cat", "tee")
            and not append
            and not re.sub(r"[-\w]*null|-\w+\b|/\S+|[0\s]", "", all_text(command))
        ):
            return True
    gone = [path for path, _ in deleted(command)]
    if name in ("mv", "chmod"):
        off = name == "mv" or any(
            re.fullmatch(r"0{1,4}|0?[0-7]*[0246][0246][0246]|[ugoa]*-[rwx]*x[rwx]*", w) for w in argv[1:]
        )
        programs = [resolve(word, command) for word in plain(command)[: None if name == "chmod" else -1]]
        gone += [
            path
            for path in programs + [resolve(w, command) for w in argv[1:]]
            if off and re.match(r"/(?:usr|opt|s?bin)", path)
        ]
    return any(
        re.match(r"/etc/(?:audit|fail2ban|apparmor\.d|selinux|ufw|iptables|nftables|rsyslog)", path)
        or (
            re.match(r"/(?:opt|var|usr|etc|s?bin|Library|Applications)/", path)
            and not path.startswith("/var/log")
            and any(_GUARDS.fullmatch(part) or _VENDORS.fullmatch(part) for part in path.split("/")[2:])
        )
        for path in gone
    )


# Settings of the kernel with which it is easier to attack.
_SOFTENED = re.compile(
    r"(?:randomize_va_space|kptr_restrict|dmesg_restrict|yama[./]ptrace_scope|unprivileged_bpf_disabled|tcp_syncookies"
    r"|rp_filter|protected_(?:symlinks|hardlinks|fifos|regular)|kexec_load_disabled|modules_disabled)\s*=\s*0\b"
    r"|suid_dumpable\s*=\s*[12]\b|mmap_min_addr\s*=\s*0\b|core_pattern\s*=\s*\|"
)
# The tools that come with security agents: how they are told to stop.
_AGENT_TOOLS = {
    "sentinelctl": r"\b(?:unload|uninstall|unprotect|disable)\b|control stop",
    "falconctl": r"(?:^|\s)-d\b|\b(?:unload|uninstall|disable)\b",
    "mdatp": r"(?:disabled|off|false)\b|\buninstall\b|--value\s+disabled|exclusion \S+ add",
    "elastic-agent": r"\b(?:uninstall|unenroll)\b",
    "ossec-control": r"\bstop\b",
    "wazuh-control": r"\bstop\b",
    "fail2ban-client": r"\bstop\b|unban\s+--all",
    "cbagentcli": r"\b(?:stop|disable)\b",
    "esets_daemon": r"stop",
    "accton": r"^off$|^$",
    "tamperprotection": r".",
    "MpCmdRun.exe": r"(?i)-RemoveDefinitions",
}
