"""Predicted memory and communication against those of real training steps, on ranks of a CPU."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from train import sequence_parallel, training_state
from train.config import AnyConfig, load_config
from train.distributed import Ranks
from train.engine import build_engine, gradient_accumulation_steps, zero_settings
from train.estimate.activations import Activations, trace_activations
from train.estimate.communication import all_to_alls, collectives
from train.estimate.live_memory import LiveBytes
from train.estimate.memory import checkpoint_bytes, state_memory, zero_config
from train.models.attention import backend_in_use
from train.precision import DTYPES
from train.tasks import build_task

LANGUAGE = [
    "configs/language/quickstart.yaml",
    "model.vocab_size=2048",
    "model.layers=4",
    "model.width=128",
    "model.mlp_width=344",
    "model.sequence_length=128",
]
VISION = ["configs/vision/quickstart.yaml", "model.layers=3", "model.width=64", "model.heads=2"]


def test_the_training_state_is_that_of_the_zero_paper():
    # arXiv:1910.02054, figure 1: 7.5B parameters on 64 ranks need 120, 31.4, 16.6 and 1.9 GB.
    gigabytes = []
    for stage in range(4):
        memory = state_memory(zero_config({}, stage), 7_500_000_000, 64, "bf16")
        gigabytes.append(round((memory.weights + memory.optimizer + memory.gradients) / 1e9, 1))
    assert gigabytes == [120.0, 31.4, 16.6, 1.9]


def test_offloading_moves_the_state_and_keeps_what_is_used():
    gpu = state_memory(zero_config({}, 3), 10**9, 8, "bf16")
    offloaded = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    host = state_memory(zero_config(offloaded, 3), 10**9, 8, "bf16")
    assert (host.weights, host.optimizer, host.gradients) == (0, 0, 0)
    assert (host.buckets, host.gathered) == (gpu.buckets, gpu.gathered)
    assert host.host == gpu.weights + gpu.optimizer + (4 + 2) * 10**9 // 8


@pytest.mark.parametrize(
    ("arguments", "every", "dtype"),
    [
        (LANGUAGE, 0, "bf16"),
        (LANGUAGE, 3, "fp32"),
        ([*LANGUAGE, "model.head=adaptive", "model.adaptive_cutoffs=[2000]"], 1, "bf16"),
        (VISION, 0, "bf16"),
        (VISION, 1, "fp32"),
    ],
    ids=["language", "language, recomputed", "adaptive head", "vision", "vision, recomputed"],
)
def test_fake_tensors_take_what_real_ones_do(arguments: list[str], every: int, dtype: str):
    config = load_config(arguments[0], [*arguments[1:], f"train.activation_checkpointing={every}"])
    device = torch.device("cpu")
    traced = trace_activations(config, 2, DTYPES[dtype], backend_in_use(config.model, device, DTYPES[dtype]))
    task = build_task(config, None, device)
    model = task.build_model().to(DTYPES[dtype])
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    batch = task.placeholder_batch(2)
    if "targets" in batch:
        batch["targets"] %= 2000  # in the shortlist of the adaptive head
    with LiveBytes(model.parameters()) as live:
        before = live.now
        loss = task.loss_sum(model, batch, 0)
        kept = live.now - before
        loss.backward()
    assert kept == pytest.approx(traced.kept, rel=0.02)
    assert live.peak - before == pytest.approx(traced.peak, rel=0.02)


def test_checkpointing_trades_memory_for_time():
    config = load_config(LANGUAGE[0], LANGUAGE[1:])
    off, half, full = (trace_activations(config, 4, torch.bfloat16, "fused", every) for every in (0, 2, 1))
    assert off.kept > half.kept > full.kept and off.peak > half.peak > full.peak
    # Recomputed blocks keep no weights for ZeRO-3 to hold on to: what remains is the head's.
    assert full.kept_weights == 2048 * 128 * 2 < half.kept_weights < off.kept_weights


ZERO = {
    "overlap_comm": True,
    "contiguous_gradients": True,
    "reduce_bucket_size": 100_000,
    "allgather_bucket_size": 100_000,
}
ZERO3 = ZERO | {
    "stage": 3,
    "stage3_prefetch_bucket_size": 50_000,
    "stage3_param_persistence_threshold": 1000,
    "stage3_max_live_parameters": 350_000,
    "stage3_max_reuse_distance": 0,
}
# Precision, what the JSON says, activation checkpointing, and other settings.
CASES: dict[str, tuple[str, dict[str, Any], int] | tuple[str, dict[str, Any], int, str]] = {
    "stage 0": ("bf16", {"stage": 0}, 0),
    "stage 0, fp32": ("fp32", {"stage": 0}, 0),
    "stage 1": ("bf16", ZERO | {"stage": 1}, 0),
    "stage 2, fp32, recomputed": ("fp32", ZERO | {"stage": 2}, 1),
    "stage 3": ("bf16", ZERO3 | {"memory_efficient_linear": False}, 0),
    "stage 3, fp32, recomputed": ("fp32", ZERO3 | {"memory_efficient_linear": False}, 1),
    "stage 3, no weight kept": ("bf16", ZERO3 | {"memory_efficient_linear": True}, 0),
    "stage 2, rows shared": ("bf16", ZERO | {"stage": 2}, 2, "train.sequence_parallel_size=2"),
    "stage 3, fp32, rows shared": ("fp32", ZERO3, 0, "train.sequence_parallel_size=2"),
    "stage 2, offloaded": ("bf16", ZERO | {"stage": 2, "offload_optimizer": {"device": "cpu"}}, 0),
    "stage 3, offloaded": (
        "bf16",
        ZERO3 | {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
        0,
    ),
    "stage 3, all weights kept": (
        "bf16",
        ZERO3 | {"stage3_max_live_parameters": 10**9, "stage3_max_reuse_distance": 10**9},
        0,
    ),
}


class Meter(LiveBytes):
    """Also counts what goes through torch's collective operations."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: dict[str, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kinds = {
            "allreduce_": "all-reduce",
            "_allgather_base_": "all-gather",
            "_reduce_scatter_base_": "reduce-scatter",
            "alltoall_base_": "all-to-all",
        }
        if func.namespace == "c10d" and (kind := kinds.get(func.__name__.partition(".")[0])):
            # The whole tensor is an all-gather's output, a reduce-scatter's input, and what an all-reduce has.
            tensors = tree_leaves(args[1] if kind == "reduce-scatter" else args[0])
            payload = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
            self.collectives[kind] = self.collectives.get(kind, 0) + payload
        return super().__torch_dispatch__(func, types, args, kwargs)


