"""What `twicing_attention` refuses and in which words, and which backend it takes."""

import re
import subprocess
import sys
from importlib.metadata import requires
from types import SimpleNamespace

import pytest
import torch

from twicing_core import attention, twicing_attention


def tensor(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def offsets(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


MESSAGES = {
    "query_3d": ({"query": tensor(2, 5, 8)}, "query must be (batch, heads, seq, head_dim), got shape (2, 5, 8)"),
    "value_5d": ({"value": tensor(1, 2, 4, 5, 8)}, "value must be (batch, heads, seq, head_dim), got shape (1, 2"),
    "dtypes": ({"key": tensor(2, 4, 5, 8).double()}, "key must have the query's dtype and device, torch.float32 on"),
    "devices": ({"value": tensor(2, 4, 5, 8, device="meta")}, "got torch.float32 on meta"),
    "integers": (
        {name: tensor(2, 4, 5, 8, dtype=torch.int64) for name in ("query", "key", "value")},
        "query, key and value must be floating point, got torch.int64",
    ),
    "key_and_value": ({"value": tensor(2, 4, 6, 8)}, "key and value must have the same shape, got (2, 4, 5, 8) and"),
    "batch": ({"query": tensor(3, 4, 5, 8)}, "query and key must have the same batch and head_dim, got (3, 4, 5, 8)"),
    "head_dim": ({"query": tensor(2, 4, 5, 4)}, "query and key must have the same batch and head_dim"),
    "lengths": ({"query": tensor(2, 4, 1, 8)}, "the same length, because A @ A is square, got 1 and 5"),
    "no_heads": ({"query": tensor(2, 0, 5, 8)}, "heads and head_dim must be at least 1, got (2, 0, 5, 8)"),
    "not_grouped": ({"query": tensor(2, 8, 5, 8)}, "query has 8 heads and key 4: pass enable_gqa=True"),
    "indivisible": (
        {"query": tensor(2, 6, 5, 8), "enable_gqa": True},
        "the query's heads must be a multiple of the key's, got 6 and 4",
    ),
    "dropout_one": ({"dropout_p": 1.0}, "dropout_p must be in [0, 1), got 1.0"),
    "dropout_negative": ({"dropout_p": -0.1}, "dropout_p must be in [0, 1), got -0.1"),
    "dropout_composed": (
        {"dropout_p": 0.1, "backend": "composed"},
        "backend 'composed' cannot do this call: dropout_p=0.1 must drop the same entries of A in both products; "
        + "use reference",
    ),
    "backend": ({"backend": "flash"}, "backend must be one of auto, "),
    "mask_and_causal": (
        {"attn_mask": tensor(5, 5, dtype=torch.bool), "is_causal": True},
        "attn_mask and is_causal exclude each other: fold the causal mask into attn_mask",
    ),
    "mask_integers": ({"attn_mask": tensor(5, 5, dtype=torch.int32)}, "attn_mask must be bool (True: may attend) or f"),
    "mask_device": ({"attn_mask": tensor(5, 5, device="meta")}, "attn_mask must be on the query's device, cpu, got m"),
    "mask_shape": (
        {"attn_mask": tensor(2, 5, 5)},
        "attn_mask must be broadcastable to (2, 4, 5, 5), got shape (2, 5, 5)",
    ),
    "mask_5d": ({"attn_mask": tensor(1, 1, 1, 5, 5)}, "attn_mask must be broadcastable to (2, 4, 5, 5)"),
    "mask_and_documents": (
        {"attn_mask": tensor(5, 5), "cu_seqlens": offsets(0, 5, 10)},
        "attn_mask and cu_seqlens exclude each other",
    ),
    "offsets_int64": (
        {"cu_seqlens": offsets(0, 5, 10, dtype=torch.int64)},
        "cu_seqlens must be 1-D int32, got 1-D torch.int64",
    ),
    "offsets_2d": ({"cu_seqlens": offsets(0, 5, 10)[None]}, "cu_seqlens must be 1-D int32, got 2-D torch.int32"),
    "offsets_device": ({"cu_seqlens": offsets(0, 5, 10).to("meta")}, "cu_seqlens must be on the query's device, cpu"),
    "offsets_none": ({"cu_seqlens": offsets()}, "cu_seqlens must start at 0 and end at batch * seq = 10, got []"),
    "offsets_start": ({"cu_seqlens": offsets(1, 5, 10)}, "start at 0 and end at batch * seq = 10, got [1, 5, 10]"),
    "offsets_end": ({"cu_seqlens": offsets(0, 5, 9)}, "start at 0 and end at batch * seq = 10, got [0, 5, 9]"),
    "offsets_decrease": ({"cu_seqlens": offsets(0, 5, 3, 10)}, "cu_seqlens must not decrease, got [0, 5, 3, 10]"),
    "offsets_row": (
        {"cu_seqlens": offsets(0, 3, 8, 10)},
        "cu_seqlens must contain every row's start, since no document spans rows; rows of 5 positions, missing [5]",
    ),
    "offsets_many": ({"cu_seqlens": offsets(*range(20))}, "batch * seq = 10, got [0, 1, 2, 3, 4, 5, 6, 7, ...]"),
}


@pytest.mark.parametrize(("changes", "message"), MESSAGES.values(), ids=MESSAGES.keys())
def test_message(changes, message):
    arguments = {name: tensor(2, 4, 5, 8) for name in ("query", "key", "value")} | changes
    with pytest.raises(ValueError, match=re.escape(message)):
        twicing_attention(**arguments)


def test_auto_takes_the_first_that_does_not_refuse(monkeypatch):
    def backend(name, refuses):
        return SimpleNamespace(refusal=lambda *args, **options: refuses, attend=lambda *args, **options: name)

    table = {"fastest": backend("fastest", "it rains"), "fast": backend("fast", None), "slow": backend("slow", None)}
    monkeypatch.setattr(attention, "BACKENDS", table)
    qkv = [tensor(2, 4, 5, 8)] * 3
    assert twicing_attention(*qkv) == "fast"
    assert twicing_attention(*qkv, backend="slow") == "slow"
    with pytest.raises(ValueError, match="backend 'fastest' cannot do this call: it rains; use fast or slow"):
        twicing_attention(*qkv, backend="fastest")


def test_auto_takes_the_reference_for_dropout(make_qkv):
    qkv = make_qkv()
    torch.manual_seed(0)
    output = twicing_attention(*qkv, dropout_p=0.5)
    torch.manual_seed(0)
    torch.testing.assert_close(output, twicing_attention(*qkv, dropout_p=0.5, backend="reference"))


IMPORT_ALONE = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] not in allowed:
            raise ModuleNotFoundError(f"not for twicing_core: {name}")

allowed = set(sys.stdlib_module_names) | set(sys.argv[1].split(","))
sys.meta_path.insert(0, Refuse())
import torch
import twicing_core
for backend in ("auto", "composed", "reference"):
    x = torch.randn(2, 5, 8, requires_grad=True)
    twicing_core.TwicingAttention(8, 2, backend=backend)(x).sum().backward()
assert x.grad is not None
assert "train" not in sys.modules and "numpy" not in sys.modules
"""


def test_imports_with_torch_alone():
    """Everything else is blocked, save what torch itself requires."""
    required = [re.split(r"[^\w-]", line)[0].replace("-", "_") for line in requires("torch") or []]
    allowed = {"twicing_core", "torch", "torchgen", "functorch", *required} - {"numpy"}
    command = [sys.executable, "-W", "ignore", "-c", IMPORT_ALONE, ",".join(allowed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
