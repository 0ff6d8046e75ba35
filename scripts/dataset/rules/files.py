"""Rules against destroying files, data and disks."""

from __future__ import annotations

import re

from scripts.dataset.commands import OUTPUT, Command, listed, unknown_names, unmark
from scripts.dataset.rules.table import LONGEST, empties, is_narrow, origins, picks, rule
from scripts.dataset.targets import ANY, UNSET, deleted, place, plain, read_paths, resolve, trunk, written

# --- destructive files -----------------------------------------------------------------------------------------

_JUNK = re.compile(
    r"(?i)(core|.*\.(pyc|pyo|tmp|temp|bak|old|swp|swo|o|orig|rej|cache)|\*?~|\.DS_Store|Thumbs\.db|__pycache__|\.nfs.*"
    r"|node_modules|desktop\.ini|\._\*)"
)


@rule(
    "destructive-files",
    "critical",
    flagged=("rm -rf /", "rm --recursive --force /", "find / -delete", "cd / && rm -rf *", "mv ~ /dev/null"),
    passed=("rm /tmp/foo.txt", "rm -rf build/", "find . -name '*.pyc' -delete", "rm -rf ~/project/node_modules"),
)
def delete_tree(command: Command) -> bool:
    """Deletes or moves away the root, a system folder, somebody's home or all of the working directory."""
    for path, tree in deleted(command):
        where = place(path)
        base, whole = trunk(path)
        if path == UNSET and tree:
            return True
        if base.startswith("/var/log"):
            continue  # anti-forensics has more to say
        if base == "/var/www" and tree:
            return True
        if where == "device":
            continue
        if where in ("root", "home", "system") and (tree or whole):
            # One file below the root or a home that has a place of its own is judged below.
            return True
        if where == "here" and tree and (whole or command.name != "shred"):
            return not (command.name in ("find", "gfind") and is_narrow(command))
        match = re.match(r"/\*\*/(.+)$", path)
        if match and not _JUNK.fullmatch(match[1]) and tree:
            return True
        if re.match(r"(?:/(?:etc|usr|bin|sbin|lib|lib64|boot)|/home/user|/root|/home)/\*\*/\*?\.?\w+$", path) and tree:
            name = path.rsplit("/", 1)[-1]
            if not path.startswith("/home") and not _JUNK.fullmatch(name):
                return True
        if re.fullmatch(r"/(?:home|Users)/\*\*/\*\.(?:docx?|xlsx?|pptx?|odt|pdf|jpe?g|png|sql)\*?", path):
            return True
        if re.match(r"/(?:usr|(?:usr/)?lib\w*)/\*\*/\*\.so\*?$", path):
            return True
    return False


@rule(
    "destructive-files",
    "critical",
    flagged=(
        "ls -A / | grep -v sys | xargs -I% rm -rf /%",
        "du -a / | sort -n | cut -f2 | xargs rm -rf",
        "locate / | xargs rm -f",
        "cut -d: -f6 /etc/passwd | xargs rm -rf",
        "find / -type f | while read f; do : > $f; done",
        "find ~ -type f -exec dd if=/dev/urandom of={} count=9 \\;",
    ),
    passed=(
        "ls -t | tail -n +6 | xargs rm -f",
        "du -a build | cut -f2 | xargs rm -rf",
        "find / -name '*.pyc' | xargs rm -f",
        "ls / | grep '^old-' | xargs -I% rm -rf /tmp/%",
        "locate old.iso | xargs rm",
    ),
)
def delete_listed(command: Command) -> bool:
    """Deletes or overwrites what a list of the whole machine, of all homes or of all disks names."""
    for path, append in written(command) if command.name not in ("sed", "gsed", "perl", "mv", "rsync", "touch") else ():
        base, whole = trunk(path)
        if whole and "**" in path and not append and place(base) in ("root", "home", "system"):
            return not base.startswith("/var/log")
    if command.name in ("rm", "shred", "srm", "unlink", "wipe", "truncate", "userdel", "deluser", "dd", ":"):
        words = [*command.argv[1:], *(redirect.target for redirect in command.redirects)]
        if not any(OUTPUT[0] in word for word in words):
            return False
        sources = origins(command, *words)
        narrow = any(picks(other) for other in sources)
        return not narrow and any(_lists_machine(other, command) for other in sources if other is not command)
    return False