def _measure(ranks: Ranks, config: AnyConfig, precision: str) -> tuple[dict[str, int], dict[str, float]]:
    """Bytes of a rank's second training step: state between steps, peaks in backward pass and optimizer, payloads."""
    task = build_task(config, None, ranks.device, sequence_parallel.start(config))
    micro_batches = gradient_accumulation_steps(config, ranks.world_size)
    with Meter() as meter:
        engine = build_engine(task.build_model(), config, ranks.world_size, precision)
        measured = {}
        for _ in range(2):
            gc.collect()
            meter.peak, meter.collectives = meter.now, {}
            for number in range(micro_batches):
                engine.backward(task.loss_sum(engine, task.placeholder_batch(2), 0) * 0.01, scale_wrt_gas=False)
                if number < micro_batches - 1:
                    engine.step()
            measured["backward"], meter.peak = meter.peak, meter.now
            engine.step()
            gc.collect()
            measured["step"], measured["state"] = meter.peak, meter.now
    if engine.zero_optimization_stage() > 0:  # without ZeRO, rank 0 writes all of it
        measured["checkpoint"] = sum(tensor.nbytes for tensor in training_state.collect(engine)[0].values())
    engine.destroy()
    return measured, meter.collectives


def _predict(config: AnyConfig, precision: str, world_size: int) -> tuple[dict[str, int], dict[str, float]]:
    zero = zero_config(zero_settings(config))
    model = build_task(config, None, torch.device("cpu")).build_model()
    parameters = sum(p.numel() for p in model.parameters())
    traced: Activations = trace_activations(config, 2, DTYPES[precision], "fused")
    kept_weights = 0 if zero.memory_efficient_linear else traced.kept_weights
    memory = state_memory(zero, parameters, world_size, precision, kept_weights)
    # What is offloaded is here as well: the ranks' device is the host.
    between_steps = memory.weights + memory.optimizer + memory.host
    if zero.stage == 3:  # its buffers stay
        between_steps += memory.buckets + memory.gradients
    sizes = {
        "backward": memory.backward_peak(traced.peak) + memory.host,
        "step": memory.weights + memory.optimizer + memory.step + memory.host,
        "state": between_steps,
        "checkpoint": checkpoint_bytes(parameters, precision)[0] // world_size,
    }
    blocks = sum(p.numel() for p in model.get_submodule("blocks").parameters())
    recomputed = blocks if config.train.activation_checkpointing else 0
    micro_batches = gradient_accumulation_steps(config, world_size)
    sent = collectives(zero, parameters, precision, micro_batches, recomputed, blocks // config.model.layers)
    return sizes, {c.kind: c.payload for c in [*sent, *all_to_alls(config, precision, micro_batches, samples=2)]}


def _config(file: Path, name: str, world_size: int) -> tuple[AnyConfig, str]:
    """The config of a case and its precision; `file` becomes its DeepSpeed JSON."""
    precision, settings, checkpointing, *others = CASES[name]
    file.write_text(json.dumps({"zero_optimization": settings}))
    overrides = [
        *LANGUAGE[1:],
        "train.micro_batch_size=2",
        f"train.global_batch_size={4 * world_size}",
        f"train.activation_checkpointing={checkpointing}",
        f"deepspeed.config={file}",
        *others,
    ]
    return load_config(LANGUAGE[0], overrides), precision


def _compare(ranks: Ranks, directory: Path, predictions: dict[str, tuple[dict[str, int], dict[str, float]]]) -> None:
    gc.freeze()  # to collect what the engines leave, and not to search all libraries for it
    wrong = []
    for name, (sizes, payloads) in predictions.items():
        measured, sent = _measure(ranks, *_config(directory / f"{ranks.rank}.json", name, ranks.world_size))
        for what, size in measured.items():
            if size != pytest.approx(sizes[what], rel=0.10):
                wrong.append(f"{name}: {what} {size:,} bytes, {sizes[what]:,} predicted")
        for kind, payload in payloads.items():
            if sent.get(kind, 0) != pytest.approx(payload, rel=0.10):
                wrong.append(f"{name}: {kind} {sent.get(kind, 0):,.0f} bytes, {payload:,.0f} predicted")
    assert not wrong, "\n".join(wrong)


@pytest.mark.long
def test_memory_and_communication_within_ten_percent(run_distributed, tmp_path):
    world_size = 2
    predictions = {name: _predict(*_config(tmp_path / "predict.json", name, world_size), world_size) for name in CASES}
    run_distributed(_compare, world_size, tmp_path, predictions)
