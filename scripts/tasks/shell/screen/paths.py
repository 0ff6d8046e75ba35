"""What a command touches: its paths resolved and placed, and the files it reads, writes, deletes and sends.

Places matter more than spellings: ``/``, ``//``, ``/*``, ``/usr/..`` and ``cd / && rm *`` are one place, the root.
A path is a pattern here: it may hold globs, and :data:`ANY` where something is not known. The places are data.
"""

import fnmatch
import itertools
import posixpath
import re
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import NamedTuple

from scripts.tasks.shell.screen.code import deleted_and_written
from scripts.tasks.shell.screen.commands import HOME, MARK, UNKNOWN, ShellCommand, unknown_names
from scripts.tasks.shell.screen.programs import Facts, Programs

ANY = "\ue000"
FD_RUNS, _FOUND = ("-x", "-X", "--exec", "--exec-batch"), f"{UNKNOWN[0]}found{UNKNOWN[1]}"
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
    """Named sets of paths; a set may name others as ``@name``, and leave out ``-pattern`` or ``-@name``."""

    def __init__(self, sets: dict[str, str]) -> None:
        self.sets = sets
        self.inside = lru_cache(maxsize=16384)(self._inside)
        self.parsed = lru_cache(maxsize=None)(self._parsed)

    def _parsed(self, spec: str) -> tuple[str, list[str], re.Pattern[str], list[str]]:
        words = spec.split()
        left_out = " ".join(word[1:] for word in words if word[0] == "-")
        own = [word for word in words if word[0] not in "@-"]
        samples = [
            word.replace("**/", "").replace("**", "*").rstrip("/") for word in own if word[0] == "/"
        ]
        pattern = re.compile("|".join(map(glob_regex, own)) or "(?!)")
        return left_out, [self.sets[word[1:]] for word in words if word[0] == "@"], pattern, samples

    def _inside(self, path: str, spec: str) -> bool:
        """Whether a path, which may hold globs itself, is in the sets and patterns of ``spec``."""
        left_out, sets, pattern, samples = self.parsed(spec)
        path = "/" if path == UNSET else path
        if left_out and self.inside(path, left_out):
            return False
        if pattern.fullmatch(path) or any(self.inside(path, inner) for inner in sets):
            return True
        if (
            path[:1] != "/"
            or "**" in path
            or ANY in path
            or not re.search(r"[^/*?\[\]]{2}", path)
            or not set("*?[") & set(path)
        ):
            return False
        return any(  # /e*c is /etc; /*/x is not every x
            path.count("/") == sample.count("/")
            and fnmatch.fnmatchcase(sample.replace("*", filling), path)
            for sample in samples
            for filling in ("", "x")
        )


def resolve(word: str, command: ShellCommand | None = None) -> str:
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
    tidy = (
        "/" if re.fullmatch(r"(?:\.\.(?:/|$)){3,}", tidy) else re.sub(r"^(?:\.\./){3,}", "/", tidy)
    )
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
    return bool(
        re.fullmatch(r"/+(?:\*|\.\*|\*/)?", bare)
        or (word.startswith(UNKNOWN[0]) and re.fullmatch(top, bare))
    )


# --- what commands do to files ---------------------------------------------------------------------------------


def _once(
    work_out: Callable[[ShellCommand, Programs], list],
) -> Callable[[ShellCommand, Programs], list]:
    """Work out once for each command: most rules ask. The list is shared, not to be changed."""
    name = work_out.__name__

    @wraps(work_out)
    def remembered(command: ShellCommand, programs: Programs) -> list:
        if name not in command.memo:
            command.memo[name] = work_out(command, programs)
        return command.memo[name]

    return remembered


def operands(command: ShellCommand, facts: Facts) -> list[str]:
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
    return {
        "all": words,
        "none": [],
        "first": words[:1],
        "rest": words[1:],
        "last": words[-1:],
        "but-last": words[:-1],
    }[which]


_WRITES = frozenset((">", ">>", ">|", "&>", "&>>", ">&", "<>"))
_OUTPUT_OPTION = re.compile(
    r"-[oOW]|-oG|-Logfile|--?(?:[\w-]*-)?(?:out|output|log|logfile|save|write|dump|junit|export|record|trace|report)[\w-]*"
)


