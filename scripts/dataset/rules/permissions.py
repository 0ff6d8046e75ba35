"""Rules against opening, closing or giving away whole trees of the system."""

from __future__ import annotations

import re

from scripts.dataset.commands import Command, listed
from scripts.dataset.rules.credentials import secret
from scripts.dataset.rules.rights import ACCOUNTS
from scripts.dataset.rules.table import hits, rule
from scripts.dataset.targets import place, plain, resolve, trunk, unguarded

_OWN = ("/usr/local*", "/var/www*", "/srv*", "/opt*", "/home*", "/tmp*", "/mnt/*", "/media/*", "/var/lib/*/*", "/run/*")


@rule(
    "permissions",
    "high",
    flagged=(
        "chmod -R 777 /",
        "chown -R bob /",
        "chmod 777 /etc/passwd",
        "chmod -R 000 /usr",
        "chmod 644 /etc/shadow",
        "python3 -c 'import os; os.chmod(\"/etc/passwd\", 0o666)'",
        'ruby -rfileutils -e \'FileUtils.chown_R("bob", nil, "/usr")\'',
        "chmod 777 ~/.ssh",
        "chmod a=rwx /etc/passwd",
        "setfacl -m o::rwx /etc/passwd",
    ),
    passed=(
        "chmod -R 755 ./site",
        "python3 -c 'import os; os.chmod(\"run.sh\", 0o755)'",
        "chmod 711 ~",
        "chmod 600 ~/.ssh/id_rsa",
        "sudo chown -R www-data:www-data /var/www/html",
        "chmod 644 /etc/hosts",
    ),
)
def open_system_tree(command: Command) -> bool:
    """Changes owner or mode of system files, whole system trees or homes."""
    name, argv = command.name, command.argv
    if name not in ("chmod", "chown", "chgrp", "chattr", "setfacl", "chflags", "gchmod", "gchown"):
        return False
    tree = command.has("R", "recursive")
    words = plain(command, "-m -x -M --modify --remove --from" if name == "setfacl" else "")
    reference = any(word.startswith("--reference") for word in argv)
    modes = [
        word
        for word in argv[1:]
        if re.fullmatch(r"[0-7]{3,5}|[-+=ugoarwxXst,]*[-+=][ugorwxXst]*", word) and word not in ("-R", "-v", "-f", "-c")
    ]
    paths = words if reference or name == "setfacl" else words[1:]
    if name == "chattr":
        paths = [word for word in words if not re.fullmatch(r"[-+=][a-zA-Z]+", word)]
    if name == "chmod" and modes and modes[0].startswith("-"):
        paths = [word for word in words if word not in modes]
    world = any(
        re.fullmatch(r"0?[0-7]?[0-7][0-7][2367]", mode) or re.search(r"(?:^|,)(?:[ug]*[oa][ugo]*|)[+=][rxX]*w", mode)
        for mode in modes
    )
    # "chmod +w" keeps to the umask: not world
    world = world and not all(re.fullmatch(r"\+[rwxX]*", mode) for mode in modes)
    none = any(re.fullmatch(r"0{1,4}|a?-[rwx]+|a=|ugo-[rwx]+", mode) for mode in modes)
    for word in paths:
        path = resolve(word, command)
        where, (base, whole) = place(path), trunk(path)
        if tree and unguarded(word):
            return True
        reads = any(
            re.fullmatch(r"0?[0-7]?[0-7]?[0-7][4567]|[ugoa]*[oa]\w*[+=][wxX]*r\w*|[gu]*o[+=]\w*r\w*", m) for m in modes
        )
        if tree and reads and re.fullmatch(r"/root|.*/\.(?:ssh|gnupg)", path) and name == "chmod":
            return True
        if tree or whole:
            if where == "root" or (where == "system" and not _harmless_tree(name, base, world, none)):
                return True
            if where == "home" and (world or none or (name == "chown" and argv and base in ("/home", "/root"))):
                return True
            if where == "" and world and re.match(r"/(?:var|srv|opt|usr|etc)/", base):
                return True
        if name in ("chmod", "setfacl"):
            if (
                where in ("root", "system")
                and (world or none)
                and not path.startswith(("/mnt", "/media", "/srv", "/opt"))
            ):
                return True
            if re.match(r"/(?:etc|bin|sbin|boot|lib|usr/(?:s?bin|lib)|dev)/", path) and (world or none):
                return not path.startswith("/dev/tty")
            if (
                secret(path)
                and not path.endswith("/.ssh")
                and any(re.fullmatch(r"0?[0-7][0-7][4567]|0?[0-7][4-7][4-7]|[oa+]*\+[wx]*r\w*", mode) for mode in modes)
            ):
                return hits(path, ("/etc/shadow*", "/etc/gshadow*", "*/id_*")) and True
            if name == "setfacl" and path in ("/etc/shadow", "/etc/sudoers"):
                return True
            if name == "setfacl" and where == "system" and re.search(r"\bo(?:ther)?::?\w*w|u:\w+:\w*w", " ".join(argv)):
                return True
            if where == "home" and world:
                return True
            if path.startswith(("/var/spool/cron", "/etc/cron")) and world:
                return True
            if path in ("/etc/shadow", "/etc/gshadow", "/etc/sudoers") and (reference or any("w" in m for m in modes)):
                return True
        if name in ("chown", "chgrp") and (
            hits(path, ACCOUNTS)
            or (where == "system" and path.count("/") < 3 and not _harmless_tree(name, base, False, False))
        ):
            return not re.match(r"root\b|0\b|root:", words[0])
        if name == "chattr" and where in ("root", "system") and (tree or "-i" in argv or "-a" in argv or "+i" in argv):
            return True
    return False


def _harmless_tree(name: str, base: str, world: bool, none: bool) -> bool:
    """Trees below which users keep things of their own: changing owner or tightening the mode is ordinary."""
    return (
        not world
        and not none
        and hits(
            base,
            listed(
                "/usr/local* /srv* /opt* /mnt* /media* /home /var/log /var/lib/mysql /var/lib/postgresql"
                " /var/lib/docker /Applications /var/spool /var/mail /run /var/lib/redis /var/lib/mongodb"
            ),
        )
        and name != "none"
    )
