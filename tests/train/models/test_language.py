"""The language model: shapes, what it may and may not see, learning, precision, recomputation."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from train.config import LanguageModelConfig
from train.models.language import LanguageModel
from train.models.layers import sinusoidal_positions

VOCAB, LENGTH = 40, 24
VARIANTS: dict[str, dict[str, Any]] = {
    "modern": {},
    "grouped-queries": dict(kv_heads=2),
    "gpt2": dict(positions="learned", norm="layer", mlp="gelu", bias=True),
    "paper": dict(positions="sinusoidal", norm="layer", norm_position="post", mlp="relu", bias=True)
    | dict(head="adaptive", adaptive_cutoffs=[10, 25], twicing_layers="last:1"),
    "softmax": dict(twicing_layers="none"),
    "softmax-grouped-untied": dict(twicing_layers="none", kv_heads=1, head="untied"),
}
BASE = LanguageModelConfig(vocab_size=VOCAB, layers=2, width=32, heads=4, mlp_width=48, sequence_length=LENGTH)


def make_model(seed: int = 0, activation_checkpointing: int = 0, **changes: Any) -> LanguageModel:
    torch.manual_seed(seed)
    return LanguageModel(dataclasses.replace(BASE, **changes), activation_checkpointing)


def make_tokens(rows: int = 2, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(VOCAB, (rows, LENGTH + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


all_variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())


@all_variants
def test_losses_are_the_cross_entropy_of_the_logits(variant: dict[str, Any]) -> None:
    model = make_model(**variant)
    inputs, targets = make_tokens()
    logits, losses = model(inputs), model(inputs, targets)
    assert logits.shape == (2, LENGTH, VOCAB) and losses.shape == (2, LENGTH) and losses.dtype == torch.float32
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(losses)
    torch.testing.assert_close(losses, expected)


@all_variants
def test_logits_do_not_see_later_tokens(variant: dict[str, Any]) -> None:
    model = make_model(**variant)
    inputs, _ = make_tokens(rows=1)
    before = model(inputs)
    for position in (0, 5, LENGTH - 1):
        changed = inputs.clone()
        changed[0, position] = (changed[0, position] + 1) % VOCAB
        after = model(changed)
        torch.testing.assert_close(after[:, :position], before[:, :position], atol=1e-6, rtol=1e-5)
        assert (after[:, position] - before[:, position]).abs().max() > 1e-4


@all_variants
def test_nothing_leaks_between_packed_documents(variant: dict[str, Any]) -> None:
    model = make_model(**variant)
    inputs, _ = make_tokens()
    boundaries = torch.tensor([0, 9, 10, LENGTH, LENGTH + 13, 2 * LENGTH], dtype=torch.int32)
    before = model(inputs, cu_seqlens=boundaries).flatten(0, 1)
    for start, end in zip(boundaries[:-1].tolist(), boundaries[1:].tolist(), strict=True):
        changed = inputs.flatten().clone()
        changed[start:end] = (changed[start:end] + 1) % VOCAB
        after = model(changed.view_as(inputs), cu_seqlens=boundaries).flatten(0, 1)
        outside = [*range(start), *range(end, 2 * LENGTH)]
        torch.testing.assert_close(after[outside], before[outside], atol=1e-6, rtol=1e-5)
        assert (after[start:end] - before[start:end]).abs().amax(dim=-1).min() > 1e-4


def test_with_rotary_positions_a_packed_document_reads_as_if_it_were_alone() -> None:
    model = make_model()
    inputs, _ = make_tokens(rows=1)
    packed = model(inputs, cu_seqlens=torch.tensor([0, 10, LENGTH], dtype=torch.int32))
    torch.testing.assert_close(packed[:, 10:], model(inputs[:, 10:]), atol=1e-5, rtol=1e-4)


@all_variants
def test_learns_one_batch_by_heart(variant: dict[str, Any]) -> None:
    model = make_model(**variant)
    inputs, targets = make_tokens()
    boundaries = torch.tensor([0, 11, LENGTH, 2 * LENGTH], dtype=torch.int32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(inputs, targets, boundaries).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3


@all_variants
def test_every_parameter_has_a_gradient(variant: dict[str, Any]) -> None:
    model = make_model(**variant)
    model(*make_tokens()).mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize(
    "variant", [VARIANTS["modern"], VARIANTS["paper"] | dict(dropout=0.2)], ids=["modern", "dropout"]
)
def test_recomputing_activations_changes_nothing(variant: dict[str, Any], every: int) -> None:
    results = []
    for activation_checkpointing in (0, every):
        model = make_model(activation_checkpointing=activation_checkpointing, **variant)
        torch.manual_seed(3)
        losses = model(*make_tokens())
        losses.mean().backward()
        results.append([losses.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("every", "expected"), [(0, []), (1, [1, 2, 3, 4, 5]), (2, [2, 4]), (5, [5])])
def test_every_kth_block_recomputes(every: int, expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    from train.models import language

    model = make_model(layers=5, activation_checkpointing=every)
    recomputed = []

    def checkpoint(block: nn.Module, *arguments: Any, use_reentrant: bool) -> torch.Tensor:
        recomputed.append(1 + list(model.blocks).index(block))
        return block(*arguments)

    monkeypatch.setattr(language, "checkpoint", checkpoint)
    model(make_tokens()[0])
    assert recomputed == expected
    model.eval()
    model(make_tokens()[0])
    assert recomputed == expected


def test_the_tied_matrix_is_registered_once() -> None:
    model = make_model()
    assert [name for name, p in model.named_parameters() if p.shape == (VOCAB, 32)] == ["embedding.weight"]
    assert len(model.state_dict()) == len(list(model.parameters()))


def test_one_seed_gives_one_model() -> None:
    first, second, other = make_model(7), make_model(7), make_model(8)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.embedding.weight, other.embedding.weight)


def test_initial_weights_are_those_of_gpt2() -> None:
    model = make_model(width=256, heads=4, mlp_width=512, layers=8, bias=True, norm="layer")
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.full_like(parameter, float("norm.weight" in name))), name
        else:
            expected = 0.02 / 4 if name.endswith(("proj.weight", "down.weight")) else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name


@pytest.mark.parametrize("positions", ["rope", "learned", "sinusoidal"])
def test_what_enters_the_first_block(positions: str) -> None:
    model = make_model(positions=positions)
    for block in model.blocks:  # which then change nothing
        block.attention.proj.weight.data.zero_()
        block.feed_forward.down.weight.data.zero_()
    inputs, _ = make_tokens()
    entering = model.embedding(inputs)
    if positions == "learned":
        entering = entering + model.positions.weight
    elif positions == "sinusoidal":
        entering = entering * 32**0.5 + sinusoidal_positions(LENGTH, 32, torch.device("cpu"))
    torch.testing.assert_close(model(inputs), model.norm(entering) @ model.embedding.weight.T)


def test_the_first_loss_is_that_of_guessing() -> None:
    inputs, targets = make_tokens(rows=8)
    assert make_model()(inputs, targets).mean().item() == pytest.approx(torch.tensor(VOCAB).log().item(), abs=0.1)


def test_dropout_is_off_in_evaluation_and_drawn_from_the_seed_in_training() -> None:
    model = make_model(dropout=0.5)
    inputs, _ = make_tokens()

    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return model(inputs)

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    model.eval()
    assert torch.equal(run(1), run(2))


@all_variants
def test_a_model_cast_to_bfloat16_stays_close(variant: dict[str, Any]) -> None:
    inputs, targets = make_tokens()
    exact = make_model(**variant)(inputs, targets)
    model = make_model(**variant).bfloat16()
    losses = model(inputs, targets)
    losses.mean().backward()
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, exact, atol=0.06, rtol=0)
    assert {p.grad.dtype for p in model.parameters()} == {torch.bfloat16}


def test_casting_to_bfloat16_costs_rotary_positions_no_precision() -> None:
    """At position 4,000 with angles cast to bfloat16 the two models would have nothing in common."""
    sizes = dict(width=64, heads=1, layers=1, sequence_length=4096)
    inputs = torch.arange(4096).remainder(VOCAB)[None]
    exact = make_model(**sizes)
    cast = make_model(**sizes).bfloat16()
    assert list(cast.buffers()) == []  # or they would be cast
    for model in (exact, cast):  # sharp attention, so that positions matter
        model.blocks[0].attention.qkv.weight.data.mul_(20)
        model.blocks[0].attention.proj.weight.data.mul_(20)
    expected, actual = exact(inputs)[0, 4000:], cast(inputs)[0, 4000:].float()
    assert F.cosine_similarity(expected, actual, dim=-1).min() > 0.98


@pytest.mark.parametrize("variant", ["modern", "gpt2", "softmax"])
def test_compiles_without_graph_breaks(variant: str) -> None:
    model = make_model(**VARIANTS[variant])
    inputs, targets = make_tokens()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs, targets), model(inputs, targets))


def test_softmax_attention_is_torchs() -> None:
    model = make_model(twicing_layers="none", layers=1, positions="learned", norm="layer", mlp="gelu")
    attention = model.blocks[0].attention
    x = torch.randn(2, LENGTH, 32)
    query, key, value = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in attention.qkv(x).chunk(3, dim=-1))
    weights = (query @ key.mT / 8**0.5).masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -torch.inf).softmax(-1)
    torch.testing.assert_close(attention(x), attention.proj((weights @ value).transpose(1, 2).flatten(2)))
