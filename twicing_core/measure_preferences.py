"""Times what `auto` may choose from on this machine's GPU, and keeps the fastest (`bench --save-preferences`)."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from twicing_core import operator as _operator  # noqa: F401  (defines torch.ops.twicing)
from twicing_core import preferences
from twicing_core.bench import seconds
from twicing_core.build_cuda import unavailable
from twicing_core.candidates import Shape
from twicing_core.composed import attend
from twicing_core.preferences import COMPOSED, Preference

SHAPES = {
    "short": Shape(64, 12, 256, 64, False),
    "causal": Shape(4, 16, 4096, 128, True),
    "full": Shape(4, 16, 4096, 128, False),
}
assert tuple(SHAPES) == preferences.REGIMES


def run(arguments: argparse.Namespace) -> int:
    """Measures every regime in bfloat16, prints the times, and saves what was fastest."""
    if arguments.device != "cuda" or not torch.cuda.is_available():
        sys.exit("--save-preferences is about CUDA kernels: it needs a GPU, and --device cuda")
    if reason := unavailable(torch.cuda.current_device()):
        sys.exit(f"there is nothing to choose from: {reason}")
    measured = {}
    for regime, shape in SHAPES.items():
        times = measure(shape, "cuda", arguments.rounds)
        measured[regime] = fastest(times)
        print(f"{regime} ({shape}): {', '.join(f'{name} {time * 1e3:.3f} ms' for name, time in times.items())}")
        print(f"  {', '.join(f'{use}: {name}' for use, name in list(measured[regime]._asdict().items())[:3])}")
    print(f"written to {preferences.save(torch.cuda.get_device_name(), measured)}")
    return 0


def measure(shape: Shape, device: str, rounds: int) -> dict[str, float]:
    """Returns medians in seconds: of "KERNEL forward", "KERNEL backward", "composed forward" and "composed training"."""
    batch, heads, seq, head_dim, is_causal = shape
    scale = head_dim**-0.5
    inputs = [torch.randn(batch, seq, heads, head_dim, device=device).bfloat16().transpose(1, 2) for _ in range(4)]
    *qkv, grad_output = inputs
    leaves = [tensor.detach().requires_grad_() for tensor in qkv]
    options: dict[str, Any] = {
        "is_causal": is_causal,
        "scale": scale,
        "attn_mask": None,
        "cu_seqlens": None,
        "dropout_p": 0.0,
    }
    steps: dict[str, Callable[[], object]] = {
        "composed forward": lambda: attend(*qkv, **options),
        "composed training": lambda: torch.autograd.grad(attend(*leaves, **options), leaves, grad_output),
    }
    call = (None, is_causal, scale)
    saved = torch.ops.twicing.forward(*qkv, *call, "long")
    for kernel in preferences.FORWARD_KERNELS:
        if preferences.fits(kernel, seq, head_dim, is_causal):
            steps[f"{kernel} forward"] = partial(torch.ops.twicing.forward, *qkv, *call, kernel)
    for kernel in preferences.BACKWARD_KERNELS:
        if preferences.fits(kernel, seq, head_dim, is_causal):
            arguments = (grad_output, *qkv, *saved, *call, kernel, False)
            steps[f"{kernel} backward"] = partial(torch.ops.twicing.backward, *arguments)
    for step in steps.values():
        step()
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            samples[name].append(seconds(step, device))
    return {name: statistics.median(times) for name, times in samples.items()}


def fastest(times: dict[str, float]) -> Preference:
    """Returns the fastest forward; and of the fastest pair of kernels and two calls of torch's, the faster training."""

    def best(names: tuple[str, ...], direction: str) -> str:
        return min((name for name in names if f"{name} {direction}" in times), key=lambda n: times[f"{n} {direction}"])

    forward = best(preferences.FORWARD_KERNELS, "forward")
    backward = best(preferences.BACKWARD_KERNELS, "backward")
    ours = times[f"{forward} forward"]
    inference = forward if ours <= times["composed forward"] else COMPOSED
    if ours + times[f"{backward} backward"] > times["composed training"]:
        forward = backward = COMPOSED
    return Preference(inference, forward, backward, "measured")
