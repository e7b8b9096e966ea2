"""Random access to the samples of a data set, through an index beside each tar.

An index `NAME.idx` is a numpy array (samples, 3) int64: a sample's offset in the tar, its size in bytes, and its label
(-1 for text). Text: a sample is a row of tokens inside a member that holds many rows. Images: a sample is a member.
"""

from __future__ import annotations

import os
import tarfile
from collections import OrderedDict
from pathlib import Path

import numpy as np

from train.data.manifest import Manifest, Shard
from train.data.order import Int64Array
from train.data.storage import check_address, fetch, is_remote, join, local_path

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp", "ppm", "bmp")
_OPEN_SHARDS = 128  # file descriptors kept by a process
_TAR_BLOCK = 512


class ShardReader:
    """Reads samples by id (their number in natural order: shard after shard).

    Args:
        address: the data set's folder or remote address.
        manifest: of that data set.
        cache_dir: where remote shards are kept, whole, under the name of their sha256.
        allow_pipe: permit `pipe:` addresses.

    Raises:
        ValueError: a remote address without `cache_dir`, or `pipe:` without `allow_pipe`.
    """

    def __init__(self, address: str, manifest: Manifest, cache_dir: str | None = None, allow_pipe: bool = False):
        check_address(address, cache_dir, allow_pipe)
        self._address = address
        self._cache_dir = cache_dir
        self._shards = manifest.shards
        self._first_ids = np.cumsum([0] + [shard.samples for shard in manifest.shards])
        self._open: OrderedDict[int, tuple[int, Int64Array]] = OrderedDict()  # shard -> descriptor, index
        self._failed: dict[int, Exception] = {}

    def read(self, sample_id: int) -> tuple[bytes, int]:
        """A sample's bytes and its label.

        Raises:
            OSError: its shard can't be opened, fetched or read to the end.
            ValueError: its index does not belong to the shard.
        """
        shard, row = self._locate(sample_id)
        descriptor, index = self._opened(shard)
        offset, size, label = index[row].tolist()
        content = os.pread(descriptor, size, offset)
        if len(content) != size:
            raise OSError(
                f"shard {self._shards[shard].name} of {self._address} ends early: {size} bytes expected at {offset:,}, "
                f"{len(content)} found; run `python -m train.prepare verify {self._address}`"
            )
        return content, label

    def describe(self, sample_id: int) -> str:
        """Where a sample lies, for messages: its shard, and its row or the name of its tar member."""
        shard, row = self._locate(sample_id)
        descriptor, index = self._opened(shard)
        offset, _, label = index[row].tolist()
        # An image follows the header of its tar member, which starts with the name, padded by zeros to 100 bytes.
        name = os.pread(descriptor, 100, offset - _TAR_BLOCK).split(b"\0")[0].decode(errors="replace")
        where = f"row {row}" if label < 0 else f"image {name}"
        return f"{where} of shard {join(self._address, self._shards[shard].name)}"

    def _locate(self, sample_id: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._first_ids, sample_id, side="right")) - 1
        return shard, sample_id - int(self._first_ids[shard])

    def _opened(self, shard: int) -> tuple[int, Int64Array]:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if shard in self._failed:  # where bad samples are skipped, don't fetch a bad shard once for each of them
            raise self._failed[shard]
        if len(self._open) >= _OPEN_SHARDS:
            _, (descriptor, _) = self._open.popitem(last=False)
            os.close(descriptor)
        try:
            tar, index = self._files(self._shards[shard])
            self._open[shard] = os.open(tar, os.O_RDONLY), load_index(index, self._shards[shard])
        except (OSError, ValueError) as error:
            self._failed[shard] = error
            raise
        return self._open[shard]

    def _files(self, shard: Shard) -> tuple[Path, Path]:
        """Local paths of a shard and its index, fetched if they are remote."""
        if not is_remote(self._address):
            folder = local_path(self._address)
            return folder / shard.name, folder / shard.index_name
        assert self._cache_dir is not None
        cache = Path(self._cache_dir)
        return (
            fetch(join(self._address, shard.name), cache, shard.sha256, ".tar"),
            fetch(join(self._address, shard.index_name), cache, shard.index_sha256, ".idx"),
        )


def load_index(path: Path, shard: Shard) -> Int64Array:
    """The index of a shard, (samples, 3) int64, memory-mapped.

    Raises:
        ValueError: it is malformed, or of another shard than the manifest describes.
    """
    try:
        index = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"index {path} can't be read ({error}); prepare the data set again") from None
    fits = (
        index.shape == (shard.samples, 3)
        and index.dtype == np.int64
        and int(index[:, :2].min()) >= 0
        and int((index[:, 0] + index[:, 1]).max()) <= shard.bytes
    )
    if not fits:
        raise ValueError(
            f"index {path} does not belong to shard {shard.name} with {shard.samples:,} samples in {shard.bytes:,} "
            "bytes; prepare the data set again"
        )
    return index


def scan_images(tar_path: Path) -> Int64Array:
    """The index of a WebDataset tar of images with `.cls` labels, by reading the tar.

    Raises:
        ValueError: a sample without image or label, or a tar that ends early.
    """
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(tar_path, "r:") as tar:
            while (member := tar.next()) is not None:
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                key = f"{folder}/{stem}"
                if extension.lower() in IMAGE_EXTENSIONS:
                    images[key] = member.offset_data, member.size
                elif extension == "cls":
                    labels[key] = int(tar.extractfile(member).read())  # type: ignore[union-attr]
                tar.members = []  # type: ignore[attr-defined]  # tarfile would remember them all
    except (tarfile.TarError, ValueError) as error:
        raise ValueError(f"{tar_path} is not a readable tar of images and labels: {error}") from None
    alone = images.keys() ^ labels.keys()
    if alone:
        raise ValueError(f"{tar_path}: sample {min(alone)} has no {'label' if min(alone) in images else 'image'}")
    if not images:
        raise ValueError(f"{tar_path} holds no images (.{', .'.join(IMAGE_EXTENSIONS)})")
    return np.array([(*place, labels[key]) for key, place in images.items()], dtype=np.int64)


def scan_text(tar_path: Path) -> Int64Array:
    """The index of a tar of token rows: members are .npy arrays (rows, row_length + 1).

    Raises:
        ValueError: a member that is not such an array, or a tar that ends early.
    """
    parts = []
    try:
        with tarfile.open(tar_path, "r:") as tar:
            while (member := tar.next()) is not None:
                file = tar.extractfile(member)
                assert file is not None
                np.lib.format.read_magic(file)
                (rows, tokens), _, dtype = np.lib.format.read_array_header_1_0(file)
                size = tokens * dtype.itemsize
                first = member.offset_data + file.tell()
                parts.append(np.stack([first + size * np.arange(rows), np.full(rows, size), np.full(rows, -1)], axis=1))
    except (tarfile.TarError, ValueError) as error:
        raise ValueError(f"{tar_path} is not a readable tar of token rows: {error}") from None
    return np.concatenate(parts).astype(np.int64)
