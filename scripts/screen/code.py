"""Code in other languages: the shell text that it hands on; what it does to files, as commands that do the same.

Python, Perl, Ruby, PHP, Lua, JavaScript and awk spell ``system("...")`` and ``unlink("...")`` alike enough for one
table. No language is parsed: what a pattern does not find is not judged.
"""

from __future__ import annotations

import re

from scripts.screen.commands import MAX_TEXT, ansi, quote, tilde

_STRING = (
    r"[rbuf]{0,2}(?:'''((?:[^\\]|\\.)*?)'''|\"{3}((?:[^\\]|\\.)*?)\"{3}"
    r"|'((?:[^'\\\n]|\\.)*)'|\"((?:[^\"\\\n]|\\.)*)\"|`((?:[^`\\]|\\.)*)`)"
)
_CALLS = re.compile(
    r"(?<![\w])(?:os\.system|os\.popen|os\.exec[lv]p?e?|exec[lv]p?e?|os\.spawn\w+|subprocess\.\w+|"
    r"commands\.getoutput|popen2?|system|exec|"
    r"execSync|spawnSync|spawn|execFile(?:Sync)?|shell_exec|passthru|proc_open|popen|"
    r"IO\.popen|Open3\.\w+|os\.execute|io\.popen|"
    r"check_output|check_call|run|call|Popen|getoutput|pty\.spawn|getline|do shell script|eval|qx|sh|\$)\s*"
    r"(?:\(|\s|\{)\s*(\[?)\s*" + _STRING,
    re.DOTALL,
)
_JOINED = re.compile(r"(['\"])\s*(?:\+|\.\.?)\s*\1")  # "rm -rf " + "/"
_ITEM = re.compile(r"\s*,\s*" + _STRING, re.DOTALL)
_BACKQUOTES = re.compile(r"`([^`]{2,400})`|%x[\[({]([^\])}]{2,400})[\])}]|qx[/({]([^/)}]{2,400})[/)}]")
_PIPED = re.compile(r"\"([^\"\n]{2,400})\"\s*\|\s*getline|\|\s*\"([^\"\n]{2,400})\"")


def shell_strings(code: str) -> list[str]:
    """Texts that a piece of Python, Perl, Ruby, PHP, Lua, JavaScript or awk hands to a shell."""
    found_texts = []
    code = _JOINED.sub("", code[:MAX_TEXT])
    for match in _CALLS.finditer(code):
        text = next((group for group in match.groups()[1:] if group is not None), "")
        words = [text]
        at = match.end()
        following = _ITEM.match(code, at)
        while following is not None and len(words) < 64:
            words.append(next((group for group in following.groups() if group is not None), ""))
            following = _ITEM.match(code, following.end())
        if len(words) > 1:
            if re.match(r"\s*(?:os\.)?(?:exec|spawn)[lv]", match[0]):
                words = words[1:]
            found_texts.append(" ".join(quote(ansi(word)) for word in words))
        else:
            found_texts.append(ansi(text))
    for pattern in (_BACKQUOTES, _PIPED):
        for match in pattern.finditer(code):
            found_texts.append(ansi(next(group for group in match.groups() if group)))
    return found_texts[:32]


def _names(text: str) -> list[str]:
    return text.split()


# A language's function: the words of the command that does the same.
_FILE_CALLS = {
    **dict.fromkeys(_names("rmtree remove_tree rm_rf rm_r rimraf removeSync"), ("rm", "-rf")),
    **dict.fromkeys(_names("rmSync rm rmdirSync"), ("rm", "-rf")),
    **dict.fromkeys(_names("unlink unlinkSync removedirs remove delete"), ("rm",)),
    **dict.fromkeys(_names("chmod chmodSync lchmod fchmod"), ("chmod",)),
    **dict.fromkeys(_names("chown chownSync lchown"), ("chown",)),
    **dict.fromkeys(_names("rename renameSync move mv"), ("mv",)),
    **dict.fromkeys(_names("truncate truncateSync"), ("truncate", "-s", "0")),
    **dict.fromkeys(_names("copy copyfile copy2 copyFileSync cp"), ("cp",)),
    **dict.fromkeys(_names("symlink symlinkSync ln_s ln_sf"), ("ln", "-sf")),
    **dict.fromkeys(_names("writeFileSync writeFile file_put_contents createWriteStream"), (">",)),
    **dict.fromkeys(_names("write_text write_bytes"), (">",)),
    **dict.fromkeys(_names("appendFileSync appendFile"), (">>",)),
    **dict.fromkeys(_names("read_text read_bytes readFileSync readFile file_get_contents"), ("cat",)),
    "chmod_R": ("chmod", "-R"),
    "chown_R": ("chown", "-R"),
    "open": ("open",),
    "fopen": ("open",),
    "write": ("write",),
    "binwrite": (">",),
}
_FILE_CALL = re.compile(
    r"(?:(?:Path|PosixPath)\(\s*(['\"])(?P<path>[^'\"\n]{1,200})\1\s*\)|\b(?P<file>File|IO|fs|Fs|os|io)|[\w)\]}])?\.?"
    r"(?<![\w$@%-])(?P<call>" + "|".join(sorted(_FILE_CALLS, key=len, reverse=True)) + r")\b\s*(?P<open>\(?)"
)
_WALKED = re.compile(
    r"\b(?:walk|rglob|glob|listdir|scandir|readdirSync|readdir|iterdir|find|finddepth|Dir|each_child|children|glob1)"
    r"(?:Sync)?\b\s*[\[(]?[^'\"\n]{0,40}?(['\"])([/~][^'\"\n]*)\1|Path\(\s*(['\"])([/~][^'\"\n]*)\3\s*\)"
    r"\.(?:rglob|glob|iterdir|walk)|<([/~][^>\n]*)>"
)
_OWN_HOME = re.compile(
    r"(?:(?:os\.path\.)?expanduser|File\.expand_path)\(\s*(['\"]~[^'\"]*['\"])\s*\)|Path\.home\(\)|(?:os\.)?homedir\(\)|Dir\.home"
    r"|\$ENV\{['\"]?HOME['\"]?\}|ENV\[['\"]HOME['\"]\]|process\.env\.HOME|(?:os\.)?(?:environ\[|getenv\()['\"]HOME['\"][\])]"
)
_TEXT = re.compile(r"(['\"])([^'\"\n]*)\1")


