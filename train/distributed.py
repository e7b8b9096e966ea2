"""Who this process is among the ranks, and the few things all ranks must agree on.

DeepSpeed moves the gradients. What stands here moves a handful of integers and strings between ranks, over a gloo group
of its own on the CPU, so that it never waits for, or orders itself among, the kernels on a GPU's stream.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from train.network import free_port


@dataclass(frozen=True)
class Ranks:
    """One process's place in the job, and collective operations on host values."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    control: Any = None  # the gloo group

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_integers(self, values: Sequence[int]) -> list[int]:
        """Sums over all ranks, each a 64-bit integer that wraps around on overflow."""
        total = torch.tensor(list(values), dtype=torch.int64)
        dist.all_reduce(total, group=self.control)
        return total.tolist()

    def sum_floats(self, values: torch.Tensor) -> torch.Tensor:
        """Sums a float64 CPU tensor over all ranks."""
        dist.all_reduce(values, group=self.control)
        return values

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, by rank, on every rank."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def barrier(self) -> None:
        dist.barrier(group=self.control)

    @contextmanager
    def fail_together(self, *kinds: type[Exception]) -> Iterator[None]:
        """An error of these kinds met inside by any rank is raised as `ValueError` by all of them (default: a user's mistake).

        Without it, the ranks that met no error would wait for ever for the one that did.
        """
        mine = None
        try:
            yield
        except kinds or (ValueError, OSError) as error:  # noqa: B030
            mine = str(error).strip().split("\n")[0] or type(error).__name__
        failures = [(rank, message) for rank, message in enumerate(self.gather(mine)) if message is not None]
        if failures:
            rank, message = failures[0]
            raise ValueError(message if rank == 0 else f"rank {rank}: {message}")


def start() -> Ranks:
    """Joins the process group that the launcher's environment variables describe.

    The DeepSpeed launcher and torchrun set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; Slurm's own
    variables are mapped to them; with neither this is a job of one process.

    Raises:
        ValueError: the rendezvous port is taken.
    """
    env = os.environ
    _fill_in_rank_variables()
    if "OMP_NUM_THREADS" not in env:
        # Torch would start one thread a core in every rank.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_on_this_host()))
    on_gpu = torch.cuda.is_available()
    rank, world_size, local_rank = int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        _keep_freed_memory()

    import deepspeed

    disable_shared_memory_extension()
    # Deprecation notices that DeepSpeed earns from torch, once per rank and step: nothing a user can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")
    try:
        deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise ValueError(
            f"port {env['MASTER_PORT']} on {env['MASTER_ADDR']} is taken, perhaps by another run: "
            "give the launcher another one (deepspeed --master_port N, torchrun --master-port N, MASTER_PORT=N)"
        ) from None
    control = dist.new_group(backend="gloo") if on_gpu else dist.group.WORLD
    return Ranks(rank, world_size, local_rank, device, control)


def stop() -> None:
    """Leaves the process group; safe to call when it was never joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def ranks_on_this_host() -> int:
    """Set by torchrun (LOCAL_WORLD_SIZE) and by the DeepSpeed launcher (LOCAL_SIZE)."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def _fill_in_rank_variables() -> None:
    env = os.environ
    if "RANK" in env:
        return
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
        env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_NTASKS"]
        env["LOCAL_RANK"] = env["SLURM_LOCALID"]
        env.setdefault("LOCAL_WORLD_SIZE", env.get("SLURM_NTASKS_PER_NODE", "1"))
        if "MASTER_ADDR" not in env or "MASTER_PORT" not in env:
            raise ValueError("under srun, export MASTER_ADDR and MASTER_PORT before it, as launch/slurm.sbatch does")
        return
    env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))


def _keep_freed_memory() -> None:
    """Makes glibc keep what a step frees. It would give it back to the system, and the next step get it page by page.

    Other C libraries do not know the function.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_mmap_threshold, 2**25)  # the largest it takes


def disable_shared_memory_extension() -> None:
    """Keeps DeepSpeed from compiling its CPU all-reduce at every start (minutes, and it needs a compiler); gloo serves."""
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False