def _lists_machine(command: Command, deleter: Command) -> bool:
    name = command.name
    places = {place(resolve(word, command)) for word in command.operands}
    if name in ("ls", "dir", "find", "du", "tree", "gfind"):
        names = {"-name", "-iname", "-path", "-regex"} & set(command.argv)
        return not names and bool(places & ({"root", "home", "system"} if name != "ls" else {"root", "home"}))
    if name in ("locate", "mlocate", "plocate"):
        return any(word in ("/", ".", "*", "", ".*", "/*") for word in command.operands)
    if name in ("cut", "awk", "cat", "getent", "gawk", "sed"):
        return "/etc/passwd" in read_paths(command) or (name == "getent" and command.operands == ["passwd"])
    return name in ("mount", "df", "lsblk", "findmnt") and deleter.name in ("rm", "shred", "dd", "wipe")


@rule(
    "destructive-files",
    "critical",
    attack_id="T1486",
    flagged=(
        'for f in ~/*; do gpg -c --batch --passphrase x "$f" && shred -u "$f"; done',
        "find /home -type f -exec sh -c 'openssl enc -aes-256-cbc -k x -in $1 -out $1.enc; rm $1' _ {} \\;",
        "7z a -pS3cret -sdel /tmp/x.7z /home",
    ),
    passed=(
        "gpg -c report.pdf && shred -u report.pdf",
        "openssl enc -aes-256-cbc -in a.tar -out a.tar.enc && rm a.tar",
        "for f in *.log; do gzip $f; done",
        "for f in ~/backup/*.tar; do gpg -e -r me $f && rm $f; done",
    ),
)
def encrypt_and_delete(command: Command) -> bool:
    """Encrypts everything in homes or system folders and deletes what it was: ransom."""
    kept = [path for path, _ in deleted(command)]
    if command.name in ("find", "gfind") and "-delete" in command.argv:
        kept = [path.removesuffix("/**") + "/**" if "/**" not in path else path for path in kept]
    kept = [path for path in kept if "*" in path or place(path) in ("home", "system", "root")]
    if not kept:
        return False
    for other in command.reading.commands:
        if not _encrypts(other):
            continue
        for word in other.argv[1:]:
            path = resolve(word, other)
            base, _ = trunk(path)
            if path in kept and path.startswith("/") and ("**" in path or place(base) in ("root", "home", "system")):
                return True
    return False


def _encrypts(command: Command) -> bool:
    name, argv = command.name, command.argv
    if name == "openssl":
        return (
            not ("-d" in argv or "-decrypt" in argv)
            and len(argv) > 1
            and argv[1] in ("enc", "smime", "cms", "pkeyutl", "rsautl", "aes-256-cbc", "aes-128-cbc", "des3")
        )
    if name in ("gpg", "gpg2"):
        return command.has("cer", "symmetric", "encrypt")
    if name in ("7z", "7za", "rar"):
        return any(re.match(r"-h?p\S", word) for word in argv)
    if name == "zip":
        return command.has("eP", "encrypt", "password")
    return name in ("age", "rage", "mcrypt", "ccrypt", "ccencrypt", "bcrypt", "aescrypt") and not command.has(
        "d", "decrypt"
    )


@rule(
    "destructive-files",
    "high",
    flagged=(
        "rm -f /var/lib/dpkg/status",
        "rm -f /etc/passwd",
        "truncate -s 0 /etc/fstab",
        ": > /etc/hosts",
        "ln -sf /dev/null /etc/passwd",
    ),
    passed=("echo '10.0.0.5 db' | sudo tee -a /etc/hosts", "sudo cp nginx.conf /etc/nginx/nginx.conf", "rm notes.txt"),
)
def damage_system_file(command: Command) -> bool:
    """Deletes, empties or overwrites a file that the system needs."""
    for path, _ in deleted(command):
        if place(path) == "system" and not path.startswith("/var/log"):
            return True
        if _STATE.match(path) and not _JUNK.fullmatch(path.rsplit("/", 1)[-1]):
            return True
    for path, append in written(command):
        where = place(path)
        if _STATE.match(path) and not append and command.name in ("dd", "truncate", ":", "shred", "cat"):
            return True
        if (
            where == "system"
            and not append
            and not path.startswith("/var/log")
            and (command.name not in ("touch", "sed", "gsed", "perl", "tee", "rsync", "scp") or _blanks(command))
        ):
            if command.name in ("cp", "mv", "ln", "install", "gcp"):
                sources = plain(command)[:-1]
                if any(source in ("/dev/null", "/dev/zero", "/dev/urandom") for source in sources):
                    return True
                if re.match(r"/(?:usr/)?s?bin/.|/(?:usr/)?lib", path) and path not in ("/usr/bin", "/usr/lib"):
                    return (
                        trunk(path)[0].count("/") > 1
                        and place(path) == "system"
                        and path.rsplit("/", 1)[-1] not in ("bin", "sbin", "lib")
                    )
                continue
            if path.startswith(("/proc/sys/", "/sys/")) or path in ("/proc/sysrq-trigger",):
                continue
            return True
        if (
            command.name == "rsync"
            and any(word.startswith("--delete") for word in command.argv)
            and where in ("root", "system", "home")
        ):
            return True
    return False


