"""What a command touches: its paths resolved and placed, and the files it deletes, writes and reads.

Places matter more than spellings: ``/``, ``//``, ``/*``, ``/usr/..`` and ``cd / && rm *`` are one place, the root.
A path is a pattern here: it may hold globs, and :data:`ANY` where a variable or an output is not known.
"""

from __future__ import annotations

import fnmatch
import posixpath
import re
from collections.abc import Callable
from functools import lru_cache, wraps

from scripts.dataset.commands import HOME, Command, unknown_names
from scripts.dataset.payloads import found

ANY = "\ue000"
UNSET = "\ue00f"  # stands for a path that is the root should a variable be empty
_MARK = re.compile("\ue000[^\ue000-\ue003]*\ue001|\ue002[0-9]+\ue003")
_GLOB = re.compile(r"[*?\[\ue000]")

_TOP = (
    "/bin /sbin /lib /lib32 /lib64 /libx32 /usr /etc /boot /dev /proc /sys /var /root /home /opt /srv /run /mnt /media"
    " /System /Library /Applications /Users /Volumes /private /nix /snap"
).split()
# Folders without which the system or its services don't come up again, or that hold all of someone's data.
_SYSTEM = frozenset(
    [
        *_TOP,
        *"/usr/bin /usr/sbin /usr/lib /usr/lib32 /usr/lib64 /usr/libexec /usr/share /usr/include /usr/local".split(),
        *(
            "/usr/local/bin /usr/local/sbin /usr/local/lib /usr/lib/x86_64-linux-gnu /usr/lib/systemd /usr/lib/modules"
        ).split(),
        *(
            "/lib/modules /lib/systemd /lib/x86_64-linux-gnu /lib/security /lib/firmware /usr/src /usr/lib/python3"
        ).split(),
        *"/var/lib /var/spool /var/mail /var/run /var/backups /var/db /var/log".split(),
        *(
            "/var/lib/dpkg /var/lib/rpm /var/lib/apt /var/lib/pacman /var/lib/mysql /var/lib/postgresql /var/lib/docker"
        ).split(),
        *"/var/lib/mongodb /var/lib/redis /var/lib/etcd /var/lib/kubelet /var/lib/systemd /var/lib/ldap".split(),
        *(
            "/etc/ssh /etc/ssl /etc/pam.d /etc/systemd /etc/systemd/system /etc/security /etc/sudoers.d /etc/init.d"
        ).split(),
        *(
            "/etc/network /etc/netplan /etc/NetworkManager /etc/apt /etc/yum.repos.d /etc/default /etc/pki /etc/selinux"
        ).split(),
        *(
            "/etc/kubernetes /etc/alternatives /etc/grub.d /etc/modprobe.d /etc/udev /etc/sysconfig /etc/ld.so.conf.d"
        ).split(),
        *"/boot/efi /boot/grub /boot/grub2 /run/systemd /sys/firmware/efi/efivars /sys/firmware".split(),
        *"/System/Library /Library/LaunchDaemons /Windows /c /mnt/c /mnt/c/Windows /mnt/c/Users".split(),
    ]
)
_SYSTEM_FILES = frozenset(
    "/etc/passwd /etc/shadow /etc/group /etc/gshadow /etc/fstab /etc/sudoers /etc/hosts /etc/crypttab /etc/inittab"
    " /etc/ssh/sshd_config /etc/nsswitch.conf /etc/ld.so.conf /etc/ld.so.cache /etc/profile /etc/pam.conf"
    " /etc/securetty /etc/login.defs /etc/shells /etc/default/grub /etc/pam.d/common-auth /etc/pam.d/sshd"
    " /etc/pam.d/su /etc/pam.d/sudo /etc/security/limits.conf /etc/sysctl.conf "
    "/etc/machine-id /proc/sysrq-trigger".split()
)
_CORE = frozenset(
    "bash sh dash ls cat cp mv rm ln chmod chown mkdir mount umount sudo su login passwd systemd systemctl init python3"
    " ssh sshd apt dpkg rpm yum dnf grep sed awk find tar env ps kill ip busybox sulogin "
    "agetty grub-install ldconfig".split()
)
_PERSONAL = frozenset(
    "Documents Desktop Pictures Music Videos Movies Library .ssh .gnupg .config .local .mozilla".split()
)
_DEVICE = re.compile(
    r"/dev/(?:r?disk[0-9*]|(?:sd|hd|vd|xvd)[a-z*?\[\ue000{]|nvme|mmcblk|md[0-9*]|dm-|mapper/(?!control)|disk/|nbd|vg|"
    r"mtd|sr[0-9]|root$|(?:ada|nda|nvd|vtbd)[0-9]|n?st[0-9]|[*\ue000])"
)


