"""`TwicingAttention`: its parameters are timm's, and its arguments reach the operator."""

import pytest
import timm
import torch
from timm.layers.attention import Attention
from torch.nn import functional as F

from twicing_core import TwicingAttention, twicing_attention


class SoftmaxAttention(TwicingAttention):
    def attend(self, query, key, value, *, cu_seqlens, attn_mask):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, is_causal=self.is_causal)


@pytest.fixture
def x():
    return torch.randn(2, 13, 24, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("qkv_bias", [False, True], ids=["no_bias", "bias"])
def test_weights_of_timm_load_and_mean_the_same(x, qkv_bias):
    theirs = Attention(24, num_heads=3, qkv_bias=qkv_bias)
    ours = SoftmaxAttention(24, 3, qkv_bias=qkv_bias)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(ours(x), theirs(x))
    twicing = TwicingAttention(24, 3, qkv_bias=qkv_bias)
    twicing.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(twicing.state_dict(), strict=True)
    assert not torch.allclose(twicing(x), theirs(x), atol=1e-3)


def test_replaces_the_attention_of_a_timm_model():
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=2)
    weights = model.state_dict()
    for block in model.blocks:
        block.attn = TwicingAttention(192, 3, qkv_bias=True)
    model.load_state_dict(weights, strict=True)
    logits = model(torch.randn(2, 3, 32, 32))
    logits.sum().backward()
    assert logits.shape == (2, 1000) and logits.isfinite().all()


@pytest.mark.parametrize("backend", ["auto", "composed", "reference"])
def test_grouped_heads_match_the_operator(x, backend):
    module = TwicingAttention(24, 6, 2, is_causal=True, backend=backend)
    assert module.qkv.weight.shape == (24 + 8 + 8, 24)
    query, key, value = module.qkv(x).split([24, 8, 8], dim=-1)
    heads = [tensor.unflatten(-1, (-1, 4)).transpose(1, 2) for tensor in (query, key, value)]
    output = twicing_attention(*heads, is_causal=True, enable_gqa=True, backend="reference")
    torch.testing.assert_close(module(x), module.proj(output.transpose(1, 2).flatten(2)))


def test_rotary_turns_queries_and_keys(x):
    module = TwicingAttention(24, 6, 2)
    shapes = []

    def rotary(tensor):
        shapes.append(tuple(tensor.shape))
        return 3 * tensor

    turned = module(x, rotary=rotary)
    assert shapes == [(2, 6, 13, 4), (2, 2, 13, 4)]
    with torch.no_grad():
        module.qkv.weight[: 24 + 8] *= 3
    torch.testing.assert_close(turned, module(x))


def test_documents_and_masks_reach_the_operator(x):
    module = TwicingAttention(24, 3)
    cu_seqlens = torch.tensor([0, 5, 13, 26], dtype=torch.int32)
    packed = module(x, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(packed[:1, :5], module(x[:1, :5]))
    torch.testing.assert_close(packed[:1, 5:], module(x[:1, 5:]))
    torch.testing.assert_close(packed[1:], module(x[1:]))
    padded = module(x, attn_mask=torch.arange(13) < 9)
    torch.testing.assert_close(padded[:, :9], module(x[:, :9]))


def test_gradients_reach_every_parameter(x):
    module = TwicingAttention(24, 6, 2, qkv_bias=True)
    module(x).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_no_biases_when_told(x):
    assert set(TwicingAttention(24, 3, proj_bias=False).state_dict()) == {"qkv.weight", "proj.weight"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((25, 3), "embed_dim must be a positive multiple of num_heads, got 25 and 3"),
        ((24, 0), "embed_dim must be a positive multiple of num_heads, got 24 and 0"),
        ((24, 6, 4), "num_heads must be a multiple of num_kv_heads, got 6 and 4"),
        ((24, 6, 0), "num_heads must be a multiple of num_kv_heads, got 6 and 0"),
    ],
    ids=["width", "no_heads", "indivisible", "no_kv_heads"],
)
def test_bad_numbers_of_heads(arguments, message):
    with pytest.raises(ValueError, match=message):
        TwicingAttention(*arguments)


def test_a_causal_call_needs_a_causal_module(x):
    with pytest.raises(ValueError, match="is_causal=True in the call"):
        TwicingAttention(24, 3)(x, is_causal=True)
    causal = TwicingAttention(24, 3, is_causal=True)
    torch.testing.assert_close(causal(x, is_causal=True), causal(x))
