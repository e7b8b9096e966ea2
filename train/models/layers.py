"""Small pieces that the models are made of: which layers are twicing, positions, feed-forward layers, norms.

Shapes: B rows, N tokens a row, D width, H heads, K head width.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def parse_twicing_layers(spec: Any, layers: int) -> frozenset[int]:
    """The layers, numbered from 1 as in the paper, whose attention is twicing.

    Args:
        spec: `all`, `none`, one layer (`3`), a range that includes both ends (`10-12`), the last ones (`last:3`), or a
            list of layers (`[3, 7, 11]`).
        layers: layers of the model.

    Raises:
        ValueError: anything else, or a layer that the model does not have.
    """
    chosen = _layer_numbers(spec, layers)
    if chosen is None or not all(1 <= number <= layers for number in chosen):
        raise ValueError(
            f"model.twicing_layers is {spec!r}; it must be all, none, a layer (3), a range (10-12), the last ones "
            f"(last:3) or a list ([3, 7, 11]), with layers from 1 to {layers}"
        )
    return frozenset(chosen)


def _layer_numbers(spec: Any, layers: int) -> list[int] | None:
    if isinstance(spec, (list, tuple)):
        return list(spec) if all(type(number) is int for number in spec) else None
    text = str(spec).strip()
    if text == "all":
        return list(range(1, layers + 1))
    if text == "none":
        return []
    if match := re.fullmatch(r"(\d+)", text):
        return [int(match[1])]
    if match := re.fullmatch(r"(\d+)\s*-\s*(\d+)", text):
        return list(range(int(match[1]), int(match[2]) + 1)) or None
    if match := re.fullmatch(r"last:\s*(\d+)", text):
        return list(range(layers - int(match[1]) + 1, layers + 1)) or None
    return None


class RotaryPositions:
    """Rotates queries and keys by their positions, `length` of them from `first` on (RoPE, arXiv:2104.09864).

    Component i is paired with component i + K/2, as in GPT-NeoX and Llama. Attention then depends on differences of
    positions only, so documents packed in one row need no positions of their own.

    The angles are computed here, in float32, at every forward pass, and are no buffer of a module: casting a model to
    bfloat16 casts its buffers too, and position 4000 in bfloat16 is off by up to 8 radians.
    """

    def __init__(self, length: int, head_width: int, theta: float, device: torch.device, first: int = 0) -> None:
        positions = torch.arange(first, first + length, dtype=torch.float32, device=device)
        frequencies = theta ** (-torch.arange(0, head_width, 2, dtype=torch.float32, device=device) / head_width)
        angles = torch.outer(positions, frequencies)  # (N, K/2)
        self.cos, self.sin = angles.cos(), angles.sin()

    def __call__(self, x_BHNK: torch.Tensor) -> torch.Tensor:
        first, second = x_BHNK.float().chunk(2, dim=-1)
        rotated = [first * self.cos - second * self.sin, second * self.cos + first * self.sin]
        return torch.cat(rotated, dim=-1).to(x_BHNK.dtype)


def sinusoidal_positions(length: int, width: int, device: torch.device, first: int = 0) -> torch.Tensor:
    """(length, width) float32: sines in the first half of the width, cosines in the second (arXiv:1706.03762, 3.5).

    Of the positions from `first` on.
    """
    positions = torch.arange(first, first + length, dtype=torch.float32, device=device)
    frequencies = 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)
    angles = torch.outer(positions, frequencies)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class FeedForward(nn.Module):
    """(..., D) to (..., D) through `hidden` units: `relu`, `gelu`, or `swiglu` (arXiv:2002.05202), which gates them."""

    def __init__(self, width: int, hidden: int, kind: str, bias: bool) -> None:
        super().__init__()
        self.kind = kind
        self.up = nn.Linear(width, 2 * hidden if kind == "swiglu" else hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x)
        if self.kind == "swiglu":
            gate, value = hidden.chunk(2, dim=-1)
            return self.down(F.silu(gate) * value)
        return self.down(F.relu(hidden) if self.kind == "relu" else F.gelu(hidden))


def make_norm(kind: str, width: int, bias: bool) -> nn.Module:
    """`rms` (arXiv:1910.07467) or `layer` normalisation over the last dimension."""
    return nn.RMSNorm(width, eps=1e-6) if kind == "rms" else nn.LayerNorm(width, bias=bias)