def resolve(word: str, command: Command | None = None) -> str:
    """The path that a word names, absolute where the working directory is known, tidied; marks become ANY."""
    path = _MARK.sub(ANY, word)
    if path.startswith("file://"):
        path = path[7:]
    cwd = command.cwd if command is not None else None
    if cwd and not path.startswith("/") and "://" not in path:
        path = f"{_MARK.sub(ANY, cwd)}/{path}"
    if not path or "://" in path:
        return path
    tidy = posixpath.normpath(path)
    tidy = "/" + tidy.lstrip("/") if tidy.startswith("//") else tidy
    # Three levels up and more: the writer is on the way to the root.
    tidy = "/" if re.fullmatch(r"(?:\.\.(?:/|$)){3,}", tidy) else re.sub(r"^(?:\.\./){3,}", "/", tidy)
    if tidy.startswith("/private/") or tidy.startswith("/proc/self/root/"):
        tidy = tidy.removeprefix("/private").removeprefix("/proc/self/root")
    return re.sub(r"^/proc/(?:1|self)/root(?=/|$)", "", tidy) or "/"


def trunk(path: str) -> tuple[str, bool]:
    """The folder that a pattern empties, and whether it takes all that is in it: ``/etc/*`` is (``/etc``, True)."""
    whole = False
    while True:
        head, _, tail = path.rpartition("/")
        bare = tail.strip("*?.[]^!") if "*" in tail or "?" in tail or "[" in tail else tail
        if tail and not bare and tail not in (".", "..") and not tail.startswith("*."):
            whole, path = True, head or ("/" if path.startswith("/") else ".")
            if path in ("/", "."):
                return path, True
        else:
            return path, whole


@lru_cache(maxsize=4096)
def place(path: str) -> str:
    """Where a path lies.

    Returns
    -------
    str
        ``root``; ``system`` (a folder or file the system needs); ``home`` (all of somebody's data); ``device`` (a
        disk); ``here`` (all of the working directory); ``""``.
    """
    path, _ = trunk(path)
    if path == "/":
        return "root"
    if path in (".", "..", "../.."):
        return "here"
    if _DEVICE.match(path):
        return "device"
    if path in _SYSTEM or path in _SYSTEM_FILES:
        return "home" if path in ("/home", "/root", "/Users") else "system"
    if re.fullmatch(r"(?:/home|/Users)/[^/]+", path):
        return "home"
    if path.startswith((HOME + "/", "/root/")) and path.split("/", 3 if path.startswith(HOME) else 2)[-1] in _PERSONAL:
        return "home"
    if re.fullmatch(r"/(?:home|Users)/[^/]+/(?:Documents|Desktop|Pictures|Music|Videos|Movies|\.ssh|\.gnupg)", path):
        return "home"
    if path.startswith(("/boot/", "/proc/sys", "/sys/firmware/", "/System/", "/lib/modules/")):
        return "system"
    if re.match(r"/(?:usr/)?s?bin/", path) and posixpath.basename(path) in _CORE:
        return "system"
    if re.match(
        r"/(?:usr/)?lib(?:32|64)?/(?:[^/]+-linux-gnu/)?(?:libc\.|ld-|libpam|libcrypt|ld\.so|libc-|security/pam_)", path
    ):
        return "system"
    if path.startswith("/") and _GLOB.search(path):
        if path.count("/") == 1 and ANY not in path and any(fnmatch.fnmatchcase(top, path) for top in _TOP):
            return "system"
        if ANY not in path and any(fnmatch.fnmatchcase(file, path) for file in _SYSTEM_FILES):
            return "system"
        if (
            ANY not in path
            and re.search(r"/[^/*?\[]{3,}\*$", path)
            and path.startswith(("/usr/", "/etc/", "/boot", "/lib"))
        ):
            return "system" if any(fnmatch.fnmatchcase(folder, path) for folder in _SYSTEM) else ""
    if re.fullmatch(r"(?i)(?:/mnt/)?[a-z]:?[\\/]*(?:windows.*|users[\\/]*)?\*?", path) and (
        ":" in path or "\\" in path
    ):
        return "system"
    return ""


