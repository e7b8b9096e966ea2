"""Losses in chunks and the adaptive softmax, against torch's own."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from train.models import heads
from train.models.heads import AdaptiveHead, token_losses


def test_chunked_losses_and_gradients_equal_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "CHUNK_TOKENS", 7)
    x = torch.randn(25, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(30, 8, dtype=torch.float64, requires_grad=True)
    targets, scale = torch.randint(30, (25,)), torch.rand(25)
    for limit in (0, 2**25):  # with and without recomputing
        monkeypatch.setattr(heads, "RECOMPUTE_ABOVE", limit)
        losses = token_losses(x, weight, targets)
        expected = F.cross_entropy((x @ weight.T).float(), targets, reduction="none")
        torch.testing.assert_close(losses, expected)
        actual_grads = torch.autograd.grad((losses * scale).sum(), (x, weight))
        expected_grads = torch.autograd.grad((expected * scale).sum(), (x, weight))
        torch.testing.assert_close(actual_grads, expected_grads, atol=1e-6, rtol=1e-6)


def test_losses_of_a_bfloat16_model_have_float32_precision() -> None:
    x, weight = torch.randn(600, 16).bfloat16(), torch.randn(50, 16).bfloat16()
    targets = torch.randint(50, (600,))
    losses = token_losses(x, weight, targets)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, F.cross_entropy((x @ weight.T).float(), targets, reduction="none"))


def test_large_batches_keep_no_logits_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "RECOMPUTE_ABOVE", 0)
    largest = 0

    def note(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    x, weight = torch.randn(2048, 4, requires_grad=True), torch.randn(1000, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        token_losses(x, weight, torch.zeros(2048, dtype=torch.int64))
    assert largest <= 2048 * 4


def adaptive_head() -> AdaptiveHead:
    torch.manual_seed(0)
    return AdaptiveHead(16, 100, [20, 50])


def test_adaptive_head_equals_torch() -> None:
    head = adaptive_head()
    x, targets = torch.randn(64, 16), torch.randint(100, (64,))
    expected = nn.AdaptiveLogSoftmaxWithLoss.forward(head, x, targets).output
    torch.testing.assert_close(head.token_losses(x, targets), -expected)
    torch.testing.assert_close(head.log_probabilities(x), head.log_prob(x))


def test_adaptive_head_gives_gradients_that_match_torch() -> None:
    head = adaptive_head()
    x, targets = torch.randn(64, 16), torch.randint(100, (64,))
    actual = torch.autograd.grad(head.token_losses(x, targets).mean(), list(head.parameters()))
    expected = torch.autograd.grad(head(x, targets).loss, list(head.parameters()))
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("targets", [[3, 7], [25, 30], [99, 60]], ids=["shortlist", "first cluster", "last cluster"])
def test_every_parameter_of_the_adaptive_head_has_a_gradient_whatever_the_targets(targets: list[int]) -> None:
    head = adaptive_head()
    head.token_losses(torch.randn(2, 16), torch.tensor(targets)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


def test_adaptive_probabilities_sum_to_one_and_agree_with_the_losses() -> None:
    head = adaptive_head()
    x, targets = torch.randn(64, 16), torch.randint(100, (64,))
    logs = head.log_probabilities(x)
    torch.testing.assert_close(logs.exp().sum(-1), torch.ones(64))
    torch.testing.assert_close(-logs.gather(1, targets[:, None])[:, 0], head.token_losses(x, targets))


def test_adaptive_head_takes_its_softmax_in_float32() -> None:
    head = adaptive_head().bfloat16()
    x, targets = torch.randn(8, 16).bfloat16(), torch.randint(100, (8,))
    assert head.token_losses(x, targets).dtype == head.log_probabilities(x).dtype == torch.float32
