"""Modules that somebody imports later, or never: what happens when they run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from typing import Any

from .patching import patched

Execute = Callable[[Any], None]  # runs a module
Places = Callable[[Any], list[tuple[Any, str, Any]]]


@contextmanager
def running(ways: Mapping[str, Callable[[Any, Execute], None]]) -> Iterator[None]:
    """Run some modules another way whenever they are imported inside.

    ``ways``: by a module's name, a function that takes the module, which is empty yet, and what runs it as ever.
    """
    finder = _Finder(ways)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


@contextmanager
def hidden(names: Iterable[str]) -> Iterator[None]:
    """Let packages seem not to be installed to whoever imports them inside, unless they are imported already."""
    own = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(own))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in own:
            if sys.modules.get(name) is None:
                sys.modules.pop(name, None)


@contextmanager
def when_imported(places: Mapping[str, Places]) -> Iterator[None]:
    """Apply patches to modules as soon as they are there, and take them back at the end.

    ``places``: by a module's name, a function that takes the module and gives its patches.
    """
    with ExitStack() as stack:

        def apply(module: Any) -> None:
            stack.enter_context(patched(places[module.__name__](module)))

        def run(module: Any, execute: Execute) -> None:
            execute(module)
            apply(module)

        for name in places:
            if name in sys.modules:
                apply(sys.modules[name])
        stack.enter_context(running(dict.fromkeys(places, run)))
        yield


class _Finder(MetaPathFinder):
    """Finds modules as Python does, and has some of them run another way."""

    def __init__(self, ways: Mapping[str, Callable[[Any, Execute], None]]) -> None:
        self._ways, self._finding = ways, set()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in self._ways or name in self._finding:
            return None
        self._finding.add(name)
        try:
            spec = find_spec(name)
        finally:
            self._finding.discard(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: self._ways[name](module, execute)
        return spec