def unguarded(word: str) -> bool:
    """Whether the word means the root or a system folder should the one variable in it, which nothing sets, be empty.

    ``$name/*``, ``$name/``, ``/$name``, ``$name/usr``; a name such as ``tmp`` says that it was made on the way.
    """
    if ANY not in word:
        return False
    names = unknown_names(word)
    bare = _MARK.sub("", word)
    return (
        len(names) == 1
        and bool(
            re.fullmatch(r"/+(?:\*|\.\*|\*/)?", bare)
            or (
                word.startswith(ANY)
                and re.fullmatch(r"/(?:bin|boot|etc|home|lib|lib64|opt|root|sbin|usr|var)/?\*?", bare)
            )
        )
        and not re.search(r"(?i)te?mp|found|[?]", names[0])
    )


# --- what commands do to files ---------------------------------------------------------------------------------


def _once(work_out: Callable[[Command], list]) -> Callable[[Command], list]:
    """Work out once for each command: most rules ask. The list is shared, not to be changed."""
    name = work_out.__name__

    @wraps(work_out)
    def remembered(command: Command) -> list:
        if name not in command.memo:
            command.memo[name] = work_out(command)
        return command.memo[name]

    return remembered


_WRITE = frozenset((">", ">>", ">|", "&>", "&>>", ">&", "<>"))


def plain(command: Command, valued: str = "") -> list[str]:
    """Operands, without the values of the options named (``"-i -p --port"``)."""
    takes = frozenset(valued.split())
    out: list[str] = []
    words = iter(command.argv[1:])
    for word in words:
        if word == "--":
            out.extend(words)
        elif word in takes:
            next(words, None)
        elif not word.startswith("-") or word == "-":
            out.append(word)
    return out


@_once
def written(command: Command) -> list[tuple[str, bool]]:
    """Paths that a command writes or replaces, and whether it only appends."""
    paths = [
        (redirect.target, redirect.operator.endswith(">>"))
        for redirect in command.redirects
        if redirect.operator in _WRITE and not redirect.target.isdigit() and redirect.target not in ("-", "/dev/null")
    ]
    name = command.name
    if name in ("tee", "sponge"):
        paths += [(word, command.has("a", "append")) for word in plain(command)]
    elif name in ("dd", "dcfldd", "dc3dd"):
        paths += [(word[3:], "oflag=append" in command.argv) for word in command.argv[1:] if word.startswith("of=")]
    elif name in ("cp", "mv", "install", "ln", "rsync", "scp", "ddrescue", "gcp"):
        words = plain(command, "-m -o -g -S -t --mode --owner --group --suffix --target-directory -i -e -P -F --rsh")
        folder = command.value("-t", "--target-directory")
        if folder and name != "rsync":
            paths += [(f"{folder[0]}/{posixpath.basename(word)}", False) for word in words]
        elif len(words) > 1:
            target = words[-1]
            paths.append((target, False))
            paths += [(f"{target}/{posixpath.basename(word.rstrip('/'))}", False) for word in words[:-1]]
    elif name in ("sed", "gsed", "perl") and any(
        re.match(r"-[a-zA-Z]*i", w) or w.startswith("--in-place") for w in command.argv
    ):
        paths += [(word, False) for word in command.operands[0 if command.value("-e", "-f") else 1 :]]
    elif name in ("gpg", "gpg2", "openssl"):
        paths += [(word, False) for word in command.value("-o", "--output", "-out")]
    elif name in ("truncate", "fallocate", "touch", "shred", "ed", "ex", "vipe"):
        paths += [(word, False) for word in plain(command, "-s -l -o -r -d -t -n --size --length --reference")]
    elif name in ("curl", "wget"):
        paths += [(word, False) for word in command.value("-o", "--output", "-O", "--output-document")]
    elif name in ("awk", "gawk", "mawk", "nawk"):
        paths += [
            (match[2], match[1] == ">>") for match in re.finditer(r"(>{1,2})\s*\"([/~][^\"]+)\"", command.code or "")
        ]
    elif command.code is not None:
        paths += [
            (match[2], "a" in match[3])
            for match in re.finditer(
                r"\bopen\(\s*(['\"])(.+?)\1\s*,\s*['\"]([rbwa+>]*[wa+>][rbwa+]*)['\"]", command.code
            )
        ]
    return [(resolve(path, command), append) for path, append in paths if path]


