"""Rules against reading and looking for passwords, keys and tokens."""

from __future__ import annotations

import posixpath
import re

from scripts.dataset.commands import Command, listed, unmark
from scripts.dataset.rules.table import (
    LONGEST,
    as_root,
    hits,
    is_interpreter,
    is_shell,
    operands_of_shell,
    origins,
    rule,
)
from scripts.dataset.targets import ANY, place, plain, read_paths, resolve

_SECRETS = listed(
    "/etc/shadow* /etc/gshadow* /etc/master.passwd /etc/security/opasswd /var/backups/*shadow*"
    " /etc/krb5.keytab /etc/ssh/ssh_host_*key */.ssh/id_* */.ssh/identity */.ssh/*.pem */.ssh/*_key"
    " */.ssh */.ssh/* */.aws/credentials */.aws */.aws/* */.gnupg */.gnupg/* */.netrc */.git-credentials"
    " */.docker/config.json */.kube/config */.kube */.azure/* */.azure */.config/gcloud*"
    " */.config/gh/hosts.yml */.pgpass */.my.cnf */.npmrc */.pypirc */.vault-token"
    " */.terraform.d/credentials* */.password-store* *.kdbx */wallet.dat */Login?Data* */logins.json"
    " */key[34].db */cookies.sqlite */Cookies */.mozilla/firefox* */.config/google-chrome*"
    " */Library/Keychains* */.local/share/keyrings* /var/run/secrets/* /run/secrets/*"
    " /etc/kubernetes/admin.conf /etc/kubernetes/pki/*.key /etc/ssl/private* /proc/*/environ /proc/*/mem"
    " /proc/kcore /dev/mem /dev/kmem */sam */SAM /etc/wpa_supplicant/*"
    " /etc/NetworkManager/system-connections* /var/lib/sss/secrets* /etc/openvpn/*.key"
    " /root/.*_history /home/*/.*_history /var/lib/jenkins/secrets/* /dev/input/event* /var/www/*wp-config.php"
    " /var/www/*.env */.config/rclone/rclone.conf */.bitcoin*"
    " */.ethereum/keystore* */etc/shadow /etc/ppp/*-secrets /var/lib/samba/private* /tmp/krb5cc*"
    " */.subversion/auth/* */.purple/accounts.xml */filezilla/*.xml */.config/chromium* */BraveSoftware*"
    " */.config/Bitwarden* */.config/op/* /var/lib/etcd* */.cargo/credentials* */.rhosts */.htpasswd"
)
_HARMLESS = (
    "*.pub",
    "*/known_hosts*",
    "*/.ssh/config",
    "*/authorized_keys",
    "/proc/self/environ",
    f"/proc/{ANY}/environ",
    "*/.bash_history",
)
_OWN_HISTORY = re.compile(r"/home/user/\.\w+_history")


def secret(path: str) -> bool:
    """Whether a path holds keys, passwords or tokens."""
    if "**/" in path and re.fullmatch(r"(?:\.?ssh/)?id_(?:\*|rsa|dsa|ecdsa|ed25519)\*?", path.rsplit("**/", 1)[1]):
        return True
    if not hits(path, _SECRETS) or hits(path, _HARMLESS[:4]):
        return False
    return not _OWN_HISTORY.fullmatch(path) and path != "/proc/self/environ"


_LOOKERS = frozenset(
    "ssh ssh-add ssh-keygen ssh-copy-id ls stat chmod chown chgrp wc mkdir touch test [ [[ find cd lsattr chattr"
    " getfacl setfacl du md5sum sha256sum sha1sum rpm dpkg git vipw visudo echo printf logger restorecon chcon"
    " auditctl sudo doas su env docker podman kubectl nerdctl : readlink realpath dirname basename export".split()
)
_HUNTED = re.compile(
    r"(?i)passw|passwd|\bpass\b|\bpwd\b|\bAKIA|db_pass|secret|api[_-]?key|private key|credential|aws_|token"
    r"|id_rsa|\.pem\b|shadow|BEGIN (?:RSA|OPENSSH)"
)


