"""Outputs and gradients: the reference against the paper's words, composed against the reference."""

import pytest
import torch
from torch.nn import functional as F

from twicing_core import twicing_attention

LENGTHS = [1, 63, 65, 197, 257]  # one, and around the sizes of kernel tiles and of a ViT
NAMES = ("output", "grad query", "grad key", "grad value")


def assert_close(actual, expected, **tolerance):
    for name, one, other in zip(NAMES, actual, expected, strict=True):
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def smoothed_residual_added_back(query, key, value, allowed):
    """The paper's account of twicing: smooth, then smooth what is left of the value and add that."""
    weights = (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(~allowed, -torch.inf).softmax(-1)
    smooth = weights @ value
    return smooth + weights @ (value - smooth)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_reference_adds_back_the_smoothed_residual(make_qkv, run, is_causal):
    qkv = make_qkv()
    allowed = torch.ones(13, 13, dtype=torch.bool)
    expected = run(qkv, function=smoothed_residual_added_back, allowed=allowed.tril() if is_causal else allowed)
    assert_close(run(qkv, is_causal=is_causal, backend="reference"), expected)


@pytest.mark.parametrize("key_heads", [4, 2, 1], ids=lambda heads: f"key_heads{heads}")
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("seq", LENGTHS)
def test_composed_equals_reference_in_float64(make_qkv, run, seq, is_causal, key_heads):
    qkv = make_qkv(seq=seq, key_heads=key_heads)
    options = {"is_causal": is_causal, "enable_gqa": key_heads != 4}
    assert_close(run(qkv, backend="composed", **options), run(qkv, backend="reference", **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("largest_logit", [None, 200.0], ids=["usual", "extreme"])
@pytest.mark.parametrize("seq", LENGTHS)
def test_composed_error_is_within_the_rule(make_qkv, run, seq, is_causal, dtype, largest_logit):
    """At most 2x (gradients 3x) the error of the definition computed by torch in the same dtype.

    Gradients at extreme logits have one allowance: fused kernels, torch's too, save only the log-sum-exp and recompute
    A = exp(logit - logsumexp) in float32, where a logit of 200 is 200 eps uncertain. The definition keeps A instead.
    """
    query, key, value = make_qkv(seq=seq, head_dim=32, dtype=dtype)
    recomputed = 0.0
    if largest_logit is not None:
        logits = query.double() @ key.double().mT / 32**0.5
        factor = (largest_logit / logits.abs().max()).sqrt()
        query, key = (query * factor).to(dtype), (key * factor).to(dtype)
        recomputed = largest_logit * torch.finfo(torch.float32).eps
    exact = run((query, key, value), dtype=torch.float64, backend="reference", is_causal=is_causal)
    definition = run((query, key, value), backend="reference", is_causal=is_causal)
    composed = run((query, key, value), backend="composed", is_causal=is_causal)
    for name, want, plain, ours in zip(NAMES, exact, definition, composed, strict=True):
        factor, allowance = (2, 0.0) if name == "output" else (3, recomputed * want.abs().max())
        error, plain_error = (ours - want).abs().max(), (plain - want).abs().max()
        assert ours.isfinite().all()
        assert error <= factor * plain_error + allowance, f"{name}: {error} against {plain_error}"


@pytest.mark.parametrize("backend", ["composed", "reference"])
def test_scale(make_qkv, run, backend):
    query, key, value = make_qkv()
    by_scale = twicing_attention(query, key, value, scale=0.7, backend=backend)
    by_query = twicing_attention(query * 0.7 * 8**0.5, key, value, backend=backend)
    torch.testing.assert_close(by_scale, by_query)


@pytest.mark.parametrize("backend", ["composed", "reference"])
def test_views_of_a_fused_projection(run, backend):
    """(batch, seq, 3, heads, head_dim), as `qkv` layers give: strided views, and one gradient for all three."""
    fused = torch.randn(2, 65, 3, 4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fused.requires_grad_()
    views = fused.permute(2, 0, 3, 1, 4).unbind()
    assert not any(view.is_contiguous() for view in views)
    output = twicing_attention(*views, is_causal=True, backend=backend)
    grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (grad_fused,) = torch.autograd.grad(output, fused, grad_output)
    expected = run(views, is_causal=True, backend="reference")
    assert_close((output, *grad_fused.permute(2, 0, 3, 1, 4).unbind()), expected)


def test_composed_with_head_dim_not_contiguous(make_qkv, run, largest_tensor):
    query, key, value = (tensor.detach().mT.contiguous().mT for tensor in make_qkv(heads=1, seq=257))
    with largest_tensor:
        actual = run((query, key, value), backend="composed")
    assert largest_tensor.elements < 257 * 257
    assert_close(actual, run((query, key, value), backend="reference"))


MASKS = {
    "key_padding": lambda: torch.arange(13).expand(2, 1, 1, 13) < torch.tensor([13, 9]).view(2, 1, 1, 1),
    "per_head": lambda: torch.rand(4, 13, 13, generator=torch.Generator().manual_seed(0)) < 0.6,
    "one_column": lambda: torch.arange(13).view(13, 1) != 3,  # row 3 sees nothing
    "bias": lambda: torch.randn(1, 4, 13, 13, generator=torch.Generator().manual_seed(0)),
    "bias_minus_inf": lambda: torch.zeros(13, 13).masked_fill(torch.ones(13, 13).tril(-1).bool(), -torch.inf),
}


@pytest.mark.parametrize("mask", ["key_padding", "per_head"])
def test_reference_masks_what_is_not_allowed(make_qkv, run, mask):
    allowed = MASKS[mask]()
    expected = run(make_qkv(), function=smoothed_residual_added_back, allowed=allowed)
    assert_close(run(make_qkv(), attn_mask=allowed, backend="reference"), expected)
    bias = torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)
    assert_close(run(make_qkv(), attn_mask=bias, backend="reference"), expected)


@pytest.mark.parametrize("key_heads", [4, 2], ids=lambda heads: f"key_heads{heads}")
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_composed_takes_any_mask(make_qkv, run, mask, key_heads):
    options = {"attn_mask": mask(), "enable_gqa": key_heads != 4}
    qkv = make_qkv(key_heads=key_heads)
    assert_close(run(qkv, backend="composed", **options), run(qkv, backend="reference", **options))


@pytest.mark.parametrize("backend", ["composed", "reference"])
@pytest.mark.parametrize("kind", ["bool", "floating"])
def test_a_position_that_sees_nothing_gets_zero_and_passes_no_gradient(make_qkv, run, backend, kind):
    mask = torch.ones(13, 13, dtype=torch.bool)
    mask[[0, 5]] = False
    if kind == "floating":
        mask = torch.zeros(13, 13).masked_fill(~mask, -torch.inf)
    output, grad_query, grad_key, grad_value = run(make_qkv(), attn_mask=mask, backend=backend)
    for tensor in (output, grad_query):
        assert (tensor[:, :, [0, 5]] == 0).all()
        assert (tensor[:, :, [1, 12]] != 0).any()
    assert grad_key.isfinite().all() and grad_value.isfinite().all()


CALLS = {
    "full": {},
    "causal": {"is_causal": True},
    "grouped": {"enable_gqa": True},
    "packed": {"cu_seqlens": torch.tensor([0, 2, 5, 6, 10], dtype=torch.int32)},
    "packed_causal": {"cu_seqlens": torch.tensor([0, 2, 5, 6, 10], dtype=torch.int32), "is_causal": True},
    "masked": {"attn_mask": torch.tensor([1, 1, 0, 1, 1]).bool() & ~torch.eye(5)[3].bool()[:, None]},
    "learned_bias": {"attn_mask": torch.randn(2, 5, 5, dtype=torch.float64)},
}


@pytest.mark.parametrize("backend", ["composed", "reference"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_gradcheck(make_qkv, backend, call):
    options = dict(call)
    qkv = make_qkv(heads=2, seq=5, head_dim=3, key_heads=1 if "enable_gqa" in options else 2)
    mask = options.pop("attn_mask", None)
    if mask is not None and mask.is_floating_point():
        mask = mask.clone().requires_grad_()

    def attention(query, key, value, attn_mask):
        return twicing_attention(query, key, value, attn_mask=attn_mask, backend=backend, **options)

    assert torch.autograd.gradcheck(attention, (*qkv, mask))


def test_dropout_drops_the_same_entries_of_both_factors(make_qkv):
    query, key, value = make_qkv()
    torch.manual_seed(3)
    output = twicing_attention(query, key, value, dropout_p=0.4, backend="reference")
    torch.manual_seed(3)
    weights = F.dropout((query @ key.mT / 8**0.5).softmax(-1), 0.4)
    assert (weights == 0).any()
    torch.testing.assert_close(output, 2 * weights @ value - weights @ (weights @ value))


@pytest.mark.parametrize("backend", ["auto", "composed", "reference"])
@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 2, 0, 8)], ids=["no_rows", "no_positions"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_empty(shape, backend, packed):
    qkv = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    cu_seqlens = torch.zeros(1, dtype=torch.int32) if packed else None
    output = twicing_attention(*qkv, cu_seqlens=cu_seqlens, backend=backend)
    output.sum().backward()
    assert output.shape == shape


# Properties of the operator, whatever the backend.


@pytest.mark.parametrize("backend", ["auto", "composed", "reference"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_rows_sum_to_one(make_qkv, backend, is_causal, packed):
    query, key, _ = make_qkv(key_heads=2)
    constant = torch.arange(1.0, 9.0, dtype=torch.float64).expand(2, 2, 13, 8)
    cu_seqlens = torch.tensor([0, 3, 13, 20, 26], dtype=torch.int32) if packed else None
    output = twicing_attention(
        query, key, constant, is_causal=is_causal, cu_seqlens=cu_seqlens, enable_gqa=True, backend=backend
    )
    torch.testing.assert_close(output, constant[:, :1].expand(2, 4, 13, 8))


@pytest.mark.parametrize("backend", ["auto", "composed", "reference"])
def test_permuting_positions_permutes_the_output(make_qkv, backend):
    query, key, value = make_qkv(seq=65)
    order = torch.randperm(65, generator=torch.Generator().manual_seed(0))
    permuted = twicing_attention(query[:, :, order], key[:, :, order], value[:, :, order], backend=backend)
    output = twicing_attention(query, key, value, backend=backend)
    torch.testing.assert_close(permuted, output[:, :, order])


@pytest.mark.parametrize("backend", ["auto", "composed", "reference"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_later_positions_do_not_reach_earlier_ones(make_qkv, backend, packed):
    qkv = make_qkv(batch=1, seq=65)
    options = {"is_causal": True, "backend": backend}
    if packed:
        options["cu_seqlens"] = torch.tensor([0, 7, 50, 65], dtype=torch.int32)
    output = twicing_attention(*qkv, **options)
    for grad in torch.autograd.grad(output[:, :, :30].sum(), qkv, retain_graph=True):
        assert (grad[:, :, 30:] == 0).all()
    changed = [torch.cat((tensor[:, :, :30], -5 * tensor[:, :, 30:]), dim=2) for tensor in qkv]
    torch.testing.assert_close(twicing_attention(*changed, **options)[:, :, :30], output[:, :, :30])
