"""Packed documents: each attends as if it were alone, and no seq x seq tensor is made for it."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from twicing_core import twicing_attention
from twicing_core.packing import attend_packed, document_mask

# Two rows of 65: one document; equal ones; ragged ones of every size class; single tokens; an empty one.
PACKINGS = {
    "rows": [0, 65, 130],
    "equal": [0, 13, 26, 39, 52, 65, 78, 91, 104, 117, 130],
    "ragged": [0, 1, 3, 6, 11, 27, 28, 65, 66, 100, 130],
    "tokens": list(range(131)),
    "empty_documents": [0, 0, 20, 20, 65, 90, 130, 130],
}


def by_document(query, key, value, *, cu_seqlens, **options):
    """Cuts the documents out, attends in each by itself, and puts the outputs back in a row."""
    batch, _, seq, _ = query.shape
    outputs = []
    for start, end in pairwise(cu_seqlens.tolist()):
        row, first = divmod(start, seq) if start < batch * seq else (batch - 1, seq)
        document = (slice(row, row + 1), slice(None), slice(first, first + end - start))
        outputs.append(twicing_attention(query[document], key[document], value[document], **options))
    rows = torch.cat(outputs, dim=2)  # (1, heads, batch * seq, head_dim)
    return rows.unflatten(2, (batch, seq)).squeeze(0).transpose(0, 1)


@pytest.mark.parametrize("backend", ["auto", "composed", "reference"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS.keys())
def test_packed_equals_document_by_document(make_qkv, run, packing, is_causal, backend):
    qkv = make_qkv(seq=65, key_heads=2)
    options = {"cu_seqlens": torch.tensor(packing, dtype=torch.int32), "is_causal": is_causal, "enable_gqa": True}
    actual = run(qkv, backend=backend, **options)
    expected = run(qkv, function=by_document, backend="reference", **options)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=12), is_causal=st.booleans())
def test_any_packing_of_one_row(make_qkv, run, lengths, is_causal):
    qkv = make_qkv(batch=1, seq=sum(lengths))
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    actual = run(qkv, cu_seqlens=cu_seqlens, is_causal=is_causal, backend="composed")
    expected = run(qkv, cu_seqlens=cu_seqlens, is_causal=is_causal, backend="reference")
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("document", [(0, 1), (28, 65), (66, 100)], ids=["first", "longest_of_bucket", "padded"])
@pytest.mark.parametrize("backend", ["auto", "composed"])
def test_not_a_number_stays_in_its_document(make_qkv, backend, document, is_causal):
    inside = torch.zeros(2, 65, dtype=torch.bool)
    inside.view(-1)[slice(*document)] = True
    qkv = [tensor.detach().masked_fill(inside[:, None, :, None], torch.nan) for tensor in make_qkv(seq=65)]
    cu_seqlens = torch.tensor(PACKINGS["ragged"], dtype=torch.int32)
    output = twicing_attention(*qkv, cu_seqlens=cu_seqlens, is_causal=is_causal, backend=backend)
    assert torch.equal(output.isnan().any(-1).any(1), inside)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_calls_are_few_and_masks_only_for_keys(make_qkv, is_causal):
    """As documented for `attend`: at most ceil(log2(seq)) + 1 calls, a mask of keys if needed, none if causal."""
    calls = []

    def attend(query, key, value, *, attn_mask, is_causal):
        calls.append((query.shape, None if attn_mask is None else attn_mask.shape, is_causal))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, is_causal=is_causal)

    cu_seqlens = torch.tensor([0, *torch.arange(1, 46).cumsum(0)], dtype=torch.int32)  # lengths 1 to 45
    query, key, value = make_qkv(batch=1, seq=int(cu_seqlens[-1]))
    output = attend_packed(attend, query, key, value, cu_seqlens, is_causal)
    assert len(calls) == 7  # 1, 2, 3-4, 5-8, 9-16, 17-32, 33-45
    assert sum(shape[0] for shape, _, _ in calls) == 45
    for shape, mask_shape, call_is_causal in calls:
        documents, _, longest, _ = shape
        assert call_is_causal == is_causal
        assert mask_shape == (None if is_causal or documents == 1 else (documents, 1, 1, longest))
    mask = document_mask(cu_seqlens, 1, query.shape[2])
    mask = mask.tril() if is_causal else mask
    torch.testing.assert_close(output, F.scaled_dot_product_attention(query, key, value, attn_mask=mask))


def test_document_mask():
    mask = document_mask(torch.tensor([0, 1, 3, 3, 4, 6], dtype=torch.int32), batch=2, seq=3)
    assert mask.int().tolist() == [[[[1, 0, 0], [0, 1, 1], [0, 1, 1]]], [[[1, 0, 0], [0, 1, 1], [0, 1, 1]]]]


SEQ = 1024
CALLS = {
    "full": {},
    "causal": {"is_causal": True},
    "grouped": {"is_causal": True, "enable_gqa": True},
    "key_mask": {"attn_mask": (torch.arange(SEQ) < 1000).view(1, 1, SEQ)},
    "packed": {"cu_seqlens": torch.tensor([0, 700, 705, 900, SEQ], dtype=torch.int32), "enable_gqa": True},
    "packed_causal": {"cu_seqlens": torch.tensor([0, 700, 705, 900, SEQ], dtype=torch.int32), "is_causal": True},
}


@pytest.mark.parametrize("backend", ["auto", "composed"])
@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_no_tensor_is_seq_by_seq(make_qkv, run, largest_tensor, options, backend, dtype):
    heads, key_heads = (2, 1) if "enable_gqa" in options else (1, 1)
    qkv = make_qkv(batch=1, heads=heads, seq=SEQ, key_heads=key_heads, dtype=dtype)
    with largest_tensor:
        run(qkv, backend=backend, **options)
    assert 0 < largest_tensor.elements <= 8 * heads * SEQ * 8  # a few times the query, forward and backward


def test_the_reference_is_seq_by_seq(make_qkv, run, largest_tensor):
    with largest_tensor:
        run(make_qkv(batch=1, heads=1, seq=256), backend="reference")
    assert largest_tensor.elements == 256 * 256
