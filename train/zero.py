"""Where a DeepSpeed engine keeps float32 weights and AdamW's moments: the one file that looks inside its optimizers (0.19).

They are in flat tensors. Which stretch of which parameter lies where depends on the ZeRO stage and the number of ranks:

    stage 0       a tensor for each parameter, the same on every rank: the parameter itself, or its float32 copy
    stages 1, 2   each parameter group flattened and split evenly: a rank may have a piece of a parameter, or none
    stage 3       each parameter padded and split evenly, the pieces of many parameters laid end to end; a tensor that is
                  offloaded to NVMe is empty but while it is `in_memory`
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")  # as torch's AdamW calls them


@dataclass(frozen=True)
class Fragment:
    """A stretch of a parameter, seen as 1-D, and its place in a flat tensor."""

    parameter: str
    start: int
    length: int
    flat: int  # number of the flat tensor
    offset: int  # in it


def flat_weights(engine: Any) -> list[Tensor]:
    """This rank's flat float32 tensors, as AdamW knows them."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 3:
        return list(optimizer.fp32_partitioned_groups_flat)
    if stage > 0:
        return list(optimizer.single_partition_of_fp32_groups)
    master = _master_weights(engine)
    return [master[id(parameter)] for _, parameter in _trained(engine)]


def fragments(engine: Any) -> list[Fragment]:
    """What lies in `flat_weights`; at most one fragment of each parameter."""
    stage, optimizer, found = engine.zero_optimization_stage(), engine.optimizer, []
    for number, (name, parameter) in enumerate(_trained(engine)):
        if stage == 3:
            share = parameter.ds_tensor.ds_numel
            start = share * dist.get_rank(optimizer.dp_process_group)
            length = max(0, min(share, parameter.ds_numel - start))  # the rest is padding
            flat, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
            found.append(Fragment(name, start, length, flat, offset))
        elif stage > 0:
            mapping = parameter._hp_mapping
            if mapping is not None:
                here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                found.append(Fragment(name, here.start, here.numel, mapping.param_group_index, there.start))
        else:
            found.append(Fragment(name, 0, parameter.numel(), number, 0))
    return found


def adam_state(engine: Any, flat: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a flat tensor: `step` and the moments, zeros where it has not stepped yet."""
    state: dict[str, Tensor] = _adam(engine).state[flat]
    if not state:
        state["step"] = torch.zeros((), device=flat.device)
        state |= {moment: torch.zeros_like(flat, requires_grad=False) for moment in MOMENTS}
    return state


def swap_folder(engine: Any) -> Path | None:
    """Where this rank's optimizer state is on NVMe; None where it is in memory."""
    swapper = _swapper(engine)
    return Path(swapper.swap_folder) if swapper else None


@contextmanager
def in_memory(engine: Any, flat: Any, write: bool = False) -> Iterator[None]:
    """Has a flat tensor and its moments in memory; with `write`, what is changed in them goes back to NVMe."""
    swapper = _swapper(engine)
    if swapper is None or flat.ds_id not in swapper.swap_params_info:  # too small: it stays in memory
        yield
        return
    # Before the first step AdamW has no state. What is made of it inside can only be kept by writing it.
    write = write or not _adam(engine).state.get(flat)
    swapper.swap_in_optimizer_state(parameter=flat)
    try:
        yield
    finally:
        if write:
            swapper.swap_out_optimizer_state(parameter=flat)
        else:
            swapper.release_swap_buffers(parameter=flat)
        flat.grad = None


def refresh_weights(engine: Any) -> None:
    """Makes the weights that the model computes with from the float32 ones; every rank must call it."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 3:
        optimizer.checkpoint_event_prologue()
        for number, flat in enumerate(flat_weights(engine)):
            with in_memory(engine, flat):
                optimizer._reassign_or_swap_out_partitioned_parameters(number)
        optimizer.checkpoint_event_epilogue()
    elif stage > 0:
        optimizer.update_lp_params()
    else:
        master = _master_weights(engine)
        for _, parameter in _trained(engine):
            parameter.data.copy_(master[id(parameter)])


def loss_scaler(engine: Any) -> Any:
    """The object that remembers the loss scale of fp16 and when it last was too large; at stages 1 to 3."""
    return engine.optimizer.loss_scaler


def undo_first_step(engine: Any) -> None:
    """DeepSpeed's bf16 optimizer without ZeRO takes a step on zero gradients when it is built.

    It would decay the weights and put AdamW's bias correction a step ahead of the other stages'.
    """
    if engine.zero_optimization_stage() == 0 and engine.bfloat16_enabled():
        engine.optimizer.refresh_fp32_params()
        engine.optimizer.optimizer.state.clear()


def _adam(engine: Any) -> Any:
    adam = engine.optimizer
    while hasattr(adam, "optimizer"):  # DeepSpeed's wraps torch's
        adam = adam.optimizer
    return adam


def _swapper(engine: Any) -> Any:
    """What moves optimizer state to NVMe and back; None without."""
    return getattr(engine.optimizer, "optimizer_swapper", None)


def _trained(engine: Any) -> list[tuple[str, Any]]:
    """Parameters with what DeepSpeed has hung on them, by name."""
    return [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]


def _master_weights(engine: Any) -> dict[int, Tensor]:
    """Without ZeRO: the float32 weights by the id of the parameter they belong to."""
    if not engine.bfloat16_enabled():
        return {id(parameter): parameter for _, parameter in _trained(engine)}
    optimizer = engine.optimizer
    groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    return {id(half): full for halves, fulls in groups for half, full in zip(halves, fulls, strict=True)}
