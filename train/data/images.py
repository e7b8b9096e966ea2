"""Encoded images to vision batches: decoding, augmentation, normalisation.

Augmentation draws from (seed, n) alone, so sample number n looks the same whichever worker of whichever rank makes it.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from train.data.batches import BadSampleError, Batch, Float32Array, load_or_skip
from train.data.order import Int64Array, draw_seed
from train.data.shards import ShardReader

Pixels = npt.NDArray[np.uint8]  # (height, width, channels)
Augment = Callable[[Image.Image, int], torch.Tensor]  # image, its draw_seed -> (C, H, W), uint8 or normalised float32

_EVALUATION_CROP = 0.875  # of the shorter side, as in the published ImageNet evaluations


class ImageBatches:
    """Makes vision batches from sample ids.

    The batch holds `images` (b, C, H, W) float32, normalised by `mean` and `std`; `labels` (b,) int64; `weights` (b,)
    float32, 0 for images to ignore; `sample_ids` (b,) int64.

    Args:
        augment: one of the functions below; it gives uint8 pixels, or normalised float32 where the recipe does that.
        mean, std: per channel, of pixels scaled to [0, 1].

    Raises (when called):
        BadSampleError: an image can't be read or decoded or its label is not below `classes`, unless `skip_bad`.
    """

    def __init__(
        self,
        reader: ShardReader,
        classes: int,
        image_size: int,
        augment: Augment,
        mean: list[float],
        std: list[float],
        seed: int,
        skip_bad: bool,
    ):
        self._reader = reader
        self._classes = classes
        self._augment = augment
        self._mode = "L" if len(mean) == 1 else "RGB"
        self._mean = torch.tensor(mean).view(-1, 1, 1)
        self._std = torch.tensor(std).view(-1, 1, 1)
        self._seed = seed
        self._skip_bad = skip_bad
        self._blank = Image.new(self._mode, (image_size, image_size))

    def __call__(self, numbers: Int64Array, ids: Int64Array, weights: Float32Array) -> Batch:
        images, labels = [], []
        for i, (n, sample_id) in enumerate(zip(numbers.tolist(), ids.tolist(), strict=True)):
            (image, label), good = load_or_skip(self._decode, sample_id, (self._blank, 0), self._skip_bad)
            weights[i] *= good
            labels.append(label)
            images.append(self._augment(image, draw_seed(self._seed, n)))
        batch = torch.stack(images)
        if batch.dtype == torch.uint8:
            batch = (batch.float().div_(255) - self._mean) / self._std
        return {
            "images": batch,
            "labels": torch.tensor(labels),
            "weights": torch.from_numpy(weights),
            "sample_ids": torch.from_numpy(ids),
        }

    def _decode(self, sample_id: int) -> tuple[Image.Image, int]:
        content, label = self._reader.read(sample_id)
        try:
            image = Image.open(io.BytesIO(content)).convert(self._mode)
        except Exception as error:  # Pillow's decoders raise all kinds of errors on damaged files
            raise BadSampleError(f"{self._reader.describe(sample_id)} can't be decoded: {error}") from error
        if not 0 <= label < self._classes:
            raise BadSampleError(f"{self._reader.describe(sample_id)} has label {label} of {self._classes} classes")
        return image, label


def no_augmentation(image_size: int) -> Augment:
    """The image as it is; of another size: scaled and cut to the centre."""

    def augment(image: Image.Image, seed: int) -> torch.Tensor:
        return torch.from_numpy(_pixels(_centre(image, image_size)).transpose(2, 0, 1).copy())

    return augment


def crop_flip(image_size: int, padding: int) -> Augment:
    """Shifts by up to `padding` pixels each way, filling with zeros, and mirrors every other image."""

    def augment(image: Image.Image, seed: int) -> torch.Tensor:
        pixels = _pixels(_centre(image, image_size))
        padded = np.zeros((image_size + 2 * padding, image_size + 2 * padding, pixels.shape[2]), dtype=np.uint8)
        padded[padding : padding + image_size, padding : padding + image_size] = pixels
        seed, top = divmod(seed, 2 * padding + 1)
        seed, left = divmod(seed, 2 * padding + 1)
        crop = padded[top : top + image_size, left : left + image_size]
        return torch.from_numpy((crop[:, ::-1] if seed % 2 else crop).transpose(2, 0, 1).copy())

    return augment


def rand_augment(image_size: int, mean: list[float], std: list[float], random_erasing: float) -> Augment:
    """The DeiT recipe (Touvron et al. 2021, table 9) as timm builds it: random resized crop, flip, RandAugment 9/0.5,
    random erasing with probability `random_erasing`."""
    from timm.data import create_transform

    transform = create_transform(
        input_size=(len(mean), image_size, image_size),
        is_training=True,
        color_jitter=0.3,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=random_erasing,
        re_mode="pixel",
        mean=tuple(mean),
        std=tuple(std),
    )

    for operation in _rand_augment_operations(transform):
        if operation.name == "PosterizeIncreasing":
            operation.magnitude_max = 9.9  # at 10, timm asks for 0 bits a channel, which Pillow refuses

    def augment(image: Image.Image, seed: int) -> torch.Tensor:
        with _keep_random_state():
            random.seed(seed)
            np.random.seed(seed % (1 << 32))
            torch.default_generator.manual_seed(seed)
            return transform(image)

    return augment


@contextmanager
def _keep_random_state() -> Iterator[None]:
    """Gives python, numpy and torch their generators back as they were: augmentation seeds them for each sample."""
    python, numpy, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_state)


def _rand_augment_operations(transform: Any) -> list[Any]:
    from timm.data.auto_augment import RandAugment

    return next(step.ops for step in transform.transforms if isinstance(step, RandAugment))


def _centre(image: Image.Image, size: int) -> Image.Image:
    """The middle of the image, `size` pixels square, after scaling its shorter side so that 87.5 % of it remain."""
    if image.size == (size, size):
        return image
    from torchvision.transforms.functional import InterpolationMode, center_crop, resize

    shorter = round(size / _EVALUATION_CROP)
    return center_crop(resize(image, shorter, InterpolationMode.BICUBIC), [size, size])


def _pixels(image: Image.Image) -> Pixels:
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]
