"""The fused kernels: every path of theirs against the definition in float64, and what they promise beside values."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twicing_core import build, twicing_attention

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=f"no fused kernels: {build.unavailable()}")

NAMES = ("output", "grad query", "grad key", "grad value")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
each_order = pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
# With as many heads as threads, each thread walks a head of its own; with fewer, all share one, by another path.
each_sharing = pytest.mark.parametrize("threads", [1, 2, 8], ids=lambda threads: f"threads{threads}")


@pytest.fixture(autouse=True)
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def assert_within_the_rule(run, qkv, *, allowance=0.0, **options):
    """At most 2x (gradients 3x) the error of the definition computed by torch in the same dtype."""
    exact = run(qkv, dtype=torch.float64, backend="reference", **options)
    definition = run(qkv, backend="reference", **options)
    fused = run(qkv, backend="fused", **options)
    for name, want, plain, ours in zip(NAMES, exact, definition, fused, strict=True):
        assert ours.isfinite().all() and ours.dtype == plain.dtype and ours.shape == plain.shape
        # The definition is lucky at times, with few keys even exact: in float32 some ulp of the largest are free.
        ulp = 8 * torch.finfo(torch.float32).eps * want.abs().max() if ours.dtype == torch.float32 else 0.0
        error, plain_error = (ours - want).abs().max(), (plain - want).abs().max()
        bound = (2 if name == "output" else 3) * plain_error + ulp + allowance * want.abs().max()
        assert error <= bound, f"{name}: {error} against {plain_error}"


@each_dtype
@each_order
@each_sharing
@pytest.mark.parametrize("seq", [1, 2, 16, 31, 63, 64, 65, 130, 197, 256, 257, 512, 513, 1000])
def test_error_is_within_the_rule(make_qkv, run, seq, threads, is_causal, dtype):
    torch.set_num_threads(threads)
    qkv = make_qkv(batch=1, heads=2, seq=seq, head_dim=32, dtype=dtype)
    assert_within_the_rule(run, qkv, is_causal=is_causal)


@each_dtype
@each_order
@pytest.mark.parametrize("head_dim", [8, 9, 16, 20, 33, 64, 80, 96, 128, 250, 256])
def test_any_head_dim(make_qkv, run, head_dim, is_causal, dtype):
    assert_within_the_rule(run, make_qkv(seq=97, head_dim=head_dim, dtype=dtype), is_causal=is_causal)


@each_dtype
@each_order
@each_sharing
@pytest.mark.parametrize("seq", [70, 600])
@pytest.mark.parametrize("largest_logit", [200.0, -200.0], ids=["peaked", "negative_scale"])
def test_extreme_logits(make_qkv, run, largest_logit, seq, threads, is_causal, dtype):
    """Gradients have an allowance: A = exp(logit - logsumexp) is made again of a logit that is 200 eps uncertain."""
    torch.set_num_threads(threads)
    query, key, value = (tensor.detach() for tensor in make_qkv(batch=1, heads=2, seq=seq, head_dim=32, dtype=dtype))
    scale = float(largest_logit / (query.double() @ key.double().mT).abs().max())
    allowance = 200 * torch.finfo(torch.float32).eps
    assert_within_the_rule(run, (query, key, value), scale=scale, is_causal=is_causal, allowance=allowance)


@each_dtype
@each_order
@each_sharing
@pytest.mark.parametrize("key_heads", [4, 2, 1], ids=lambda heads: f"key_heads{heads}")
def test_grouped_heads(make_qkv, run, key_heads, threads, is_causal, dtype):
    torch.set_num_threads(threads)
    qkv = make_qkv(batch=1, seq=130, key_heads=key_heads, dtype=dtype)
    assert_within_the_rule(run, qkv, is_causal=is_causal, enable_gqa=True)


@each_dtype
@each_order
@each_sharing
@pytest.mark.parametrize("offsets", [[0, 1, 3, 40, 300, 301, 600], [0, 7, 7, 300, 300, 600]], ids=["ragged", "empty"])
def test_packed_equals_document_by_document(make_qkv, run, offsets, threads, is_causal, dtype):
    """Bit for bit, where the same path is taken: a document is a problem of its own."""
    torch.set_num_threads(threads)
    query, key, value = make_qkv(batch=2, heads=8, seq=300, key_heads=2, head_dim=16, dtype=dtype)

    def by_document(query, key, value, **options):
        rows = [tensor.transpose(0, 1).flatten(1, 2) for tensor in (query, key, value)]  # (heads, batch * seq, d)
        outputs = [
            twicing_attention(*(row[None, :, start:end] for row in rows), enable_gqa=True, **options)
            for start, end in pairwise(offsets)
        ]
        return torch.cat(outputs, dim=2)[0].unflatten(1, (2, 300)).transpose(0, 1)

    options = {"is_causal": is_causal, "backend": "fused"}
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
    packed = run((query, key, value), cu_seqlens=cu_seqlens, enable_gqa=True, **options)
    alone = run((query, key, value), function=by_document, **options)
    for name, one, other in zip(NAMES, packed, alone, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


STRIDES = {
    "by_position": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every_other_position": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "part_of_wider_heads": lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
    "head_dim_not_contiguous": lambda x: x.mT.contiguous().mT,
    "expanded_heads": lambda x: x[:, :1].expand_as(x),
}


@each_dtype
@pytest.mark.parametrize("view", STRIDES.values(), ids=STRIDES.keys())
def test_any_strides(make_qkv, view, dtype):
    """Of the inputs and of the output's gradient; the numbers are the same, so the results are, bit for bit."""
    views = [view(tensor.detach()).requires_grad_() for tensor in make_qkv(seq=70, head_dim=16, dtype=dtype)]
    copies = [tensor.detach().contiguous().requires_grad_() for tensor in views]
    output = twicing_attention(*views, backend="fused")
    expected = twicing_attention(*copies, backend="fused")
    grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    gradients = torch.autograd.grad(output, views, view(grad_output))
    expected_gradients = torch.autograd.grad(expected, copies, view(grad_output).contiguous())
    for one, other in zip((output, *gradients), (expected, *expected_gradients), strict=True):
        assert torch.equal(one, other)


