"""What of the attention is available on this machine, and which backend "auto" would take for a call."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
from typing import Any

import torch

from twicing_core import build, build_cuda, fused, preferences
from twicing_core.attention import BACKENDS, Backend


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape",
        nargs=4,
        type=int,
        default=[16, 8, 256, 16],
        metavar=("BATCH", "HEADS", "SEQ", "HEAD_DIM"),
        help="the call to choose a backend for (default: %(default)s)",
    )
    parser.add_argument("--causal", action="store_true", help="that call is causal")
    parser.add_argument("--dropout", type=float, default=0.0, help="dropout_p of that call")
    parser.add_argument("--mask", action="store_true", help="that call has an attn_mask")


def run(arguments: argparse.Namespace) -> int:
    _print_machine()
    print(f"\nbackend for (batch, heads, seq, head_dim) = {tuple(arguments.shape)}")
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in devices:
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            _print_choice(torch.empty(arguments.shape, dtype=dtype, device=device), arguments)
    _print_preferences(arguments)
    return 0


def _print_machine() -> None:
    compiler = os.environ.get("CXX", "g++")
    unavailable = build.unavailable()
    print(f"torch          {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"processor      {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}")
    print(f"compiler       {shutil.which(compiler) or f'{compiler} not found'}")
    print(f"fused kernels  {f'none: {unavailable}' if unavailable else build.library()}")
    if unavailable is None:
        bfloat16 = "bfloat16 (AMX)" if fused.multiplies_bfloat16() else "float32 (no AMX)"
        print(f"  products     of bfloat16 in {bfloat16}, of float16 and float32 in float32")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"CUDA           {', '.join(devices) or 'no device'}")
    print(f"nvcc           {build_cuda.nvcc() or 'not found; install the CUDA toolkit, or set CUDA_HOME'}")
    print(f"CUDA kernels   {build_cuda.find() or 'not compiled: python -m twicing_core.build, or their first use'}")


def _print_choice(query: torch.Tensor, arguments: argparse.Namespace) -> None:
    mask = torch.ones(1, 1, dtype=torch.bool, device=query.device) if arguments.mask else None
    call: dict[str, Any] = {
        "is_causal": arguments.causal,
        "scale": query.shape[-1] ** -0.5,
        "attn_mask": mask,
        "cu_seqlens": None,
    }
    print(f"{query.device.type} {fused.name_of(query.dtype)}")
    chosen = False
    for name, backend in BACKENDS.items():

        def refusal(auto: bool, backend: Backend = backend) -> str | None:
            return backend.refusal(query, query, query, **call, dropout_p=arguments.dropout, auto=auto)

        if reason := refusal(auto=False):
            print(f"    {name:10s} no: {reason}")
        elif reason := refusal(auto=True):
            print(f"    {name:10s} yes, but auto does not: {reason}")
        else:
            print(f"    {name:10s} {'yes' if chosen else 'yes: auto takes it'}")
            chosen = True


def _print_preferences(arguments: argparse.Namespace) -> None:
    """What auto would take on GPUs that may not be here, where the kernels can do the call at all."""
    _, _, seq, head_dim = arguments.shape
    regime = preferences.regime(seq, head_dim, arguments.causal)
    print(f"\nauto with CUDA kernels for this shape (regime {regime!r}, {preferences.path()} before the guesses)")
    measured = [(device, regimes[regime]) for device, regimes in preferences.load().items() if regime in regimes]
    guessed = [(f"sm_{major}x", preferences.guess((major, 0))[regime]) for major in preferences.GUESSES]
    for device, chosen in measured + guessed:
        print(
            f"    {device:10s} inference: {chosen.inference}; training: {chosen.training}, {chosen.backward} backward"
        )
        print(f"    {'':10s} {chosen.reason}")
