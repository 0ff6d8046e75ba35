"""Patches of libraries that a program imports later, or never: applied when it imports them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from typing import Any

from will_it_fit.engine.patching import patched

Places = Callable[[Any], list[tuple[Any, str, Any]]]


@contextmanager
def when_imported(places: Mapping[str, Places]) -> Iterator[None]:
    """Apply patches to modules as soon as they are there, and take them back at the end.

    Parameters
    ----------
    places
        By a module's name, a function that takes the module and gives its patches.
    """
    with ExitStack() as stack:

        def apply(name: str) -> None:
            stack.enter_context(patched(places[name](sys.modules[name])))

        for name in places:
            if name in sys.modules:
                apply(name)
        finder = _Finder(frozenset(places), apply)
        sys.meta_path.insert(0, finder)
        stack.callback(sys.meta_path.remove, finder)
        yield


class _Finder(MetaPathFinder):
    """Finds modules as Python does, and calls back when some of them were run."""

    def __init__(self, names: frozenset[str], apply: Callable[[str], None]) -> None:
        self._names, self._apply, self._finding = names, apply, set()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in self._names or name in self._finding:
            return None
        self._finding.add(name)
        try:
            found = find_spec(name)
        finally:
            self._finding.discard(name)
        if found is not None and found.loader is not None:
            run = found.loader.exec_module

            def exec_module(module: Any) -> None:
                run(module)
                self._apply(name)

            found.loader.exec_module = exec_module
        return found
