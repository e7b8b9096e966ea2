"""Continuing a prompt."""

import torch
from torch import nn

from train.config import LanguageModelConfig
from train.evaluate.generation import generate
from train.models.language import LanguageModel

BOS = 1


class Letters:
    """Token 0 is unused, 1 is the start of a document, 2 .. 27 are letters."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") + 2 for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(ord("a") + token - 2) for token in ids)

    def bos_id(self) -> int:
        return BOS


class Alphabet(nn.Module):
    """Predicts the next letter of the alphabet, and a new document after z; records what it was shown."""

    def __init__(self, sequence_length: int = 8) -> None:
        super().__init__()
        self.config = LanguageModelConfig(vocab_size=28, sequence_length=sequence_length)
        self.weight = nn.Parameter(torch.zeros(1))
        self.windows: list[list[int]] = []

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        assert not self.training and not torch.is_grad_enabled()
        self.windows.append(tokens[0].tolist())
        following = torch.where(tokens == 27, BOS, tokens + 1)
        return 5.0 * nn.functional.one_hot(following, 28).float()


def small_model(head: str = "tied") -> LanguageModel:
    torch.manual_seed(0)
    config = LanguageModelConfig(
        vocab_size=28, layers=1, width=16, heads=2, mlp_width=16, sequence_length=8, head=head, adaptive_cutoffs=[5, 12]
    )
    return LanguageModel(config)


def test_stops_where_another_document_would_start() -> None:
    assert generate(Alphabet(), Letters(), "vw", max_new_tokens=50, temperature=0) == "vwxyz"


def test_stops_after_the_asked_for_tokens() -> None:
    assert generate(Alphabet(), Letters(), "a", max_new_tokens=3, temperature=0) == "abcd"
    assert generate(Alphabet(), Letters(), "a", max_new_tokens=0) == "a"


def test_an_empty_prompt_starts_from_the_document_start() -> None:
    model = Alphabet()
    assert generate(model, Letters(), "", max_new_tokens=2, temperature=0) == "ab"
    assert model.windows == [[BOS], [BOS, 2]]


def test_shows_the_model_at_most_its_sequence_length() -> None:
    model = Alphabet(sequence_length=4)
    generate(model, Letters(), "abc", max_new_tokens=3, temperature=0)
    assert model.windows == [[1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 6]]


def test_is_deterministic_and_leaves_the_model_and_the_global_generator_alone() -> None:
    model = small_model().train()
    state = torch.get_rng_state()
    texts = [generate(model, Letters(), "ab", max_new_tokens=20, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert model.training and torch.equal(torch.get_rng_state(), state)


def test_top_k_of_one_is_the_likeliest_token() -> None:
    greedy = generate(small_model(), Letters(), "ab", max_new_tokens=10, temperature=0)
    assert generate(small_model(), Letters(), "ab", max_new_tokens=10, temperature=5.0, top_k=1, seed=3) == greedy


def test_a_low_temperature_approaches_the_likeliest_token() -> None:
    assert generate(Alphabet(), Letters(), "a", max_new_tokens=9, temperature=0.1, seed=4) == "abcdefghij"
    assert generate(Alphabet(), Letters(), "a", max_new_tokens=9, temperature=9.0, seed=4) != "abcdefghij"


def test_works_with_the_adaptive_head_and_in_bfloat16() -> None:
    text = generate(small_model("adaptive").bfloat16(), Letters(), "ab", max_new_tokens=5, seed=1)
    assert text.startswith("ab")
