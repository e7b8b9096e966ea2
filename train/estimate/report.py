"""The text that `python -m train.estimate` prints: a section a function, which computes what it shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from train.config import AnyConfig, LanguageConfig
from train.data.order import micro_batch_size
from train.engine import gradient_accumulation_steps, zero_settings
from train.estimate.activations import Activations, trace_activations, trace_head
from train.estimate.communication import AllToAll, Collective, all_to_alls, collectives
from train.estimate.gpus import GIB, Gpu
from train.estimate.memory import checkpoint_bytes, state_memory, zero_config
from train.models.attention import planned_backend
from train.models.flops import model_flops_per_sample
from train.precision import DTYPES
from train.tasks import Task

# Of the peak, by hardware FLOPs. Published runs reach 38-43 % (Llama 3, arXiv:2407.21783, table 4), 52 % (Megatron-LM,
# arXiv:2104.04473) and 55 % (MegaScale, arXiv:2402.15627) in model FLOPs; none of them is of this trainer.
COMPUTE_EFFICIENCY = (0.30, 0.55)
LINK_EFFICIENCY = (0.60, 0.85)  # of a link's bandwidth, in large collective operations; assumed
IMAGE_BYTES = 110_000  # of an encoded image, where the data set isn't here: ImageNet's average (138 GB of 1.28 million)
KINDS = {  # what a parameter belongs to: the first of these that its name contains
    "norm": "norms",
    "attn": "attention",
    "attention": "attention",
    "feed_forward": "feed-forward",
    "mlp": "feed-forward",
    "head": "head",
    "": "embeddings",
}


@dataclass(frozen=True)
class Plan:
    """A config on a cluster: what all sections are computed from. `config.train.precision` is not `auto`."""

    config: AnyConfig
    task: Task
    model: nn.Module  # on the device meta
    gpu: Gpu
    gpus: int
    gpus_per_node: int
    samples_per_epoch: int | None
    bytes_per_sample: float  # in the shards

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @property
    def precision(self) -> str:
        return self.config.train.precision

    @property
    def backend(self) -> str:
        return planned_backend(self.config.model, self.gpu.capability, DTYPES[self.precision])

    @property
    def flops_per_sample(self) -> tuple[float, float]:
        """Model and hardware FLOPs."""
        return model_flops_per_sample(self.config, self.backend, torch.device("cuda"))

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.gpus_per_node)

    @property
    def micro_batches(self) -> int:
        return gradient_accumulation_steps(self.config, self.gpus)

    def collectives(self, stage: int) -> list[Collective | AllToAll]:
        blocks = self.model.get_submodule("blocks")
        every, numel = self.config.train.activation_checkpointing, sum(p.numel() for p in blocks.parameters())
        recomputed = numel // self.config.model.layers * (self.config.model.layers // every) if every else 0
        zero = zero_config(zero_settings(self.config), stage)
        largest = numel // self.config.model.layers
        sent = collectives(zero, self.parameters, self.precision, self.micro_batches, recomputed, largest)
        samples = micro_batch_size(self.config, self.gpus)
        return [*sent, *all_to_alls(self.config, self.precision, self.micro_batches, samples)]


def model(plan: Plan) -> str:
    kinds: Counter[str] = Counter()
    for name, parameter in plan.model.named_parameters():
        kinds[next(kind for part, kind in KINDS.items() if part in name)] += parameter.numel()
    return _lines(
        ("cluster", f"{plan.gpus} x {plan.gpu.title}, {plan.nodes} nodes"),
        ("numbers of the GPU", plan.gpu.source),
        ("parameters", f"{plan.parameters:,}"),
        *((f"  {kind}", f"{number:,}") for kind, number in kinds.most_common()),
        ("precision", plan.precision),
        ("attention backend", f"{plan.backend}  (model.attention_backend={plan.config.model.attention_backend})"),
        ("ranks that share a row", f"{plan.config.train.sequence_parallel_size}"),
        ("samples a forward pass", f"{micro_batch_size(plan.config, plan.gpus)}"),
        ("gradient accumulation", f"{plan.micro_batches}"),
        (f"{plan.task.unit} a step", f"{plan.config.train.global_batch_size * plan.task.units_per_sample:,}"),
    )


def memory(plan: Plan) -> str:
    config = plan.config
    samples, every = micro_batch_size(config, plan.gpus), config.train.activation_checkpointing

    def trace(every: int) -> Activations:
        return trace_activations(config, samples, DTYPES[plan.precision], plan.backend, every)

    own = trace(every)
    choices = [("no layer recomputed", trace(0)), ("every layer recomputed", trace(1))]
    rows = [(label, _gib(a.kept), _gib(a.peak)) for label, a in [*choices, (f"this config: {every}", own)]]
    if isinstance(config, LanguageConfig):
        tokens = samples * config.model.sequence_length // config.train.sequence_parallel_size
        head = trace_head(config.model, tokens, DTYPES[plan.precision])
        rows.append(("of these, logits and losses", _gib(head.kept), _gib(head.peak)))
    tables = [_table(("activations, GiB", "kept for backward", "at most"), rows)]
    settings = zero_settings(config)
    own_zero, zero_rows = zero_config(settings), []
    for label, row in _layouts(settings):
        zero = zero_config(row)
        kept = 0 if zero.memory_efficient_linear else own.kept_weights
        state = state_memory(zero, plan.parameters, plan.gpus, plan.precision, kept)
        peak = state.peak(own.peak)
        parts = (state.weights, state.optimizer, state.gradients, state.buckets, state.gathered)
        verdict = "this config" if zero == own_zero else ""
        if peak > plan.gpu.fits:
            verdict = f"{verdict} TOO MUCH".strip()
        zero_rows.append((label, *map(_gib, parts), _gib(peak), _gib(state.host), verdict))
    header = ("GiB a GPU", "weights", "optimizer", "gradients", "buckets", "gathered", "at most", "on host", "")
    tables.append(_table(header, zero_rows))
    tables.append(
        f"Memory of each {plan.gpu.title}: {_gib(plan.gpu.memory)} GiB, of which about {_gib(plan.gpu.fits)} for tensors."
    )
    return "\n\n".join(tables)


def _layouts(settings: dict) -> list[tuple[str, dict]]:
    """The config's own ZeRO settings and their variations, by name."""
    optimizer = {"offload_optimizer": settings.get("offload_optimizer", {"device": "cpu"})}
    weights = {"offload_param": settings.get("offload_param", {"device": "cpu"})}
    on_gpu = {key: value for key, value in settings.items() if key not in {*optimizer, *weights}}
    rows = [(f"ZeRO-{stage}", on_gpu | {"stage": stage}) for stage in range(4)]
    rows += [(f"ZeRO-{stage} optimizer offloaded", on_gpu | optimizer | {"stage": stage}) for stage in (1, 2, 3)]
    return [*rows, ("ZeRO-3 weights offloaded too", on_gpu | optimizer | weights | {"stage": 3})]