@each_dtype
@each_order
@pytest.mark.parametrize("seq", [197, 600])
def test_same_bits_every_time(make_qkv, run, seq, is_causal, dtype):
    """On any number of threads up to the number of heads; with more threads than heads, for that number of threads."""
    qkv = make_qkv(batch=1, heads=4, seq=seq, head_dim=16, dtype=dtype)
    results = []
    for threads in (1, 2, 4, 4, 7, 7):
        torch.set_num_threads(threads)
        results.append(run(qkv, is_causal=is_causal, backend="fused"))
    for first, second in ((0, 1), (1, 2), (2, 3), (4, 5)):
        assert all(torch.equal(one, other) for one, other in zip(results[first], results[second], strict=True))


OPCHECKS = {
    "full": {},
    "causal": {"is_causal": True},
    "grouped": {"key_heads": 2},
    "packed": {"cu_seqlens": torch.tensor([0, 5, 13, 26], dtype=torch.int32), "is_causal": True},
    "bfloat16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("call", OPCHECKS.values(), ids=OPCHECKS.keys())
def test_opcheck(make_qkv, call):
    options = {"key_heads": 4, "dtype": torch.float32, "is_causal": False, "cu_seqlens": None} | call
    is_causal, cu_seqlens = options.pop("is_causal"), options.pop("cu_seqlens")
    qkv = make_qkv(**options)
    forward, backward = torch.ops.twicing.forward.default, torch.ops.twicing.backward.default
    torch.library.opcheck(forward, (*qkv, cu_seqlens, is_causal, 0.3, ""))
    saved = [tensor.detach() for tensor in (*qkv, *forward(*qkv, cu_seqlens, is_causal, 0.3, ""))]
    torch.library.opcheck(backward, (torch.randn_like(saved[0]), *saved, cu_seqlens, is_causal, 0.3, "", False))


def test_saves_no_more_than_documented(make_qkv):
    """Query, key, value, U, O and the log-sum-exp: nothing of size seq x seq, nothing in a wider dtype."""
    sizes = []

    def pack(tensor):
        sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        twicing_attention(*make_qkv(dtype=torch.bfloat16), is_causal=True, backend="fused")
    one = 2 * 4 * 13 * 8 * 2
    assert sorted(sizes) == sorted([one] * 5 + [2 * 4 * 13 * 4])


def test_second_derivatives_are_refused_in_words(make_qkv):
    query, key, value = make_qkv(dtype=torch.float32)
    output = twicing_attention(query, key, value, backend="fused")
    (gradient,) = torch.autograd.grad(output.sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once only; use backend='reference' for second derivatives"):
        gradient.sum().backward()


def test_compiles_with_inductor_and_packed_documents(make_qkv, run):
    torch.compiler.reset()
    cu_seqlens = torch.tensor([0, 5, 13, 26], dtype=torch.int32)
    compiled = torch.compile(twicing_attention, fullgraph=True, backend="aot_eager")
    qkv = make_qkv(dtype=torch.float32)
    options = {"cu_seqlens": cu_seqlens, "is_causal": True, "backend": "fused"}
    for one, other in zip(run(qkv, function=compiled, **options), run(qkv, **options), strict=True):
        assert torch.equal(one, other)
    torch.compiler.reset()


REFUSALS = {
    "mask": ({"attn_mask": torch.ones(13, 13, dtype=torch.bool)}, {}, "take no attn_mask; use composed or reference"),
    "dropout": ({"dropout_p": 0.1}, {}, "take no dropout, got dropout_p=0.1; use reference"),
    "float64": ({}, {"dtype": torch.float64}, "take float32, bfloat16 and float16, got torch.float64"),
    "head_dim": ({}, {"head_dim": 7}, "take head_dim 8 to 256, got 7"),
}


@pytest.mark.parametrize(("options", "shape", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refuses_what_it_cannot_do(make_qkv, options, shape, message):
    qkv = make_qkv(**({"dtype": torch.float32} | shape))
    with pytest.raises(ValueError, match=message):
        twicing_attention(*qkv, backend="fused", **options)


@each_dtype
@each_order
@each_sharing
@pytest.mark.parametrize(("seq", "head_dim"), [(1, 8), (97, 24), (500, 40), (600, 64)])
def test_nothing_of_one_call_reaches_the_next(make_qkv, run, seq, head_dim, threads, is_causal, dtype):
    """Threads keep their scratch memory, and what pads rows there is multiplied by zero, which would not make NaN zero."""
    torch.set_num_threads(threads)
    qkv = make_qkv(batch=1, heads=2, seq=seq, head_dim=head_dim, dtype=dtype)
    before = run(qkv, is_causal=is_causal, backend="fused")
    for causal in (False, True):
        run([torch.full((1, 2, 700, 128), torch.nan, dtype=dtype)] * 3, is_causal=causal, backend="fused")
    after = run(qkv, is_causal=is_causal, backend="fused")
    for name, one, other in zip(NAMES, before, after, strict=True):
        assert one.equal(other), name


# Properties, of any shape.

shapes = st.fixed_dictionaries(
    {
        "seq": st.integers(1, 140) | st.integers(500, 530),
        "head_dim": st.sampled_from([8, 16, 24, 64]),
        "is_causal": st.booleans(),
        "dtype": st.sampled_from(DTYPES),
        "threads": st.sampled_from([1, 4]),
    }
)
a_few = settings(max_examples=25, deadline=None)


def draw(make_qkv, shape):
    torch.set_num_threads(shape["threads"])
    return make_qkv(batch=1, heads=2, seq=shape["seq"], head_dim=shape["head_dim"], dtype=shape["dtype"])


def tolerance(dtype):
    error = 4 * torch.finfo(dtype).eps + 5e-6  # of rounding the result, of sums in float32
    return {"atol": error, "rtol": error}


@a_few
@given(shape=shapes)
def test_rows_sum_to_one(make_qkv, shape):
    query, key, value = draw(make_qkv, shape)
    constant = value[:, :, :1].expand_as(value)
    output = twicing_attention(query, key, constant, is_causal=shape["is_causal"], backend="fused")
    torch.testing.assert_close(output, constant, **tolerance(shape["dtype"]))


@a_few
@given(shape=shapes)
def test_attention_to_oneself_alone_gives_the_value(make_qkv, shape):
    """A = I: keys of equal length that are each query's own, and a scale that makes everything else negligible."""
    query, _, value = draw(make_qkv, shape)
    unit = torch.nn.functional.normalize(query.double(), dim=-1)
    gap = 1 - (unit @ unit.mT).masked_fill(torch.eye(shape["seq"], dtype=torch.bool), -1).max()
    gap = float(gap.detach())
    scale = 60 / max(gap, 1e-2) if gap > 2e-2 else None
    if scale is None:  # two queries happen to be nearly the same
        return
    unit = unit.to(shape["dtype"])
    output = twicing_attention(unit, unit, value, scale=scale, is_causal=shape["is_causal"], backend="fused")
    torch.testing.assert_close(output, value, **tolerance(shape["dtype"]))


@a_few
@given(shape=shapes, seed=st.integers(0, 1000))
def test_permuting_positions_permutes_the_output(make_qkv, shape, seed):
    qkv = draw(make_qkv, shape)
    order = torch.randperm(shape["seq"], generator=torch.Generator().manual_seed(seed))
    output = twicing_attention(*qkv, backend="fused")
    permuted = twicing_attention(*(tensor[:, :, order] for tensor in qkv), backend="fused")
    torch.testing.assert_close(permuted, output[:, :, order], **tolerance(shape["dtype"]))


@a_few
@given(shape=shapes, which=st.integers(0, 2))
def test_gradients_are_finite_differences(make_qkv, run, shape, which):
    """Along a random direction, in float32: the slope of the reference in float64 is the kernels' gradient."""
    qkv = draw(make_qkv, shape | {"dtype": torch.float32})
    gradient = run(qkv, is_causal=shape["is_causal"], backend="fused")[1 + which].double()
    direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weights = torch.randn(qkv[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(step):
        moved = [tensor.detach().double() for tensor in qkv]
        moved[which] = moved[which] + step * direction
        return (twicing_attention(*moved, is_causal=shape["is_causal"], backend="reference") * weights).sum()

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    error = abs((gradient * direction).sum() - slope)
    assert error <= 1e-5 * (1 + gradient.norm() * direction.norm())


@a_few
@given(shape=shapes)
def test_later_positions_do_not_reach_earlier_ones(make_qkv, shape):
    qkv = draw(make_qkv, shape)
    cut = shape["seq"] // 2
    output = twicing_attention(*qkv, is_causal=True, backend="fused")
    for gradient in torch.autograd.grad(output[:, :, :cut].sum(), qkv, retain_graph=True):
        assert (gradient[:, :, cut:] == 0).all()
    changed = [torch.cat((tensor[:, :, :cut], -5 * tensor[:, :, cut:]), dim=2) for tensor in qkv]
    assert torch.equal(twicing_attention(*changed, is_causal=True, backend="fused")[:, :, :cut], output[:, :, :cut])
