"""The ways to say which layers are twicing."""

import pytest
import torch

from train.config import LanguageModelConfig
from train.models.attention import SoftmaxAttention
from train.models.language import LanguageModel
from train.models.layers import parse_twicing_layers


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("all", set(range(1, 13))),
        ("none", set()),
        ("3", {3}),
        (3, {3}),
        ("10-12", {10, 11, 12}),
        ("10 - 12", {10, 11, 12}),
        ("5-5", {5}),
        ("last:3", {10, 11, 12}),
        ("last:12", set(range(1, 13))),
        ([3, 7, 11], {3, 7, 11}),
        ([12], {12}),
        ([], set()),
    ],
    ids=str,
)
def test_parsed(spec: object, expected: set[int]) -> None:
    assert parse_twicing_layers(spec, 12) == expected


@pytest.mark.parametrize(
    "spec",
    [0, 13, -1, "13", "0-3", "10-13", "12-10", "last:0", "last:13", "last", "first:3", "3,7", "", [0], [3, 13], ["3"]]
    + [None, True, 2.0, [True], {"layers": 3}],
    ids=str,
)
def test_refused_with_the_key_the_value_and_what_is_allowed(spec: object) -> None:
    with pytest.raises(ValueError) as error:
        parse_twicing_layers(spec, 12)
    message = str(error.value)
    assert message.startswith(f"model.twicing_layers is {spec!r}; it must be all, none,") and "from 1 to 12" in message


def test_layers_count_from_one_in_the_model() -> None:
    config = LanguageModelConfig(
        vocab_size=11, layers=3, width=8, heads=2, mlp_width=8, sequence_length=4, twicing_layers=[3]
    )
    softmax = [isinstance(block.attention, SoftmaxAttention) for block in LanguageModel(config).blocks]
    assert softmax == [True, True, False]


def test_softmax_and_twicing_models_start_from_equal_weights() -> None:
    weights = []
    for spec in ("all", "none"):
        torch.manual_seed(5)
        config = LanguageModelConfig(
            vocab_size=11, layers=2, width=8, heads=2, mlp_width=8, sequence_length=4, twicing_layers=spec
        )
        weights.append(LanguageModel(config).state_dict())
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
