"""Text files to shards of packed rows.

The documents of a split form one stream of tokens, BOS before each. Row i holds tokens i * N to (i + 1) * N of it,
inclusive: rows overlap by one token, so that as inputs row[:-1] and targets row[1:] every token is predicted once. The
last tokens, too few for a row, are left out and counted in the manifest.

Documents are tokenised in chunks, in parallel, to files; then, their lengths being known, shards are cut from these
files in parallel. Either step continues where a killed one ended.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view
from tqdm import tqdm

from train.data.manifest import Shard, TextManifest
from train.data.shards import scan_text
from train.data.storage import file_sha256
from train.prepare.output import Output, parallel_map, samples_per_shard, write_shard
from train.prepare.sources import read_documents
from train.prepare.tokenizer import load_tokenizer, train_tokenizer

SPLITS = ("train", "validation")
_CHUNK_CHARACTERS = 1 << 20
_MEMBER_ROWS = 512

Tokens = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class TextSettings:
    """What decides the content of a text data set."""

    inputs: list[Path]
    separator: str  # of documents in plain text: line | blank-line
    tokenizer: Path | None  # an existing model; None trains one
    tokenizer_type: str
    vocab_size: int  # of the tokeniser to train
    row_length: int  # N
    validation_fraction: float
    rows_per_shard: int | None


def prepare_text(settings: TextSettings, out: Path, processes: int) -> None:
    """Makes `out`/train, `out`/validation and `out`/tokenizer.model, unless they are there.

    Raises:
        ValueError: an input that is missing or empty, a setting that does not fit it, or other content at `out`.
    """
    for path in settings.inputs:
        if not path.is_file() or path.stat().st_size == 0:
            raise ValueError(f"--input {path} {'is empty' if path.is_file() else 'is not a file'}")
    if settings.tokenizer:
        load_tokenizer(settings.tokenizer)  # raises if it does not serve
    output = Output(out, _as_json(settings))
    if output.complete:
        print(f"{out} is complete: nothing to do")
        return
    model = output.work / "tokenizer.model"
    if not model.exists():
        _make_tokenizer(settings, model)
    _tokenize(settings, model, output.work, processes)
    for split in SPLITS:
        manifest = _pack(split, settings, model, output.work, processes)
        print(
            f"{split}: {manifest.documents:,} documents, {manifest.samples:,} rows of {manifest.row_length} tokens, "
            f"{len(manifest.shards)} shards"
        )
    shutil.rmtree(output.work / "tokens")
    output.finish()
    print(f"{out} is complete")


def _as_json(settings: TextSettings) -> dict[str, Any]:
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in settings.inputs]
    tokenizer = file_sha256(settings.tokenizer) if settings.tokenizer else None
    return {**asdict(settings), "inputs": files, "tokenizer": tokenizer}


def _make_tokenizer(settings: TextSettings, model: Path) -> None:
    if settings.tokenizer:
        shutil.copyfile(settings.tokenizer, model)
        return
    print(f"training a {settings.tokenizer_type} tokeniser of {settings.vocab_size:,} pieces")
    documents = (d for d in _documents(settings) if _split_of(d, settings.validation_fraction) == "train")
    train_tokenizer(documents, model, settings.tokenizer_type, settings.vocab_size)


def _documents(settings: TextSettings) -> Iterator[str]:
    return chain.from_iterable(read_documents(path, settings.separator) for path in settings.inputs)


def _split_of(document: str, validation_fraction: float) -> str:
    """By a hash of the text: the same wherever it stands, so equal documents are never in both splits."""
    number = int.from_bytes(hashlib.blake2b(document.encode(), digest_size=8).digest())
    return "validation" if number < validation_fraction * 2**64 else "train"


@dataclass(frozen=True)
class _Chunk:
    number: int
    documents: list[str]
    folder: Path
    model: Path
    validation_fraction: float


def _tokenize(settings: TextSettings, model: Path, work: Path, processes: int) -> None:
    """Fills `work`/tokens with files SPLIT-NUMBER.npy, each the tokens of a chunk of documents."""
    folder = work / "tokens"
    folder.mkdir(exist_ok=True)
    size = sum(path.stat().st_size for path in settings.inputs)
    chunks = _chunks(settings, folder, model)
    with tqdm(desc="tokenising", total=size, unit="B", unit_scale=True, disable=None) as bar:
        for characters in parallel_map(_tokenize_chunk, chunks, processes):
            bar.update(characters)


def _chunks(settings: TextSettings, folder: Path, model: Path) -> Iterator[_Chunk]:
    number, documents, size = 0, [], 0
    for document in _documents(settings):
        documents.append(document)
        size += len(document)
        if size >= _CHUNK_CHARACTERS:
            yield _Chunk(number, documents, folder, model, settings.validation_fraction)
            number, documents, size = number + 1, [], 0
    if documents:
        yield _Chunk(number, documents, folder, model, settings.validation_fraction)


def _tokenize_chunk(chunk: _Chunk) -> int:
    """Writes a chunk's tokens, by split, unless they are there; returns its size in characters."""
    tokenizer = load_tokenizer(chunk.model)
    for split in SPLITS:
        path = _token_file(chunk.folder, split, chunk.number)
        if path.exists():
            continue
        documents = [d for d in chunk.documents if _split_of(d, chunk.validation_fraction) == split]
        tokens = list(chain.from_iterable(tokenizer.encode(documents, add_bos=True)))
        partial = path.with_suffix(".partial")
        with open(partial, "wb") as file:
            np.save(file, np.array(tokens, dtype=_dtype(tokenizer.vocab_size())))
        os.replace(partial, path)
    return sum(map(len, chunk.documents))