@rule(
    "credential-access",
    "high",
    flagged=(
        "sudo cat /etc/shadow",
        "cp ~/.ssh/id_rsa /tmp/k",
        "cat ~/.aws/credentials",
        "tar czf s.tgz ~/.gnupg",
        "sudo file -f /etc/shadow",
        "sudo csplit /etc/shadow 1",
        "debugfs -R 'cat /etc/shadow' /dev/sda1",
        "cat /mnt/disk/etc/shadow",
    ),
    passed=(
        "sudo stat /etc/shadow",
        "test -f /etc/shadow && echo yes",
        "sudo getfacl /etc/shadow",
        "cat ~/.ssh/id_rsa.pub",
        "ls -l /etc/shadow",
        "chmod 600 ~/.ssh/id_rsa",
        "ssh -i ~/.ssh/id_rsa host uptime",
        "git config credential.helper store",
        "cat /etc/passwd",
    ),
)
def read_secret(command: Command) -> bool:
    """Reads or copies password hashes, private keys, tokens or the memory they lie in."""
    name = command.name
    if name == "ln":
        return any(secret(resolve(word, command)) for word in plain(command)[:-1])
    if name in ("wc", "ssh"):  # options that take a file for a list or a configuration, and quote it
        return any(secret(resolve(word, command)) for word in command.value("--files0-from", "-F"))
    if name in _LOOKERS:
        return False
    if as_root(command) and not is_shell(command) and not is_interpreter(command):
        quoted = r"[\"'({<]\s*/etc/g?shadow\s*[\"')}]|\bInclude /etc/g?shadow"
        if any("/etc/" in word and re.search(quoted, word) for word in command.argv[1:]):
            return True
    # The hashes: a program that can be given a file shows it one way or another, if only in its error messages.
    if any(
        re.fullmatch(r"(?:-\w|[^\s=@:]*[=@:]+(?://)?)?(?:/[\w./-]+)?/etc/g?shadow-?", word) for word in command.argv[1:]
    ) or any(
        re.search(r"(?:\b(?:cat|dump|e|r|edit|import)\s+|\(\s*['\"])/etc/g?shadow", text)
        for text in (*command.argv[1:], (command.stdin.text or "") if command.stdin is not None else "")
        if name in ("debugfs", "ed", "ex", "vim", "vi", "sqlite3", "gdb", "terraform")
    ):
        return name not in (
            "rm",
            "mv",
            "shred",
            "truncate",
            "tee",
            "passwd",
            "usermod",
        )
    skip = (
        frozenset(command.value("-i", "--cert", "--key", "-E", "--cacert", "-E", "--identity"))
        if name in ("scp", "sftp", "rsync", "curl", "openssl", "wget")
        else ()
    )
    for path in read_paths(command):
        if secret(path) and not any(resolve(word, command) == path for word in skip):
            return True
    return False


