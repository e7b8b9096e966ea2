"""This process as one rank of a job of many, for what must be asked of DeepSpeed itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from train.distributed import disable_shared_memory_extension


@contextmanager
def fake_process_group(rank: int, world_size: int) -> Iterator[None]:
    """This process as `rank` of a job of `world_size`: every collective operation returns at once, having sent nothing."""
    import deepspeed

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    variables = dict(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0", MASTER_ADDR="none", MASTER_PORT="0")
    before = os.environ.copy()
    os.environ.update(variables)
    disable_shared_memory_extension()
    try:
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        dist.destroy_process_group()
        deepspeed.comm.comm.cdb = None  # what it remembers of the group
