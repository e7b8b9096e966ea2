"""The backend "fused": one operator with a forward and a backward of its own, in compiled kernels (`csrc/`).

On the CPU it keeps A in the processor's cache, block by block, and multiplies V and U by it at once: for causal and for
short attention 3 products forward and 7 backward, where two calls of an attention take 4 and 10. On CUDA: docs/kernels.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from twicing_core import operator as _operator  # noqa: F401  (defines torch.ops.twicing)
from twicing_core import preferences

DTYPES = {"cpu": (torch.float32, torch.bfloat16, torch.float16), "cuda": (torch.bfloat16, torch.float16)}
HEAD_DIMS = range(8, 257)
CUDA_HEAD_DIMS = (16, 32, 64, 96, 128, 256)  # those of the kernels; others are padded to the next of them
CUDA_BACKWARD_HEAD_DIM = 128  # at most: the accumulators of dK and dV take all registers there


def refusal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool,
    scale: float,
    attn_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    dropout_p: float,
    auto: bool,
) -> str | None:
    """Returns why this backend cannot or, if `auto`, had better not do the call. The first call compiles the kernels."""
    device, head_dim = query.device.type, query.shape[-1]
    if attn_mask is not None:
        return "the fused kernels take no attn_mask"
    if dropout_p > 0.0:
        return f"the fused kernels take no dropout, got dropout_p={dropout_p}"
    if device not in DTYPES:
        return f"there are no fused kernels for {device}"
    if query.dtype not in DTYPES[device]:
        names = [name_of(dtype) for dtype in DTYPES[device]]
        kernels = "fused kernels" if device == "cpu" else "fused CUDA kernels"
        return f"the {kernels} take {', '.join(names[:-1])} and {names[-1]}, got {query.dtype}"
    if head_dim not in HEAD_DIMS:
        return f"the fused kernels take head_dim {HEAD_DIMS[0]} to {HEAD_DIMS[-1]}, got {head_dim}"
    if device == "cpu":
        return _unavailable()
    if head_dim > CUDA_BACKWARD_HEAD_DIM and _wants_gradients(query, key, value):
        return f"the fused CUDA kernels have gradients up to head_dim {CUDA_BACKWARD_HEAD_DIM}, got {head_dim}"
    if scale <= 0.0:
        return f"the fused CUDA kernels take a positive scale, got {scale}"
    unavailable = _cuda_unavailable(query.device.index)
    if unavailable is None and auto and cu_seqlens is None:  # of packed documents "composed" waits for the device
        preference = preferences.preference_of(query, is_causal)
        chosen = preference.training if _wants_gradients(query, key, value) else preference.inference
        if chosen == preferences.COMPOSED:
            return f"two calls of torch's attention are expected to be faster ({preference.reason})"
    return unavailable


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
    kernel = preferences.forward_kernel(query, is_causal, _wants_gradients(query, key, value))
    forward = _forward if query.device.type == "cpu" else _forward_of_padded_heads
    return forward(query, key, value, cu_seqlens, is_causal, scale, kernel)


def _forward(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
    output: Tensor = torch.ops.twicing.forward(query, key, value, *options)[0]
    return output


def _forward_of_padded_heads(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
    """Fills a head_dim between those of the CUDA kernels up with zeros, which change neither A nor what is kept of O.

    Here and not in the operator, so that torch.compile can make it part of what produces the query. It costs a copy of
    query, key, value and the output's gradient; all else the operator makes at the kernels' head_dim, and is not copied.
    """
    head_dim = query.shape[-1]
    if head_dim in CUDA_HEAD_DIMS:
        return _forward(query, key, value, *options)
    missing = next(size for size in CUDA_HEAD_DIMS if size > head_dim) - head_dim
    query, key, value = (F.pad(tensor, (0, missing)) for tensor in (query, key, value))
    return _forward(query, key, value, *options)[..., :head_dim]


def _wants_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def name_of(dtype: torch.dtype) -> str:
    """``bfloat16`` of ``torch.bfloat16``"""
    return str(dtype).removeprefix("torch.")


def multiplies_bfloat16() -> bool:
    """Whether this processor's kernels multiply bfloat16 as it is (AMX), not in float32."""
    return _unavailable() is None and bool(torch.ops.twicing.multiplies_bfloat16())


def _unavailable() -> str | None:
    from twicing_core import build  # here, so that `python -m twicing_core.build` is not imported before it runs

    return build.unavailable()


def _cuda_unavailable(device_index: int) -> str | None:
    from twicing_core import build_cuda

    return build_cuda.unavailable(device_index)


# A graph being compiled takes these answers as constants. It is what torch.compiler.assume_constant_result does, without
# importing all of the compiler, which takes longer than the rest of torch.
_unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]
_cuda_unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]
