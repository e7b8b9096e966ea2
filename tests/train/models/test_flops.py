"""Counted FLOPs against torch's counter, which sees every matrix product of the reference backend."""

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from train.config import AnyConfig, LanguageConfig, LanguageModelConfig, VisionConfig, VisionModelConfig
from train.models.flops import count_parameters
from train.models.flops import model_flops_per_sample as flops_with
from train.models.language import LanguageModel
from train.models.vision import VisionModel

LANGUAGE = LanguageModelConfig(
    vocab_size=50, layers=3, width=32, heads=4, mlp_width=48, sequence_length=24, attention_backend="reference"
)
VISION = VisionModelConfig(
    image_size=16, patch_size=4, channels=3, classes=5, layers=3, width=32, heads=2, attention_backend="reference"
)


def language(activation_checkpointing: int = 0, **changes: Any) -> LanguageConfig:
    config = LanguageConfig(model=dataclasses.replace(LANGUAGE, **changes))
    config.train.activation_checkpointing = activation_checkpointing
    return config


def vision(**changes: Any) -> VisionConfig:
    return VisionConfig(model=dataclasses.replace(VISION, **changes))


def model_flops_per_sample(config: AnyConfig) -> tuple[float, float]:
    return flops_with(config, config.model.attention_backend, torch.device("cpu"))


def counted(config: AnyConfig, samples: int) -> float:
    """FLOPs a sample, forward and backward, that torch's counter sees."""
    with FlopCounterMode(display=False) as counter:
        if isinstance(config, LanguageConfig):
            tokens = torch.randint(config.model.vocab_size, (samples, config.model.sequence_length))
            LanguageModel(config.model, config.train.activation_checkpointing)(tokens, tokens).sum().backward()
        else:
            size = config.model.image_size
            VisionModel(config.model)(torch.randn(samples, config.model.channels, size, size)).sum().backward()
    return counter.get_total_flops() / samples


@pytest.mark.parametrize(
    "config",
    [
        language(),
        language(head="untied"),
        language(mlp="gelu", positions="learned", norm="layer"),
        language(kv_heads=2),
        vision(),
        vision(channels=1, patch_size=8, mlp_ratio=2.0),
    ],
    ids=["modern", "untied", "gpt2", "grouped-queries", "vit", "vit-narrow"],
)
def test_hardware_flops_are_what_torch_counts(config: AnyConfig) -> None:
    assert model_flops_per_sample(config)[1] == counted(config, samples=3)


@pytest.mark.parametrize(
    ("config", "baseline", "model_products", "hardware_products"),
    [
        (vision(attention_backend="composed"), vision(twicing_layers="none"), 9 - 6, 14 - 7),
        (language(attention_backend="composed"), language(twicing_layers="none"), (9 - 6) / 2, (14 - 7) / 2),
        (language(attention_backend="fused"), language(twicing_layers="none"), (9 - 6) / 2, (10 - 7) / 2),
        (vision(attention_backend="fused"), vision(twicing_layers="none"), 9 - 6, 10 - 7),
    ],
    ids=["full", "causal", "causal-fused", "short-fused"],
)
def test_what_twicing_adds_to_softmax(
    config: AnyConfig, baseline: AnyConfig, model_products: float, hardware_products: float
) -> None:
    tokens = 24 if isinstance(config, LanguageConfig) else 17
    product = 2 * tokens**2 * 32 * 3
    twicing, softmax = model_flops_per_sample(config), model_flops_per_sample(baseline)
    assert twicing[0] - softmax[0] == pytest.approx(model_products * product)
    assert twicing[1] - softmax[1] == pytest.approx(hardware_products * product)


@pytest.mark.parametrize(("length", "products"), [(256, 10), (257, 12)], ids=["short", "long"])
def test_the_fused_kernels_of_a_gpu_take_one_pass_over_short_rows(length: int, products: int) -> None:
    twicing, softmax = language(sequence_length=length), language(sequence_length=length, twicing_layers="none")
    cuda = torch.device("cuda")
    added = flops_with(twicing, "fused", cuda)[1] - flops_with(softmax, "fused", cuda)[1]
    assert added == pytest.approx((products - 7) / 2 * 2 * length**2 * 32 * 3)


def test_model_flops_of_softmax_are_six_per_parameter_and_attention() -> None:
    config = language(twicing_layers="none")
    matrices = sum(p.numel() for p in LanguageModel(config.model).parameters() if p.dim() == 2)
    attention = 3 * (6 / 2) * 2 * 24**2 * 32
    assert model_flops_per_sample(config)[0] == 6 * matrices * 24 + attention


@pytest.mark.parametrize(("every", "blocks"), [(1, 3), (2, 1), (3, 1)])
def test_recomputing_costs_hardware_flops_only(every: int, blocks: int) -> None:
    plain, recomputed = language(), language(activation_checkpointing=every)
    assert model_flops_per_sample(plain)[0] == model_flops_per_sample(recomputed)[0]
    skipped = blocks * 2 * 24 * 48 * 32  # by torch: the block's last product
    assert model_flops_per_sample(recomputed)[1] == counted(recomputed, samples=3) + skipped


@pytest.mark.parametrize(
    ("changes", "embeddings"),
    [({}, 50 * 32), ({"positions": "learned"}, (50 + 24) * 32), ({"head": "untied"}, 50 * 32)],
    ids=["tied", "learned positions", "untied"],
)
def test_parameters_outside_embeddings(changes: dict[str, Any], embeddings: int) -> None:
    model = LanguageModel(dataclasses.replace(LANGUAGE, **changes))
    total = sum(p.numel() for p in model.parameters())
    assert count_parameters(model) == (total, total - embeddings)
