"""Vision transformers: timm's `VisionTransformer`, with twicing attention in chosen blocks.

Everything else is timm's, names of parameters included, so that timm and DeiT checkpoints load as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from torch.utils.checkpoint import checkpoint

from train.config import VisionModelConfig
from train.models.layers import parse_twicing_layers
from twicing_core import TwicingAttention


class VisionModel(VisionTransformer):
    """A ViT that maps images (B, channels, image_size, image_size) to logits (B, classes).

    Initialised by timm from torch's global random state; with one seed softmax and twicing models start equal.

    Args:
        config: the `model` section of the configuration, already validated.
        activation_checkpointing: recompute every k-th block in the backward pass; 0 is off, 1 is all.
        initialise: False leaves the weights as torch makes them; `initialise` must follow.
    """

    def __init__(self, config: VisionModelConfig, activation_checkpointing: int = 0, initialise: bool = True) -> None:
        before = None if initialise else torch.get_rng_state()
        twicing = parse_twicing_layers(config.twicing_layers, config.layers)
        super().__init__(
            img_size=config.image_size,
            patch_size=config.patch_size,
            in_chans=config.channels,
            num_classes=config.classes,
            embed_dim=config.width,
            depth=config.layers,
            num_heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            drop_path_rate=config.drop_path,
            block_fn=partial(VisionBlock, twicing=twicing),  # type: ignore[arg-type]
            weight_init="" if initialise else "skip",
        )
        self._random_states = None if before is None else (before, torch.get_rng_state())
        for number, block in enumerate(self.blocks, start=1):
            assert isinstance(block, VisionBlock)
            block.recompute = activation_checkpointing > 0 and number % activation_checkpointing == 0
            if isinstance(block.attn, TwicingAttention):
                block.attn.backend = config.attention_backend

    @torch.no_grad()
    def initialise(self, writable: Callable[[Any], AbstractContextManager[Any]] = nullcontext) -> None:
        """Draws what timm's constructor would have drawn, in its order, and in float32 whatever the model's precision.

        `writable(parameter)` makes a parameter of a partitioned model whole while it is written.
        """

        def fill(parameter: Any, draw: Callable[[torch.Tensor], Any]) -> None:
            with writable(parameter):
                values = torch.empty(parameter.shape, dtype=torch.float32)
                draw(values)
                parameter.copy_(values)

        assert self._random_states is not None, "built with initialise=False"
        before, after = self._random_states
        # Torch's own initial values of the convolution stay. It was the first module to draw any.
        torch.set_rng_state(before)
        convolution = self.patch_embed.proj
        whole = nn.Conv2d(self.in_chans, self.embed_dim, convolution.kernel_size, convolution.stride)
        for parameter, initial in zip(convolution.parameters(), whole.parameters(), strict=True):
            fill(parameter, partial(_copy, initial))
        torch.set_rng_state(after)
        fill(self.pos_embed, partial(trunc_normal_, std=0.02))
        fill(self.cls_token, partial(nn.init.normal_, std=1e-6))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                fill(module.weight, partial(trunc_normal_, std=0.02))
                fill(module.bias, nn.init.zeros_)


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    target.copy_(source)


class VisionAttention(TwicingAttention):
    """Twicing attention that is made with timm's arguments."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, proj_bias: bool, **others: Any) -> None:
        super().__init__(dim, num_heads, qkv_bias=qkv_bias, proj_bias=proj_bias)


class VisionBlock(Block):
    """timm's block, which may recompute its activations in the backward pass; (B, N, D) to (B, N, D).

    `twicing` has the numbers of the blocks, from 1, whose attention is twicing.
    """

    recompute = False

    def __init__(self, *, depth: int, twicing: frozenset[int], **settings: Any) -> None:
        if depth + 1 in twicing:
            settings["attn_layer"] = VisionAttention
        super().__init__(depth=depth, **settings)

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        assert attn_mask is None and not is_causal, "images are never masked here"
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(self._residuals, x, use_reentrant=False)
        return self._residuals(x)

    def _residuals(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
