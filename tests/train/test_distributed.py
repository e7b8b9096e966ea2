"""What ranks agree on, in real gloo processes."""

from __future__ import annotations

import ctypes
import resource
import socket
from pathlib import Path

import pytest
import torch

from train.agreement import check_agreement
from train.config import LanguageConfig, VisionConfig, load_config
from train.distributed import Ranks
from train.loop import _wrap


def _collectives(ranks: Ranks) -> None:
    assert ranks.sum_integers([ranks.rank + 1, 2**62]) == [3, _wrap(2 * 2**62)]
    assert ranks.sum_floats(torch.tensor([0.5], dtype=torch.float64)).item() == 1.0
    assert ranks.gather(f"rank {ranks.rank}") == ["rank 0", "rank 1"]
    assert ranks.broadcast(ranks.rank) == 0
    with pytest.raises(ValueError, match="rank 1: the disk is on fire"), ranks.fail_together():
        if ranks.rank == 1:
            raise OSError("the disk is on fire")
    with ranks.fail_together():  # after an error the next collective still lines up
        assert ranks.gather(ranks.rank) == [0, 1]


def test_collectives_and_an_error_that_all_ranks_raise(run_distributed):
    run_distributed(_collectives, 2)


def _reuses_memory(ranks: Ranks) -> None:
    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensors = [torch.ones(2**20) for _ in range(32)]  # 128 MiB in all, freed together
        del tensors
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    pages = 32 * 2**22 // resource.getpagesize()
    assert min(faults() for _ in range(5)) < pages / 10


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_memory_that_was_freed_is_not_asked_for_again(run_distributed):
    run_distributed(_reuses_memory, 1)


def _disagree(ranks: Ranks, run_dir: str) -> None:
    def config(*overrides: str) -> LanguageConfig | VisionConfig:
        return load_config("configs/language/quickstart.yaml", [f"run.dir={run_dir}", *overrides])

    check_agreement(ranks, config(), "same")
    odd = ranks.rank == 1
    elsewhere = config(f"run.dir={run_dir}/not_mounted") if odd else config()
    for subject, mine, digest in [
        ("the config", config("optimizer.lr=0.5") if odd else config(), "same"),
        ("the data set", config(), "other" if odd else "same"),
        ("the run directory", elsewhere, "same"),
    ]:
        with pytest.raises(ValueError, match=f"hosts disagree .* about {subject}.*: {socket.gethostname()}"):
            check_agreement(ranks, mine, digest)
    ranks.barrier()
    assert list(Path(run_dir).iterdir()) == []


def test_hosts_that_were_given_different_runs_are_named(run_distributed, tmp_path):
    run_distributed(_disagree, 2, str(tmp_path))


def test_wrap_is_arithmetic_modulo_two_to_the_64():
    assert [_wrap(v) for v in (0, -1, 2**63 - 1, 2**63, 2**64 + 5)] == [0, -1, 2**63 - 1, -(2**63), 5]
