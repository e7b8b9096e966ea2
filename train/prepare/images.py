"""Images to shards: encoded files stay as they are, raw pixels become PNG.

A hash decides the order, so that classes mix within a shard.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from train.data.manifest import ImageManifest, Shard
from train.data.order import Int64Array, permutation
from train.data.shards import IMAGE_EXTENSIONS, scan_images
from train.prepare.output import Output, parallel_map, samples_per_shard, write_shard
from train.prepare.sources import FASHION_MNIST_CLASSES, LabelledPixels, fashion_mnist, mnist_5000

_MNIST_VALIDATION = 500  # images of the 5,000
_VALIDATION_FOLDERS = ("val", "validation")


@dataclass(frozen=True)
class PixelImages:
    """Raw images, (count, height, width) uint8, and their labels."""

    pixels: npt.NDArray[np.uint8]
    labels: Int64Array

    def take(self, ids: Int64Array) -> PixelImages:
        return PixelImages(self.pixels[ids], self.labels[ids])

    def bytes_per_image(self) -> float:
        return self.pixels[0].size

    def encoded(self, i: int) -> tuple[str, bytes]:
        """Extension and content of image `i`."""
        buffer = io.BytesIO()
        Image.fromarray(self.pixels[i]).save(buffer, "PNG")
        return "png", buffer.getvalue()


@dataclass(frozen=True)
class FileImages:
    """Image files and their labels."""

    paths: list[Path]
    labels: Int64Array

    def take(self, ids: Int64Array) -> FileImages:
        return FileImages([self.paths[i] for i in ids], self.labels[ids])

    def bytes_per_image(self) -> float:
        some = self.paths[:: -(-len(self.paths) // 1000)]
        return sum(path.stat().st_size for path in some) / len(some)

    def encoded(self, i: int) -> tuple[str, bytes]:
        """Extension and content of image `i`."""
        return self.paths[i].suffix[1:].lower(), self.paths[i].read_bytes()


Images = PixelImages | FileImages


def prepare_images(
    source: str | None, folder: Path | None, downloads: Path, out: Path, per_shard: int | None, processes: int
) -> None:
    """Makes `out`/train, `out`/validation and `out`/classes.txt, unless they are there.

    Args:
        source: `fashion-mnist` or `mnist`; or None, and
        folder: with `train` and `val` in it, and in these a folder of files for each class, as ImageNet has.
        per_shard: images a shard; None chooses.

    Raises:
        ValueError: a folder that is not laid out like that, or other content at `out`.
        OSError: a source can't be downloaded.
    """
    output = Output(out, {"source": source, "folder": folder and str(folder), "samples_per_shard": per_shard})
    if output.complete:
        print(f"{out} is complete: nothing to do")
        return
    if folder:
        splits, classes = _from_folders(folder)
    else:
        splits, classes = _from_source(source, downloads)
    (output.work / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
    for split, images in splits.items():
        _write_split(output.work / split, images, len(classes), per_shard, processes)
        print(f"{split}: {len(images.labels):,} images of {len(classes)} classes")
    output.finish()
    print(f"{out} is complete")


def _from_source(source: str | None, downloads: Path) -> tuple[dict[str, Images], list[str]]:
    if source == "fashion-mnist":
        try:
            train, test = fashion_mnist(downloads)
            return {"train": PixelImages(*train), "validation": PixelImages(*test)}, list(FASHION_MNIST_CLASSES)
        except OSError as error:
            print(f"fashion-mnist can't be had: {error}")
            print("using mnist instead: the 5,000 handwritten digits that PyPI ships; results will not be comparable")
    return _split_mnist(mnist_5000(downloads)), [str(digit) for digit in range(10)]


def _split_mnist(mnist: LabelledPixels) -> dict[str, Images]:
    images = PixelImages(*mnist)
    ids = permutation(len(images.labels), 1)
    return {"train": images.take(ids[_MNIST_VALIDATION:]), "validation": images.take(ids[:_MNIST_VALIDATION])}


def _from_folders(folder: Path) -> tuple[dict[str, Images], list[str]]:
    validation = next((folder / name for name in _VALIDATION_FOLDERS if (folder / name).is_dir()), None)
    if validation is None or not (folder / "train").is_dir():
        raise ValueError(f"--folder {folder} must hold the folders train and {' or '.join(_VALIDATION_FOLDERS)}")
    classes = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())
    return {
        "train": _class_folders(folder / "train", classes),
        "validation": _class_folders(validation, classes),
    }, classes


def _class_folders(folder: Path, classes: list[str]) -> Images:
    unknown = {path.name for path in folder.iterdir() if path.is_dir()} - set(classes)
    if unknown:
        raise ValueError(f"{folder} has a class that the training images lack: {min(unknown)}")
    paths, labels = [], []
    for label, name in enumerate(classes):
        files = sorted((folder / name).glob("*"))
        of_class = [path for path in files if path.suffix[1:].lower() in IMAGE_EXTENSIONS]
        paths += of_class
        labels += [label] * len(of_class)
    if not paths:
        raise ValueError(f"{folder} has no images (.{', .'.join(IMAGE_EXTENSIONS)}) in folders named by class")
    return FileImages(paths, np.array(labels, dtype=np.int64))


@dataclass(frozen=True)
class _Task:
    path: Path
    first: int  # number of its first image, in the order written
    images: Images


def _write_split(folder: Path, images: Images, classes: int, per_shard: int | None, processes: int) -> None:
    folder.mkdir(exist_ok=True)
    count = len(images.labels)
    order = permutation(count, 0)
    size = per_shard or samples_per_shard(count, images.bytes_per_image())
    starts = range(0, count, size)
    tasks = (
        _Task(folder / f"{i:06d}.tar", start, images.take(order[start : start + size]))
        for i, start in enumerate(starts)
    )
    import webdataset  # noqa: F401  so that the processes that write shards need not import it each

    written = parallel_map(_write_images, tasks, processes)
    shards = list(tqdm(written, desc=folder.name, total=len(starts), disable=None))
    ImageManifest(shards=shards, classes=classes).save(folder)


def _write_images(task: _Task) -> Shard:
    def members() -> Iterator[dict[str, Any]]:
        for i, label in enumerate(task.images.labels.tolist()):
            extension, content = task.images.encoded(i)
            yield {"__key__": f"{task.first + i:09d}", extension: content, "cls": str(label).encode()}

    return write_shard(task.path, members(), scan_images)


def index_images(folder: Path, classes: int | None) -> None:
    """Writes the indexes and the manifest for the WebDataset shards `folder`/*.tar of images with `.cls` labels.

    Args:
        classes: None takes the largest label, and one.

    Raises:
        ValueError: no shards there, or one that holds something else.
    """
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise ValueError(f"{folder} has no .tar files")
    shards, largest = [], 0
    for path in tqdm(paths, desc="indexing", disable=None):
        index = scan_images(path)
        if int(index[:, 2].min()) < 0:
            raise ValueError(f"{path} has a negative label")
        largest = max(largest, int(index[:, 2].max()))
        with open(path.with_suffix(".idx"), "wb") as file:
            np.save(file, index)
        shards.append(write_shard(path, (), scan_images))
    if classes is not None and classes <= largest:
        raise ValueError(f"--classes is {classes}, but {folder} has the label {largest}")
    ImageManifest(shards=shards, classes=classes or largest + 1).save(folder)
    print(f"{folder}: {sum(shard.samples for shard in shards):,} images in {len(shards)} shards")
