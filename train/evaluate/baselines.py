"""What a model must beat: n-gram models of the same tokens, and published accuracies."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Pairs = NDArray[np.integer]  # (n, 2): an input token and the token that follows it

# Test accuracy on Fashion-MNIST in percent, from the benchmark table of the data set's README (arXiv:1708.07747).
FASHION_MNIST_ACCURACY = {
    "MLP 256-128-100": 88.3,
    "2 convolutions, pooling": 87.6,
    "2 convolutions, 2 dense layers": 93.9,
    "ResNet18": 94.9,
}


def unigram_cross_entropy(train: Pairs, validation: Pairs, vocab: int) -> float:
    """Nats per target of `validation` under the frequencies of the targets of `train`, one added to every count.

    Args:
        train, validation: (n, 2) integers, the (input, target) pairs the model is trained and scored on.
        vocab: size of the vocabulary.
    """
    return float(-np.log(unigram_probabilities(train, vocab)[validation[:, 1]]).mean())


def bigram_cross_entropy(train: Pairs, validation: Pairs, vocab: int) -> float:
    """Nats per target of `validation` under an interpolated Kneser-Ney bigram model of `train`; arguments as above."""
    return float(-np.log(KneserNeyBigram.fit(train, vocab).probability(validation)).mean())


def unigram_probabilities(train: Pairs, vocab: int) -> NDArray[np.float64]:
    """(vocab,), summing to 1."""
    counts = np.bincount(train[:, 1], minlength=vocab) + 1.0
    return counts / counts.sum()


@dataclass(frozen=True)
class KneserNeyBigram:
    """Interpolated Kneser-Ney with absolute discounting (Chen and Goodman 1999, sections 2.7 and 3).

        p(w | u) = max(c(uw) - d, 0) / c(u) + d · types(u·) / c(u) · q(w)

    q(w) is proportional to the number of different tokens seen before w, itself discounted and interpolated with the
    uniform distribution, so that every token has a probability. An input that was never seen gives q.
    """

    vocab: int
    codes: NDArray[np.int64]  # u·vocab + w of every pair seen, ascending
    counts: NDArray[np.int64]
    discount: float
    context_counts: NDArray[np.int64]  # c(u), (vocab,)
    context_types: NDArray[np.int64]  # different tokens seen after u, (vocab,)
    continuation: NDArray[np.float64]  # q, (vocab,)

    @classmethod
    def fit(cls, train: Pairs, vocab: int) -> KneserNeyBigram:
        """Counts the (n, 2) pairs of `train`, n at least 1."""
        codes, counts = np.unique(train[:, 0].astype(np.int64) * vocab + train[:, 1], return_counts=True)
        contexts, targets = codes // vocab, codes % vocab
        predecessors = np.bincount(targets, minlength=vocab)
        discount = _discount(predecessors)
        kept = np.maximum(predecessors - discount, 0.0)
        return cls(
            vocab=vocab,
            codes=codes,
            counts=counts,
            discount=_discount(counts),
            context_counts=np.bincount(train[:, 0], minlength=vocab),
            context_types=np.bincount(contexts, minlength=vocab),
            continuation=kept / len(codes) + (1 - kept.sum() / len(codes)) / vocab,
        )

    def probability(self, pairs: Pairs) -> NDArray[np.float64]:
        """p(target | input) of each of the (n, 2) pairs; (n,)."""
        inputs, targets = pairs[:, 0].astype(np.int64), pairs[:, 1].astype(np.int64)
        codes = inputs * self.vocab + targets
        places = np.minimum(np.searchsorted(self.codes, codes), len(self.codes) - 1)
        counts = np.where(self.codes[places] == codes, self.counts[places], 0)
        totals = self.context_counts[inputs]
        seen = np.maximum(totals, 1)
        backoff = np.where(totals > 0, self.discount * self.context_types[inputs] / seen, 1.0)
        return np.maximum(counts - self.discount, 0.0) / seen + backoff * self.continuation[targets]


def _discount(counts: NDArray[np.int64]) -> float:
    """n1 / (n1 + 2·n2), the estimate of Ney, Essen and Kneser (1994); a half where nothing was counted once."""
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    return once / (once + 2 * twice) if once else 0.5
