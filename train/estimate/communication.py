"""What the ranks send each other in a training step, by ZeRO stage, as DeepSpeed 0.19 does it.

With P bytes of weights in the training precision, W ranks and A micro-batches a step:

    stage 0   all-reduce P, once
    stage 1   all-reduce P, once; all-gather P, once
    stage 2   all-reduce P, A times; all-gather P, once
    stage 3   all-gather P, 2·A times (forward, backward); reduce-scatter P, A times

Stages 1 and 2 reduce gradients by all-reduce though a rank wants its share only (`use_multi_rank_bucket_allreduce`,
DeepSpeed's default). ZeRO-3 gathers once if it never lets weights go in between, and a recomputed block a third time if
the block is larger than `stage3_max_reuse_distance`, so that it is let go between recomputing and its backward pass.
Sums of a few numbers (norms, losses) don't count.

Ranks that share rows (`train.sequence_parallel`) also send each other, in every layer, their slices of queries, keys, values and
outputs, and the gradients of these: all-to-alls in the forward pass, the backward pass and, of recomputed layers, once more.
"""

from __future__ import annotations

from dataclasses import dataclass

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from train.config import AnyConfig, LanguageConfig
from train.estimate.gpus import Gpu
from train.estimate.memory import keeps_all_gathered

ROUNDS = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}  # an all-reduce is a reduce-scatter and an all-gather


@dataclass(frozen=True)
class Collective:
    kind: str  # all-reduce | all-gather | reduce-scatter
    what: str
    payload: float  # bytes of the whole tensor, summed over a training step

    def sent(self, world_size: int) -> float:
        """Bytes that each rank sends, and receives, in a training step; rings and trees alike send no less."""
        return ROUNDS[self.kind] * self.payload * (world_size - 1) / world_size

    def seconds(self, gpu: Gpu, world_size: int, gpus_per_node: int) -> float:
        """At the links' full bandwidth. Every node must get the payload through its GPUs' network cards once; inside it,
        every GPU must get it through its own link."""
        nodes = -(-world_size // gpus_per_node)
        inside = self.sent(world_size) / gpu.link
        between = (
            ROUNDS[self.kind] * self.payload * (nodes - 1) / nodes / (gpu.network * min(gpus_per_node, world_size))
        )
        return max(inside, between)


@dataclass(frozen=True)
class AllToAll:
    """Of groups of `ranks` that share rows, next to each other: a GPU keeps its own part and sends each other one theirs."""

    what: str
    payload: float  # bytes of a rank's tensors, summed over a training step
    ranks: int
    kind: str = "all-to-all"

    def sent(self, world_size: int) -> float:
        """Bytes that each rank sends, and receives, in a training step."""
        return self.payload * (self.ranks - 1) / self.ranks

    def seconds(self, gpu: Gpu, world_size: int, gpus_per_node: int) -> float:
        """At the links' full bandwidth: what goes to other nodes goes through the GPU's own network card."""
        elsewhere = self.ranks - min(self.ranks, gpus_per_node)
        return max(self.sent(world_size) / gpu.link, self.payload * elsewhere / self.ranks / gpu.network)


def all_to_alls(config: AnyConfig, precision: str, micro_batches: int, samples: int) -> list[AllToAll]:
    """Of `micro_batches` micro-batches of `samples` samples; none where no rows are shared."""
    size = config.train.sequence_parallel_size
    if size == 1 or not isinstance(config, LanguageConfig):
        return []
    model = config.model
    item = 4 if precision == "fp32" else 2
    heads = 2 * (model.heads + (model.kv_heads or model.heads))  # of queries and outputs, keys and values
    layer = samples * model.sequence_length // size * heads * (model.width // model.heads) * item
    every = config.train.activation_checkpointing
    passes = 2 * model.layers + (model.layers // every if every else 0)
    return [AllToAll("slices and heads", float(layer * passes * micro_batches), size)]


def collectives(
    zero: DeepSpeedZeroConfig,
    parameters: int,
    precision: str,
    micro_batches: int,
    recomputed: int = 0,
    largest_block: int = 0,
) -> list[Collective]:
    """A rank's collective operations in one training step.

    Args:
        parameters: of the model.
        precision: bf16, fp16 or fp32: gradients and weights travel as they are.
        micro_batches: A, forward passes a step.
        recomputed: parameters in blocks that activation checkpointing recomputes.
        largest_block: parameters of one of these.
    """
    weights = float(parameters * (4 if precision == "fp32" else 2))
    if zero.stage == 0:
        return [Collective("all-reduce", "gradients", weights)]
    if zero.stage < 3:
        reductions = micro_batches if zero.stage == 2 else 1
        return [
            Collective("all-reduce", "gradients", weights * reductions),
            Collective("all-gather", "weights", weights),
        ]
    gathers = 1.0 if keeps_all_gathered(zero, parameters) else 2.0
    if gathers == 2.0 and largest_block > zero.max_reuse_distance:
        gathers += recomputed / parameters
    return [
        Collective("all-gather", "weights", weights * gathers * micro_batches),
        Collective("reduce-scatter", "gradients", weights * micro_batches),
    ]
