"""Vision transformers: timm's `VisionTransformer`, with the attention of chosen blocks swapped.

Everything else is timm's, names of parameters included, so that timm and DeiT checkpoints load as they are.
"""

from __future__ import annotations

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch.utils.checkpoint import checkpoint

from train.config import VisionModelConfig
from train.models.layers import parse_twicing_layers
from twicing_core import TwicingAttention


def build_vision_model(config: VisionModelConfig, activation_checkpointing: int = 0) -> VisionTransformer:
    """A ViT that maps images (B, channels, image_size, image_size) to logits (B, classes).

    Initialised by timm from torch's global random state. The swap keeps the initial weights, so that with one seed
    softmax and twicing models start equal.

    Args:
        config: the `model` section of the configuration, already validated.
        activation_checkpointing: recompute every k-th block in the backward pass; 0 is off, 1 is all.
    """
    model = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        in_chans=config.channels,
        num_classes=config.classes,
        embed_dim=config.width,
        depth=config.layers,
        num_heads=config.heads,
        mlp_ratio=config.mlp_ratio,
        drop_path_rate=config.drop_path,
        block_fn=VisionBlock,
    )
    twicing = parse_twicing_layers(config.twicing_layers, config.layers)
    for number, block in enumerate(model.blocks, start=1):
        assert isinstance(block, VisionBlock)
        block.recompute = activation_checkpointing > 0 and number % activation_checkpointing == 0
        if number in twicing:
            attention = TwicingAttention(config.width, config.heads, qkv_bias=True, backend=config.attention_backend)
            attention.load_state_dict(block.attn.state_dict())
            block.attn = attention
    return model


class VisionBlock(Block):
    """timm's block, which may recompute its activations in the backward pass; (B, N, D) to (B, N, D)."""

    recompute = False

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        assert attn_mask is None and not is_causal, "images are never masked here"
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(self._residuals, x, use_reentrant=False)
        return self._residuals(x)

    def _residuals(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
