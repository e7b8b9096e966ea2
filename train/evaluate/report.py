"""Validation metrics as a table, beside what they should be held against."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from train.evaluate.baselines import FASHION_MNIST_ACCURACY, bigram_cross_entropy, unigram_cross_entropy
from train.trained import Trained


def language_report(trained: Trained, metrics: dict[str, float], baselines: bool) -> str:
    """Loss in nats per token and perplexity; with `baselines`, of n-gram models of the same tokens too."""
    losses = {"this model": metrics["loss"]}
    if baselines:
        train, validation = (token_pairs(trained, split) for split in ("train", "validation"))
        vocab = trained.config.model.vocab_size
        losses["bigram model (interpolated Kneser-Ney)"] = bigram_cross_entropy(train, validation, vocab)
        losses["unigram model"] = unigram_cross_entropy(train, validation, vocab)
    lines = [f"{'':42}{'loss':>8}{'perplexity':>13}"]
    lines += [f"{name:42}{loss:8.4f}{math.exp(loss):13,.1f}" for name, loss in losses.items()]
    return "\n".join(lines)


def vision_report(trained: Trained, metrics: dict[str, float], baselines: bool) -> str:
    """Accuracy in percent; with `baselines`, the published ones where the data set is Fashion-MNIST."""
    accuracies = {"this model": 100 * metrics["accuracy"]}
    if baselines and trained.data.validation_manifest.source == "fashion-mnist":
        accuracies |= {f"{name} (published)": value for name, value in FASHION_MNIST_ACCURACY.items()}
    lines = [f"{'':42}{'accuracy %':>10}"] + [f"{name:42}{value:10.2f}" for name, value in accuracies.items()]
    return "\n".join(lines)


def token_pairs(trained: Trained, split: str) -> NDArray[np.integer]:
    """(n, 2): every (input, target) pair of a data set, as the model is trained or scored on them."""
    rows = trained.data.rows(split)  # (samples, row_length + 1)
    return np.stack([rows[:, :-1].ravel(), rows[:, 1:].ravel()], axis=1)