@_once
def writes(command: ShellCommand, programs: Programs) -> list[Touched]:
    """Paths that a command writes or replaces."""
    name, argv, facts = command.name, command.argv, programs.of(command.name)
    out = [
        Touched(redirect.target, appends=redirect.operator.endswith(">>"))
        for redirect in command.redirects
        if redirect.operator in _WRITES
        and not redirect.target.isdigit()
        and redirect.target not in ("-", "/dev/null")
    ]
    words = operands(command, facts)
    targets = _chosen(words, facts.writes)
    if facts.writes == "last" and targets + command.values(*facts.into):  # into a folder, perhaps
        folder = (command.values(*facts.into) or targets)[0]
        targets = targets + [f"{folder}/{posixpath.basename(word.rstrip('/'))}" for word in words]
    if not facts.to_when or command.has(*facts.to_when):
        targets = targets + command.values(*facts.to)
    if command.has(*facts.in_place):
        targets = (
            targets + words[0 if facts.pattern is None or command.has(*facts.pattern) else 1 :]
        )
    appends = command.has(*facts.appends) or "oflag=append" in argv
    out += [Touched(word, appends=appends) for word in targets]
    if name not in ("echo", "printf") and not programs.member(name, "shells"):
        # An option that names an output, of a program that the table does not know so well.
        pairs = [*itertools.pairwise(argv), *(word.partition("=")[::2] for word in argv[1:])]
        out += [
            Touched(value)
            for option, value in pairs
            if value[:1] in ("/", "~") and _OUTPUT_OPTION.fullmatch(option)
        ]
        if command.code is not None:
            for match in re.finditer(r"(>{1,2})\s*[\"']([/~][^\"'\n]+)[\"']", command.code[:8192]):
                out.append(Touched(match[2], appends=match[1] == ">>"))
            out += [Touched(path) for path in deleted_and_written(command.code)[1]]
    return [one._replace(path=resolve(one.path, command)) for one in out if one.path]


@_once
def deletes(command: ShellCommand, programs: Programs) -> list[Touched]:
    """Paths that a command deletes or wipes, resolved, and whether whole trees go."""
    name, facts = command.name, programs.of(command.name)
    words, out = operands(command, facts), []
    if facts.deletes != "none" and (not facts.when or command.has(*facts.when)):
        tree = facts.tree == ("always",) or command.has(*facts.tree)
        chosen = [
            word for word in _chosen(words, facts.deletes) if name != "rsync" or ":" not in word
        ]
        out = [Touched(word, tree or word.endswith("**")) for word in chosen]
    elif name in ("find", "gfind", "fd", "fdfind") and "-delete" in command.argv:
        out = [Touched(path, True) for path in found(command)]
    elif name == "truncate" and any(
        re.fullmatch(r"=?0+[a-zA-Z]*", v) for v in command.values("-s", "--size")
    ):
        out = [Touched(word) for word in words]
    elif command.code is not None and programs.member(name, "interpreters"):
        out = [Touched(path, True) for path in deleted_and_written(command.code)[0]]
    elif name == "mv":  # a tree that is moved away is gone from there
        out = [Touched(word, True) for word in (words if command.has(*facts.into) else words[:-1])]
    return [
        one._replace(path=UNSET if unguarded(one.path) else resolve(one.path, command))
        for one in out
    ]


# Of find: what says what goes (a pattern, a number, nothing in it, a link), and what says its age or size alone.
_CHOOSE = frozenset("-regex -iregex -empty -inum -samefile -lname -xtype l".split())
_FILTERS = _CHOOSE | frozenset(
    "-mtime -mmin -atime -amin -ctime -cmin -newer -newermt -size -links".split()
)
_NAMED = frozenset("-name -iname -path -ipath -wholename -iwholename".split())


def found(command: ShellCommand) -> list[str]:
    """What ``find`` or ``fd`` finds, as patterns: ``root/**`` or, with a filter, ``root/**/name``."""
    argv = [word for word in command.argv[1:] if word not in ("-L", "-H", "-P")]
    pairs = enumerate(argv[:-1])
    names = [
        argv[at + 1] for at, word in pairs if word in _NAMED and argv[at - 1] not in ("!", "-not")
    ]
    names = [name.lstrip("*").lstrip("/") if "/" in name else name for name in names]
    roots = [*itertools.takewhile(lambda word: word[:1] not in ("-", "(", "!"), argv)]
    if command.name[:2] == "fd":  # a pattern, then folders
        own = ShellCommand(
            "fd", [*itertools.takewhile(lambda word: word not in FD_RUNS, command.argv)]
        )
        kinds = own.values("-e", "--extension")
        what, *roots = [word for word in own.operands if word not in kinds] or ["."]
        names = [f"*.{kind}" for kind in kinds] or [_FOUND] * (what != ".")
    roots = [root.rstrip("/") for root in roots or ["."]]
    if not names and not _FILTERS.isdisjoint(
        argv
    ):  # all of it where an age or a size alone leaves open what goes
        known = (resolve(root or "/", command)[:1] == "/" for root in roots)
        names = [""] if _CHOOSE.isdisjoint(argv) and all(known) else [_FOUND]
    if "-maxdepth 0" in " ".join(argv):
        return [root or "/" for root in roots][:16]
    return [
        f"{root}/**/{name}" if name.strip("*.") else f"{root}/**"
        for root in roots
        for name in names or [""]
    ][:16]


# A path among a word's other text: quoted, in brackets, after = @ : or a space.
_TOKEN = re.compile(
    r"(?:^|(?<=[\s'\"(){}<>=@:,;|&\[]))(?:file://)?(~?/[^\s'\"(){}<>,;|&=]*|\.\.?/[^\s'\"(){}<>,;|&=]+)"
)
_PLAIN = re.compile(r"[^\s:=@'\"(){}<>,;|&\[]+")
_KEY_OPTION = re.compile(
    r"-i|--?(?:[\w-]*-)?(?:private-?key|key|keyfile|key-file|identity|identity-file|kubeconfig|defaults-(?:extra-)?file"
    r"|password-file|passphrase-file|cert\w*|homedir|cacert|config|config-file|env-file|netrc-file|keyring|credentials)"
)
_MESSAGE_OPTION = frozenset(
    "-m --message --title --body --comment --description -t --notes".split()
)