def _token_file(folder: Path, split: str, number: int) -> Path:
    return folder / f"{split}-{number:08d}.npy"


def _dtype(vocab_size: int) -> str:
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


@dataclass(frozen=True)
class _Rows:
    """Rows `first` to `last` (exclusive) of a split, which become the shard at `path`."""

    path: Path
    first: int
    last: int
    row_length: int
    token_files: list[Path]
    ends: npt.NDArray[np.int64]  # of each token file in the stream


def _pack(split: str, settings: TextSettings, model: Path, work: Path, processes: int) -> TextManifest:
    """Cuts the shards of a split and writes its manifest.

    Raises:
        ValueError: the split does not fill one row.
    """
    import webdataset  # noqa: F401  so that the processes that write shards need not import it each

    files = sorted((work / "tokens").glob(f"{split}-*.npy"))
    lengths = [np.load(file, mmap_mode="r").size for file in files]
    tokens, n = sum(lengths), settings.row_length
    rows = (tokens - 1) // n
    if rows < 1:
        raise ValueError(
            f"the {split} split has {tokens} tokens, which do not fill a row of {n}: give more text, lower "
            f"--row-length or change --validation-fraction ({settings.validation_fraction})"
        )
    tokenizer = load_tokenizer(model)
    dtype = np.dtype(_dtype(tokenizer.vocab_size()))
    size = settings.rows_per_shard or samples_per_shard(rows, (n + 1) * dtype.itemsize)
    folder = work / split
    folder.mkdir(exist_ok=True)
    tasks = [
        _Rows(folder / f"{i:06d}.tar", first, min(first + size, rows), n, files, np.cumsum(lengths))
        for i, first in enumerate(range(0, rows, size))
    ]
    shards = list(tqdm(parallel_map(_write_rows, tasks, processes), desc=split, total=len(tasks), disable=None))
    manifest = TextManifest(
        shards=shards,
        row_length=n,
        dtype=dtype.name,
        vocab_size=tokenizer.vocab_size(),
        bos_id=tokenizer.bos_id(),
        tokenizer="../tokenizer.model",
        tokenizer_sha256=file_sha256(model),
        documents=sum(int((np.load(file) == tokenizer.bos_id()).sum()) for file in files),
        dropped_tokens=tokens - 1 - rows * n,
    )
    manifest.save(folder)
    return manifest


def _write_rows(task: _Rows) -> Shard:
    def members() -> Iterator[dict[str, Any]]:
        for first in range(task.first, task.last, _MEMBER_ROWS):
            last = min(first + _MEMBER_ROWS, task.last)
            tokens = _read_tokens(task, first * task.row_length, last * task.row_length + 1)
            buffer = io.BytesIO()
            np.save(buffer, sliding_window_view(tokens, task.row_length + 1)[:: task.row_length])
            yield {"__key__": f"{first:010d}", "npy": buffer.getvalue()}

    return write_shard(task.path, members(), scan_text)


def _read_tokens(task: _Rows, begin: int, end: int) -> Tokens:
    """Tokens `begin` to `end` (exclusive) of the stream."""
    parts = []
    for i in range(int(np.searchsorted(task.ends, begin, side="right")), len(task.ends)):
        tokens = np.load(task.token_files[i], mmap_mode="r")
        start = int(task.ends[i]) - tokens.size
        if start >= end:
            break
        parts.append(tokens[max(begin - start, 0) : end - start])
    return np.concatenate(parts)
