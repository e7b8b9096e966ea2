"""Vision transformers: timm's, apart from the attention of the chosen blocks."""

import dataclasses
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import Attention, VisionTransformer

from train.config import VisionModelConfig
from train.models.vision import VisionAttention, VisionModel
from twicing_core import TwicingAttention

TINY = VisionModelConfig(image_size=16, patch_size=4, channels=3, classes=5, layers=3, width=32, heads=2)


def make_model(seed: int = 0, activation_checkpointing: int = 0, **changes: Any) -> VisionTransformer:
    torch.manual_seed(seed)
    return VisionModel(dataclasses.replace(TINY, **changes), activation_checkpointing)


@pytest.mark.parametrize(("name", "width", "heads"), [("deit_tiny", 192, 3), ("deit_small", 384, 6)])
@pytest.mark.parametrize("twicing_layers", ["none", "all"])
def test_timm_weights_load_strictly(name: str, width: int, heads: int, twicing_layers: str) -> None:
    published = timm.create_model(f"{name}_patch16_224", pretrained=False).eval()
    shape = VisionModelConfig(224, 16, 3, 1000, 12, width, heads, twicing_layers=twicing_layers)
    model = VisionModel(shape).eval()
    model.load_state_dict(published.state_dict(), strict=True)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        equal = torch.equal(model(images), published(images))
    assert equal == (twicing_layers == "none")


def test_only_the_chosen_blocks_are_swapped() -> None:
    kinds = [type(block.attn) for block in make_model(twicing_layers="2-3").blocks]
    assert kinds == [Attention, VisionAttention, VisionAttention] and issubclass(VisionAttention, TwicingAttention)


def test_softmax_and_twicing_models_start_from_equal_weights() -> None:
    softmax, twicing = make_model(twicing_layers="none").state_dict(), make_model().state_dict()
    assert softmax.keys() == twicing.keys()
    assert all(torch.equal(softmax[name], twicing[name]) for name in softmax)


@pytest.mark.parametrize("twicing_layers", ["none", "all"])
def test_weights_drawn_later_are_those_of_timms_constructor(twicing_layers: str) -> None:
    torch.manual_seed(0)
    whole = VisionTransformer(16, 4, 3, 5, embed_dim=32, depth=3, num_heads=2).state_dict()
    torch.manual_seed(0)
    model = VisionModel(dataclasses.replace(TINY, twicing_layers=twicing_layers), initialise=False)
    model.initialise()
    weights = model.state_dict()
    assert all(torch.equal(weights[name], whole[name]) for name in whole)
    weights = make_model(twicing_layers=twicing_layers).state_dict()
    assert all(torch.equal(weights[name], whole[name]) for name in whole)


def test_twicing_blocks_compute_twicing_attention() -> None:
    model = make_model().eval()
    attention, x = model.blocks[0].attn, torch.randn(2, 17, 32)
    query, key, value = attention.qkv(x).view(2, 17, 3, 2, 16).permute(2, 0, 3, 1, 4)
    weights = (query @ key.mT / 4).softmax(-1)
    output = (2 * weights - weights @ weights) @ value
    torch.testing.assert_close(attention(x), attention.proj(output.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("every", [1, 2])
def test_recomputing_activations_changes_nothing(every: int) -> None:
    images, results = torch.randn(2, 3, 16, 16), []
    for activation_checkpointing in (0, every):
        model = make_model(activation_checkpointing=activation_checkpointing, drop_path=0.3)
        assert [block.recompute for block in model.blocks] == [
            activation_checkpointing > 0 and number % every == 0 for number in (1, 2, 3)
        ]
        torch.manual_seed(3)
        logits = model(images)
        logits.square().sum().backward()
        results.append([logits.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_learns_one_batch_by_heart() -> None:
    model = make_model(channels=1)
    images, labels = torch.randn(10, 1, 16, 16), torch.arange(10) % 5
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_drop_path_grows_with_depth() -> None:
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in make_model(drop_path=0.2).blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])


def test_compiles_without_graph_breaks() -> None:
    model, images = make_model(), torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(images), model(images))