@_once
def reads(command: ShellCommand, programs: Programs) -> list[Touched]:
    """Paths whose content a command reads or copies.

    Closed by default: a program that is given a file is taken to show it, if only in its error messages, unless the
    table says that it looks at names alone, or that the word is a pattern, a key or an output.
    """
    name, facts = command.name, programs.of(command.name)
    out: list[tuple[str, bool]] = []
    if command.stdin is not None and command.stdin.path and not command.stdin.path.startswith("&"):
        out.append((command.stdin.path, False))
    out += [(r.target, False) for r in command.redirects if r.operator in ("<", "<>")]
    out += [(value, False) for value in command.values(*facts.reads_from)]
    if not programs.member(name, "lookers"):
        words = operands(command, facts)
        # written, run (and judged as the command that it is), or a pattern
        left_out = {
            *command.values(*facts.to),
            *_chosen(words, facts.writes),
            *command.values(*facts.runs),
        }
        left_out.update(set(words) - set(_chosen(words, facts.reads)))
        left_out.update(
            words[:1] if facts.pattern is not None and not command.has(*facts.pattern) else ()
        )
        keys = set(command.values(*facts.keys))
        for before, word in itertools.pairwise(command.argv):
            option, _, value = word.partition("=")
            word = re.sub(r"\b(?!file:)\w+://\S*", "", word)  # another machine's
            if before in _MESSAGE_OPTION or (
                word in left_out and not re.search(r"[\"'(]/etc/g?shadow", word)
            ):
                continue
            as_key = word in keys or bool(
                _KEY_OPTION.fullmatch(before) or (value and _KEY_OPTION.fullmatch(option))
            )
            if _PLAIN.fullmatch(word):
                out.append((re.sub(r"^-\w(?=[/~])", "", word), as_key))
                continue
            out += [
                (match[1].rstrip(":"), as_key) for match in list(_TOKEN.finditer(word[:8192]))[:64]
            ]
            # scp host:/etc/shadow brings another machine's
            if re.fullmatch(r"(?:[\w.-]+[=@:]+)?@?[\w.~/-]+", word) and facts.sends != "but-last":
                out.append((re.split(r"[=@:]", word)[-1], as_key))
    home = re.compile(r"^~(?=/|$)")
    return [
        Touched(resolve(home.sub(HOME, word), command), as_key=key)
        for word, key in out
        if word not in ("", "-")
    ]


_REMOTE = re.compile(r"(?:[\w.-]+@)?[\w.-]+:(?!\\)|(?:s3|gs|rsync|az|b2|sftp)://")


@_once
def network_uploads(command: ShellCommand, programs: Programs) -> list[Touched]:
    """Paths whose content leaves the machine with a command, straight or through what feeds it."""
    name, facts, argv = command.name, programs.of(command.name), command.said
    sender = programs.member(name, "senders")
    nets = any(re.search(r"/dev/(?:tcp|udp)/", word) for word in argv) or (
        command.reading.sockets
        and any(
            r.operator == ">&" and re.fullmatch(r"[3-9]|\d\d", r.target) for r in command.redirects
        )
    )
    interprets = command.code is not None and programs.member(name, "interpreters")
    if not (sender or nets or interprets):
        return []
    if interprets or not sender:
        own = [one.path for one in reads(command, programs) if not one.path.startswith("/dev/")]
    else:
        words = operands(command, facts)
        own = _chosen(words, facts.sends)
        own = own if facts.sends != "but-last" or (words and _REMOTE.match(words[-1])) else []
        for option in facts.send:
            for value in command.values(option.rstrip("@")):
                match = re.search(r"(?:^|[=<;])[@<](.+?)(?:;|$)", value)
                own.append(match[1] if match else "" if option[-1] == "@" else value.lstrip("@"))
        if facts.sends_of is not None:
            text = (
                " ".join(command.argv[1:])
                + " "
                + ((command.stdin.text or "") if command.stdin else "")
            )
            own += facts.sends_of.findall(text[:4096])
        if command.stdin is not None and command.stdin.path and name != "ssh":
            own.append(command.stdin.path)
        own = [
            resolve(word, command)
            for word in own
            if word not in ("-", "") and not _REMOTE.match(word)
        ]
    out = [Touched(path) for path in own]
    files = [command.reading.files.get(posixpath.normpath(path)) for path in own if path]
    for origin in command.reading.origins(*files, command.stdin, *argv):
        if origin is not command:
            out += [
                one
                for one in reads(origin, programs)
                if not re.match(r"/dev/(?:fd|null|std)", one.path)
            ]
            out += [Touched(path) for path in found(origin)] if origin.name == "find" else []
    return out
