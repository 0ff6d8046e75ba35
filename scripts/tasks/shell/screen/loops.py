"""Which loops end only with the disk, the memory or the user's patience, and which variables grow in them."""

import re

# Conditions that stay as they are.
_ALWAYS = re.compile(
    r":|(?:/usr)?(?:/bin/)?true|1|\(\(\s*1\s*\)\)|\[\[?\s+(?:1|true|x|.{1,9}\s-eq\s.{1,9}|(\S{1,9})\s*==?\s*\1)\s+\]\]?"
    r"|test 1|! ?false|sleep 0|(?:mkdir|echo|printf|dd|touch|cp|head|cat)\b(?!.*\|\s*(?:grep|read|nc)).*"
)
_NEVER = re.compile(
    r"false|\[\[?\s+(?:0\s+-(?:eq|ne)\s+\d|1\s+-eq\s+[02])?\s*\]\]?|\(\(\s*0\s*\)\)|! ?true|! ?:"
)
MANY = 5000  # turns of a loop that count as endless


def endless_condition(condition: str, until: bool) -> bool:
    """Whether nothing ends a loop over this condition, ``while`` or ``until``."""
    return bool((_NEVER if until else _ALWAYS).fullmatch(condition))


def endless_for(head: str) -> bool:
    """Whether ``for ((a; b; c))`` has no condition, or counts for very long."""
    many = any(int(number) > MANY for number in re.findall(r"<=?\s*(\d{1,9})\b", head))
    return many or bool(re.match(r"for\s*\(\(\s*[^;]*;\s*(1\s*|true\s*)?;", head))


def many_turns(items: bytes) -> bool:
    """Whether the items of ``for x in`` count for very long: ``{1..9999}``, ``$(seq 9999)``."""
    numbers = re.findall(rb"(?:\.\.|seq\s+(?:\d+\s+)*)\s*(\d{1,12})", items)
    return any(int(number) > MANY for number in numbers)


def grows(name: str, source: str) -> bool:
    """Whether an assignment makes its variable longer each time, other than by counting."""
    head, _, value = source.partition("=")
    if re.search(r"\[[^]]*(?:\+\+|\$|\+)[^]]*\]\+?$", head):
        return True
    if "$((" in source or "$[" in source:
        return False
    own = re.compile(rf"\$\{{?{re.escape(name)}(?:\[[@*]\])?\}}?(?![\w#%/:])")
    times = len(own.findall(value))
    return (
        head.endswith("+") or times > 1 or (times == 1 and own.sub("", value).strip("\"'() ") != "")
    )
