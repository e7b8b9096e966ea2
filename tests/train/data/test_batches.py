import io
import json
import logging
import random
import shutil
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from train.data.batches import BadSampleError
from train.data.images import ImageBatches, crop_flip, no_augmentation, rand_augment
from train.data.loader import build_data
from train.data.manifest import Manifest
from train.data.shards import ShardReader
from train.data.text import TextBatches


def gradient(width: int, height: int) -> Image.Image:
    pixels = np.arange(width * height * 3, dtype=np.uint32).reshape(height, width, 3) * 255 // (width * height * 3)
    return Image.fromarray(pixels.astype(np.uint8))


def text_batch(address: str, ids: list[int], skip_bad: bool = False) -> dict[str, torch.Tensor]:
    manifest = Manifest.load(address)
    make = TextBatches(ShardReader(address, manifest), manifest, skip_bad)
    return make(np.array(ids), np.array(ids), np.ones(len(ids), dtype=np.float32))


def image_batch(address: str, ids: list[int], skip_bad: bool = False) -> dict[str, torch.Tensor]:
    manifest = Manifest.load(address)
    make = ImageBatches(
        ShardReader(address, manifest), manifest.classes, 8, no_augmentation(8), [0.5], [0.25], 0, skip_bad
    )
    return make(np.array(ids), np.array(ids), np.ones(len(ids), dtype=np.float32))


def test_text_batch_shapes_and_document_starts(text_data):
    address = str(text_data / "train")
    batch = text_batch(address, [3, 0, 4])
    assert {name: (tuple(t.shape), t.dtype) for name, t in batch.items() if name != "cu_seqlens"} == {
        "input_ids": ((3, 16), torch.int64),
        "targets": ((3, 16), torch.int64),
        "weights": ((3,), torch.float32),
        "sample_ids": ((3,), torch.int64),
    }
    inputs = batch["input_ids"]
    assert torch.equal(inputs[:, 1:], batch["targets"][:, :-1])
    assert batch["targets"][0, -1] == inputs[2, 0], "row 4 starts with the last target of row 3"
    bos = Manifest.load(address).bos_id
    starts = [i for i, token in enumerate(inputs.flatten().tolist()) if token == bos or i % 16 == 0]
    assert batch["cu_seqlens"].dtype == torch.int32
    assert batch["cu_seqlens"].tolist() == [*starts, 48]
    assert (inputs == bos).any(), "the rows of this test should hold document boundaries"
    assert batch["sample_ids"].tolist() == [3, 0, 4]


@pytest.fixture
def damaged_text(text_data, tmp_path) -> str:
    """The text data set with a token outside the vocabulary in row 2."""
    shutil.copytree(text_data, tmp_path / "data")
    index = np.load(tmp_path / "data/train/000000.idx")
    with open(tmp_path / "data/train/000000.tar", "r+b") as tar:
        tar.seek(int(index[2, 0]))
        tar.write(b"\xff\xff")
    return str(tmp_path / "data/train")


def test_a_damaged_row_names_itself(damaged_text):
    with pytest.raises(BadSampleError, match=r"row 2 of shard .*000000.tar is damaged: .*on_bad_sample=skip would"):
        text_batch(damaged_text, [1, 2])


def test_a_damaged_row_can_be_skipped(damaged_text, text_data):
    batch, whole = text_batch(damaged_text, [1, 2, 3], skip_bad=True), text_batch(str(text_data / "train"), [1, 2, 3])
    assert batch["weights"].tolist() == [1, 0, 1]
    assert torch.equal(batch["input_ids"][[0, 2]], whole["input_ids"][[0, 2]])
    assert batch["input_ids"].max() < 300
    assert batch["sample_ids"].tolist() == [1, 2, 3]


def test_image_batch_is_normalised(image_data):
    batch = image_batch(str(image_data / "train"), list(range(97)))
    assert batch["images"].shape == (97, 1, 8, 8) and batch["images"].dtype == torch.float32
    first = (batch["images"][:, 0, 0, 0] * 0.25 + 0.5) * 255
    assert sorted(first.round().int().tolist()) == list(range(97)), "every image is there, and pixels keep their values"
    assert torch.equal(batch["labels"], first.round().long() % 5), "labels stay with their images"


@pytest.fixture
def damaged_images(image_data, tmp_path) -> str:
    """The image data set with image 1 corrupted."""
    shutil.copytree(image_data / "train", tmp_path / "train")
    index = np.load(tmp_path / "train/000000.idx")
    with open(tmp_path / "train/000000.tar", "r+b") as tar:
        tar.seek(int(index[1, 0]))
        tar.write(b"\0" * int(index[1, 1]))
    return str(tmp_path / "train")


def test_a_corrupt_image_names_its_shard_and_key(damaged_images):
    with pytest.raises(BadSampleError, match=r"image 000000001.png of shard .*000000.tar can't be decoded"):
        image_batch(damaged_images, [0, 1])


