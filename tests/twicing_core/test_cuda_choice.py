"""What `auto` takes on CUDA, and what the fused backend refuses there: decided without a device, on fake tensors."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from twicing_core import attention, fused, preferences, twicing_attention
from twicing_core.preferences import COMPOSED, Preference


@pytest.fixture(autouse=True)
def h100(tmp_path, monkeypatch):
    """A machine with an H100, its kernels loaded, and nothing measured yet."""
    properties = SimpleNamespace(name="H100", major=9, minor=0)
    monkeypatch.setenv("TWICING_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(fused, "_cuda_unavailable", lambda index: None)
    preferences._preference.cache_clear()
    yield properties
    preferences._preference.cache_clear()


@pytest.fixture
def cuda_qkv():
    with FakeTensorMode():

        def make(batch, heads, seq, head_dim, *, dtype=torch.bfloat16, grad=False):
            shape = (batch, heads, seq, head_dim)
            return [torch.empty(shape, dtype=dtype, device="cuda", requires_grad=grad) for _ in range(3)]

        yield make


def chosen(qkv, is_causal=False, cu_seqlens=None, backend="auto", scale=0.1):
    call = {"is_causal": is_causal, "scale": scale, "attn_mask": None, "cu_seqlens": cu_seqlens, "dropout_p": 0.0}
    return attention.choose(backend, *qkv, call)[0]


def test_auto_follows_the_guesses(cuda_qkv, h100):
    long, short = (1, 4, 2048, 64), (1, 4, 197, 64)
    assert chosen(cuda_qkv(*long)) == "composed"
    assert chosen(cuda_qkv(*long, grad=True)) == "fused"
    assert chosen(cuda_qkv(*short)) == "fused"
    assert chosen(cuda_qkv(*long), cu_seqlens=torch.empty(3, dtype=torch.int32)) == "fused"
    with torch.no_grad():
        assert chosen(cuda_qkv(*long, grad=True)) == "composed"
    assert chosen(cuda_qkv(*long), backend="fused") == "fused", "an explicit choice is followed"
    h100.major = 8
    preferences._preference.cache_clear()
    assert chosen(cuda_qkv(*long)) == "fused"


REFUSALS = {
    "float32": ({"dtype": torch.float32}, {}, "the fused CUDA kernels take bfloat16 and float16, got torch.float32"),
    "head_dim": ({"head_dim": 260}, {}, "take head_dim 8 to 256, got 260"),
    "gradients": ({"head_dim": 130, "grad": True}, {}, "have gradients up to head_dim 128, got 130"),
    "scale": ({}, {"scale": -1.0}, "take a positive scale, got -1.0"),
}


@pytest.mark.parametrize(("tensors", "call", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refusals_name_what_can(cuda_qkv, tensors, call, message):
    qkv = cuda_qkv(1, 2, 300, **({"head_dim": 64} | tensors))
    with pytest.raises(ValueError, match=f"{message}; use composed or reference"):
        chosen(qkv, backend="fused", **call)
    assert chosen(qkv, **call) == "composed"


def test_forward_alone_has_larger_heads(cuda_qkv):
    assert chosen(cuda_qkv(1, 2, 300, 256), backend="fused") == "fused"


def test_without_kernels_auto_goes_on(cuda_qkv, monkeypatch):
    monkeypatch.setattr(fused, "_cuda_unavailable", lambda index: "no nvcc found")
    assert chosen(cuda_qkv(1, 2, 100, 64, grad=True)) == "composed"


@pytest.mark.parametrize("head_dim", [64, 80])
def test_calls_reach_the_operator_at_the_kernels_head_dim(cuda_qkv, head_dim):
    called = []

    class Calls(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "twicing":
                called.append((function._opname, args[0].shape[-1], [x for x in args if isinstance(x, str)]))
            return function(*args, **(kwargs or {}))

    qkv = cuda_qkv(1, 2, 300, head_dim, grad=True)
    with Calls():
        output = twicing_attention(*qkv, backend="fused")  # (its backward would need the device)
    assert called == [("forward", 64 if head_dim == 64 else 96, ["long"])]
    assert output.shape == (1, 2, 300, head_dim)


def test_a_kernel_is_taken_only_where_it_fits(cuda_qkv):
    """Of one regime, the wavefront leaves head dimensions above 128 to the long kernels; backward, another is taken."""
    preferences.save("H100", {"causal": Preference("wavefront_lag1", "wavefront", "long", "")})
    query, large = cuda_qkv(1, 4, 2048, 128)[0], cuda_qkv(1, 4, 2048, 256)[0]
    assert preferences.forward_kernel(query, True, training=False) == "wavefront_lag1"
    assert preferences.forward_kernel(query, True, training=True) == "wavefront"
    assert preferences.backward_kernel(query, True) == "long"
    assert preferences.forward_kernel(large, True, training=False) == "long"


def test_measurements_replace_guesses(cuda_qkv):
    qkv = cuda_qkv(1, 4, 2048, 64)
    assert preferences.preference_of(qkv[0], False).inference == COMPOSED
    measured = Preference("long", COMPOSED, COMPOSED, "")
    path = preferences.save("H100", {"full": measured})
    assert json.loads(path.read_text())["H100"]["full"]["inference"] == "long"
    assert chosen(qkv) == "fused"
    assert chosen(cuda_qkv(1, 4, 2048, 64, grad=True)) == "composed"
    assert chosen(qkv, is_causal=True) == "composed", "not measured: the guess"
    preferences.save("other", {"full": measured})
    assert set(preferences.load()) == {"H100", "other"}


DAMAGES = {
    "not_json": ("{", "Expecting"),
    "list": ("[]", r"the file must be an object, got \[\]"),
    "regime": ('{"H100": {"long": {}}}', "H100, long: the regimes are short, causal, full"),
    "missing": (
        '{"H100": {"full": {"inference": "long"}}}',
        "must have inference, training and backward, has inference",
    ),
    "kernel": (
        '{"H100": {"full": {"inference": "fast", "training": "long", "backward": "long"}}}',
        "H100, full, inference is 'fast'; it may be long, ",
    ),
    "mixed": (
        '{"H100": {"full": {"inference": "long", "training": "long", "backward": "composed"}}}',
        "training and backward are both composed, or neither",
    ),
}


@pytest.mark.parametrize(("text", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_file_is_not_used_and_says_why(cuda_qkv, text, message):
    preferences.path().write_text(text)
    with pytest.warns(UserWarning, match=message):
        assert preferences.preference_of(cuda_qkv(1, 2, 300, 64)[0], False).inference == COMPOSED


def test_every_guess_is_of_kernels_that_there_are():
    for regimes in preferences.GUESSES.values():
        assert tuple(regimes) == preferences.REGIMES
        for guess in regimes.values():
            assert {guess.inference, guess.training} <= {*preferences.FORWARD_KERNELS, COMPOSED}
            assert guess.backward in (*preferences.BACKWARD_KERNELS, COMPOSED)
            assert (guess.training == COMPOSED) == (guess.backward == COMPOSED) and guess.reason
    assert preferences.guess((11, 0)) is preferences.GUESSES[10] and preferences.guess((8, 9)) is preferences.GUESSES[8]