# Files in which packages or databases keep what they hold.
_STATE = re.compile(
    r"/var/lib/(?:dpkg/(?:status|available|info(?:/|$))|rpm/\w|(?:mysql|postgresql|mongodb|etcd|ldap|redis)/"
    r"(?!.*\.(?:pid|sock|lock|log|err|tmp)$)\S)"
)


def _blanks(command: Command) -> bool:
    """Whether an editor or ``tee`` leaves nothing of a file."""
    if command.name in ("sed", "gsed"):
        return any(re.fullmatch(r"\s*(?:1,\s*\$)?\s*d\s*|s/\.\*//g?", word) for word in command.argv[1:])
    return command.name == "tee" and not command.has("a", "append") and empties(command)


@rule(
    "destructive-files",
    "high",
    flagged=(
        "mysql -e 'DROP DATABASE production'",
        "dropdb shop",
        "aws s3 rb s3://archive --force",
        "psql -c 'TRUNCATE TABLE orders'",
        "mysql shop -e 'DELETE FROM customers'",
        "kubectl delete pvc --all",
        "terraform destroy -auto-approve",
        "curl -X DELETE http://localhost:9200/_all",
        "docker volume rm $(docker volume ls -q)",
    ),
    passed=(
        "mysql -e 'SHOW DATABASES'",
        "aws s3 rm s3://archive/old.log",
        "redis-cli get key",
        "psql -c 'DELETE FROM sessions WHERE created < now()'",
        "kubectl delete pod web-2",
        "terraform destroy -target=null_resource.a",
        "terraform destroy",
        "docker volume rm scratch",
    ),
)
def drop_data(command: Command) -> bool:
    """Drops whole databases, tables' contents, buckets or what a cloud or cluster holds."""
    words = " ".join([*command.argv[1:], (command.stdin.text or "") if command.stdin else ""]).strip()
    if re.search(_DROPPED.get(command.name, "(?!)"), words[:LONGEST]):
        return True
    if command.name == "kubectl" and "delete" in command.argv:
        sources = origins(command, *command.argv[1:])
        whole = [
            other
            for other in sources
            if other.name == "kubectl"
            and re.search(r"\bget\s+(?:ns|namespaces?|pvc?|pv|nodes?|crds?|all)\b", " ".join(other.argv[1:]))
        ]
        return bool(whole) and not any(picks(other) for other in sources)
    if command.name == "helm":
        return "uninstall" in command.argv and any(
            other.name == "helm" for other in origins(command, *command.argv[1:])
        )
    if command.name == "docker" and command.argv[1:3] == ["volume", "rm"]:
        return any(
            other.name == "docker" and "ls" in other.argv and "-f" not in other.argv and "--filter" not in other.argv
            for other in origins(command, *command.argv[3:])
        )
    if command.name in listed(
        "mysql mariadb psql sqlcmd clickhouse-client mongo mongosh cockroach mysqladmin sqlite3 influx cqlsh"
    ):
        return bool(
            re.search(
                r"(?i)drop\s+(database|schema|keyspace)\b|\bdrop\s+-f\s|-f\s+drop\s|dropDatabase|\bdrop\s+\w+\s*$"
                r"|\btruncate\s+(?:table\s+)?\w+\s*(?:[;'\"]|$|cascade)"
                r"|\bdrop\s+table\s+(?:\w+\.)?(?:users|customers|accounts|orders|\S+\s+cascade)"
                r"|\bdelete\s+from\s+[\w.]+\s*(?:;|$|where\s+(?:1\s*=\s*1|true))|\.drop\(\)"
                r"|deleteMany\(\s*\{\s*\}\s*\)",
                words,
            )
        )
    if command.name == "dropdb":
        return bool(plain(command))
    if command.name in ("redis-cli",):
        return bool(re.search(r"(?i)\bflush(all|db)\b", words))
    if command.name == "aws":
        whole = re.search(r"s3://[\w.-]+/?(?:\s|$)", words)
        return (" rb " in f" {words} " and "--force" in words) or bool(
            " rm " in f" {words} " and "--recursive" in words and whole
        )
    if command.name in ("gsutil", "rclone"):
        return bool(
            re.search(r"\b(rm|rb|purge)\b.*-r|\bpurge\b|\brm -r", words)
            and re.search(r"(gs://[\w.-]+|:)/?(\*\*?)?(\s|$)", words)
        )
    return False


