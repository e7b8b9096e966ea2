from pathlib import Path

import numpy as np
import pytest

from train.config import LanguageConfig, VisionConfig
from train.prepare.images import PixelImages, _write_split


@pytest.fixture(scope="session")
def image_data(tmp_path_factory) -> Path:
    """A prepared image data set, 97 + 23 images of 8 x 8 pixels in 5 classes; pixel [0, 0] of image i of a split is i,
    in the order they were handed over; the label is i % 5."""
    folder = tmp_path_factory.mktemp("images")
    for split, count in (("train", 97), ("validation", 23)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 8, 8), dtype=np.uint8)
        pixels[:, 0, 0] = np.arange(count)
        _write_split(folder / split, PixelImages(pixels, np.arange(count) % 5), classes=5, per_shard=30, processes=1)
    return folder


@pytest.fixture
def language_config(text_data) -> LanguageConfig:
    config = LanguageConfig()
    config.data.train, config.data.validation = str(text_data / "train"), str(text_data / "validation")
    config.data.lanes, config.data.shuffle_block, config.data.workers = 12, 4, 0
    config.model.vocab_size, config.model.sequence_length = 300, 16  # of `text_data`
    config.train.global_batch_size = 12
    return config


@pytest.fixture
def vision_config(image_data) -> VisionConfig:
    config = VisionConfig()
    config.data.train, config.data.validation = str(image_data / "train"), str(image_data / "validation")
    config.data.lanes, config.data.shuffle_block, config.data.workers = 12, 4, 0
    config.data.mean, config.data.std = [0.0], [1 / 255]
    config.model.image_size, config.model.channels, config.model.classes = 8, 1, 5
    config.train.global_batch_size = 12
    return config
