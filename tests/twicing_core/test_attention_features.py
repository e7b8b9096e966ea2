"""The operator among torch's features: compile, autocast, activation checkpointing, fake tensors."""

import shutil

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from twicing_core import twicing_attention

CU_SEQLENS = torch.tensor([0, 4, 13, 14, 26], dtype=torch.int32)
CALLS = {
    "full": {},
    "causal_grouped": {"is_causal": True, "enable_gqa": True},
    "packed": {"cu_seqlens": CU_SEQLENS},
    "packed_causal": {"cu_seqlens": CU_SEQLENS, "is_causal": True, "enable_gqa": True},
    "masked": {"attn_mask": torch.ones(13, 13, dtype=torch.bool).tril(3)},
    "biased": {"attn_mask": torch.linspace(-1, 1, 169, dtype=torch.float64).view(13, 13)},
}
each_call = pytest.mark.parametrize("options", CALLS.values(), ids=CALLS.keys())
each_backend = pytest.mark.parametrize("backend", ["auto", "composed", "reference"])


def assert_all_close(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@each_backend
@each_call
def test_compiles_without_graph_break(fresh_compiler, make_qkv, run, options, backend):
    qkv = make_qkv(key_heads=2 if "enable_gqa" in options else 4)
    compiled = torch.compile(twicing_attention, fullgraph=True, backend="aot_eager")
    actual = run(qkv, function=compiled, backend=backend, **options)
    assert_all_close(actual, run(qkv, backend="reference", **options))


def test_compiled_packing_is_not_bound_to_its_documents(fresh_compiler, make_qkv, run):
    """One graph serves any documents of as many offsets (empty documents fill up)."""
    compiled = torch.compile(twicing_attention, fullgraph=True, backend="aot_eager")
    qkv = make_qkv()
    run(qkv, function=compiled, cu_seqlens=CU_SEQLENS)
    other = torch.tensor([0, 13, 20, 26, 26], dtype=torch.int32)
    with torch.compiler.set_stance("fail_on_recompile"):
        actual = run(qkv, function=compiled, cu_seqlens=other)
    assert_all_close(actual, run(qkv, cu_seqlens=other, backend="reference"))


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="inductor needs a C++ compiler")
def test_compiles_with_inductor(fresh_compiler, make_qkv, run):
    options = {"is_causal": True, "cu_seqlens": CU_SEQLENS}
    qkv = make_qkv(dtype=torch.float32)
    compiled = torch.compile(twicing_attention, fullgraph=True)
    actual = run(qkv, function=compiled, backend="composed", **options)
    assert_all_close(actual, run(qkv, backend="composed", **options))


@each_backend
@each_call
def test_autocast_computes_in_its_dtype(make_qkv, options, backend):
    """Inputs of mixed dtypes, as a float32 rotary embedding and bfloat16 linear layers give them."""
    query, key, value = make_qkv(key_heads=2 if "enable_gqa" in options else 4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = twicing_attention(query, key.bfloat16(), value, backend=backend, **options)
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert query.grad.dtype == torch.float32
    expected = twicing_attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), backend=backend, **options)
    torch.testing.assert_close(output, expected)


@each_backend
def test_autocast_leaves_float64_alone(make_qkv, backend):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert twicing_attention(*make_qkv(), backend=backend).dtype == torch.float64


@each_backend
@each_call
def test_activation_checkpointing_gives_the_same_gradients(make_qkv, run, options, backend):
    qkv = make_qkv(key_heads=2 if "enable_gqa" in options else 4)

    def checkpointed(*args, **kwargs):
        return checkpoint(twicing_attention, *args, use_reentrant=False, **kwargs)

    actual = run(qkv, function=checkpointed, backend=backend, **options)
    assert_all_close(actual, run(qkv, backend=backend, **options))


def test_checkpointing_replays_dropout(make_qkv, run):
    def checkpointed(*args, **kwargs):
        return checkpoint(twicing_attention, *args, use_reentrant=False, **kwargs)

    torch.manual_seed(0)
    actual = run(make_qkv(), function=checkpointed, dropout_p=0.5)
    torch.manual_seed(0)
    assert_all_close(actual, run(make_qkv(), dropout_p=0.5))


@each_backend
@each_call
def test_fake_tensors_give_the_shape(options, backend):
    with FakeTensorMode() as mode:
        query = torch.empty(2, 4, 13, 8, dtype=torch.float64)
        key = torch.empty(2, 2 if "enable_gqa" in options else 4, 13, 8, dtype=torch.float64)
        fake = {name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        output = twicing_attention(query, key, key, backend=backend, **fake)
    assert output.shape == query.shape and output.dtype == query.dtype


@each_backend
@each_call
def test_meta_tensors_give_the_shape(options, backend):
    query = torch.empty(2, 4, 13, 8, device="meta")
    key = torch.empty(2, 2 if "enable_gqa" in options else 4, 13, 8, device="meta")
    meta = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    assert twicing_attention(query, key, key, backend=backend, **meta).shape == query.shape