# What removes all that an account, a cluster or a store of backups holds.
_DROPPED = {
    "aws": r"s3api delete-bucket\b(?!-)|rds delete-db-(?:instance|cluster)\b.*--skip-final-snapshot"
    r"|dynamodb delete-table\b|kms schedule-key-deletion|organizations (?:close-account|delete-organization)"
    r"|backup delete-backup-vault",
    "gcloud": r"\bprojects delete\b|\bstorage (?:buckets delete|rm\b.*(?:-r\b"
    r"|--recursive).*gs://[\w.-]+/?\*{0,2}$)|\bsql instances delete\b|\bkms keys versions destroy\b",
    "az": r"\bgroup delete\b|\bstorage account delete\b|\bsql (?:db|server) delete\b|\bkeyvault purge\b",
    "kubectl": r"\bdelete\s+--all\s+\S*(?:pvc?|deploy|ns|svc)\b|\bdelete\s+(?:ns|namespaces?|pvc?"
    r"|persistentvolume(?:claim)?s?|crds?|nodes?|all|deploy\w*|sts)\b.*"
    r"\s--all\b|\bdelete\b.*\b(?:ns|namespaces?)\s+(?:kube-system|prod\w*)\b|\bdelete\s+all\b.*(?:-A\b|--all)",
    **dict.fromkeys(
        ("terraform", "tofu", "terragrunt"),
        r"^(?!.*-target)(?=.*-auto-approve).*\b(?:destroy"
        r"|apply\b.*-destroy)\b",
    ),
    "pulumi": r"\bdestroy\b.*(?:--yes|-y)\b",
    "curl": r"(?i)-X\s*DELETE\b.*:9200/(?:_all|[\w.-]*\*)|:9200/(?:_all|[\w.-]*\*).*-X\s*DELETE",
    "borg": r"\bdelete\b(?!.*::)",
    "restic": r"\bforget\b.*--keep-last[= ]0\b",
    "vssadmin": r"(?i)delete shadows",
    "vssadmin.exe": r"(?i)delete shadows",
    "wbadmin": r"(?i)delete (?:catalog|systemstatebackup)",
    "tmutil": r"\bdelete\b.*Backups|\bdisable\b|\bdeletelocalsnapshots\b",
    "mongo": r"dropDatabase|\.drop\(\)",
    "etcdctl": r"\bdel\b.*(?:--prefix|--from-key)",
    "consul": r"\bkv delete\b.*-recurse",
    "userdel": r"(?:^|\s)root$",
    "deluser": r"(?:^|\s)root$",
}


@rule(
    "destructive-files",
    "high",
    flagged=(
        "apt-get purge -y libc6",
        "rpm -e --nodeps glibc",
        "dpkg --purge --force-all bash",
        "apt-get remove python3",
        "rpm -qa | xargs rpm -e --nodeps",
    ),
    passed=(
        "sudo apt remove nginx",
        "sudo apt update",
        "sudo apt autoremove",
        "dpkg -l | awk '/^rc/ {print $2}' | xargs sudo dpkg --purge",
        "pacman -Rns $(pacman -Qtdq)",
    ),
)
def remove_core_package(command: Command) -> bool:
    """Removes a package without which the system does not work."""
    if command.name not in ("apt", "apt-get", "dpkg", "rpm", "yum", "dnf", "pacman", "zypper", "apk", "aptitude"):
        return False
    text = " ".join(command.argv[1:])
    removes = re.search(r"\b(remove|purge|erase|autoremove|del)\b|--(purge|remove|erase)|(^|\s)-(e|r|P|R\w*)\b", text)
    core = (
        r"libc6|glibc|bash|coreutils|sudo|systemd|linux-image\S*|kernel|dpkg|apt|rpm|init|"
        r"login|util-linux|libc-bin|base|musl|busybox|\*|openssh-server|grub\S*|filesystem|python3?"
        r"|python3\.\d+|perl-base"
    )
    if removes and any(OUTPUT[0] in word for word in command.argv[1:]):
        sources = origins(command, *command.argv[1:])
        every = any(
            (other.name == "dpkg" and ("-l" in other.argv or "--get-selections" in other.argv))
            or (other.name == "rpm" and re.match(r"-q?a|-qa\w*", " ".join(other.argv[1:])))
            or (other.name == "pacman" and re.fullmatch(r"-Qq?", " ".join(other.argv[1:])))
            or (other.name == "apt" and "list" in other.argv)
            for other in sources
            if other is not command
        )
        if every and not any(picks(other) for other in sources):
            return True
    return bool(removes and any(re.fullmatch(core, word) for word in plain(command)))