def compute(plan: Plan) -> str:
    model_flops, hardware_flops = (flops / plan.task.units_per_sample for flops in plan.flops_per_sample)
    units = plan.config.train.global_batch_size * plan.task.units_per_sample
    unit = plan.task.unit.removesuffix("s")
    return _lines(
        (f"model FLOPs per {unit}", f"{model_flops:.3e}"),
        (
            f"hardware FLOPs per {unit}",
            f"{hardware_flops:.3e}  (attention by {plan.backend}, recomputed layers included)",
        ),
        ("hardware FLOPs a GPU and step", f"{hardware_flops * units / plan.gpus:.3e}"),
    )


def communication(plan: Plan) -> str:
    rows = [
        (
            f"ZeRO-{stage}",
            f"{c.kind} of {c.what}",
            _gib(c.payload),
            _gib(c.sent(plan.gpus)),
            f"{_seconds(plan, [c]):.3f}",
        )
        for stage in range(4)
        for c in plan.collectives(stage)
    ]
    header = ("a step", "", "payload GiB", "sent by a GPU, GiB", "s at full bandwidth")
    return _table(header, rows)


def _seconds(plan: Plan, collectives: Sequence[Collective | AllToAll]) -> float:
    return sum(c.seconds(plan.gpu, plan.gpus, plan.gpus_per_node) for c in collectives)


