"""An interpreter of PTX: what nvcc really made of a kernel, executed in numpy. See README.md."""

from . import access, arithmetic, warp  # noqa: F401 (they fill the table of handlers)
from .instructions import compile_kernel
from .machine import Counts, Launch, Program, run
from .memory import Buffer, Global
from .parser import Kernel, PtxError, parse

__all__ = ["Buffer", "Counts", "Global", "Kernel", "Launch", "Program", "PtxError", "compile_kernel", "parse", "run"]
