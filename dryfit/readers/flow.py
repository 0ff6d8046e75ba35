"""What a program's statements come to, one after another: constants, decided branches, and what calls make.

The program is a syntax tree and never runs. A branch whose condition is a constant is taken or left out; one that only
a run decides is gone through on both sides. A loop's body counts once. Functions of the program are entered where they
are called. What calls of libraries make is for the caller to say.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dryfit.common.errors import UserError


class _Unknown:
    """A value that only a run would know."""

    def __repr__(self) -> str:
        return "UNKNOWN"


UNKNOWN = _Unknown()
_DEEPEST = 12  # functions within functions
_MOST_STATEMENTS = (
    20_000  # functions that call each other on both sides of branches would go on for ever
)
_LONGEST = 1000  # how often a text or a list is repeated
_ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARED = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda one, others: one in others,
    ast.NotIn: lambda one, others: one not in others,
}
_BUILTINS: Mapping[str, Callable[..., Any]] = {
    "int": int,
    "float": float,
    "str": str,
    "bool": bool,
    "len": len,
    "min": min,
    "max": max,
    "round": round,
    "list": list,
    "tuple": list,
    "dict": dict,
    "abs": abs,
}
_OF_TEXTS = (
    "replace",
    "lower",
    "upper",
    "strip",
    "startswith",
    "endswith",
    "split",
    "format",
    "removesuffix",
)
_DTYPES = ("bfloat16", "float16", "float32", "half", "float")


@dataclass
class Made:
    """What a call made, as far as it decides a training: its ``kind`` and its values by name."""

    kind: str
    values: dict[str, Any] = field(default_factory=dict)
    unread: dict[str, str] = field(
        default_factory=dict
    )  # what of it is no constant, as it is written

    def copy(self, kind: str | None = None) -> Made:
        return Made(kind or self.kind, dict(self.values), dict(self.unread))

    def take(self, other: Made) -> None:
        """Add what another says; a value that is known there is no longer unread, and the other way round."""
        for key, value in other.values.items():
            self.values[key] = value
            self.unread.pop(key, None)
        for key, text in other.unread.items():
            self.unread[key] = text
            self.values.pop(key, None)


@dataclass
class Call:
    """A call with its arguments as far as they are known, and as they are written."""

    name: str  # the last part of what is called
    owner: str  # the part before it; "": none
    receiver: Any  # the value of what it is a method of
    args: list[Any]
    words: dict[str, Any]
    written: dict[str, str]
    all_known: bool  # no `**unknown` among them

    @property
    def things(self) -> list[Made]:
        """What calls made, among receiver and arguments."""
        return [
            one
            for one in (self.receiver, *self.args, *self.words.values())
            if isinstance(one, Made)
        ]

    def argument(self, place: int, name: str) -> Any:
        return self.args[place] if place < len(self.args) else self.words.get(name)


class Flow:
    """Goes through a program; ``made_by`` says what a call of a library makes, or None.

    ``constants``: results of functions without arguments that a machine decides, by name; None: unknown.
    ``deciding``: the kinds of what calls make that a condition must not leave open.
    """

    def __init__(
        self, made_by: Callable[[Call], Any], constants: Mapping[str, Any], deciding: Sequence[str]
    ) -> None:
        self.made_by, self.constants, self.deciding = made_by, constants, deciding
        self.environ: dict[str, Any] = {}  # what the program itself sets
        self.names: dict[str, Any] = {
            "__name__": "__main__",
            "os": Made("module", {"environ": self.environ}),
        }
        self.functions: dict[str, ast.FunctionDef] = {}
        self.classes: dict[str, ast.ClassDef] = {}
        self.entered: set[str] = set()
        self.undecided: list[str] = []  # conditions whose sides made something else
        self._within: list[str] = []
        self._left = _MOST_STATEMENTS

    # --- statements ----------------------------------------------------------------------------------------------

    def run(self, body: Sequence[ast.stmt]) -> Any:
        """Go through statements; what they return, UNKNOWN where they return nothing."""
        for statement in body:
            if isinstance(statement, ast.Return):
                return self.value(statement.value)
            if isinstance(statement, (ast.Break, ast.Continue)):
                break
            result = self._statement(statement)
            if result is not UNKNOWN:
                return result
        return UNKNOWN

    def _statement(self, node: ast.stmt) -> Any:
        self._left -= 1
        if self._left < 0:
            raise UserError(
                "The program's functions call each other too often to be followed.",
                allowed="dryfit run, which runs the program without a GPU",
            )
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            self.functions[node.name] = node  # type: ignore[assignment]
        elif isinstance(node, ast.ClassDef):
            self.classes[node.name] = node
        elif isinstance(node, ast.Assign):
            value = self.value(node.value)
            for target in node.targets:
                self._assign(target, value)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            self._assign(node.target, self.value(node.value))
        elif isinstance(node, ast.AugAssign):
            self._assign(
                node.target, self.value(ast.BinOp(_read(node.target), node.op, node.value))
            )
        elif isinstance(node, ast.Expr):
            self.value(node.value)
        elif isinstance(node, ast.If):
            return self._branch(node)
        elif isinstance(node, (ast.For, ast.AsyncFor)):
            self.value(node.iter)
            self._assign(node.target, UNKNOWN)
            return self.run([*node.body, *node.orelse])
        elif isinstance(node, ast.While):
            return self.run(node.body) if self.value(node.test) is not False else UNKNOWN
        elif isinstance(node, (ast.With, ast.AsyncWith)):
            for item in node.items:
                entered = self.value(item.context_expr)
                if item.optional_vars is not None:
                    self._assign(item.optional_vars, entered)
            return self.run(node.body)
        elif isinstance(node, ast.Try):
            return self.run([*node.body, *node.orelse, *node.finalbody])
        elif isinstance(node, ast.Delete):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    self.names.pop(target.id, None)
        return UNKNOWN

    def _branch(self, node: ast.If) -> Any:
        decided = self.value(node.test)
        if decided is not UNKNOWN and not isinstance(decided, Made):
            return self.run(node.body if decided else node.orelse)
        before = dict(self.names)
        self.run(node.body)
        one, self.names = self.names, dict(before)
        self.run(node.orelse)
        other = self.names
        merged = {}
        for name in one | other:
            left, right = one.get(name, UNKNOWN), other.get(name, UNKNOWN)
            if left is right or (not isinstance(left, Made) and left == right):
                merged[name] = left
                continue
            old = [one for one in before.values() if isinstance(one, Made)]
            made = next(
                (side for side in (left, right) if isinstance(side, Made) and side not in old), None
            )
            if made is not None and made.kind in self.deciding:
                self.undecided.append(ast.unparse(node.test))
            merged[name] = made or UNKNOWN
        self.names = merged
        return UNKNOWN

    def _assign(self, target: ast.expr, value: Any) -> None:
        if isinstance(target, ast.Name):
            self.names[target.id] = value
        elif isinstance(target, (ast.Tuple, ast.List)):
            if isinstance(value, list) and len(value) == len(target.elts):
                parts: list[Any] = value
            else:  # model, tokenizer = ...
                parts = [
                    value if isinstance(value, Made) else UNKNOWN,
                    *[UNKNOWN] * (len(target.elts) - 1),
                ]
            for one, part in zip(target.elts, parts, strict=True):
                self._assign(one, part)
        elif isinstance(target, ast.Attribute):
            owner = self.value(target.value)
            if isinstance(owner, Made):
                owner.unread.pop(target.attr, None)
                owner.values[target.attr] = value
        elif isinstance(target, ast.Subscript):
            owner, key = self.value(target.value), self.value(target.slice)
            if isinstance(owner, dict) and isinstance(key, (str, int)):
                owner[key] = value

    # --- expressions ---------------------------------------------------------------------------------------------

    def value(self, node: ast.expr | None) -> Any:
        """What an expression is worth: a constant, what a call made, or UNKNOWN."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return self.names.get(node.id, UNKNOWN)
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, ast.Await):
            return self.value(node.value)
        if isinstance(node, ast.Attribute):
            owner = self.value(node.value)
            if isinstance(owner, Made):
                return owner.values.get(node.attr, UNKNOWN)
            return node.attr if node.attr in _DTYPES else UNKNOWN
        if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
            items = [self.value(item) for item in node.elts]
            return UNKNOWN if UNKNOWN in items else items
        if isinstance(node, ast.Dict):
            return self._dictionary(node)
        if isinstance(node, ast.JoinedStr):
            parts = [
                self.value(part.value if isinstance(part, ast.FormattedValue) else part)
                for part in node.values
            ]
            plain = all(isinstance(part, (str, int, float)) for part in parts)
            return "".join(map(str, parts)) if plain else UNKNOWN
        if isinstance(node, ast.IfExp):
            decided = self.value(node.test)
            if decided is UNKNOWN or isinstance(decided, Made):
                one, other = self.value(node.body), self.value(node.orelse)
                return one if not isinstance(one, Made) and one == other else UNKNOWN
            return self.value(node.body if decided else node.orelse)
        return self._operation(node)

    def _dictionary(self, node: ast.Dict) -> Any:
        found: dict[Any, Any] = {}
        for key, item in zip(node.keys, node.values, strict=True):
            value = self.value(item)
            if key is None:
                found |= value if isinstance(value, dict) else {}
            elif isinstance(name := self.value(key), (str, int, float)):
                found[name] = value
        return found

    def _operation(self, node: ast.expr | None) -> Any:
        try:
            if isinstance(node, ast.UnaryOp):
                inner = self.value(node.operand)
                if inner is UNKNOWN or isinstance(inner, Made):
                    return UNKNOWN
                return (
                    not inner
                    if isinstance(node.op, ast.Not)
                    else -inner
                    if isinstance(node.op, ast.USub)
                    else inner
                )
            if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
                left, right = self.value(node.left), self.value(node.right)
                short = any(isinstance(one, (str, list)) for one in (left, right)) and isinstance(
                    node.op, ast.Mult
                )
                if UNKNOWN in (left, right) or (
                    short and not any(one in range(_LONGEST) for one in (left, right))
                ):
                    return UNKNOWN  # a program may repeat a list a billion times
                return _ARITHMETIC[type(node.op)](left, right)
            if isinstance(node, ast.BoolOp):
                return self._boolean(node)
            if isinstance(node, ast.Compare) and len(node.ops) == 1:
                left, right = self.value(node.left), self.value(node.comparators[0])
                known = left is not UNKNOWN and right is not UNKNOWN
                return _COMPARED[type(node.ops[0])](left, right) if known else UNKNOWN
            if isinstance(node, ast.Subscript):
                owner, key = self.value(node.value), self.value(node.slice)
                known = isinstance(owner, (dict, list, str)) and key is not UNKNOWN
                return owner[key] if known else UNKNOWN
        except (TypeError, ValueError, KeyError, IndexError, ArithmeticError):
            pass
        return UNKNOWN

    def _boolean(self, node: ast.BoolOp) -> Any:
        ends = isinstance(node.op, ast.Or)  # a value that decides it whatever the others are
        values = [self.value(part) for part in node.values]
        known = [one for one in values if one is not UNKNOWN and not isinstance(one, Made)]
        decisive = next((one for one in known if bool(one) is ends), None)
        if decisive is not None:
            return decisive
        return values[-1] if len(known) == len(values) else UNKNOWN

    def _call(self, node: ast.Call) -> Any:
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        receiver = self.value(function.value) if isinstance(function, ast.Attribute) else None
        args = [self.value(one.value if isinstance(one, ast.Starred) else one) for one in node.args]
        words: dict[str, Any] = {}
        written: dict[str, str] = {}
        all_known = True
        for word in node.keywords:
            value = self.value(word.value)
            if word.arg is not None:
                words[word.arg], written[word.arg] = value, ast.unparse(word.value)[:60]
            elif isinstance(value, dict):
                words |= value
                written |= {str(key): str(key) for key in value}
            else:
                all_known = False
        owner = last_name(function.value) if isinstance(function, ast.Attribute) else ""
        call = Call(name, owner, receiver, args, words, written, all_known)
        if isinstance(function, ast.Name) and name in self.functions and name not in self._within:
            return self._enter(self.functions[name], call)
        made = self.made_by(call)
        return made if made is not None else self._otherwise(call)

    def _otherwise(self, call: Call) -> Any:
        """Of a call that no library's is known for: a constant, or the thing that it passes on."""
        known = UNKNOWN not in call.args and UNKNOWN not in call.words.values() and not call.things
        if call.name in self.constants and not call.things:
            value = self.constants[call.name]
            return UNKNOWN if value is None else value
        try:
            if known and not call.owner and call.name in _BUILTINS:
                return _BUILTINS[call.name](*call.args, **call.words)
            if known and isinstance(call.receiver, str) and call.name in _OF_TEXTS:
                return getattr(call.receiver, call.name)(*call.args, **call.words)
            if isinstance(call.receiver, dict) and call.name == "get" and call.args:
                nothing = UNKNOWN if call.receiver is self.environ else None
                return call.receiver.get(
                    call.args[0], call.args[1] if len(call.args) > 1 else nothing
                )
            if (
                isinstance(call.receiver, dict)
                and call.name == "setdefault"
                and len(call.args) == 2
            ):
                return call.receiver.setdefault(*call.args)
            if isinstance(call.receiver, dict) and call.name == "update":
                for given in (*call.args, call.words):
                    call.receiver.update(given if isinstance(given, dict) else {})
        except (TypeError, ValueError, KeyError, IndexError):
            return UNKNOWN
        if call.name in self.classes and not call.owner:
            return self._instance(self.classes[call.name], call)
        order = {"trainer": 0, "model": 1}
        return min(call.things, key=lambda one: order.get(one.kind, 2), default=UNKNOWN)

    def _instance(self, kind: ast.ClassDef, call: Call) -> Made:
        """Of a class of the program: its fields with their defaults, and what the call gives them."""
        made = Made(kind.name)
        for line in kind.body:
            target = line.target if isinstance(line, ast.AnnAssign) else None
            target = line.targets[0] if isinstance(line, ast.Assign) else target
            if isinstance(target, ast.Name) and line.value is not None:  # type: ignore[union-attr]
                made.values[target.id] = self.value(line.value)  # type: ignore[union-attr]
        made.values |= call.words
        return made

    def _enter(self, function: ast.FunctionDef, call: Call) -> Any:
        """Go through a function of the program with a call's arguments."""
        if len(self._within) >= _DEEPEST:
            return UNKNOWN
        names = [one.arg for one in (*function.args.posonlyargs, *function.args.args)]
        defaults = dict(zip(names[::-1], function.args.defaults[::-1], strict=False))
        by_name = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
        defaults |= {one.arg: node for one, node in by_name if node is not None}
        inside = {name: self.value(node) for name, node in defaults.items()}
        inside |= dict(zip(names, call.args, strict=False)) | call.words
        unsaid = {name: UNKNOWN for name in names if name not in inside}
        outside, self.names = self.names, {**self.names, **unsaid, **inside}
        self._within.append(function.name)
        self.entered.add(function.name)
        try:
            return self.run(function.body)
        finally:
            self._within.pop()
            self.names = outside

    def enter_the_rest(self) -> None:
        """Go through functions and methods that no call has entered, with the defaults of their arguments."""
        methods = [
            one
            for kind in self.classes.values()
            for one in kind.body
            if isinstance(one, ast.FunctionDef)
        ]
        for function in (*self.functions.values(), *methods):
            if function.name not in self.entered:
                self._enter(function, Call(function.name, "", None, [], {}, {}, True))


def last_name(node: ast.AST) -> str:
    """The last part of a dotted name; "" of anything else."""
    return (
        node.attr
        if isinstance(node, ast.Attribute)
        else node.id
        if isinstance(node, ast.Name)
        else ""
    )


def called_classes(classes: Mapping[str, ast.ClassDef], name: str) -> Iterable[str]:
    """A class's name and those of its bases, as far as the program has them."""
    seen: set[str] = set()
    while (
        name in classes and name not in seen
    ):  # `class Trainer(library.Trainer)` has its own name as its base's
        yield name
        seen.add(name)
        name = last_name(classes[name].bases[0]) if classes[name].bases else ""
    yield name


def _read(target: ast.expr) -> ast.expr:
    return ast.parse(ast.unparse(target), mode="eval").body
