"""At start, all ranks check that they were given the same run: directory, data, code and config.

On a cluster the commonest silent mistake is one host with an old checkout or without the shared file system.
"""

from __future__ import annotations

import hashlib
import secrets
import socket
from pathlib import Path

import twicing_core
from train.config import AnyConfig, to_yaml
from train.distributed import Ranks
from train.run_directory import needed


def check_agreement(ranks: Ranks, config: AnyConfig, data_digest: str) -> None:
    """Compares every rank with rank 0.

    Raises:
        ValueError: on all ranks; names what differs and the hosts where it does, or the file that rank 0 can't write.
    """
    run_dir = Path(config.run.dir)
    probe = run_dir / f".visible_{ranks.broadcast(secrets.token_hex(8))}"
    with ranks.fail_together():
        if ranks.is_main:
            with needed(probe):
                probe.touch()
    mine = {
        "the run directory (run.dir must lie on a file system that all hosts share)": str(probe.exists()),
        "the data set's manifest (data.train and data.validation)": data_digest,
        "the code (another version of train or twicing_core is installed)": code_digest(),
        "the config (file or overrides)": hashlib.sha256(to_yaml(config).encode()).hexdigest(),
    }
    everyone = ranks.gather((socket.gethostname(), mine))
    if ranks.is_main:
        probe.unlink()
    for subject, value in everyone[0][1].items():
        hosts = sorted({host for host, theirs in everyone if theirs[subject] != value})
        if hosts:
            raise ValueError(f"hosts disagree with {everyone[0][0]} (rank 0) about {subject}: {', '.join(hosts)}")


def code_digest() -> str:
    """sha256 over the sources of both packages."""
    digest = hashlib.sha256()
    for package in (Path(__file__).parent, Path(twicing_core.__file__).parent):
        for source in sorted(package.rglob("*.py")):
            digest.update(str(source.relative_to(package)).encode())
            digest.update(source.read_bytes())
    return digest.hexdigest()
