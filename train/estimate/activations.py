"""Activations of a forward and backward pass, found by running the model itself on fake tensors.

Fake tensors (torch's FakeTensorMode) have shapes and dtypes and no memory, so that a model of any size runs in seconds,
through the very code that trains it. What is counted is what torch would allocate: whatever lives at once, temporary results
included. Kernels of a GPU may use some workspace besides.
"""

from __future__ import annotations

from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from train import sequence_parallel
from train.config import AnyConfig, LanguageConfig, LanguageModelConfig
from train.estimate.fake_ranks import fake_process_group
from train.estimate.live_memory import LiveBytes
from train.models.heads import AdaptiveHead, token_losses
from train.tasks import Task, build_task


@dataclass(frozen=True)
class Activations:
    """Bytes for one micro-batch, beside weights and their gradients."""

    kept: int  # from the forward to the backward pass
    peak: int  # the most there is at any moment of both
    kept_weights: int  # weights that the graph itself holds on to, recomputed blocks aside; ZeRO-3 can't let them go


def meta_model(config: AnyConfig) -> nn.Module:
    """The model that `config` describes on the device `meta`: all of its shapes and none of its memory."""
    task = build_task(config, None, torch.device("cpu"))
    with torch.device("meta"):
        return task.build_model()


def trace_activations(
    config: AnyConfig,
    samples: int,
    dtype: torch.dtype,
    backend: str,
    activation_checkpointing: int | None = None,
) -> Activations:
    """Runs one micro-batch of `samples` samples, every text row a single document; of shared rows, one rank's part.

    Args:
        dtype: of the weights.
        backend: of twicing attention, not `auto`.
        activation_checkpointing: in place of `train.activation_checkpointing`.
    """
    config = deepcopy(config)
    config.model.attention_backend = backend
    if activation_checkpointing is not None:
        config.train.activation_checkpointing = activation_checkpointing
    model, size = meta_model(config), config.train.sequence_parallel_size
    with ExitStack() as stack:
        if size > 1:
            stack.enter_context(fake_process_group(0, size))
        task = build_task(config, None, torch.device("cpu"), sequence_parallel.start(config))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(_NoRareTokens())
        _make_fake(model, dtype)
        return _trace(config, task, model, samples)


def _trace(config: AnyConfig, task: Task, model: nn.Module, samples: int) -> Activations:
    weights = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in model.parameters()}
    batch = task.placeholder_batch(samples)
    if isinstance(config, LanguageConfig):
        batch["cu_seqlens"] = None  # type: ignore[assignment]
    kept_weights = set()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        # A parameter itself is fetched anew in the backward pass; a view of it, as a linear layer saves, is not.
        if storage in weights and not isinstance(tensor, nn.Parameter):
            kept_weights.add(storage)
        return tensor

    with LiveBytes(model.parameters()) as live:
        before = live.now
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = task.loss_sum(model, batch, first_sample=0)
        kept = live.now - before
        loss.backward()
    return Activations(kept, live.peak - before, sum(weights[storage] for storage in kept_weights))


def trace_head(model: LanguageModelConfig, tokens: int, dtype: torch.dtype) -> Activations:
    """What of it the language model's head takes: logits and losses of `tokens` tokens, and what they are made from."""
    with torch.device("meta"):
        head: AdaptiveHead | nn.Linear
        if model.head == "adaptive":
            head = AdaptiveHead(model.width, model.vocab_size, model.adaptive_cutoffs)
        else:
            head = nn.Linear(model.width, model.vocab_size, bias=False)
    with FakeTensorMode(), _NoRareTokens():
        _make_fake(head, dtype)
        x_TD = torch.empty(tokens, model.width, dtype=dtype, requires_grad=True)
        targets_T = torch.empty(tokens, dtype=torch.int64)
        with LiveBytes([x_TD, targets_T, *head.parameters()]) as live:
            before = live.now
            if isinstance(head, AdaptiveHead):
                losses_T = head.token_losses(x_TD, targets_T)
            else:
                losses_T = token_losses(x_TD, head.weight, targets_T)
            kept = live.now - before
            losses_T.sum().backward()
    return Activations(kept, live.peak - before, kept_weights=0)


def _make_fake(model: nn.Module, dtype: torch.dtype) -> None:
    """Gives a model on `meta` fake weights on the CPU, inside a FakeTensorMode. They drop their gradients."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(_drop_gradient)


def _drop_gradient(parameter: Tensor) -> None:
    """Gradients of weights are counted with the training state."""
    parameter.grad = None


class _NoRareTokens(TorchDispatchMode):
    """Finds every target of the adaptive softmax in its shortlist: where fake targets are can't be known."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.nonzero.default:
            return args[0].new_empty((0, args[0].dim()), dtype=torch.int64)
        return func(*args, **(kwargs or {}))
