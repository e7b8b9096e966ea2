"""The first thing to run on a machine with a GPU: `python -m pytest tests/gpu`. Without one, all of it is skipped."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))  # the cases that the emulator was given

from twicing_core import build_cuda


@pytest.fixture(scope="session")
def device() -> torch.device:
    """A device whose kernels are loaded, compiled first if need be; that they can't be is a failure."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    reason = build_cuda.unavailable(torch.cuda.current_device())
    assert reason is None, reason
    return torch.device("cuda", torch.cuda.current_device())
