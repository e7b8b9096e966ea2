"""What stands between the kernels and torch: shapes, strides, memory, errors and gradients, by a twin of the CUDA library.

The twin registers the operators for CPU tensors, where the CPU's own kernels would be. So the checks run in a process of
their own, all of them in one (importing torch takes longer than they do), and each test here is the verdict on one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import traceback

import pytest
import torch
from binding import build_twin
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from twicing_core import fused, preferences, reference, twicing_attention

forward, backward = torch.ops.twicing.forward, torch.ops.twicing.backward
OFFSETS = torch.tensor([0, 1, 30, 30, 70, 75, 140], dtype=torch.int32)


def make(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_qkv(heads: int = 4, key_heads: int = 4, seq: int = 70, head_dim: int = 16, **options) -> list[Tensor]:
    return [make(2, h, seq, head_dim, seed=i, **options) for i, h in enumerate((heads, key_heads, key_heads))]


def run(attend, qkv, grad_output=None) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in qkv]
    output = attend(*leaves)
    grad_output = make(*output.shape, dtype=output.dtype, seed=3) if grad_output is None else grad_output
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]


def assert_within_the_rule(attend, qkv, **options) -> None:
    """At most 2x (gradients 3x) the error of two calls of torch's attention in the same dtype."""

    def definition(*qkv):
        call = {"is_causal": False, "scale": qkv[0].shape[-1] ** -0.5, "cu_seqlens": None} | options
        return reference.attend(*qkv, attn_mask=None, dropout_p=0.0, **call)

    def composed(*qkv):
        return twicing_attention(*qkv, backend="composed", enable_gqa=True, **options)

    exact = run(
        definition, [tensor.double() for tensor in qkv], make(*qkv[0].shape, dtype=qkv[0].dtype, seed=3).double()
    )
    for factor, want, by_torch, ours in zip((2, 3, 3, 3), exact, run(composed, qkv), run(attend, qkv), strict=True):
        assert (ours - want).abs().max() <= factor * (by_torch - want).abs().max()


def attend(query, key, value, **options) -> Tensor:
    return twicing_attention(query, key, value, backend="fused", enable_gqa=True, **options)


def check_values_and_gradients():
    assert_within_the_rule(attend, make_qkv())


def check_causal_grouped():
    qkv = make_qkv(key_heads=2, head_dim=32, dtype=torch.float16)
    assert_within_the_rule(lambda *qkv: attend(*qkv, is_causal=True), qkv, is_causal=True)


def check_every_kernel_and_pair_of_kernels():
    """Whatever forward and backward meet, what one saved is what the other needs."""
    qkv, grad_output = make_qkv(key_heads=2), make(2, 4, 70, 16, seed=3)
    call = (OFFSETS, True, 0.25)
    outputs = [forward(*qkv, *call, kernel) for kernel in preferences.FORWARD_KERNELS]
    results = [
        (saved[0], *backward(grad_output, *qkv, *saved, *call, kernel, deterministic))
        for saved in outputs
        for kernel in preferences.BACKWARD_KERNELS
        for deterministic in (False, True)
    ]
    for result in results[1:]:
        for one, other in zip(result, results[0], strict=True):
            torch.testing.assert_close(one, other, atol=0.02, rtol=0.02)  # a few roundings to bfloat16


def check_packed_documents():
    options = {"cu_seqlens": OFFSETS, "is_causal": True}
    assert_within_the_rule(lambda *qkv: attend(*qkv, **options), make_qkv(key_heads=1), **options)
    spread = torch.stack((OFFSETS, OFFSETS), 1)[:, 0]
    assert torch.equal(attend(*make_qkv(), cu_seqlens=spread), attend(*make_qkv(), cu_seqlens=OFFSETS))


def check_head_dims_between_those_of_the_kernels():
    def padded(query, key, value):
        return fused._forward_of_padded_heads(query, key, value, None, False, query.shape[-1] ** -0.5, "long")

    for head_dim, dtype in ((8, torch.bfloat16), (13, torch.bfloat16), (24, torch.float16), (32, torch.float16)):
        assert_within_the_rule(padded, make_qkv(head_dim=head_dim, dtype=dtype))


def _copies(function) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return sum(event.name == "aten::copy_" for event in profile.events())


# Views of the same numbers, and how many of query, key and value and of the output's gradient have to be copied.
VIEWS = {
    "contiguous": (lambda x: x, 0),
    "by_position": (lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), 0),
    "part_of_a_projection": (lambda x: torch.cat((x, x, x), 1).transpose(1, 2).contiguous().transpose(1, 2)[:, :4], 0),
    "every_other_position": (lambda x: x.repeat_interleave(2, 2)[:, :, ::2], 0),
    "part_of_wider_heads": (lambda x: torch.cat((x, x), -1)[..., :16], 0),
    "expanded_heads": (lambda x: x[:, :1].expand_as(x), 0),
    "head_dim_not_contiguous": (lambda x: x.mT.contiguous().mT, 1),
    "rows_not_of_16_bytes": (lambda x: torch.cat((x, x[..., :4]), -1)[..., :16], 1),
    "starts_off_16_bytes": (lambda x: torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape), 1),
}


def check_any_strides_and_no_needless_copy():
    for name, (view, copies) in VIEWS.items():
        views = [view(tensor) for tensor in make_qkv()]
        grad_output = view(make(*views[0].shape, seed=3))
        actual = run(attend, views, grad_output)
        expected = run(attend, [tensor.contiguous() for tensor in views], grad_output.contiguous())
        assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True)), name
        saved = forward(*views, None, False, 0.25, "long")
        assert _copies(lambda: forward(*views, None, False, 0.25, "long")) == 3 * copies, name  # noqa: B023
        needed = _copies(lambda: backward(grad_output, *views, *saved, None, False, 0.25, "long", False))  # noqa: B023
        assert needed == 4 * copies, name


