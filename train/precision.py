"""The dtype a run computes in."""

from __future__ import annotations

import os
from pathlib import Path

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` becomes bf16 where the processor computes in it, else fp16 on a GPU and fp32 on a CPU."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    # Without these instructions a CPU only imitates bf16, slower than fp32.
    flags = set(Path("/proc/cpuinfo").read_text().split()) if os.path.exists("/proc/cpuinfo") else set()
    return "bf16" if flags & {"avx512_bf16", "amx_bf16", "bf16"} else "fp32"