_DELETERS = re.compile(
    r"(?:rmtree|unlink|remove|removedirs|rmdir|rm_rf|rm_r|remove_tree|rmSync|rmdirSync|unlinkSync|removeSync|rimraf|rm|"
    r"delete|move)\s*[({]?\s*(?:(?:Path|glob|glob\.glob|os\.path\.expanduser|pathlib\.Path)\s*[(]?\s*)?"
    r"(['\"<])([^'\"\n>]+)['\">]"
)


_DELETES = re.compile(
    r"\b(?:rmtree|os\.remove|os\.unlink|rm_rf|rmSync|unlinkSync|File\.delete)\b|\.(?:unlink|rmdir)\(\)|\bunlink\b"
)


@_once
def deleted(command: Command) -> list[tuple[str, bool]]:
    """Words that a command deletes or wipes, resolved, and whether whole trees go."""
    name, out = command.name, []
    if name in ("rm", "grm", "srm", "unlink", "wipe", "shred", "rmdir", "trash", "del", "rd", "Remove-Item", "scrub"):
        tree = command.has("rR", "recursive", "r", "recurse") or name in ("rd", "wipe") or "-Recurse" in command.argv
        if name == "rm" and command.has("", "help", "version"):
            return []
        words = plain(command, "-n -s --iterations --size" if name == "shred" else "")
        out = [(word, tree or word.endswith("**")) for word in words]
        if name == "rmdir":
            out = [(word, False) for word, _ in out if place(resolve(word, command)) in ("root", "system")]
    elif name in ("find", "gfind") and "-delete" in command.argv:
        out = [(path, True) for path in found(command)]
    elif name in ("truncate",) and any(v.lstrip("=") in ("0", "0K") for v in command.value("-s", "--size")):
        out = [(word, False) for word in plain(command, "-s --size")]
    elif name == "mv":
        words = plain(command, "-t -S --target-directory --suffix")
        if command.value("-t", "--target-directory"):
            words.append(command.value("-t", "--target-directory")[0])
        if len(words) > 1:
            # Moving a system tree away or anything into the null device is a deletion.
            gone = resolve(words[-1], command) == "/dev/null"
            out = [(w, True) for w in words[:-1] if gone or place(resolve(w, command)) in ("root", "system", "home")]
            if not gone:  # renaming a file beside itself keeps it
                target = resolve(words[-1], command)
                out = [
                    (w, tree)
                    for w, tree in out
                    if resolve(w, command) not in _SYSTEM_FILES or not target.startswith(resolve(w, command))
                ]
    elif name == "rsync" and any(word.startswith("--delete") for word in command.argv):
        words = plain(command, "-e --rsh --exclude --include -f --filter")
        out = [(words[-1], True)] if len(words) > 1 and ":" not in words[-1] else []
    elif name == "zip" and (command.has("m", "move")):
        out = [(word, True) for word in plain(command, "-P -x -i -n -b -t")[1:]]
    elif name in ("7z", "7za", "7zr") and "-sdel" in command.argv:
        out = [(word, True) for word in plain(command)[2:]]
    elif name == "git" and "clean" in command.argv[1:3] and command.has("f", "force"):
        out = [(word, True) for word in command.operands[1:] if word.startswith("/")]
    elif name == "ansible":
        out = [(path, True) for path in re.findall(r"\bpath=(\S+).*\bstate=absent", " ".join(command.argv))]
    elif name in ("tar", "gtar") and "--remove-files" in command.argv:
        out = [(word, True) for word in plain(command, "-C -f --file --directory")]
    elif command.code is not None:
        paths = [match[2] for match in _DELETERS.finditer(command.code)]
        if _DELETES.search(command.code):  # a loop over a folder: the call names no path
            paths += [m[1] for m in re.finditer(r"['\"<]([/~][^'\"\n>]*)['\">]", command.code)]
        out = [(HOME + path[1:] if path.startswith("~") else path, True) for path in paths]
    return [(resolve(word, command) if not unguarded(word) else UNSET, tree) for word, tree in out]


