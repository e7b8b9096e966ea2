"""`python -m train CONFIG [key=value ...]`: train, or continue, the run that a config describes.

    deepspeed --num_accelerators 2 --module train configs/language/quickstart.yaml optimizer.lr=3e-4

runs it on two ranks; torchrun and srun do too, and without a launcher it is one process. `--dry-run` prints the plan.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings

PROCESS_START = time.time()


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    is_main = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    _quieten_libraries()
    _show_warnings_as_lines(is_main)
    from train import distributed
    from train.checkpoint import CheckpointError
    from train.config import load_config
    from train.loop import TrainingError
    from train.run_directory import EXIT_ERROR, EXIT_USAGE

    try:
        config = load_config(options.config, options.overrides)
        if options.dry_run:
            from train.plan import dry_run

            return dry_run(config)
        from train.run import run

        return run(config, PROCESS_START)
    except ValueError as error:
        # Every rank raises the same errors: one of them says so.
        if is_main:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_USAGE
    except (CheckpointError, TrainingError) as error:
        if is_main:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_ERROR
    finally:
        distributed.stop()


def _quieten_libraries() -> None:
    """Before torch and deepspeed are imported: what they would say at every start, a user can do nothing about."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not os.path.exists("/dev/nvidiactl"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _show_warnings_as_lines(is_main: bool) -> None:
    """A warning is one line for the person who started the run, not a line of source from every rank."""

    def as_line(message: Warning | str, *context: object) -> str:
        return f"warning: {message}\n" if is_main else ""

    warnings.formatwarning = as_line  # type: ignore[assignment]


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m train", description="Train, or continue, the run that a config describes."
    )
    parser.add_argument("config", help="YAML file, such as configs/language/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and try one batch, without training")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the DeepSpeed launcher adds it
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
