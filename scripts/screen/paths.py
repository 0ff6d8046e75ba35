"""What a command touches: its paths resolved and placed, and the files it reads, writes, deletes and sends.

Places matter more than spellings: ``/``, ``//``, ``/*``, ``/usr/..`` and ``cd / && rm *`` are one place, the root.
A path is a pattern here: it may hold globs, and :data:`ANY` where a variable or an output is not known.
Which places there are is data (``config/screen/places.yaml``).
"""

from __future__ import annotations

import fnmatch
import itertools
import posixpath
import re
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import NamedTuple

from scripts.screen.commands import HOME, MARK, OUTPUT, UNKNOWN, Command, unknown_names
from scripts.screen.programs import Facts, Programs

ANY = "\ue000"
UNSET = "\ue00f"  # stands for a path that is the root should a variable be empty


class Touched(NamedTuple):
    """A path that a command touches.

    ``whole``: with all that is below it; ``appends``: what was there stays; ``as_key``: to identify with, not to show.
    """

    path: str
    whole: bool = False
    appends: bool = False
    as_key: bool = False


# --- places ----------------------------------------------------------------------------------------------------


def glob_regex(pattern: str) -> str:
    """A place's pattern as a regular expression: ``*`` within a name, ``**`` over folders, ``x/`` and all below it."""
    below, pattern = pattern.endswith("/") and len(pattern) > 1, pattern.rstrip("/") or "/"
    out = ""
    for part in re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]*\])", pattern):
        out += {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(part) or (
            part if part[:1] == "[" else re.escape(part)
        )
    return out + ("(?:/.*)?" if below else "")


class Places:
    """Named sets of paths; a set may name others as ``@name``, and except as ``-pattern`` or ``-@name``."""

    def __init__(self, sets: dict[str, str]) -> None:
        self.sets = sets
        self._compiled: dict[str, tuple[re.Pattern[str], re.Pattern[str] | None, list[str]]] = {}
        self.inside = lru_cache(maxsize=16384)(self._inside)

    def _patterns(self, spec: str) -> tuple[list[str], list[str]]:
        taken, left = [], []
        for word in spec.split():
            out, word = (left, word[1:]) if word[0] == "-" else (taken, word)
            if word[0] == "@":
                inner, but = self._patterns(self.sets[word[1:]])
                out += inner
                left += but if out is taken else []
            else:
                out.append(word)
        return taken, left

    def _inside(self, path: str, spec: str) -> bool:
        """Whether a path, which may hold globs itself, is in the sets and patterns of ``spec``."""
        if spec not in self._compiled:
            taken, left = self._patterns(spec)
            samples = [p.replace("**/", "").replace("**", "*").rstrip("/") for p in taken if p[0] == "/"]
            self._compiled[spec] = (
                re.compile("|".join(map(glob_regex, taken))),
                re.compile("|".join(map(glob_regex, left))) if left else None,
                samples,
            )
        taken, left, samples = self._compiled[spec]
        if path == UNSET:
            return taken.fullmatch("/") is not None
        if left is not None and left.fullmatch(path):
            return False
        if taken.fullmatch(path):
            return True
        if path[:1] == "/" and any(c in path for c in "?*[") and "**" not in path and ANY not in path:
            literal = re.search(r"[^/*?\[\]]{2}", path)  # /e*c is /etc; /*/x is not every x
            for sample in samples if literal else ():
                if path.count("/") == sample.count("/") and any(
                    fnmatch.fnmatchcase(sample.replace("*", filling), path) for filling in ("", "x")
                ):
                    return True
        return False


def resolve(word: str, command: Command | None = None) -> str:
    """The path that a word names, absolute where the working directory is known, tidied; marks become ANY."""
    path = MARK.sub(ANY, word).removeprefix("file://")
    cwd = command.cwd if command is not None else None
    if cwd and path[:1] != "/" and "://" not in path:
        path = f"{MARK.sub(ANY, cwd)}/{path}"
    if not path or "://" in path:
        return path
    tidy = posixpath.normpath(path)
    tidy = "/" + tidy.lstrip("/") if tidy.startswith("//") else tidy
    # Three levels up and more: the writer is on the way to the root.
    tidy = "/" if re.fullmatch(r"(?:\.\.(?:/|$)){3,}", tidy) else re.sub(r"^(?:\.\./){3,}", "/", tidy)
    return re.sub(r"^(?:/private|/proc/(?:self|1)/root)(?=/|$)(?!/tmp)", "", tidy) or "/"


def trunk(path: str) -> tuple[str, bool]:
    """The folder that a pattern empties, and whether it takes all that is in it: ``/etc/*`` is (``/etc``, True)."""
    whole = False
    while True:
        head, _, tail = path.rpartition("/")
        bare = tail.strip("*?.[]^!") if any(c in tail for c in "*?[") else tail
        if not tail or bare or tail in (".", "..") or tail.startswith("*."):
            return path, whole
        whole, path = True, head or ("/" if path.startswith("/") else ".")
        if path in ("/", "."):
            return path, True


def unguarded(word: str) -> bool:
    """Whether the word means the root or a system folder should the one variable in it, which nothing sets, be empty:
    ``$name/*``, ``$name/``, ``/$name``, ``$name/usr``; a name such as ``tmp`` says that it was made on the way."""
    names = unknown_names(word) if UNKNOWN[0] in word else []
    bare = MARK.sub("", word)
    top = r"/(?:bin|boot|etc|home|lib|lib64|opt|root|sbin|usr|var)/?\*?"
    if len(names) != 1 or re.search(r"(?i)te?mp|found|[?]", names[0]):
        return False
    return bool(re.fullmatch(r"/+(?:\*|\.\*|\*/)?", bare) or (word.startswith(UNKNOWN[0]) and re.fullmatch(top, bare)))


# --- what commands do to files ---------------------------------------------------------------------------------


def _once(work_out: Callable[[Command, Programs], list]) -> Callable[[Command, Programs], list]:
    """Work out once for each command: most rules ask. The list is shared, not to be changed."""

    @wraps(work_out)
    def remembered(command: Command, programs: Programs) -> list:
        if work_out.__name__ not in command.memo:
            command.memo[work_out.__name__] = work_out(command, programs)
        return command.memo[work_out.__name__]

    return remembered


def operands(command: Command, facts: Facts) -> list[str]:
    """Operands, without the values of options."""
    out: list[str] = []
    words = iter(command.argv[1:])
    for word in words:
        if word == "--":
            out.extend(words)
        elif word in facts.values:
            next(words, None)
        elif word[:1] != "-" or word == "-":
            out.append(word)
    return out


def _chosen(words: list[str], which: str) -> list[str]:
    """The operands that a row of the table means."""
    if which in ("last", "but-last") and len(words) < 2:
        return words[:0] if which == "last" else words
    return {"all": words, "none": [], "first": words[:1], "rest": words[1:], "last": words[-1:],
            "but-last": words[:-1]}[which]  # fmt: skip


_WRITES = frozenset((">", ">>", ">|", "&>", "&>>", ">&", "<>"))
_OUTPUT_OPTION = re.compile(
    r"-[oOW]|-oG|-Logfile|--?(?:[\w-]*-)?(?:out|output|log|logfile|save|write|dump|junit|export|record|trace|report)[\w-]*"
)


@_once
def writes(command: Command, programs: Programs) -> list[Touched]:
    """Paths that a command writes or replaces."""
    name, argv = command.name, command.argv
    facts = programs.of(name)
    out = [
        Touched(redirect.target, appends=redirect.operator.endswith(">>"))
        for redirect in command.redirects
        if redirect.operator in _WRITES and not redirect.target.isdigit() and redirect.target not in ("-", "/dev/null")
    ]
    words = operands(command, facts)
    appends = bool(facts.appends) and command.has(*facts.appends)
    targets = _chosen(words, facts.writes)
    folder = command.values(*facts.into)
    if folder and facts.writes == "last":
        targets, words = [f"{folder[0]}/{posixpath.basename(word)}" for word in words], []
    elif facts.writes == "last" and len(words) > 1:
        targets = targets + [f"{targets[0]}/{posixpath.basename(word.rstrip('/'))}" for word in words[:-1]]
    if not facts.to_when or command.has(*facts.to_when):
        targets = targets + command.values(*facts.to)
    if facts.in_place and command.has(*facts.in_place):
        given = facts.pattern is not None and command.has(*facts.pattern)
        targets = targets + words[0 if given or facts.pattern is None else 1 :]
    out += [Touched(word, appends=appends or "oflag=append" in argv) for word in targets]
    if name not in ("echo", "printf") and not programs.member(name, "shells"):
        # An option that names an output, of a program that the table does not know so well.
        for option, word in itertools.pairwise(argv):
            if word[:1] in "/~" and option[:1] == "-" and _OUTPUT_OPTION.fullmatch(option):
                out.append(Touched(word))
        for word in argv[1:]:
            option, equals, value = word.partition("=")
            if equals and value[:1] in ("/", "~") and _OUTPUT_OPTION.fullmatch(option):
                out.append(Touched(value))
    if command.code is not None:
        for match in re.finditer(r"(>{1,2})\s*[\"']([/~][^\"'\n]+)[\"']", command.code[:8192]):
            out.append(Touched(match[2], appends=match[1] == ">>"))
    return [one._replace(path=resolve(one.path, command)) for one in out if one.path]


@_once
def deletes(command: Command, programs: Programs) -> list[Touched]:
    """Paths that a command deletes or wipes, resolved, and whether whole trees go."""
    name, argv = command.name, command.argv
    facts = programs.of(name)
    out: list[Touched] = []
    if facts.deletes != "none" and (not facts.when or command.has(*facts.when)):
        tree = facts.tree == ("always",) or (bool(facts.tree) and command.has(*facts.tree))
        words = _chosen(operands(command, facts), facts.deletes)
        out = [Touched(word, tree or word.endswith("**")) for word in words if name != "rsync" or ":" not in word]
        if name == "rm" and command.has("--help", "--version"):
            return []
    elif name in ("find", "gfind", "fd", "fdfind") and "-delete" in argv:
        out = [Touched(path, True) for path in found(command)]
    elif name == "truncate" and any(v.lstrip("=") in ("0", "0K") for v in command.values("-s", "--size")):
        out = [Touched(word) for word in operands(command, facts)]
    elif name == "mv":  # moving a tree away, or anything into the null device
        words = operands(command, facts) + command.values(*facts.into)[:1]
        if len(words) > 1:
            target = resolve(words[-1], command)
            # a file that is renamed beside itself is kept
            out = [
                Touched(word, target == "/dev/null" or not target.startswith(resolve(word, command)))
                for word in words[:-1]
            ]
            out = [one for one in out if one.whole]
    return [one._replace(path=UNSET if unguarded(one.path) else resolve(one.path, command)) for one in out]


_FILTERS = frozenset(
    "-regex -iregex -mtime -mmin -atime -amin -ctime -cmin -newer -size -empty -user -group -uid -perm -inum -nouser"
    " -nogroup -links -samefile -newermt -lname -xtype".split()
)


def found(command: Command) -> list[str]:
    """What ``find`` finds, as patterns: ``root/**`` or, with a filter, ``root/**/name``."""
    argv = [word for word in command.argv[1:] if word not in ("-L", "-H", "-P")]
    start = next((at for at, word in enumerate(argv) if word[:1] in ("-", "(", "!")), len(argv))
    named = "-name -iname -path -ipath -wholename -iwholename".split()
    names = [
        argv[at + 1]
        for at, word in enumerate(argv[:-1])
        if word in named and not (at and argv[at - 1] in ("!", "-not"))
    ]
    filtered = not _FILTERS.isdisjoint(argv) or "-type l" in " ".join(argv)
    out = []
    for root in argv[:start] or ["."]:
        root = root.rstrip("/")
        if ["-maxdepth", "0"] in [argv[at : at + 2] for at in range(len(argv))]:
            out.append(root or "/")
        elif names:
            for name in names:
                name = name.lstrip("*").lstrip("/") if "/" in name else name
                out.append(f"{root}/**/{name}" if name.strip("*.") else f"{root}/**")
        else:
            out.append(f"{root}/**/{UNKNOWN[0]}found{UNKNOWN[1]}" if filtered else f"{root}/**")
    return out[:16]


# A path among a word's other text: quoted, in brackets, after = @ : or a space.
_TOKEN = re.compile(
    r"(?:^|(?<=[\s'\"(){}<>=@:,;|&\[]))(?:file://)?(~?/[^\s'\"(){}<>,;|&=]*|\.\.?/[^\s'\"(){}<>,;|&=]+)"
)
_KEY_OPTION = re.compile(
    r"-i|--?(?:[\w-]*-)?(?:private-?key|key|keyfile|key-file|identity|identity-file|kubeconfig|defaults-(?:extra-)?file"
    r"|password-file|passphrase-file|cert\w*|homedir|cacert|config|config-file|env-file|netrc-file|keyring|credentials)"
)
_MESSAGE_OPTION = frozenset("-m --message --title --body --comment --description -t --notes".split())


@_once
def reads(command: Command, programs: Programs) -> list[Touched]:
    """Paths whose content a command reads or copies.

    Closed by default: a program that is given a file is taken to show it, if only in its error messages, unless the
    table says that it looks at names alone, or that the word is a pattern, a key or an output.
    """
    name, argv = command.name, command.argv
    facts = programs.of(name)
    out: list[tuple[str, bool]] = []
    if command.stdin is not None and command.stdin.path and not command.stdin.path.startswith("&"):
        out.append((command.stdin.path, False))
    out += [(r.target, False) for r in command.redirects if r.operator in ("<", "<>")]
    out += [(value, False) for value in command.values(*facts.reads_from)]
    if not programs.member(name, "lookers") and name != "command":
        written = set(command.values(*facts.to)) | set(_chosen(operands(command, facts), facts.writes))
        words = operands(command, facts)
        skipped = set(words) - set(_chosen(words, facts.reads))
        if facts.pattern is not None and words and not command.has(*facts.pattern):
            skipped.add(words[0])
        skipped.update(command.values(*facts.runs))  # judged as the command that it is
        keys = set(command.values(*facts.keys))
        for before, word in itertools.pairwise(argv):
            option, _, value = word.partition("=")
            if before in _MESSAGE_OPTION or word in written:
                continue
            if word in skipped and (facts.pattern is None or not re.search(r"[\"'(]/etc/g?shadow", word)):
                continue
            as_key = word in keys or bool(_KEY_OPTION.fullmatch(before) or (value and _KEY_OPTION.fullmatch(option)))
            if re.fullmatch(r"[^\s:=@'\"(){}<>,;|&\[]+", word):
                out.append((re.sub(r"^-\w(?=[/~])", "", word), as_key))
                continue
            # scp host:/etc/shadow brings another machine's
            far = "host" if facts.sends == "but-last" and re.match(r"[\w.@-]+:", word) else ""
            for match in list(_TOKEN.finditer(word[:8192]))[:64]:
                out.append((match[1].rstrip(":"), as_key))
            if not far and re.fullmatch(r"(?:[\w.-]+[=@:]+)?@?[\w.~/-]+", word):
                out.append((re.split(r"[=@:]", word)[-1], as_key))
    home = re.compile(r"^~(?=/|$)")
    return [Touched(resolve(home.sub(HOME, word), command), as_key=key) for word, key in out if word and word != "-"]


_REMOTE = re.compile(r"(?:[\w.-]+@)?[\w.-]+:(?!\\)|(?:s3|gs|rsync|az|b2|sftp)://")


@_once
def sends(command: Command, programs: Programs) -> list[Touched]:
    """Paths whose content leaves the machine with a command, straight or through what feeds it."""
    name = command.name
    nets = any(re.search(r"/dev/(?:tcp|udp)/", word) for word in (*argv_of(command), ""))
    sockets = command.reading.sockets and any(
        r.operator == ">&" and r.target.isdigit() and int(r.target) > 2 for r in command.redirects
    )
    interprets = command.code is not None and programs.member(name, "interpreters")
    if not (programs.member(name, "senders") or nets or sockets or interprets):
        return []
    facts = programs.of(name)
    if interprets or ((nets or sockets) and not programs.member(name, "senders")):
        own = [one.path for one in reads(command, programs) if not one.path.startswith("/dev/")]
    else:
        words = operands(command, facts)
        own = _chosen(words, facts.sends)
        if facts.sends == "but-last" and not (words and _REMOTE.match(words[-1])):
            return []
        if facts.sends == "all" and name in ("restic", "borg", "duplicity", "kopia"):
            own = own if any(re.search(r"\w:|@|://", word) for word in command.argv[1:]) else []
        for option in facts.send:
            for value in command.values(option.rstrip("@")):
                match = re.search(r"(?:^|[=<;])[@<](.+?)(?:;|$)", value)
                own.append(match[1] if match else "" if option[-1] == "@" else value.lstrip("@"))
        if facts.sends_of is not None:
            text = " ".join(command.argv[1:]) + " " + ((command.stdin.text or "") if command.stdin else "")
            own += facts.sends_of.findall(text[:4096])
        if command.stdin is not None and command.stdin.path and name != "ssh":
            own.append(command.stdin.path)
        own = [resolve(word, command) for word in own if word not in ("-", "") and not _REMOTE.match(word)]
    out = [Touched(path) for path in own]
    files = [command.reading.files.get(posixpath.normpath(path)) for path in own if path]
    for origin in command.reading.origins(*files, command.stdin, *argv_of(command)):
        if origin is not command:
            out += [one for one in reads(origin, programs) if not re.match(r"/dev/(?:fd|null|std)", one.path)]
            out += [Touched(path) for path in (*found(origin),) if origin.name == "find" and "-exec" not in origin.argv
                    and any(OUTPUT[0] in word for word in argv_of(command))]  # fmt: skip
    return out


def argv_of(command: Command) -> list[str]:
    """A command's words and where it redirects to."""
    return [*command.argv, *(redirect.target for redirect in command.redirects)]
