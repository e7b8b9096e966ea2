"""A rank's part of the training state in a file that any number of ranks, at any ZeRO stage, can read.

    state_00003.safetensors    "0.fp32", "0.exp_avg", "0.exp_avg_sq", "1.fp32", ...: the flat tensors of `train.zero`
                               "random.cpu", "random.cuda": the rank's random number generators
                               in its header: what lies where in the flat tensors, AdamW's step, the loss scaler

A job reads from such files the stretches of parameters that it needs, and no others. Weights in half precision are the
rounded float32 ones at every moment, so that nobody has to store them.
"""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import ExitStack
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from train import zero
from train.zero import MOMENTS, Fragment

LOSS_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # what it remembers; fp16 only


def file_name(rank: int) -> str:
    return f"state_{rank:05d}.safetensors"


def collect(engine: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """This rank's tensors and its header. The tensors are the engine's own, or copies on NVMe of what is there already.

    Raises:
        OSError: the NVMe disk is full.
    """
    tensors: dict[str, Tensor] = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    flats, fragments, step = zero.flat_weights(engine), zero.fragments(engine), 0.0
    if engine.zero_optimization_stage() == 0 and dist.get_rank() != 0:
        flats, fragments = [], []  # all ranks have the same: one of them writes it
    swap_folder = zero.swap_folder(engine)
    for number, flat in enumerate(flats):
        with zero.in_memory(engine, flat):
            adam = zero.adam_state(engine, flat)
            step = adam["step"].item()
            own = {"fp32": flat.detach().view(-1), **{moment: adam[moment].view(-1) for moment in MOMENTS}}
            for key, tensor in own.items():
                tensors[f"{number}.{key}"] = tensor if swap_folder is None else _copy_on_disk(tensor, swap_folder)
    scaler = vars(zero.loss_scaler(engine)) if engine.fp16_enabled() else {}
    header = {
        "fragments": [astuple(fragment) for fragment in fragments],
        "step": step,
        "loss_scaler": {name: scaler[name] for name in LOSS_SCALER if name in scaler},
    }
    return tensors, {key: json.dumps(value) for key, value in header.items()}


def restore(engine: Any, directory: Path, world_size: int) -> None:
    """Fills this rank's part of the engine from the files that `world_size` ranks wrote into `directory`.

    `zero.refresh_weights` must follow, on all ranks. The random number generators come back too, except on ranks beyond
    `world_size`.

    Raises:
        ValueError: the files do not hold all of a parameter.
    """
    rank = dist.get_rank()
    flats = zero.flat_weights(engine)
    wanted = {fragment.parameter: fragment for fragment in zero.fragments(engine)}
    # Where ranks and stage are as they were, the first of these has everything.
    writers = sorted(range(world_size), key=lambda writer: (writer != rank, writer))
    with safe_open(directory / file_name(0), "pt") as file:
        header = _header(file)
    # All at once, since every round reads the headers of the files anew; but what is on NVMe has no room in memory at once.
    numbers = list(range(len(flats)))
    for some in [numbers] if zero.swap_folder(engine) is None else [[number] for number in numbers]:
        with ExitStack() as stack:
            for number in some:
                stack.enter_context(zero.in_memory(engine, flats[number], write=True))
                zero.adam_state(engine, flats[number])["step"].fill_(header["step"])
            _fill(engine, flats, {name: f for name, f in wanted.items() if f.flat in some}, directory, writers)
    if engine.fp16_enabled():
        vars(zero.loss_scaler(engine)).update(header["loss_scaler"])
    if rank < world_size:
        with safe_open(directory / file_name(rank), "pt") as file:
            torch.set_rng_state(file.get_tensor("random.cpu"))
            if torch.cuda.is_available() and "random.cuda" in file.keys():  # noqa: SIM118
                torch.cuda.set_rng_state(file.get_tensor("random.cuda"))


def _fill(engine: Any, flats: list[Tensor], wanted: dict[str, Fragment], directory: Path, writers: list[int]) -> None:
    """Copies what is `wanted`, by parameter, from the writers' files."""
    missing = {name: fragment.length for name, fragment in wanted.items()}
    for writer in writers:
        if not any(missing.values()):
            break
        with safe_open(directory / file_name(writer), "pt") as file:
            for stored in (Fragment(*row) for row in _header(file)["fragments"]):
                if stored.parameter in wanted:
                    missing[stored.parameter] -= _copy(engine, flats, wanted[stored.parameter], file, stored)
    incomplete = [name for name, length in missing.items() if length]
    if incomplete:
        raise ValueError(f"{directory} does not hold all of {', '.join(incomplete[:3])}; {len(incomplete)} in all")


def _copy_on_disk(tensor: Tensor, folder: Path) -> Tensor:
    """A copy in a file of its own, which takes no memory that the system could not use otherwise, and ends with the tensor."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        # A full disk is an error here; met later, it would end the process.
        os.posix_fallocate(file.fileno(), 0, tensor.nbytes)
        copy = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    return copy.copy_(tensor)


def _copy(engine: Any, flats: list[Tensor], wanted: Fragment, file: Any, stored: Fragment) -> int:
    """Copies what `stored` has of `wanted`; returns its length."""
    start = max(stored.start, wanted.start)
    length = min(stored.start + stored.length, wanted.start + wanted.length) - start
    if length <= 0:
        return 0
    flat = flats[wanted.flat]
    adam = zero.adam_state(engine, flat)
    here, there = wanted.offset + start - wanted.start, stored.offset + start - stored.start
    for key, tensor in {"fp32": flat.data, **{moment: adam[moment] for moment in MOMENTS}}.items():
        values = file.get_slice(f"{stored.flat}.{key}")[there : there + length]
        tensor.view(-1)[here : here + length].copy_(values)
    return length


def _header(file: Any) -> dict[str, Any]:
    return {key: json.loads(value) for key, value in file.metadata().items()}
