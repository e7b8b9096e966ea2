"""The backend "fused": one operator with a forward and a backward of its own, in compiled kernels (`csrc/`).

It keeps A in the processor's cache, block by block, and multiplies V and U by it at once: for causal and for short
attention 3 products forward and 7 backward, where two calls of an attention take 4 and 10.
"""

from __future__ import annotations

import torch
from torch import Tensor

from twicing_core import operator as _operator  # noqa: F401  (defines torch.ops.twicing)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS = range(8, 257)


def refusal(query: Tensor, *, attn_mask: Tensor | None, cu_seqlens: Tensor | None, dropout_p: float) -> str | None:
    """Returns why this backend cannot do the call, or None if it can. The first call compiles the kernels."""
    if attn_mask is not None:
        return "the fused kernels take no attn_mask"
    if dropout_p > 0.0:
        return f"the fused kernels take no dropout, got dropout_p={dropout_p}"
    if query.dtype not in DTYPES:
        return f"the fused kernels take float32, bfloat16 and float16, got {query.dtype}"
    if query.shape[-1] not in HEAD_DIMS:
        return f"the fused kernels take head_dim {HEAD_DIMS[0]} to {HEAD_DIMS[-1]}, got {query.shape[-1]}"
    if query.device.type != "cpu":
        return f"there are no fused kernels for {query.device.type}"
    return _unavailable()


def _unavailable() -> str | None:
    from twicing_core import build  # here, so that `python -m twicing_core.build` is not imported before it runs

    return build.unavailable()


# A graph being compiled takes the answer as a constant. It is what torch.compiler.assume_constant_result does, without
# importing all of the compiler, which takes longer than the rest of torch.
_unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool,
    scale: float,
    attn_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    dropout_p: float,
) -> Tensor:
    """O = 2U - A @ U with U = A @ value, in O(seq) memory. See `twicing_attention`."""
    assert attn_mask is None and dropout_p == 0.0, "refused"
    output: Tensor = torch.ops.twicing.forward(query, key, value, cu_seqlens, is_causal, scale)[0]
    return output
