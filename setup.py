"""Everything declarative is in pyproject.toml. Here: the attention's kernels are compiled, where pip lets torch be seen.

They don't go into the wheel, which would hold code for the machine that built it, but into the cache that their first
use looks into (twicing_core/build.py). pip builds in an environment of its own, without torch, unless it is told
--no-build-isolation.
"""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        if find_spec("torch") is None:
            print(
                "twicing_core: no kernels were compiled, for torch cannot be seen from here; their first use compiles them,"
                " and so does `python -m twicing_core.build`, or installing with --no-build-isolation"
            )
        else:
            command = [sys.executable, "-m", "twicing_core.build"]
            subprocess.run(command, cwd=Path(__file__).parent, check=False)  # everything works without kernels


setup(cmdclass={"build_py": BuildPy})
