"""The n-gram baselines against definitions written out with dictionaries."""

import math
from collections import Counter

import numpy as np
import pytest

from train.evaluate.baselines import (
    FASHION_MNIST_ACCURACY,
    KneserNeyBigram,
    bigram_cross_entropy,
    unigram_cross_entropy,
    unigram_probabilities,
)


def random_pairs(count: int, vocab: int, seed: int) -> np.ndarray:
    """A stream in which small tokens are frequent and a token is likely to be followed by its double."""
    random = np.random.default_rng(seed)
    tokens = (vocab * random.random(count + 1) ** 3).astype(np.uint16)
    follows = random.random(count) < 0.5
    tokens[1:][follows] = (2 * tokens[:-1][follows]) % vocab
    return np.stack([tokens[:-1], tokens[1:]], axis=1)


def all_pairs(vocab: int) -> np.ndarray:
    return np.stack(np.meshgrid(np.arange(vocab), np.arange(vocab), indexing="ij"), axis=-1).reshape(-1, 2)


def brute_force_bigram(train: np.ndarray, vocab: int) -> np.ndarray:
    """(vocab, vocab) probabilities, from the formulas of Chen and Goodman (1999)."""
    pairs = Counter(map(tuple, train.tolist()))
    types = Counter(w for _, w in pairs)

    def discount(counts: list[int]) -> float:
        return counts.count(1) / (counts.count(1) + 2 * counts.count(2))

    d_types, d_pairs = discount(list(types.values())), discount(list(pairs.values()))
    probability = np.zeros((vocab, vocab))
    for u in range(vocab):
        total = sum(count for (first, _), count in pairs.items() if first == u)
        followers = sum(1 for first, _ in pairs if first == u)
        for w in range(vocab):
            q = max(types[w] - d_types, 0) / len(pairs) + d_types * len(types) / len(pairs) / vocab
            if total == 0:
                probability[u, w] = q
            else:
                probability[u, w] = max(pairs[u, w] - d_pairs, 0) / total + d_pairs * followers / total * q
    return probability


def test_bigram_equals_brute_force() -> None:
    train = random_pairs(300, 24, seed=0)
    actual = KneserNeyBigram.fit(train, 24).probability(all_pairs(24)).reshape(24, 24)
    np.testing.assert_allclose(actual, brute_force_bigram(train, 24), rtol=1e-12)


@pytest.mark.parametrize("count", [1, 2, 50, 5000])
def test_bigram_sums_to_one_after_every_token_seen_or_not(count: int) -> None:
    train = random_pairs(count, 40, seed=1)
    table = KneserNeyBigram.fit(train, 40).probability(all_pairs(40)).reshape(40, 40)
    np.testing.assert_allclose(table.sum(axis=1), 1.0, rtol=1e-12)
    assert (table > 0).all()


def test_unigram_adds_one_to_every_count_of_a_target() -> None:
    train = np.array([[3, 0], [0, 0], [0, 1]])
    np.testing.assert_allclose(unigram_probabilities(train, 4), [3 / 7, 2 / 7, 1 / 7, 1 / 7])
    expected = -(math.log(3 / 7) + math.log(1 / 7)) / 2
    assert unigram_cross_entropy(train, np.array([[9, 0], [9, 3]]), 4) == pytest.approx(expected)


def test_cross_entropy_is_the_mean_over_the_validation_pairs_only() -> None:
    train = random_pairs(300, 24, seed=0)
    validation = random_pairs(80, 24, seed=2)
    table = brute_force_bigram(train, 24)
    expected = -np.mean([math.log(table[u, w]) for u, w in validation.tolist()])
    assert bigram_cross_entropy(train, validation, 24) == pytest.approx(expected)


def test_order_of_the_baselines_on_text_with_structure() -> None:
    train, validation = random_pairs(200_000, 500, seed=3), random_pairs(20_000, 500, seed=4)
    unigram = unigram_cross_entropy(train, validation, 500)
    bigram = bigram_cross_entropy(train, validation, 500)
    assert bigram < unigram < math.log(500)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int64])
def test_pairs_of_a_large_vocabulary_do_not_overflow(dtype: type) -> None:
    vocab = 60_000
    train = np.array([[59_999, 59_999], [59_999, 1], [1, 59_999], [2, 3], [2, 3]], dtype=dtype)
    model = KneserNeyBigram.fit(train, vocab)
    assert model.probability(train[:1])[0] > 100 * model.probability(np.array([[59_998, 59_998]]))[0]


def test_published_accuracies_are_percentages() -> None:
    assert {"MLP 256-128-100": 88.3, "ResNet18": 94.9}.items() <= FASHION_MNIST_ACCURACY.items()
    assert all(80 < accuracy < 100 for accuracy in FASHION_MNIST_ACCURACY.values())
