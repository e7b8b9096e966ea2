"""`TwicingAttention`: the multi-head self-attention module over `twicing_attention`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from twicing_core.attention import twicing_attention


class TwicingAttention(nn.Module):
    """Multi-head self-attention whose heads are Twicing Attention (arXiv:2503.00687).

    Its parameters are those of softmax attention, named and laid out as in timm's `Attention`: `qkv`, one linear layer
    to queries, keys and values in this order, and `proj`. So weights of either load into the other.

    Args:
        embed_dim: width of the tokens; a multiple of `num_heads`.
        num_heads: heads of the queries.
        num_kv_heads: heads of keys and values, a divisor of `num_heads`; None means as many.
        qkv_bias: whether `qkv` has a bias.
        proj_bias: whether `proj` has a bias.
        is_causal: position i attends to positions j <= i only.
        backend: of `twicing_attention`.

    Raises:
        ValueError: the numbers of heads do not divide as described above.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        is_causal: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads != 0:
            raise ValueError(f"embed_dim must be a positive multiple of num_heads, got {embed_dim} and {num_heads}")
        if num_kv_heads < 1 or num_heads % num_kv_heads != 0:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = embed_dim // num_heads
        self.is_causal = is_causal
        self.backend = backend
        self.qkv = nn.Linear(embed_dim, (num_heads + 2 * num_kv_heads) * self.head_dim, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim, bias=proj_bias)

    def forward(
        self,
        x: Tensor,
        *,
        rotary: Callable[[Tensor], Tensor] | None = None,
        cu_seqlens: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        distribute: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """Attends within each row of tokens, or within each document of it.

        Args:
            x: (batch, seq, embed_dim).
            rotary: applied to the queries and to the keys, each (batch, heads, seq, head_dim); keeps their shape.
            cu_seqlens: (documents + 1,) int32, starts of packed documents, as in `twicing_attention`.
            attn_mask: broadcastable to (batch, heads, seq, seq), as in `twicing_attention`.
            is_causal: timm's blocks pass it; causality is a property of this module, so True needs a causal one.
            distribute: called as ``distribute(attend, query, key, value, ...)`` in place of ``attend(query, key, value, ...)``:
                where `x` is a part of what is attended to, it brings the parts together around `attend`.

        Returns:
            (batch, seq, embed_dim).

        Raises:
            ValueError: as `twicing_attention` does, or `is_causal` asks for what the module is not.
        """
        if is_causal and not self.is_causal:
            raise ValueError("is_causal=True in the call of an attention module made with is_causal=False")
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        query, key, value = qkv.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        if rotary is not None:
            query, key = rotary(query), rotary(key)
        attend = self.attend if distribute is None else partial(distribute, self.attend)
        output = attend(query, key, value, cu_seqlens=cu_seqlens, attn_mask=attn_mask)
        return self.proj(output.transpose(1, 2).flatten(2))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor | None, attn_mask: Tensor | None
    ) -> Tensor:
        """The attention itself, for a subclass to replace.

        Args:
            query: (batch, num_heads, seq, head_dim).
            key, value: (batch, num_kv_heads, seq, head_dim).
            cu_seqlens, attn_mask: as given to `forward`.

        Returns:
            (batch, num_heads, seq, head_dim).
        """
        return twicing_attention(
            query,
            key,
            value,
            is_causal=self.is_causal,
            attn_mask=attn_mask,
            cu_seqlens=cu_seqlens,
            enable_gqa=self.num_kv_heads != self.num_heads,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, is_causal={self.is_causal}, "
            f"backend={self.backend!r}"
        )
