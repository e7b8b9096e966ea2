"""Validation metrics as a table, beside what they should be held against."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from train.config import DataConfig, LanguageConfig
from train.data.manifest import Manifest, TextManifest
from train.data.shards import ShardReader
from train.evaluate.baselines import FASHION_MNIST_ACCURACY, bigram_cross_entropy, unigram_cross_entropy
from train.prepare.sources import FASHION_MNIST_CLASSES
from train.trained import Trained


def language_report(trained: Trained, metrics: dict[str, float], baselines: bool) -> str:
    """Loss in nats per token and perplexity; with `baselines`, of n-gram models of the same tokens too."""
    losses = {"this model": metrics["loss"]}
    if baselines:
        config = trained.config
        assert isinstance(config, LanguageConfig)
        train, validation = (
            token_pairs(config.data, address) for address in (config.data.train, config.data.validation)
        )
        vocab = config.model.vocab_size
        losses["bigram model (interpolated Kneser-Ney)"] = bigram_cross_entropy(train, validation, vocab)
        losses["unigram model"] = unigram_cross_entropy(train, validation, vocab)
    lines = [f"{'':42}{'loss':>8}{'perplexity':>13}"]
    lines += [f"{name:42}{loss:8.4f}{math.exp(loss):13,.1f}" for name, loss in losses.items()]
    return "\n".join(lines)


def vision_report(trained: Trained, metrics: dict[str, float], baselines: bool) -> str:
    """Accuracy in percent; with `baselines`, the published ones where the data set is Fashion-MNIST."""
    accuracies = {"this model": 100 * metrics["accuracy"]}
    if baselines and _is_fashion_mnist(Path(trained.config.data.validation)):
        accuracies |= {f"{name} (published)": value for name, value in FASHION_MNIST_ACCURACY.items()}
    lines = [f"{'':42}{'accuracy %':>10}"] + [f"{name:42}{value:10.2f}" for name, value in accuracies.items()]
    return "\n".join(lines)


def token_pairs(data: DataConfig, address: str) -> NDArray[np.integer]:
    """(n, 2): every (input, target) pair of the data set at `address`, as models are trained or scored on them."""
    manifest = Manifest.load(address)
    assert isinstance(manifest, TextManifest)
    reader = ShardReader(address, manifest, data.cache_dir, data.allow_pipe)
    rows = np.stack([np.frombuffer(reader.read(row)[0], dtype=manifest.dtype) for row in range(manifest.samples)])
    return np.stack([rows[:, :-1].ravel(), rows[:, 1:].ravel()], axis=1)


def _is_fashion_mnist(validation: Path) -> bool:
    """Whether the published figures are of this data set; the quick start may have had to take another one."""
    names = validation.parent / "classes.txt"
    return names.is_file() and names.read_text().splitlines() == list(FASHION_MNIST_CLASSES)
