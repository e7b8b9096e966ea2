"""Twicing Attention (Abdullaev & Nguyen, ICLR 2025, arXiv:2503.00687), alone: it needs torch and nothing else.

`twicing_attention` is the operator, with the call of `torch.nn.functional.scaled_dot_product_attention`;
`TwicingAttention` is the multi-head module over it. Documents packed into rows: `twicing_core.packing`.
"""

from twicing_core.attention import twicing_attention
from twicing_core.module import TwicingAttention

__all__ = ["TwicingAttention", "twicing_attention"]