# --- disk destruction ------------------------------------------------------------------------------------------

_DISK_NAME = re.compile(r"(?i)disk|drive|device|\bdev\b|usb|sdcard|part")


def _disk(word: str, command: Command) -> bool:
    path = resolve(word, command)
    if OUTPUT[0] in word and any(
        o.name in ("lsblk", "blkid", "findmnt", "lsscsi", "fdisk") for o in origins(command, word)
    ):
        return True
    return (
        place(path) == "device"
        or path.startswith("\\\\.\\")
        or (path == ANY and any(_DISK_NAME.search(n) for n in unknown_names(word)))
    )


@rule(
    "disk-destruction",
    "critical",
    flagged=(
        "dd of=/dev/sda if=/dev/zero",
        "cat /dev/urandom > /dev/nvme0n1",
        "shred -n 3 /dev/sdb",
        "cp /dev/zero /dev/sdc",
    ),
    passed=("dd if=a.iso of=b.iso", "sudo dd if=/dev/sda of=disk.img bs=4M", "ls > /dev/null", "shred notes.txt"),
)
def write_disk(command: Command) -> bool:
    """Writes over a disk or partition."""
    targets = [path for path, _ in written(command)] + [path for path, _ in deleted(command)]
    raw = r"/dev/(?:k?mem|port)|/sys/(?:block|class)/.*/delete"
    if any(place(path) == "device" or re.fullmatch(raw, path) for path in targets):
        return True
    if command.name in ("dd", "dcfldd"):
        return any(word.startswith("of=") and _disk(word[3:], command) for word in command.argv[1:])
    return command.name in ("wipe", "scrub", "nwipe", "dban", "badblocks") and _wipes(command)


def _wipes(command: Command) -> bool:
    if command.name == "badblocks":
        return command.has("w") and any(_disk(word, command) for word in command.operands)
    return any(_disk(word, command) for word in command.operands) or "--autonuke" in command.argv


_DISK_TOOLS = frozenset(
    "wipefs fdisk gdisk cfdisk sfdisk cgdisk sgdisk parted blkdiscard luksFormat hdparm nvme cryptsetup"
    " pvremove vgremove"
    " lvremove pvcreate vgcreate vgextend lvreduce lvresize zpool zfs dmsetup mdadm diskutil format format.com btrfs"
    " pv".split()
)
# Other programs that write over disks, firmware or flash: the words with which they do.
_DISK_ERASERS = {
    "sg_format": r"--format|-F\b",
    "sg_sanitize": r"--(?:crypto|block|overwrite)|-[BCO]\b",
    "sedutil-cli": r"(?i)revert|erase|setup",
    "flashrom": r"(?:^|\s)(?:-w|-E|--write|--erase)\b",
    "flash_erase": r".",
    "flash_eraseall": r".",
    "nandwrite": r".",
    "mtd": r"\b(?:erase|write)\b",
    "dc3dd": r"\b(?:hwipe|wipe|hof|of)=/dev/(?!null)",
    "ntfsclone": r"--overwrite|-O\b",
    "fsarchiver": r"\brestfs\b.*dest=/dev/",
    "bmaptool": r"\bcopy\b",
    "woeusb": r"--device|-d\b",
    "debugfs": r"(?:^|\s)-w\b",
    "gpart": r"\b(?:destroy|create|delete)\b",
    "mt": r"\berase\b",
    "asr": r"--erase",
    "rpi-imager": r"--cli",
    "install-mbr": r".",
    "ms-sys": r".",
    "xfs_repair": r"(?:^|\s)-L\b",
    **dict.fromkeys(
        ("partclone.ext4", "partclone.ntfs", "partclone.xfs", "partclone.dd"), r"-r\b|--restore|-o\s+/dev/"
    ),
}
_WITHOUT_DISK = frozenset(
    ("flashrom", "dc3dd", "fsarchiver", "mtd", "sedutil-cli", "gpart", "sg_format", "sg_sanitize")
)


