"""The folders on each host's own disk that hold what DeepSpeed offloads to NVMe: of use to a running job only."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
from pathlib import Path
from typing import Any

from train.config import AnyConfig


def folders(config: AnyConfig, zero_settings: dict[str, Any]) -> dict[str, Path]:
    """Where `offload_optimizer` and `offload_param` go, by those names, if to NVMe: a folder of this run's below nvme_path.

    DeepSpeed names its files after ranks and parameters. Two runs must not share them.
    """
    name = "run_" + hashlib.sha256(os.path.abspath(config.run.dir).encode()).hexdigest()[:16]
    parts = {part: zero_settings.get(part, {}) for part in ("offload_optimizer", "offload_param")}
    return {part: Path(given["nvme_path"]) / name for part, given in parts.items() if given.get("device") == "nvme"}


def prepare(config: AnyConfig, zero_settings: dict[str, Any]) -> None:
    """Makes the folders. At the first start on a host, what moves tensors there is compiled.

    Raises:
        ValueError: a folder can't be written, or libaio or a compiler is missing.
    """
    needed = set(folders(config, zero_settings).values())
    where = f"deepspeed.config={config.deepspeed.config} offloads to NVMe, but"
    for folder in needed:
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"{where} its nvme_path {folder.parent} can't be written on {socket.gethostname()} ({error.strerror}): make "
                "that folder, or name another"
            ) from None
    if needed:
        from deepspeed.ops.op_builder import AsyncIOBuilder

        if not AsyncIOBuilder().is_compatible(verbose=False):
            raise ValueError(
                f"{where} {socket.gethostname()} lacks libaio's header, which DeepSpeed compiles with (Debian: apt-get install "
                "libaio-dev), or a C++ compiler"
            )
        AsyncIOBuilder().load()


def remove(config: AnyConfig, zero_settings: dict[str, Any]) -> None:
    """Removes the folders; for one rank of a host, when all have ended their training."""
    for folder in folders(config, zero_settings).values():
        shutil.rmtree(folder, ignore_errors=True)