_READERS = frozenset(
    "cat less more head tail tac nl od xxd hexdump strings base64 base32 gbase64 cp mv "
    "scp rsync tar zip 7z gzip bzip2 xz"
    " grep egrep fgrep rg awk gawk mawk sed cut sort uniq tee dd diff cmp vim vi nano "
    "view emacs bat batcat rev paste join"
    " openssl gpg curl wget nc ncat socat split xargs column pr fold fmt wc install ln "
    "jq yq python3 sqlite3 john unshadow"
    " hashcat rclone aws gsutil sftp ftp mail mutt sendmail mapfile readarray source . expand look iconv pv ag ack zcat"
    " cpio pax rar gzcat uuencode perl ruby php msmtp tftp age ccrypt".split()
)
_READ_VALUES = {
    "ssh": "", "scp": "-i -F -P -o -l -c -S -J", "sftp": "-i -F -P -o", "rsync": "-e --rsh --exclude --include",
    "curl": "-o --output -H --header -A -u --cert --key --cacert -X --request -w -b -c -E -e --user", "tar": "-C",
    "head": "-n -c", "tail": "-n -c", "dd": "", "wget": "-O -o -P --header", "cut": "-d -f -c",
}  # fmt: skip


@_once
def read_paths(command: Command) -> list[str]:
    """Paths whose content a command reads or copies."""
    name, out = command.name, []
    if command.stdin is not None and command.stdin.path and not command.stdin.path.startswith("&"):
        out.append(command.stdin.path)
    out += [r.target for r in command.redirects if r.operator.startswith("<") and r.operator != "<&"]
    if name in _READERS:
        words = plain(command, _READ_VALUES.get(name, ""))
        if name in ("grep", "egrep", "fgrep", "rg", "sed", "awk", "gawk", "mawk", "jq", "yq", "ag", "ack"):
            words = words[0 if command.value("-e", "-f") else 1 :]
        elif name in ("cp", "mv", "scp", "rsync", "install", "ln", "sftp") and len(words) > 1:
            words = [re.sub(r"^[\w.@-]+:(?=[/~])", "", word) for word in words[:-1]]
        elif name == "tee":
            words = []
        out += words
        for word in command.argv[1:]:  # if=file, -d @file, -F name=@file, -T file, --post-file=file, -in file
            match = re.match(r"if=(.+)|(?:.*?[=<])?@([^;]+)|--[\w-]+=@?([/~.].*)|-[a-zA-Z]*[dFT]@?([/~].*)", word)
            if match:
                out.append(next(group for group in match.groups() if group))
        if name == "curl":
            out += [v.lstrip("@") for v in command.value("-T", "--upload-file")]
        if name == "tar":
            folders = command.value("-C", "--directory")
            out += folders if not any(w.startswith("-") and "x" in w for w in command.argv[1:2]) else []
            out = [f"{folders[0]}/{w}" if folders and not w.startswith("/") else w for w in out]
    if command.code is not None:
        out += [
            m[2]
            for m in re.finditer(
                (
                    r"(?:open|fopen|FileReader|read_text|readFileSync|readFile|readfile|file_get_contents|File\.read|IO\.read|read|"
                    r"Path)\s*\(?\s*(?:(?:my\s*)?\$?[A-Za-z]\w*\s*,\s*(?:['\"]<['\"]\s*,\s*)?)?(['\"])<?([^'\"\n]+)\1"
                ),
                command.code,
            )
        ]
    return [resolve(HOME + w[1:] if w.startswith("~/") else w, command) for w in out if w]