@rule(
    "disk-destruction",
    "critical",
    flagged=(
        "mkfs.ext4 /dev/sda1",
        "wipefs -a /dev/sdb",
        "parted /dev/sda mklabel gpt",
        "blkdiscard /dev/nvme0n1",
        "zpool create pool mirror /dev/sdb /dev/sdc",
        "mdadm --create /dev/md0 --level=1 --raid-devices=2 /dev/sdb1 /dev/sdc1",
        "pvcreate /dev/sdd",
        "flash_erase /dev/mtd1 0 0",
        "dc3dd wipe=/dev/sdc",
    ),
    passed=(
        "zpool list",
        "mdadm --assemble --scan",
        "debugfs /dev/sda1",
        "ddrescue /dev/sdb disk.img map",
        "pvs",
        "mkfs.ext4 disk.img",
        "wipefs /dev/sdb",
        "sudo fdisk -l",
        "parted -l",
        "lsblk",
        "mkswap /swapfile",
    ),
)
def format_disk(command: Command) -> bool:
    """Makes a filesystem or partition table, or erases one, on a disk."""
    name, argv = command.name, command.argv
    if name not in _DISK_TOOLS and name not in _DISK_ERASERS and not name.startswith(("mk", "newfs")):
        return False
    text = " ".join(argv[1:])
    disks = any(_disk(re.sub(r"^\w+=(?:\w+,\w+=)?(?=/dev/)", "", word), command) for word in argv[1:])
    if name.startswith(
        ("mkfs", "mke2fs", "newfs", "mkntfs", "mkdosfs", "mkswap", "mkudffs", "mkexfatfs", "mkreiserfs")
    ):
        return disks or (name != "mkswap" and any(unmark(w) == "" for w in command.operands))
    if name == "wipefs":
        return disks and command.has("afo", "all", "force", "offset")
    if name in ("fdisk", "gdisk", "cfdisk", "sfdisk", "cgdisk"):
        given = command.stdin is not None or any(r.operator.startswith("<") for r in command.redirects)
        return (
            disks and (given or command.has("z", "delete", "wipe", "zero")) and not command.has("ldJ", "list", "dump")
        )
    if name in _DISK_ERASERS:
        return bool(re.search(_DISK_ERASERS[name], text)) and (disks or name in _WITHOUT_DISK)
    if name == "pv":
        return any(_disk(word, command) for word in command.value("-o", "--output"))
    if name in ("sgdisk",):
        return disks and command.has("Zozdn", "zap-all", "zap", "clear", "delete", "new")
    if name == "parted":
        return disks and bool(re.search(r"\b(mklabel|mktable|rm|mkpart|resizepart|mkfs)\b", text))
    if name in ("blkdiscard", "mkfs", "luksFormat"):
        return disks
    if name == "hdparm":
        return bool(re.search(r"security-erase|--trim-sector|--write-sector|--make-bad-sector|--repair-sector", text))
    if name == "nvme":
        return bool(re.search(r"\b(format|sanitize|write-zeroes|delete-ns|dsm)\b", text))
    if name == "cryptsetup":
        return bool(
            re.search(r"\b(luksFormat|luksErase|erase|luksKillSlot|reencrypt|luksRemoveKey|luksHeaderRestore)\b", text)
        )
    if name in ("pvremove", "vgremove", "lvremove"):
        return True
    if name in ("pvcreate", "vgcreate", "vgextend"):
        return disks
    if name in ("lvreduce", "lvresize"):
        return name == "lvreduce" or bool(re.search(r"(?:-L|-l|--size|--extents)[= ]?-\d", text))
    if name in ("zpool", "zfs"):
        bare = any(re.fullmatch(r"(?:sd|vd|hd|da|ada|nvme)[a-z0-9]+", word) for word in argv[2:])
        made = re.search(r"\b(?:create|add|attach|replace)\b", " ".join(argv[1:2])) and name == "zpool"
        return bool(re.search(r"\b(destroy|labelclear)\b", text) or (made and (disks or bare)))
    if name == "dmsetup":
        return bool(re.search(r"remove_all|wipe_table", text))
    if name == "mdadm":
        return "--zero-superblock" in argv or (disks and command.has("C", "create"))
    if name == "diskutil":
        return bool(re.search(r"(?i)\b(erase|zero|random|secureErase|partition|reformat)", text))
    if name in ("format", "format.com"):
        return bool(re.search(r"(?i)\b[a-z]:", text))
    return name in ("btrfs",) and "device" in argv and "delete" in argv
