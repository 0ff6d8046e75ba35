"""The judge: what counts as doing the same, on results made by hand."""

import pytest

from scripts.tasks.shell.execution.judge import Reference, decidable, judge


def result(stdout="", status=0, end="exit", complete=True, stderr="", **changes):
    """What a command did; changes as path_with_dots=content after it (None: removed)."""
    made = {
        f"/{path}": [
            None,
            after and ["file", after[:5], after[5:]] if isinstance(after, str) else after,
        ]
        for path, after in changes.items()
    }
    return {
        "stdout": stdout,
        "stderr": stderr,
        "status": status,
        "end": end,
        "complete": complete,
        "changes": made,
    }


def reference(done, again=None, command="cat file", request="show the file"):
    return Reference(request, command, done, again or done)


def right(answer, *references):
    return judge(answer, references)[0]


def test_the_same_output_status_and_changes_are_right():
    wanted = reference(result("a\nb\n"))
    assert right(result("a\nb\n"), wanted) and right(result("a  \n\nb"), wanted)
    assert (
        not right(result("b\na\n"), wanted)
        and not right(result("a\n"), wanted)
        and not right(result(), wanted)
    )
    assert not right(result("a", status=1), reference(result("a")))
    assert right(result("a", status=2), reference(result("a", status=1)))
    wanted = reference(result(new="0o644x"))
    assert right(result(new="0o644x"), wanted)
    for other in (
        result(new="0o600x"),
        result(new="0o644y"),
        result(other="0o644x"),
        result(),
        result(new=None),
    ):
        assert not right(other, wanted)
    assert not right(result(new="0o644x", more="0o644x"), wanted)
    assert not right(result(new="0o644x", complete=False), wanted)
    assert right(result("'a' -> 'b'\n", new="0o644x"), reference(result(new="0o644x")))
    assert not right(result("c\n", new="0o644x"), reference(result("b\n", new="0o644x")))


@pytest.mark.parametrize("end", ["time", "output", "memory", "inodes", "length"])
def test_what_had_to_be_ended_is_wrong(end):
    assert not right(result("a", status=None, end=end), reference(result("a")))


def test_what_differs_from_run_to_run_is_compared_without_it():
    wanted = reference(result(new="0o644x"), result(new="0o644y"))
    assert right(result(new="0o644z"), wanted) and not right(result(new="0o600z"), wanted)
    wanted = reference(result("up 5 min\n"), result("up 6 min\n"))
    assert right(result("up 17 min"), wanted) and not right(result("down 5 min"), wanted)
    assert not right(result("17"), reference(result("16")))
    wanted = result("a b\n")
    assert right(result("a   b"), reference(wanted, request="show the file"))
    assert not right(result("a   b"), reference(wanted, request="remove repeated spaces"))


@pytest.mark.parametrize(
    ("answer", "wanted", "same"),
    [
        ("./a/b\n", "/a/b\n", True),
        ("a/b/\n", "/a/b\n", True),
        ("./a\n", "a\n", True),
        ("a/\n", "a\n", False),  # ls -F
        ("/root\n", "root\n", False),  # a home and a group
        ("a//b\n", "a/b\n", False),
        ("x /a/b y", "x a/b y", True),
        ("http://a/b\n", "http://b/a\n", False),
    ],
)
def test_spellings_of_a_path(answer, wanted, same):
    assert right(result(answer), reference(result(wanted))) is same


@pytest.mark.parametrize(
    ("command", "request_text", "free"),
    [
        ("find . -name '*.c'", "find C files", True),
        ("grep -r x /a", "search for x", True),
        ("ls /a", "list a", True),
        ("find /a | sort", "list the files under a", True),
        ("find /a | sort", "list the files under a in alphabetical order", False),
        ("find /a -size +1k | head -n 2", "show two large files", False),
        ("ls -t /a", "list the newest files", False),
        ("cat a", "show a", False),
        ("sort a", "show the lines", False),
    ],
)
def test_order_counts_unless_the_command_lists_and_the_request_asks_for_none(
    command, request_text, free
):
    wanted = reference(result("a\nb\n"), command=command, request=request_text)
    assert right(result("b\na\n"), wanted) is free


def test_either_reference_will_do_and_the_nearest_names_the_terms():
    first, second = reference(result("a")), reference(result("b"))
    assert right(result("b"), first, second) and not right(result("c"), first, second)
    assert not right(result(), first, reference(result()))
    _, terms = judge(result("b", status=1), [reference(result("a")), reference(result("b"))])
    assert terms == {"end": True, "status": False, "changes": True, "output": True}


@pytest.mark.parametrize(
    ("one", "again", "answer"),
    [
        (result("a"), None, True),
        (result(new="0o644x"), None, True),
        (result(), None, False),  # `true` would be right
        (result(" \n"), None, False),
        (result("a"), result(), False),
        (result("a"), result("b"), False),  # its own words differ
        (result("at 5"), result("at 6"), True),
        (result("5"), result("6"), False),  # any number would be right
        (result("a", end="time", status=None), None, False),
        (result(one="0o644x"), result(two="0o644x"), False),
    ],
)
def test_a_task_is_decidable_if_its_first_reference_leaves_a_trace_that_tells_right_from_wrong(
    one, again, answer
):
    assert decidable([reference(one, again), reference(result("x"))]) is answer
