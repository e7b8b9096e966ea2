"""How many parameters a model has and how many floating-point operations a sample costs, forward and backward.

Model FLOPs are what the algorithm needs at least; dividing by time and by the device's peak gives MFU. Hardware FLOPs
are what the attention backend and activation checkpointing execute; they give HFU.

A multiply-add is two operations. Only matrix products count. A matrix of P parameters costs 2·P a token forward and 4·P
backward. Attention is counted in products of size N²·D (one head: N x N x K; all heads: 2·N²·D operations):

                          forward  backward
    softmax, at least        2        4        backward: dV, dA, dQ, dK
    twicing, at least        3        6        forward: S, A·V, A·U; backward: dU, dV, dQ, dK and the two of dA
    softmax, executed        2        5        flash attention computes S once more
    fused on CPUs, executed  3        7        causal, or A fits the cache; long full attention takes 4 and 8
    fused on CUDA, executed  3        7        short rows; others take 4 and 8: S and dA are computed once more
    composed, executed       4       10        two calls of flash attention
    reference, executed   2 + N/K   4 + 2·N/K  A·A costs N/K products; nothing is skipped

Causal attention counts half: kernels skip the blocks above the diagonal (the reference does not, and counts whole).
Where timing a GPU has preferred the causal wavefront kernel, of 3 and 7 products, it still counts as 4 and 8.
A recomputed block counts whole, though torch may skip its last product, whose result the backward pass does not need.
Packed documents count as one row, the convention of the field, which overstates attention for short documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from train.config import AnyConfig, LanguageConfig, LanguageModelConfig, VisionModelConfig
from train.models.layers import parse_twicing_layers
from twicing_core import preferences

FUSED_SHORT = 512  # tokens up to which the CPU's fused kernels keep A of full attention


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(all, those outside token and position embeddings); a tied output matrix is an embedding, counted once.

    To be called before ZeRO-3 partitions the parameters.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    embeddings = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Embedding))
    return total, total - embeddings


def model_flops_per_sample(config: AnyConfig, backend: str, device: torch.device) -> tuple[float, float]:
    """(model FLOPs, hardware FLOPs) of one sample, a text row or an image, forward and backward.

    The adaptive head counts as if every target were in its shortlist, since the rest depends on the text: a little low.

    Args:
        backend: of the twicing layers, as `train.models.attention` finds it: never `auto`.
        device: what computes; it need not be here.
    """
    shape = _language_shape(config.model) if isinstance(config, LanguageConfig) else _vision_shape(config.model)
    twicing = parse_twicing_layers(config.model.twicing_layers, config.model.layers)
    recompute_every = config.train.activation_checkpointing
    model_flops = hardware_flops = shape.outside_blocks
    for number in range(1, config.model.layers + 1):
        forward = 2.0 * shape.block_parameters * shape.tokens
        minimum, attention_forward, attention_backward = _attention(shape, number in twicing, backend, device)
        model_flops += 3 * forward + minimum
        hardware_flops += 3 * forward + attention_forward + attention_backward
        if recompute_every > 0 and number % recompute_every == 0:
            hardware_flops += forward + attention_forward
    return model_flops, hardware_flops


@dataclass(frozen=True)
class _Shape:
    tokens: int
    width: int
    head_width: int
    causal: bool
    block_parameters: int  # in the matrices of one block
    outside_blocks: float  # FLOPs of embedding and head, forward and backward


def _language_shape(model: LanguageModelConfig) -> _Shape:
    head_width = model.width // model.heads
    kv_width = head_width * (model.kv_heads or model.heads)
    attention = model.width * (model.width + 2 * kv_width) + model.width * model.width
    feed_forward = model.width * model.mlp_width * (3 if model.mlp == "swiglu" else 2)
    outputs = model.vocab_size
    if model.head == "adaptive":
        outputs = model.adaptive_cutoffs[0] + len(model.adaptive_cutoffs)
    return _Shape(
        tokens=model.sequence_length,
        width=model.width,
        head_width=head_width,
        causal=True,
        block_parameters=attention + feed_forward,
        outside_blocks=6.0 * model.width * outputs * model.sequence_length,
    )


def _vision_shape(model: VisionModelConfig) -> _Shape:
    patches = (model.image_size // model.patch_size) ** 2
    patch_embedding = model.patch_size**2 * model.channels * model.width
    return _Shape(
        tokens=patches + 1,  # and the class token
        width=model.width,
        head_width=model.width // model.heads,
        causal=False,
        block_parameters=4 * model.width**2 + 2 * model.width * int(model.width * model.mlp_ratio),
        # An image has no gradient; the classifier reads the class token only.
        outside_blocks=4.0 * patch_embedding * patches + 6.0 * model.width * model.classes,
    )


def _attention(shape: _Shape, twicing: bool, backend: str, device: torch.device) -> tuple[float, float, float]:
    """FLOPs of one layer's attention: (at least, executed forward, executed backward)."""
    whole = 2.0 * shape.tokens**2 * shape.width
    product = whole / 2 if shape.causal else whole
    if not twicing:
        return 6 * product, 2 * product, 5 * product
    if backend == "reference":
        forward = (2 + shape.tokens / shape.head_width) * whole
        return 9 * product, forward, 2 * forward
    if backend == "composed":
        return 9 * product, 4 * product, 10 * product
    assert backend == "fused", backend
    if device.type == "cpu":
        one_pass = shape.causal or shape.tokens <= FUSED_SHORT
    else:
        one_pass = preferences.regime(shape.tokens, shape.head_width, shape.causal) == "short"
    return 9 * product, (3 if one_pass else 4) * product, (7 if one_pass else 8) * product
