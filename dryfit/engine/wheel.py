"""What setuptools does beside its own work: a wheel gets the compiled replay where the building machine can make it.

Without a compiler, or with ``DRYFIT_REPLAY=python``, the wheel is one for every machine. Building alone imports
this module.
"""

from __future__ import annotations

import os
import runpy
from pathlib import Path

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """Copies the modules, and compiles the sources that lie in ``native/``."""

    made: Path | None = None

    def run(self) -> None:
        super().run()
        known = runpy.run_path(
            str(Path(__file__).with_name("native_library.py"))
        )  # packages aren't importable yet
        if self.editable_mode or os.environ.get(known["SETTING"]) == "python":
            return
        home = next(
            name
            for name in self.packages
            if Path(self.get_package_dir(name), "native", "replay.c").is_file()
        )
        try:
            self.made = known["REPLAY"].compile_into(
                Path(self.build_lib, *home.split("."), "native")
            )
        except (known["NotCompiled"], OSError) as reason:
            self.warn(
                f"a wheel without the compiled replay, which installations compile or do without: {reason}"
            )

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), *([str(self.made)] if self.made else ())]


class BdistWheel(bdist_wheel):
    """A wheel for this platform if it holds a compiled file, whatever Python."""

    def run(self) -> None:
        self.run_command("build_py")
        self.root_is_pure = not self.get_finalized_command("build_py").made
        if not self.root_is_pure:
            self.distribution.has_ext_modules = lambda: (
                True
            )  # it is installed where such files belong
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)