@rule(
    "credential-access",
    "high",
    flagged=(
        "grep -ri password /etc /home",
        "find / -name id_rsa",
        "sudo getent shadow",
        "curl http://169.254.169.254/latest/meta-data/iam/",
        "mimipenguin",
        "kubectl get secret db -o jsonpath='{.data.key}'",
        "etcdctl get /registry/secrets --prefix",
        "aws secretsmanager get-secret-value --secret-id db",
        "vault kv get secret/db",
        "kubectl config view --raw",
        "python3 lazagne.py all",
        "mysql -e 'SELECT user, authentication_string FROM mysql.user'",
        "nmcli device wifi show-password",
    ),
    passed=(
        "curl -s http://169.254.169.254/latest/meta-data/placement/region",
        "kubectl get secret db -o name",
        "kubectl get secret db -o jsonpath='{.metadata.name}'",
        "etcdctl get /config/site",
        "aws secretsmanager list-secrets",
        "vault kv list secret/",
        "nmcli device wifi list",
        "grep -rn password src/",
        "find . -name '*.pem'",
        "getent passwd bob",
        "env | sort",
        "ssh-keygen -t ed25519",
    ),
)
def hunt_secrets(command: Command) -> bool:
    """Searches the machine for secrets, dumps them or attacks passwords."""
    name, argv = command.name, command.argv
    text = " ".join(unmark(word) for word in argv[1:])[:LONGEST]
    if name in ("grep", "egrep", "fgrep", "rg", "ag", "ack"):
        captured = any(other.name in ("tcpdump", "tshark", "ngrep") for other in origins(command, command.stdin))
        if captured and re.search(r"(?i)pass|user|login|auth|cookie", text):
            return True
        patterns = command.value("-e", "--regexp")
        glued = [argv[at + 1] for at, word in enumerate(argv[:-1]) if re.fullmatch(r"-[a-zA-Z]+e", word)]
        places = [word for word in command.operands if word not in glued][0 if patterns or glued else 1 :]
        patterns = patterns + glued or command.operands[:1]
        wide = any(
            place(resolve(p, command)) in ("root", "home", "system")
            or hits(resolve(p, command), ("/etc*", "/var/www*", "/opt", "/proc/*"))
            for p in places
        )
        deep = command.has("rR", "recursive", "dereference-recursive") or any("*" in p for p in places) or name == "rg"
        history = any(re.search(r"history$|/environ$", p) for p in places)
        for other in origins(command, command.stdin):
            history = history or any(p.endswith("_history") for p in read_paths(other))
            history = history or (other.name == "history" and len(other.argv) == 1)
        return bool(any(_HUNTED.search(p) for p in patterns) and ((wide and deep) or history))
    if name in ("find", "locate", "mlocate", "plocate", "fd"):
        wide = name != "find" or any(
            place(resolve(p, command)) in ("root", "home") or re.search(r"/\.(?:aws|azure|config/gcloud|oci|ssh)\b", p)
            for p in _roots(command)
        )
        return wide and bool(
            re.search(
                (
                    r"id_(?:rsa|dsa|ecdsa|ed25519)(?!\.pub)|\.pem\b|\.kdbx|\.key\b|shadow\b|credentials|"
                    r"password|passwd|\.p12|\.pfx|\.ovpn|wallet|\.env\b|tokens?\b|\.aws\b|git-credentials"
                    r"|\.netrc|wp-config|_history|\.htpasswd|\.pgpass|"
                    r"secret"
                ),
                text,
            )
        )
    if command.code and re.search(r"\bspwd\.|\bgetsp(?:nam|all|ent)\b", command.code):
        return True
    if name == "getent":
        return "shadow" in argv or "gshadow" in argv
    if name in ("curl", "wget", "http", "nc", "fetch") or (command.code and "169.254" in command.code):
        text += " " + (command.code or "")[:LONGEST]
        # What a machine is and where is harmless; what lets one act as it, and its start-up script, is not.
        return "169.254.170.2" in text or bool(
            re.search(r"169\.254\.169\.254|metadata\.google\.internal|100\.100\.100\.200|\[?fd00:ec2::254", text)
            and re.search(
                r"/iam/|security-credentials|/identity|user-?data|service-accounts|oauth2|recursive=true"
                r"|/ram/|attributes"
                r"|custom_?data|\bkeys?\b|passw|opc/v\d/(?:identity|instance/?\s*$)",
                text,
            )
        )
    if name in ("kubectl", "oc"):
        asked = re.search(r"\bget\s+(?:.*\s)?secrets?\b", text)
        shown = re.search(
            r"-o\s*=?\s*(?:yaml|json\b|go-template|(?:jsonpath|custom-columns)\S*?=?.*(?:\.data|\{\.\}|\{\.items))"
            r"|--output[= ](?:yaml|json\b|go-template|(?:jsonpath|custom-columns).*\.data)|--template",
            text,
        )
        return (
            bool(asked and shown)
            or "serviceaccounts/" in text
            or bool(re.search(r"\bview-secret\b|\bconfig\s+view\b.*--raw\b|\bextract\s+secrets?/", text))
        )
    if name in _STORES:
        return bool(re.search(_STORES[name], text))
    if name in ("mysql", "mariadb", "psql", "mongo", "mongosh", "pg_dump"):
        return bool(
            re.search(
                r"(?i)authentication_string|mysql\.user\b.*passw|passw.*mysql\.user\b|pg_shadow"
                r"|pg_authid|system\.users",
                text,
            )
        )
    if name == "security":
        return bool(re.search(r"find-(?:generic|internet)-password|dump-keychain|export", text))
    if name == "gpg":
        return bool(re.search(r"--export-secret", text))
    if name in ("strace", "ltrace", "gdb", "gcore", "procdump"):
        targets = re.search(
            r"sshd|\bssh\b|\bsu\b|sudo|login|gnome-keyring|passwd|lsass|firefox|chrom|ssh-agent|gpg-agent|keepass", text
        )
        source = any(
            o.name in ("pgrep", "pidof")
            and re.search(r"ssh|su\b|sudo|login|keyring|agent|firefox|chrom|keepass", " ".join(o.argv))
            for o in origins(command, *argv)
        )
        return bool(targets) or source
    if name in ("pass", "secret-tool", "op", "bw"):
        return name == "secret-tool" and "search" in argv and "--all" in argv
    if (name in ("xinput",) and "test" in text) or (
        name == "tcpdump" and bool(re.search(r"(?i)pass|user|login|authorization", text))
    ):
        return True
    tools = (
        "john hashcat hydra medusa ncrack patator unshadow logkeys mimikatz mimipenguin "
        "secretsdump.py lazagne laZagne pwdump fgdump crackmapexec ettercap responder "
        "keylogger linpeas.sh lse.sh fcrackzip aircrack-ng cowpatty pdfcrack impacket-secretsdump dsniff"
        " bettercap avml firefox_decrypt.py mimipenguin.py chainbreaker"
    ).split()
    if name == "trap":
        return "DEBUG" in argv and "BASH_COMMAND" in text and ">" in text
    if (is_shell(command) or is_interpreter(command)) and command.code is None:
        return any(
            posixpath.basename(word).lower()
            in {tool.lower() for tool in tools if "." in tool}
            | {
                "lazagne.py",
                "mimipenguin.sh",
                "linenum.sh",
                "autosuid.sh",
                "les.sh",
                "linux-exploit-suggester.sh",
                "pspy64",
            }
            for word in operands_of_shell(command)[:1]
        )
    if name == "nmap":
        return bool(re.search(r"--script[= ]\S*brute", text))
    if name in ("ngrep", "tshark"):
        return bool(re.search(r"(?i)pass|authbasic|login|cookie|authorization", text))
    return name in tools or posixpath.basename(name) in listed(
        "mimipenguin mimipenguin.sh linpeas.sh laZagne.py LaZagne.py"
    )