def test_a_corrupt_image_can_be_skipped_with_a_warning(damaged_images, caplog):
    with caplog.at_level(logging.WARNING):
        batch = image_batch(damaged_images, [0, 1, 2], skip_bad=True)
    assert batch["weights"].tolist() == [1, 0, 1]
    assert torch.isfinite(batch["images"]).all()
    assert "skipped: image 000000001.png" in caplog.text


def test_a_bad_shard_can_be_skipped(image_data, tmp_path):
    shutil.copytree(image_data / "train", tmp_path / "train")
    address = str(tmp_path / "train")
    shutil.copy(tmp_path / "train/000003.idx", tmp_path / "train/000001.idx")
    assert image_batch(address, [29, 30, 59, 60], skip_bad=True)["weights"].tolist() == [1, 0, 0, 1]


def test_labels_beyond_the_classes_are_bad(image_data, tmp_path):
    shutil.copytree(image_data / "train", tmp_path / "train")
    content = json.loads((tmp_path / "train/manifest.json").read_text())
    (tmp_path / "train/manifest.json").write_text(json.dumps({**content, "classes": 3}))
    with pytest.raises(BadSampleError, match=r"has label [34] of 3 classes"):
        image_batch(str(tmp_path / "train"), list(range(20)))


def test_crop_flip_shifts_and_mirrors_by_the_seed_alone():
    image = gradient(8, 8)
    pixels = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())
    padded = torch.nn.functional.pad(pixels, (2, 2, 2, 2))
    crops = [padded[:, top : top + 8, left : left + 8] for top in range(5) for left in range(5)]
    candidates = [*crops, *(crop.flip(-1) for crop in crops)]
    augment = crop_flip(8, padding=2)
    seen = set()
    for seed in range(400):
        result = augment(image, seed)
        assert torch.equal(result, augment(image, seed))
        seen.add(next(i for i, candidate in enumerate(candidates) if torch.equal(result, candidate)))
    assert seen == set(range(50)), "every shift, mirrored and not, occurs"


def test_crop_flip_without_padding_only_mirrors():
    results = {crop_flip(8, padding=0)(gradient(8, 8), seed).numpy().tobytes() for seed in range(20)}
    assert len(results) == 2


@pytest.mark.parametrize("size", [(12, 9), (9, 30), (300, 200)])
def test_images_of_other_sizes_are_scaled_and_centred(size):
    result = no_augmentation(56)(gradient(*size), 0)
    assert result.shape == (3, 56, 56) and result.dtype == torch.uint8
    # the gradient is symmetric about its middle, and so is what is left of it
    assert abs(result.float().mean() - 127) < 4


def test_rand_augment_depends_on_the_seed_alone_and_leaves_generators_as_they_were():
    augment = rand_augment(32, [0.5] * 3, [0.25] * 3, random_erasing=0.5)
    image = gradient(40, 50)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    results = [augment(image, seed) for seed in range(300)]  # enough to meet every operation at full strength
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    torch.manual_seed(4)
    random.seed(4)
    np.random.seed(4)
    assert all(torch.equal(augment(image, seed), results[seed]) for seed in (0, 17, 299))
    assert len({result.numpy().tobytes() for result in results}) > 290
    assert results[0].shape == (3, 32, 32) and results[0].dtype == torch.float32


def test_validation_images_are_not_augmented(vision_config):
    vision_config.data.augmentation = "crop_flip"
    augmented = build_data(vision_config, 0, 1)
    vision_config.data.augmentation = "none"
    plain = build_data(vision_config, 0, 1)
    for a, b in zip(augmented.validation_batches(), plain.validation_batches(), strict=True):
        assert torch.equal(a["images"], b["images"])
    a, b = next(augmented.train_batches(0)), next(plain.train_batches(0))
    assert torch.equal(a["sample_ids"], b["sample_ids"]) and not torch.equal(a["images"], b["images"])


def test_repeated_augmentation_shows_a_sample_several_times_in_different_views(vision_config):
    vision_config.data.augmentation, vision_config.data.repeats = "crop_flip", 3
    plain = build_data(vision_config, 0, 1)
    batches = list(islice(plain.train_batches(0), 3))
    ids = torch.cat([batch["sample_ids"] for batch in batches])
    assert ids.reshape(12, 3).eq(ids[::3, None]).all()
    assert ids[::3].tolist() == plain.order.sample_ids(np.arange(12)).tolist()
    views = torch.cat([batch["images"] for batch in batches]).reshape(12, 3, -1)
    assert not torch.equal(views[:, 0], views[:, 1])


def test_colour_images_become_grey_where_the_model_has_one_channel(tmp_path):
    from train.prepare.images import _class_folders, _write_split

    (tmp_path / "source" / "a").mkdir(parents=True)
    buffer = io.BytesIO()
    gradient(8, 8).save(buffer, "JPEG")
    (tmp_path / "source" / "a" / "x.JPEG").write_bytes(buffer.getvalue())
    _write_split(tmp_path / "train", _class_folders(tmp_path / "source", ["a"]), 1, None, 1)
    assert image_batch(str(tmp_path / "train"), [0])["images"].shape == (1, 1, 8, 8)
