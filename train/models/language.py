"""A decoder-only language model: token embedding, blocks of attention and feed-forward, output head.

The modern shape (RoPE, RMS norms before, SwiGLU), GPT-2's (learned positions, layer norms before, GELU) and that of the
twicing paper's WikiText-103 model (sinusoidal positions, layer norms after, ReLU, adaptive softmax) are settings of
`model.*`.

Shapes: B rows, N tokens a row, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from train.config import LanguageModelConfig
from train.models.attention import SharedRows, SoftmaxAttention
from train.models.heads import AdaptiveHead, token_losses
from train.models.layers import FeedForward, RotaryPositions, make_norm, parse_twicing_layers, sinusoidal_positions
from twicing_core import TwicingAttention

INITIAL_STD = 0.02  # of all matrices, as in GPT-2


class LanguageModel(nn.Module):
    """The model that `config` describes, freshly initialised from torch's global random state.

    Args:
        config: the `model` section of the configuration, already validated.
        activation_checkpointing: recompute every k-th block in the backward pass; 0 is off, 1 is all.
        initialise: False leaves the weights as torch makes them; `initialise` must follow.
    """

    def __init__(self, config: LanguageModelConfig, activation_checkpointing: int = 0, initialise: bool = True) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        twicing = parse_twicing_layers(config.twicing_layers, config.layers)
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        if config.positions == "learned":
            self.positions = nn.Embedding(config.sequence_length, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, number in twicing) for number in range(1, config.layers + 1))
        self.norm: nn.Module = nn.Identity()  # a block with its norms after ends in one already
        if config.norm_position == "pre":
            self.norm = make_norm(config.norm, config.width, config.bias)
        self.head: nn.Linear | AdaptiveHead | None = None  # tied: the embedding's matrix serves
        if config.head == "untied":
            self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        elif config.head == "adaptive":
            self.head = AdaptiveHead(config.width, config.vocab_size, config.adaptive_cutoffs)
        if initialise:
            self.initialise()

    def forward(
        self,
        input_ids: torch.Tensor,
        targets: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        shared_rows: SharedRows | None = None,
    ) -> torch.Tensor:
        """Logits, or the loss of each token where there are targets.

        Positions count from the start of the row, not of the document, whatever their kind: for `rope` that makes no
        difference, and `learned` and `sinusoidal` ones see all their positions however short the documents are.

        Args:
            input_ids: (B, N) int64, N at most `config.sequence_length` where positions are learned.
            targets: (B, N) int64, the token that follows each input.
            cu_seqlens: int32 offsets into the B·N tokens where rows and documents start, 0 and B·N included. Tokens
                attend within their document only. None makes every row one document.
            shared_rows: where ranks share rows, this rank's part in them. All other arguments are of the whole rows, the
                same on these ranks; what is returned is of this rank's positions only, N / ranks of them.

        Returns:
            Without targets, (B, N, V) logits in the model's dtype (float32 log-probabilities for the adaptive head);
            with them, (B, N) float32 losses in nats.
        """
        own = slice(0, input_ids.shape[1]) if shared_rows is None else shared_rows.positions(input_ids.shape[1])
        input_ids, targets = input_ids[:, own], None if targets is None else targets[:, own]
        x_BND = self.norm(self._hidden(input_ids, own.start, cu_seqlens, shared_rows))
        if isinstance(self.head, AdaptiveHead):
            x_TD = x_BND.flatten(0, 1)
            if targets is None:
                return self.head.log_probabilities(x_TD).unflatten(0, input_ids.shape)
            return self.head.token_losses(x_TD, targets.flatten()).unflatten(0, input_ids.shape)
        weight_VD = self.embedding.weight if self.head is None else self.head.weight
        if targets is None:
            return F.linear(x_BND, weight_VD)
        return token_losses(x_BND.flatten(0, 1), weight_VD, targets.flatten()).unflatten(0, input_ids.shape)

    def _hidden(
        self, input_ids: torch.Tensor, first: int, cu_seqlens: torch.Tensor | None, shared_rows: SharedRows | None
    ) -> torch.Tensor:
        """`first` is the position of the first token."""
        config, length, device = self.config, input_ids.shape[1], input_ids.device
        x_BND = self.embedding(input_ids)
        rotary = None
        if config.positions == "rope":
            rotary = RotaryPositions(length, config.width // config.heads, config.rope_theta, device, first)
        elif config.positions == "learned":
            x_BND = x_BND + self.positions(torch.arange(first, first + length, device=device))
        else:
            # Scaled as in arXiv:1706.03762 (3.4); sines of size 1 would drown the embeddings otherwise.
            positions_ND = sinusoidal_positions(length, config.width, device, first)
            x_BND = x_BND * math.sqrt(config.width) + positions_ND.to(x_BND.dtype)
        x_BND = self.dropout(x_BND)
        for number, block in enumerate(self.blocks, start=1):
            if self._recomputes(number):
                x_BND = checkpoint(block, x_BND, rotary, cu_seqlens, shared_rows, use_reentrant=False)
            else:
                x_BND = block(x_BND, rotary, cu_seqlens, shared_rows)
        return x_BND

    def _recomputes(self, number: int) -> bool:
        every = self.activation_checkpointing
        return every > 0 and number % every == 0 and self.training and torch.is_grad_enabled()

    @torch.no_grad()
    def initialise(self, writable: Callable[[Any], AbstractContextManager[Any]] = nullcontext) -> None:
        """As in GPT-2: a standard deviation of 0.02, less where branches add up along the depth; biases zero.

        `writable(parameter)` makes a parameter of a partitioned model whole while it is written.
        """

        def draw(parameter: Any, std: float) -> None:
            with writable(parameter):  # drawn in float32, so that they are the same numbers in any precision
                parameter.copy_(torch.empty(parameter.shape, dtype=torch.float32).normal_(std=std))

        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                draw(module.weight, INITIAL_STD)
            if isinstance(module, nn.Linear) and module.bias is not None:
                with writable(module.bias):
                    nn.init.zeros_(module.bias)
        residual_std = INITIAL_STD / math.sqrt(2 * self.config.layers)
        for name, parameter in self.blocks.named_parameters():
            if name.endswith(("proj.weight", "down.weight")):
                draw(parameter, residual_std)


class Block(nn.Module):
    """One layer: attention, then the feed-forward layer, each on a residual branch; (B, N, D) to (B, N, D)."""

    def __init__(self, config: LanguageModelConfig, twicing: bool) -> None:
        super().__init__()
        self.pre_norm = config.norm_position == "pre"
        kind = TwicingAttention if twicing else SoftmaxAttention
        self.attention = kind(
            config.width,
            config.heads,
            config.kv_heads,
            qkv_bias=config.bias,
            proj_bias=config.bias,
            is_causal=True,
            backend=config.attention_backend,
        )
        self.feed_forward = FeedForward(config.width, config.mlp_width, config.mlp, config.bias)
        self.attention_norm = make_norm(config.norm, config.width, config.bias)
        self.feed_forward_norm = make_norm(config.norm, config.width, config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x_BND: torch.Tensor,
        rotary: RotaryPositions | None,
        cu_seqlens: torch.Tensor | None,
        shared_rows: SharedRows | None = None,
    ) -> torch.Tensor:
        call: dict[str, Any] = dict(rotary=rotary, cu_seqlens=cu_seqlens, distribute=shared_rows and shared_rows.attend)
        if self.pre_norm:
            attended = self.attention(self.attention_norm(x_BND), **call)
            x_BND = x_BND + self.dropout(attended)
            return x_BND + self.dropout(self.feed_forward(self.feed_forward_norm(x_BND)))
        attended = self.attention(x_BND, **call)
        x_BND = self.attention_norm(x_BND + self.dropout(attended))
        return self.feed_forward_norm(x_BND + self.dropout(self.feed_forward(x_BND)))