# What prints passwords, tokens or keys from where they are kept.
_STORES = {
    "etcdctl": r"\bget\b.*(?:/registry(?:/secrets)?|\s/\s|\s['\"]*\s?--prefix$)",
    "aws": r"secretsmanager (?:batch-)?get-secret-value|ssm get-parameters?\S*\b.*--with-decryption"
    r"|configure get \S*(?:secret|token)|iam create-access-key|configure export-credentials",
    "gcloud": r"\bsecrets versions access\b|service-accounts keys create\b",
    "az": r"\bkeyvault (?:secret|key|certificate) (?:show|download|backup)\b|storage account keys list|acr"
    r" credential show",
    "vault": r"^(?:kv get|read|kv export|token create|print token|operator unseal)\b",
    "gh": r"\bauth token\b|--show-token",
    "git": r"\bcredential(?:-\S+)? (?:fill|get)\b",
    "bw": r"^(?:export|list items(?!.*--search))\b",
    "lpass": r"^export\b",
    "keepassxc-cli": r"^export\b",
    "op": r"--reveal",
    "rclone": r"\bconfig (?:show|dump)\b",
    "nmcli": r"show-password|(?:^|\s)(?:-s|--show-secrets)\b|-\w*s\b.*psk",
    "pdbedit": r"-\w*w",
    "tdbdump": r"secrets",
    "ldapsearch": r"(?i)userPassword|unicodePwd|ntPwd",
    "redis-cli": r"(?i)config get (?:requirepass|masterauth|\*pass\*)",
    "mysqldump": r"\bmysql\s+user\b",
}


def _roots(command: Command) -> list[str]:
    roots = []
    for word in command.argv[1:]:
        if word in ("-L", "-H", "-P"):
            continue
        if word.startswith(("-", "(", "!")):
            break
        roots.append(word)
    return roots or ["."]
