"""Positions, norms and feed-forward layers by themselves."""

import math

import pytest
import torch
from torch import nn

from train.models.layers import FeedForward, RotaryPositions, make_norm, sinusoidal_positions

CPU = torch.device("cpu")


def rotate(x: torch.Tensor, theta: float = 10_000.0) -> torch.Tensor:
    return RotaryPositions(x.shape[-2], x.shape[-1], theta, CPU)(x)


def test_rotary_scores_depend_on_the_distance_only() -> None:
    query, key = torch.randn(2, 16, dtype=torch.float32)
    scores = rotate(query.expand(1, 1, 40, 16)) @ rotate(key.expand(1, 1, 40, 16)).mT
    for distance in (-30, -1, 0, 1, 7):
        diagonal = scores[0, 0].diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[0].expand_as(diagonal), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(scores[0, 0, 0, 0], scores[0, 0, 0, 7], atol=1e-2)


def test_rotary_keeps_lengths_and_leaves_position_zero_alone() -> None:
    x = torch.randn(2, 3, 9, 8)
    rotated = rotate(x)
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rotated[:, :, 0], x[:, :, 0])


def test_rotary_against_complex_multiplication() -> None:
    x = torch.randn(1, 1, 20, 8)
    frequencies = 500.0 ** (-torch.arange(4).double() / 4)
    turn = torch.exp(1j * torch.arange(20).double()[:, None] * frequencies)
    expected = torch.complex(x[..., :4].double(), x[..., 4:].double()) * turn
    actual = rotate(x, theta=500.0)
    torch.testing.assert_close(actual, torch.cat([expected.real, expected.imag], dim=-1).float(), atol=1e-5, rtol=1e-5)


def test_rotary_gradients() -> None:
    """Of the first and second order, against finite differences; float32 throughout, so not to many digits."""
    x = torch.randn(1, 2, 5, 8, dtype=torch.float32, requires_grad=True)
    positions = RotaryPositions(5, 8, 500.0, CPU)
    tolerance = {"eps": 1e-2, "atol": 1e-3, "rtol": 1e-3}
    assert torch.autograd.gradcheck(positions, x, **tolerance)
    assert torch.autograd.gradgradcheck(positions, x, **tolerance)


def test_rotary_in_bfloat16_is_right_at_position_4000() -> None:
    x = torch.randn(1, 1, 4001, 64).bfloat16()
    exact = rotate(x.float())
    error = (rotate(x).float() - exact)[0, 0, 4000].abs()
    assert (error <= 2**-8 * exact[0, 0, 4000].abs() + 1e-6).all()  # one rounding to bfloat16
    angle = 4000.0
    first, middle = x[0, 0, 4000, 0].item(), x[0, 0, 4000, 32].item()
    assert exact[0, 0, 4000, 0].item() == pytest.approx(first * math.cos(angle) - middle * math.sin(angle), abs=1e-3)


def test_sinusoidal_positions_are_the_published_ones() -> None:
    table = sinusoidal_positions(50, 12, CPU)
    assert table.shape == (50, 12) and table.dtype == torch.float32
    for position, i in [(0, 0), (7, 3), (49, 5)]:
        angle = position / 10_000 ** (2 * i / 12)
        assert table[position, i].item() == pytest.approx(math.sin(angle), abs=1e-5)
        assert table[position, 6 + i].item() == pytest.approx(math.cos(angle), abs=1e-5)


@pytest.mark.parametrize(("kind", "matrices"), [("relu", 2), ("gelu", 2), ("swiglu", 3)])
def test_feed_forward_against_its_formula(kind: str, matrices: int) -> None:
    layer = FeedForward(6, 10, kind, bias=True)
    assert sum(p.numel() for p in layer.parameters() if p.dim() == 2) == matrices * 60
    x = torch.randn(4, 6)
    hidden = x @ layer.up.weight.T + layer.up.bias
    if kind == "swiglu":
        hidden = hidden[:, :10] * torch.sigmoid(hidden[:, :10]) * hidden[:, 10:]
    else:
        hidden = hidden.clamp(min=0) if kind == "relu" else hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    torch.testing.assert_close(layer(x), hidden @ layer.down.weight.T + layer.down.bias)


@pytest.mark.parametrize(
    ("kind", "bias", "parameters"),
    [("rms", True, ["weight"]), ("layer", True, ["weight", "bias"]), ("layer", False, ["weight"])],
)
def test_norms(kind: str, bias: bool, parameters: list[str]) -> None:
    norm = make_norm(kind, 32, bias)
    assert [name for name, _ in norm.named_parameters()] == parameters
    y = norm(5 + 3 * torch.randn(4, 32))
    torch.testing.assert_close(y.square().mean(-1), torch.ones(4), atol=1e-3, rtol=1e-3)
    assert isinstance(norm, nn.RMSNorm) == (y.mean(-1).abs().min().item() > 0.1)