def check_a_sum_may_be_differentiated():
    """Its gradient is one number, expanded: no stride at all."""
    qkv = [tensor.requires_grad_() for tensor in make_qkv()]
    attend(*qkv).sum().backward()
    expected = run(attend, qkv, torch.ones_like(qkv[0]))
    assert all(torch.equal(leaf.grad, want) for leaf, want in zip(qkv, expected[1:], strict=True))


def check_opcheck():
    for options in ((None, False), (None, True), (OFFSETS, True)):
        qkv = [tensor.requires_grad_() for tensor in make_qkv(key_heads=2)]
        torch.library.opcheck(forward.default, (*qkv, *options, 0.3, "long"))
        saved = [tensor.detach() for tensor in (*qkv, *forward(*qkv, *options, 0.3, "long"))]
        torch.library.opcheck(backward.default, (make(2, 4, 70, 16), *saved, *options, 0.3, "long", False))


def check_compiles():
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for one, other in zip(run(compiled, make_qkv()), run(attend, make_qkv()), strict=True):
        assert torch.equal(one, other)


def check_deterministic_algorithms_choose_the_deterministic_backward():
    class Modes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is backward.default:
                chosen.append(args[-1])
            return function(*args, **(kwargs or {}))

    chosen: list[bool] = []
    for mode in (False, True):
        torch.use_deterministic_algorithms(mode)
        with Modes():
            run(attend, make_qkv())
        torch.use_deterministic_algorithms(False)
    assert chosen == [False, True]


def check_deterministic_values():
    torch.use_deterministic_algorithms(True)
    assert_within_the_rule(attend, make_qkv(key_heads=2))
    torch.use_deterministic_algorithms(False)


def check_saves_no_more_than_documented():
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes) or x, lambda x: x):
        attend(*(tensor.requires_grad_() for tensor in make_qkv()))
    rows = 2 * 4 * 70
    assert sorted(sizes) == sorted([rows * 16 * 2] * 5 + [rows * 4])


def check_short_kernels():
    """With a workspace if query heads share keys; and not for heads that do not fit."""
    for key_heads in (4, 2):
        qkv, grad_output = make_qkv(key_heads=key_heads), make(2, 4, 70, 16, seed=3)
        saved = forward(*qkv, OFFSETS, True, 0.25, "short")
        ours, want = (
            [*forward(*qkv, OFFSETS, True, 0.25, name)[:1]]
            + [*backward(grad_output, *qkv, *saved, OFFSETS, True, 0.25, name, True)]
            for name in ("short", "long")
        )
        for one, other in zip(ours, want, strict=True):
            assert (one - other).abs().max() <= 0.02 * other.abs().max()
    forward(*make_qkv(seq=256), None, False, 0.25, "short")
    with pytest.raises(RuntimeError, match="'short' does not take this problem"):
        forward(*make_qkv(seq=257), None, False, 0.25, "short")


def check_errors_are_words():
    query, key, value = make_qkv()
    wrong = {
        "take bfloat16 and float16, got Float": ([x.float() for x in (query, key, value)], None, 0.3, "long"),
        "must have the same dtype": ((query, key.half(), value.half()), None, 0.3, "long"),
        "key and value of one shape": ((query, key, value[:, :2]), None, 0.3, "long"),
        "the same batch, seq and head_dim": ((query, key[:, :, :5], value[:, :, :5]), None, 0.3, "long"),
        "a multiple of the key's": ((query, key[:, :3], value[:, :3]), None, 0.3, "long"),
        "a positive scale, got -1": ((query, key, value), None, -1.0, "long"),
        "must be 1-D int32": ((query, key, value), OFFSETS.long(), 0.3, "long"),
        "no kernel 'longer' was built for BFloat16": ((query, key, value), None, 0.3, "longer"),
        "and head_dim 8": ([x[..., :8] for x in (query, key, value)], None, 0.3, "long"),
    }
    wrong["'wavefront' does not take this problem"] = ((query, key, value), None, 0.3, "wavefront")  # not causal
    for message, (qkv, cu_seqlens, scale, kernel) in wrong.items():
        with pytest.raises(RuntimeError, match=message):
            forward(*qkv, cu_seqlens, False, scale, kernel)
    saved = forward(query, key, value, None, False, 0.3, "long")
    with pytest.raises(RuntimeError, match="must have the query's shape and dtype"):
        backward(query[:, :, :5], query, key, value, *saved, None, False, 0.3, "long", False)


def check_the_emulator_would_have_noticed():
    """Its checks reach through the operator: offsets that lead out of the tensors are an error, not a crash."""
    beyond = torch.tensor([0, 70, 400], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="access outside of all buffers"):
        forward(*make_qkv(), beyond, False, 0.3, "long")


CHECKS = [name for name in list(globals()) if name.startswith("check_")]


def main(library: str) -> None:
    """Runs all checks, and writes what went wrong, by name, as JSON."""
    torch.ops.load_library(library)
    fused._unavailable = lambda: None  # or the CPU's own kernels would be loaded
    failures = {}
    for name in CHECKS:
        try:
            globals()[name]()
        except Exception:
            failures[name] = traceback.format_exc()
    print(json.dumps(failures))


@pytest.fixture(scope="module")
def failures():
    command = [sys.executable, __file__, str(build_twin())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("check", CHECKS)
def test_twin(failures, check):
    assert check not in failures, failures[check]


if __name__ == "__main__":
    main(sys.argv[1])
