"""Where data sets lie: local folders, and remote addresses read through webdataset's openers.

A data set's address is a folder, or the front part of an address that `webdataset.gopen` understands (http, https, s3,
gs, ...); "/" and a file's name are appended to it. `pipe:` works the same way, so `pipe:ssh host cat /data/train` runs
`ssh host cat /data/train/000000.tar`.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import posixpath
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

_SCHEME = re.compile(r"^(pipe:|[A-Za-z][A-Za-z0-9+.-]*://)")


def is_remote(address: str) -> bool:
    """Whether `address` must be fetched, rather than being a local folder."""
    return _SCHEME.match(address) is not None and not address.startswith("file:")


def check_address(address: str, cache_dir: str | None, allow_pipe: bool) -> None:
    """Raises ValueError if `address` is remote and the settings do not allow to read it."""
    if address.startswith("pipe:") and not allow_pipe:
        raise ValueError(
            f"{address!r} runs a shell command on every node; set data.allow_pipe=true if you trust whoever wrote it"
        )
    if is_remote(address) and cache_dir is None:
        raise ValueError(f"{address!r} is not local; set data.cache_dir to a folder where its shards may be kept")


def local_path(address: str) -> Path:
    """The folder that a local address means."""
    return Path(re.sub(r"^file:(//)?", "", address))


def join(address: str, name: str) -> str:
    """The address of file `name` of the data set at `address`; a leading ../ leads out of its folder."""
    address = address.rstrip("/")
    if name.startswith("../"):
        address, name = posixpath.dirname(address), name[3:]
    return f"{address}/{name}"


def read_remote(address: str) -> bytes:
    """The whole content of a remote file.

    Raises:
        OSError: it can't be read.
    """
    with _open(address) as stream:
        return stream.read()


def fetch(address: str, cache_dir: Path, sha256: str, suffix: str) -> Path:
    """A local copy of a remote file, fetched unless `cache_dir` has it already.

    Copies are named by their content, so one folder serves any number of data sets, and a name that exists is complete
    and right. A lock makes sure that of several ranks only one fetches.

    Raises:
        OSError: the file can't be read, or what arrived has another sha256.
    """
    target = cache_dir / f"{sha256}{suffix}"
    if target.exists():
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    with file_lock(cache_dir / f"{sha256}.lock"):
        if target.exists():  # another rank fetched it while this one waited
            return target
        partial = cache_dir / f"{sha256}.partial"
        with _open(address) as source, open(partial, "wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
        found = file_sha256(partial)
        if found != sha256:
            size = partial.stat().st_size
            partial.unlink()
            raise OSError(
                f"{address} is damaged: the manifest says sha256 {sha256}, {found} arrived ({size:,} bytes); "
                "check the server's copy with `python -m train.prepare verify DIR`"
            )
        os.replace(partial, target)
    return target


@contextmanager
def _open(address: str) -> Iterator[BinaryIO]:
    from webdataset.gopen import gopen  # imported late: it brings torch, which preparing data does not need

    try:
        stream = gopen(address, "rb")
        try:
            yield cast(BinaryIO, stream)
        finally:
            stream.close()
    except (OSError, ValueError) as error:
        raise OSError(f"{address} can't be read: {error}") from error


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on `path`; the system releases it should the process die."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