def step_seconds(plan: Plan) -> tuple[float, float]:
    """A guess at the fastest and the slowest step: all communication hidden behind computing, or none of it."""
    hardware_flops = plan.flops_per_sample[1] * plan.config.train.global_batch_size / plan.gpus
    stage = zero_config(zero_settings(plan.config)).stage
    sending = _seconds(plan, plan.collectives(stage))
    slow_compute, fast_compute = (hardware_flops / plan.gpu.bf16_flops / share for share in COMPUTE_EFFICIENCY)
    slow_sending, fast_sending = (sending / share for share in LINK_EFFICIENCY)
    return max(fast_compute, fast_sending), slow_compute + slow_sending


def time_and_cost(plan: Plan, dollars_per_gpu_hour: float | None) -> str:
    train, unit = plan.config.train, plan.task.unit
    fast, slow = step_seconds(plan)
    units = train.global_batch_size * plan.task.units_per_sample
    model_flops = plan.flops_per_sample[0] * train.global_batch_size / plan.gpus / plan.gpu.bf16_flops
    rows = [
        ("assumed: compute", f"{_percent(COMPUTE_EFFICIENCY)} of {plan.gpu.bf16_flops / 1e12:,.0f} TFLOPS"),
        (
            "assumed: links",
            f"{_percent(LINK_EFFICIENCY)} of {plan.gpu.link / 1e9:.0f} GB/s in a node, "
            f"{plan.gpu.network / 1e9:.1f} GB/s a GPU between nodes",
        ),
        ("seconds a step", f"{fast:.3g} to {slow:.3g}"),
        (f"{unit} a second", f"{units / slow:,.0f} to {units / fast:,.0f}"),
        ("MFU", f"{model_flops / slow:.0%} to {model_flops / fast:.0%}"),
    ]
    spans: list[tuple[str, float]] = [(f"the run, {train.steps:,} steps", train.steps)]
    if plan.samples_per_epoch:
        steps = plan.samples_per_epoch / train.global_batch_size
        spans.insert(0, (f"an epoch, {steps:,.0f} steps", steps))
    for label, steps in spans:
        hours = [seconds * steps / 3600 for seconds in (fast, slow)]
        text = f"{hours[0] * plan.gpus:,.1f} to {hours[1] * plan.gpus:,.1f} GPU hours in {hours[0]:,.2f} to {hours[1]:,.2f} hours"
        if dollars_per_gpu_hour is not None:
            text += ", $" + " to $".join(f"{h * plan.gpus * dollars_per_gpu_hour:,.0f}" for h in hours)
        rows.append((label, text))
    return _lines(*rows)


def storage(plan: Plan, filesystem_bandwidth: float) -> str:
    """`filesystem_bandwidth` in bytes/s, over all nodes."""
    checkpoint = sum(checkpoint_bytes(plan.parameters, plan.precision))
    fast, slow = step_seconds(plan)
    # Each of the ranks that share a row reads all of it.
    samples = plan.config.train.global_batch_size * plan.config.train.sequence_parallel_size / plan.nodes
    data = [samples / seconds * plan.bytes_per_sample / 1e6 for seconds in (slow, fast)]
    every = plan.config.checkpoint.every_steps
    return _lines(
        ("a checkpoint", f"{checkpoint / 1e9:,.1f} GB (float32 weights, two moments, and the weights whole)"),
        ("writing one", f"{checkpoint / filesystem_bandwidth:,.1f} s at {filesystem_bandwidth / 1e9:g} GB/s"),
        ("time between two", f"{fast * every:,.0f} to {slow * every:,.0f} s (checkpoint.every_steps={every})"),
        ("data read by a node", f"{data[0]:,.2f} to {data[1]:,.2f} MB/s"),
    )


def sample_bytes(config: AnyConfig) -> float:
    """Bytes of a sample in its shard where the data set isn't at hand."""
    if isinstance(config, LanguageConfig):
        return (config.model.sequence_length + 1) * (2 if config.model.vocab_size <= 2**16 else 4)
    return IMAGE_BYTES


def _percent(shares: tuple[float, float]) -> str:
    return " to ".join(f"{share:.0%}" for share in shares)


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / GIB:,.2f}"


def _lines(*rows: tuple[str, str]) -> str:
    return "\n".join(label.ljust(32) + value for label, value in rows)


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Columns as wide as need be: text to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    numeric = [all(cell[:1].isdigit() for cell in column) for column in zip(*rows, strict=True)]

    def line(cells: tuple[str, ...]) -> str:
        padded = (c.rjust(w) if n else c.ljust(w) for c, w, n in zip(cells, widths, numeric, strict=True))
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), *map(line, rows)])
