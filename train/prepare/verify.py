"""Comparing a data set with its manifest, byte for byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tqdm import tqdm

from train.data.manifest import FILE_NAME, ImageManifest, Manifest, Shard, TextManifest
from train.data.shards import load_index, scan_images, scan_text
from train.data.storage import file_sha256


def verify(folder: Path) -> list[str]:
    """All that is wrong with the data set in `folder`, or with those in its sub-folders; a line each.

    Raises:
        ValueError: there is no data set.
    """
    data_sets = [path.parent for path in sorted([*folder.glob(FILE_NAME), *folder.glob(f"*/{FILE_NAME}")])]
    if not data_sets:
        raise ValueError(f"{folder} holds no {FILE_NAME}, nor does a folder in it")
    return [problem for data_set in data_sets for problem in _verify_data_set(data_set)]


def _verify_data_set(folder: Path) -> list[str]:
    try:
        manifest = Manifest.read(str(folder))
    except ValueError as error:
        return [str(error)]
    problems = []
    for shard in tqdm(manifest.shards, desc=str(folder), disable=None):
        problems += _verify_shard(folder, shard, manifest)
    if isinstance(manifest, TextManifest):
        problems += _verify_file(folder / manifest.tokenizer, manifest.tokenizer_sha256)
    return problems


def _verify_file(path: Path, sha256: str) -> list[str]:
    if not path.is_file():
        return [f"{path} is missing"]
    if file_sha256(path) != sha256:
        return [f"{path} is damaged: its sha256 is not that of the manifest"]
    return []


def _verify_shard(folder: Path, shard: Shard, manifest: TextManifest | ImageManifest) -> list[str]:
    path, index_path = folder / shard.name, folder / shard.index_name
    if path.is_file() and path.stat().st_size != shard.bytes:
        return [f"{path} is damaged: {shard.bytes:,} bytes expected, {path.stat().st_size:,} found"]
    problems = _verify_file(path, shard.sha256) + _verify_file(index_path, shard.index_sha256)
    if problems:
        return problems
    try:
        found = scan_text(path) if isinstance(manifest, TextManifest) else scan_images(path)
        if not np.array_equal(found, load_index(index_path, shard)):
            return [f"{index_path} does not describe {path}, which holds {len(found):,} samples"]
    except ValueError as error:
        return [str(error)]
    return []
