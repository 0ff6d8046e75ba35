"""Code in other languages: the shell text that it hands on, and the files that it deletes and writes.

Python, Perl, Ruby, PHP, Lua, JavaScript and awk spell ``system("...")`` and ``unlink("...")`` alike enough for one
table. No language is parsed: what a pattern does not find is not judged.
"""

import re
import shlex

from scripts.tasks.shell.screen.commands import HOME, MAX_TEXT, ansi

_STRING = (
    r"[rbuf]{0,2}(?:'''((?:[^\\]|\\.)*?)'''|\"{3}((?:[^\\]|\\.)*?)\"{3}"
    r"|'((?:[^'\\\n]|\\.)*)'|\"((?:[^\"\\\n]|\\.)*)\"|`((?:[^`\\]|\\.)*)`)"
)
_CALLS = re.compile(
    r"(?<![\w])(?:os\.system|os\.popen|os\.exec[lv]p?e?|exec[lv]p?e?|os\.spawn\w+|subprocess\.\w+|commands\.getoutput"
    r"|popen2?|system|exec|execSync|spawnSync|spawn|execFile(?:Sync)?|shell_exec|passthru|proc_open|IO\.popen"
    r"|Open3\.\w+|os\.execute|io\.popen|check_output|check_call|run|call|Popen|getoutput|pty\.spawn|getline"
    r"|do shell script|eval|qx|sh|\$)\s*(?:\(|\s|\{)\s*(\[?)\s*" + _STRING,
    re.DOTALL,
)
_JOINED = re.compile(r"(['\"])\s*(?:\+|\.\.?)\s*\1")  # "rm -rf " + "/"
_ITEM = re.compile(r"\s*,\s*" + _STRING, re.DOTALL)
_QUOTED = re.compile(
    r"`([^`]{2,400})`|%x[\[({]([^\])}]{2,400})[\])}]|qx[/({]([^/)}]{2,400})[/)}]"
    r"|\"([^\"\n]{2,400})\"\s*\|\s*getline|\|\s*\"([^\"\n]{2,400})\""
)


def shell_strings(code: str) -> list[str]:
    """Texts that a piece of code hands to a shell."""
    strings = []
    code = _JOINED.sub("", code[:MAX_TEXT])
    for match in _CALLS.finditer(code):
        words = [next((group for group in match.groups()[1:] if group is not None), "")]
        following = _ITEM.match(code, match.end())
        while following is not None and len(words) < 64:
            words.append(next((group for group in following.groups() if group is not None), ""))
            following = _ITEM.match(code, following.end())
        if len(words) > 1 and re.match(r"\s*(?:os\.)?(?:exec|spawn)[lv]", match[0]):
            words = words[1:]
        strings.append(ansi(words[0]) if len(words) == 1 else shlex.join(map(ansi, words)))
    strings += [
        ansi(next(group for group in match.groups() if group)) for match in _QUOTED.finditer(code)
    ]
    return strings[:32]


_DELETES = re.compile(
    r"\b(?:rmtree|remove_tree|rm_rf?|rimraf|removeSync|rmSync|rmdirSync|unlink(?:Sync)?|removedirs|os\.remove|os\.rmdir"
    r"|File\.delete|FileUtils\.rm\w*|truncate(?:Sync)?|os\.execute)\b|\.(?:unlink|rmdir|rm)\s*\(|\bdelete\s*\(\s*['\"]/"
)
_MOVES = re.compile(r"\b(?:rename|move|mv|os\.replace)(?:Sync)?\s*\(?\s*['\"]([^'\"\n]+)['\"]")
_WRITES = re.compile(
    r"['\"]([/~][^'\"\n]*)['\"]\s*,\s*(?:mode\s*=\s*)?['\"][rbt]*[wa+x]"  # open("/x", "w")
    r"|['\"]\s*\+?>{1,2}\s*([/~][^'\"\n]*)['\"]|['\"]>{1,2}['\"]\s*,\s*['\"]([/~][^'\"\n]*)['\"]"  # Perl
    r"|(?:write(?:_text|_bytes|File(?:Sync)?)?|binwrite|file_put_contents|append(?:File(?:Sync)?)?|createWriteStream"
    r"|copy(?:file|2|FileSync)?\s*\(\s*['\"][^'\"\n]+['\"]\s*,|symlink\s*\(\s*['\"][^'\"\n]+['\"]\s*,)"
    r"\s*\(?\s*['\"]([/~][^'\"\n]*)['\"]"
    r"|['\"]([/~][^'\"\n]*)['\"]\s*\)\.write_(?:text|bytes)|O_(?:WRONLY|RDWR|TRUNC)"
)
_PATHS = re.compile(r"['\"<{]\s*(~?/[^'\"<>\n]*|~)\s*['\">}]")
_OWN_HOME = re.compile(
    r"Path\.home\(\)|(?:os\.)?homedir\(\)|Dir\.home|\$ENV\{['\"]?HOME['\"]?\}|ENV\[['\"]HOME['\"]\]|process\.env\.HOME"
    r"|(?:os\.)?(?:environ\[|getenv\()['\"]HOME['\"][\])]"
)


def deleted_and_written(code: str) -> tuple[list[str], list[str]]:
    """Paths in the code that it deletes or moves away, and that it writes; loops over a folder count as the folder."""
    code = _OWN_HOME.sub(f"'{HOME}'", code[:8192])
    paths = [HOME + path[1:] if path[0] == "~" else path for path in _PATHS.findall(code)]
    deleted = (paths if _DELETES.search(code) else []) + [
        match[1] for match in _MOVES.finditer(code)
    ]
    written = []
    for match in _WRITES.finditer(code):
        written += (
            [next((group for group in match.groups() if group), "")]
            if match.groups() != (None,) * 5
            else paths
        )
    return deleted[:24], written[:24]


FETCHED = re.compile(  # what code writes that it gets from an address
    r"(?:(?:urlretrieve|getstore)\([^,\n]+,|(?:open|file_put_contents)\()\s*['\"]([^'\"\n]+)['\"](?!\s*,\s*['\"]r)"
)
