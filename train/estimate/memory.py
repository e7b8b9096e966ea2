"""Memory of the training state on a rank, as DeepSpeed 0.19 holds it: weights, gradients, AdamW's state, buffers.

Bytes a parameter, with W ranks; half precision (bf16, fp16) first, fp32 after the slash:

                       weights    optimizer     gradients    on top, in the optimizer's step
    stage 0            2 / 4      12 / 8        2 / 4        4 / 0
    stage 1            2 / 4      12/W / 12/W   2 / 4        step's copies, see below
    stage 2            2 / 4      12/W / 12/W   2/W / 4/W    the same
    stage 3            2/W / 4/W  12/W / 12/W   2/W / 4/W    the same, of one group of parameters at a time

The optimizer's share is float32 weights and two moments (arXiv:1910.02054, section 3.1); under ZeRO, DeepSpeed keeps a
second float32 copy of the weights in fp32 as well. In the step of stages 1 to 3 a rank's gradients are laid end to end
and then cast to float32: 2 + 4 bytes, and 4 in fp32. Stage 1 has given up the gradients of other ranks by then.

ZeRO-3 gathers weights for as long as they are used: at most `stage3_max_live_parameters`, and what it fetches ahead. A
linear layer keeps its gathered weight from the forward to the backward pass if "memory_efficient_linear" is off and
its block isn't recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

FLOAT32 = 4
MOMENTS = 2 * FLOAT32


def zero_config(settings: dict[str, Any], stage: int | None = None) -> DeepSpeedZeroConfig:
    """`zero_optimization` of DeepSpeed's JSON with its defaults filled in, at another stage if one is given."""
    return DeepSpeedZeroConfig(**(settings if stage is None else settings | {"stage": stage}))


def _is_offloaded(part: Any) -> bool:
    """Of DeepSpeed's `offload_optimizer` or `offload_param`."""
    return part is not None and part.device != "none"


@dataclass(frozen=True)
class StateMemory:
    """Bytes on one rank. `weights`, `optimizer` and `buckets` stay; the others come and go within a step."""

    weights: int
    optimizer: int  # float32 weights and moments
    gradients: int  # from the backward pass to the optimizer's step
    buckets: int  # gradients on their way to other ranks
    gathered: int  # ZeRO-3: weights of other ranks, at most
    step: int  # in the optimizer's step, gradients included
    host: int  # offloaded to the host's memory, for this rank

    def backward_peak(self, activations: int) -> int:
        """The most there is in a forward and backward pass."""
        return self.weights + self.optimizer + self.gradients + self.buckets + self.gathered + activations

    def peak(self, activations: int) -> int:
        """The most there is in a training step. In the optimizer's part there are no activations any more."""
        return max(self.backward_peak(activations), self.weights + self.optimizer + self.step)


def state_memory(
    zero: DeepSpeedZeroConfig, parameters: int, world_size: int, precision: str, kept_weights: int = 0
) -> StateMemory:
    """What the training state of `parameters` parameters takes on each of `world_size` ranks.

    Args:
        zero: the stage, its buckets and its offloading.
        precision: bf16, fp16 or fp32.
        kept_weights: bytes of weights that the model's autograd graph keeps until its backward pass, see
            `activations.Activations`; ZeRO-3 only.
    """
    item = 4 if precision == "fp32" else 2
    whole, share = parameters, -(-parameters // world_size)
    if zero.stage == 0:
        half = item == 2
        return StateMemory(
            weights=item * whole,
            optimizer=(MOMENTS + FLOAT32 * half) * whole,
            gradients=item * whole,
            buckets=0,
            gathered=0,
            step=(item + FLOAT32 * half) * whole,
            host=0,
        )
    casts = item == 2
    optimizer = (FLOAT32 + MOMENTS) * share
    bucket = item * min(zero.reduce_bucket_size, parameters) if zero.contiguous_gradients else 0
    if zero.stage < 3:
        memory = StateMemory(
            weights=item * whole,
            optimizer=optimizer,
            gradients=item * (whole if zero.stage == 1 else share),
            buckets=bucket * (2 if zero.overlap_comm else 1),
            gathered=0,
            step=(2 * item + FLOAT32 * casts) * share,
            host=0,
        )
    else:
        group = min(share, zero.sub_group_size)
        memory = StateMemory(
            weights=item * share,
            optimizer=optimizer,
            gradients=item * share,
            buckets=bucket,
            gathered=_gathered(zero, parameters, item, kept_weights),
            step=item * share + bucket + (item + FLOAT32 * casts) * group,
            host=0,
        )
    return _offloaded(memory, zero, share, item)


def checkpoint_bytes(parameters: int, precision: str) -> tuple[int, int]:
    """Of a checkpoint: (the ranks' parts of the training state, the weights whole). The rest is small."""
    return (FLOAT32 + MOMENTS) * parameters, (4 if precision == "fp32" else 2) * parameters


def _gathered(zero: DeepSpeedZeroConfig, parameters: int, item: int, kept_weights: int) -> int:
    if keeps_all_gathered(zero, parameters):
        return item * parameters
    return item * min(parameters, zero.max_live_parameters + zero.prefetch_bucket_size) + kept_weights


def keeps_all_gathered(zero: DeepSpeedZeroConfig, parameters: int) -> bool:
    """Whether ZeRO-3 lets no weight go between forward and backward pass, since all are wanted again soon enough."""
    return parameters <= zero.max_live_parameters and 2 * parameters <= zero.max_reuse_distance


def _offloaded(memory: StateMemory, zero: DeepSpeedZeroConfig, share: int, item: int) -> StateMemory:
    """`memory` with optimizer state, and under ZeRO-3 weights, moved to the host as the file says.

    With the optimizer go the gradients of the rank's share, in float32 and as they arrive; in stages 1 and 2 also a
    copy of the new weights on their way back (and room for the largest parameter, twice, which isn't counted).
    """
    weights, optimizer, gradients, step = memory.weights, memory.optimizer, memory.gradients, memory.step
    host = 0
    if _is_offloaded(zero.offload_optimizer):
        host += optimizer + (FLOAT32 + item * (1 if zero.stage == 3 else 2)) * share
        optimizer, step = 0, 0
        gradients = gradients if zero.stage == 1 else 0
    if zero.stage == 3 and _is_offloaded(zero.offload_param):
        host += weights
        weights = 0
    return StateMemory(weights, optimizer, gradients, memory.buckets, memory.gathered, step, host)