def file_commands(code: str) -> list[tuple[list[str], tuple[str, str] | None]]:
    """Commands that do to files what the code does with its language's functions, and what they redirect to."""
    if "/" not in code and "~" not in code and "home" not in code and "HOME" not in code:
        return []
    code = _OWN_HOME.sub(lambda match: match[1] or ("Path('~')" if match[0][0] == "P" else "'~'"), code[:8192])
    roots = [next(group for group in (match[2], match[4], match[5]) if group) for match in _WALKED.finditer(code)]
    roots = [root if "*" in root else root.rstrip("/") + "/**" for root in roots]
    out: list[tuple[list[str], tuple[str, str] | None]] = []
    for match in _FILE_CALL.finditer(code):
        words = list(_FILE_CALLS[match["call"]])
        rest = code[match.end() : match.end() + 240]
        rest = _arguments(rest) if match["open"] else re.split(r"[;\n}]", rest)[0]
        texts = [re.sub(r"^\s*\+?>{1,2}\s*(?=/)", "", text[2]) for text in _TEXT.finditer(rest)]
        paths = [text for text in texts if text.startswith(("/", "~"))]
        paths = [path for path in ([match["path"]] if match["path"] else []) + paths if path.startswith(("/", "~"))]
        if not paths:
            joined = re.match(r"\s*(?:os\.path\.join\(|(\w+)\s*,\s*['\"]w)", rest) if words[0] == "open" else None
            walked = joined and (
                not joined[1] or re.search(rf"\b{joined[1]}\s*=\s*os\.path\.join|\bfor\s+{joined[1]}\s+in", code)
            )
            if (words[0] not in ("rm", "chmod", "chown", ">", "truncate") and not walked) or match["path"]:
                continue
            paths = roots
        paths = [tilde(path) for path in paths[:4]]
        if not paths:
            continue
        if words[0] in ("open", "write"):
            if words[0] == "write" and match["file"] not in ("File", "IO"):
                continue
            modes = [text for text in texts if re.fullmatch(r"[rwab+t>xU]{1,4}|\+?[<>]{1,2}", text)]
            # Perl writes the mode before the path, in one text or in two.
            glued = re.search(r"['\"]\s*(>{1,2})\s*([/~][^'\"]*)['\"]", rest)
            if glued:
                modes, paths = [glued[1]], [glued[2].strip()]
            if words[0] == "write" or "O_WRONLY" in rest or "O_RDWR" in rest or "O_TRUNC" in rest:
                modes.append("w")
            if not any(char in mode for mode in modes for char in "wa+x>"):
                out.append((["cat", *paths], None))
                continue
            append = any("a" in mode or ">>" in mode for mode in modes)
            out.append(([":"], (">>" if append else ">", paths[0])))
        elif words[0] in (">", ">>"):
            out.append(([":"], (words[0], paths[0])))
        elif words[0] in ("chmod", "chown"):
            number = re.search(r"\b0?o?([0-7]{3,4})\b", rest)
            names = [text for text in texts if re.fullmatch(r"[a-z_][\w-]*", text)]
            if words[0] == "chmod" and number is None:
                continue
            owner = number[1] if words[0] == "chmod" and number else (names or re.findall(r"\d+", rest) or ["0"])[0]
            out.append(([*words, owner, *paths], None))
        elif words[0] in ("mv", "cp", "ln"):
            if len(paths) > 1:
                out.append(([*words, paths[0], paths[1]], None))
        else:
            out.append(([*words, *paths], None))
    return out[:24]


def _arguments(text: str) -> str:
    """The text up to the bracket that closes a call."""
    level = 1
    for match in re.finditer(r"[()\n]", text):
        level += {"(": 1, ")": -1}.get(match[0], 0)
        if level == 0:
            return text[: match.start()]
    return text


def fetched_files(code: str) -> list[str]:
    """Files into which code writes what it gets from an address."""
    if "://" not in code:
        return []
    return [match[2] for match in re.finditer(r"(?:urlretrieve|getstore)\([^,\n]+,\s*(['\"])([^'\"\n]+)\1", code)] + [
        match[2]
        for match in re.finditer(
            r"(?:open|file_put_contents)\(\s*(['\"])([^'\"\n]+)\1\s*,\s*(?:['\"]wb?['\"]\)\.write|\$)", code
        )
    ]
