"""`python -m twicing_core doctor`, `bench` or `build`: what is available here, how fast it is, and compiling it now."""

from __future__ import annotations

import argparse
import sys

from twicing_core import bench, build, doctor


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m twicing_core", description=__doc__)
    commands = parser.add_subparsers(required=True)
    for module in (doctor, bench):
        name = module.__name__.rpartition(".")[2]
        command = commands.add_parser(name, help=module.__doc__, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    commands.add_parser("build", help="compile the CPU kernels now").set_defaults(run=lambda arguments: build.main())
    arguments = parser.parse_args()
    return int(arguments.run(arguments))


if __name__ == "__main__":
    sys.exit(main())
