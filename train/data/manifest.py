"""manifest.json: what a prepared data set holds, and how to notice that some of it is missing."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from train.data.storage import is_remote, join, local_path, read_remote

FILE_NAME = "manifest.json"
_VERSION = 1
# Names become part of paths and, for pipe: addresses, of shell commands: nothing but plain file names may pass.
_PLAIN_NAME = re.compile(r"^(\.\./)?\w[\w.-]*$", re.ASCII)


@dataclass(frozen=True)
class Shard:
    """A tar file with its index beside it."""

    name: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str

    @property
    def index_name(self) -> str:
        return str(Path(self.name).with_suffix(".idx"))


@dataclass(frozen=True)
class Manifest:
    """What text and image data sets have in common; `load` returns one of the two classes below."""

    kind: ClassVar[str]
    shards: list[Shard]

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def digest(self) -> str:
        """sha256 of the content: a run resumed with another digest would see other data."""
        canonical = json.dumps(self._as_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def save(self, folder: Path) -> None:
        (folder / FILE_NAME).write_text(json.dumps(self._as_json(), indent=1) + "\n")

    def _as_json(self) -> dict[str, Any]:
        return {"version": _VERSION, "kind": self.kind, **asdict(self)}

    @staticmethod
    def load(address: str) -> TextManifest | ImageManifest:
        """Reads the manifest of the data set at `address` and checks that its local shards are there, whole.

        A remote address is opened as it is: check it with `storage.check_address` first.

        Raises:
            ValueError: no data set there, a malformed manifest, a shard that is missing or truncated; the message names
                the file and what to do.
            OSError: a remote manifest can't be read.
        """
        manifest = Manifest.read(address)
        if not is_remote(address):
            _check_files(local_path(address), manifest.shards)
        return manifest

    @staticmethod
    def read(address: str) -> TextManifest | ImageManifest:
        """As `load`, without a look at the shards."""
        return _parse(_read(address), join(address, FILE_NAME))


@dataclass(frozen=True)
class TextManifest(Manifest):
    """Rows of `row_length` + 1 tokens; a row's last token is the next row's first."""

    kind = "text"
    row_length: int
    dtype: str  # of the tokens: uint16 | uint32
    vocab_size: int
    bos_id: int  # starts every document
    tokenizer: str  # file name, relative to the manifest
    tokenizer_sha256: str
    documents: int
    dropped_tokens: int  # at the very end, too few to fill a row


@dataclass(frozen=True)
class ImageManifest(Manifest):
    """Encoded images and their labels, 0 <= label < classes."""

    kind = "images"
    classes: int


def _read(address: str) -> str:
    if is_remote(address):
        return read_remote(join(address, FILE_NAME)).decode()
    folder = local_path(address)
    advice = "prepare a data set with `python -m train.prepare text` or `python -m train.prepare images`"
    if not folder.is_dir():
        raise ValueError(f"data folder {folder} does not exist; {advice}")
    if not any(folder.iterdir()):
        raise ValueError(f"data folder {folder} is empty; {advice}")
    if not (folder / FILE_NAME).is_file():
        raise ValueError(
            f"data folder {folder} has no {FILE_NAME}; {advice}, or make one for existing WebDataset shards of images "
            f"with `python -m train.prepare index {folder}`"
        )
    return (folder / FILE_NAME).read_text()


def _parse(text: str, name: str) -> TextManifest | ImageManifest:
    classes = {"text": TextManifest, "images": ImageManifest}
    try:
        content = json.loads(text)
        version, kind = content.pop("version"), content.pop("kind")
        shards = [Shard(**shard) for shard in content.pop("shards")]
        if version != _VERSION:
            raise ValueError(f"version is {version!r}, this program reads {_VERSION}")
        manifest: TextManifest | ImageManifest = classes[kind](shards=shards, **content)
        _check_values(manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{name} is malformed ({reason}); prepare the data set again") from None
    return manifest


def _check_values(manifest: TextManifest | ImageManifest) -> None:
    names = [shard.name for shard in manifest.shards]
    if isinstance(manifest, TextManifest):
        names.append(manifest.tokenizer)
        if manifest.dtype not in ("uint16", "uint32"):
            raise ValueError(f"dtype is {manifest.dtype!r}, not uint16 or uint32")
    for name in names:
        if not _PLAIN_NAME.match(name):
            raise ValueError(f"{name!r} is not a plain file name")
    if manifest.samples < 1:
        raise ValueError("it lists no samples")


def _check_files(folder: Path, shards: list[Shard]) -> None:
    advice = f"run `python -m train.prepare verify {folder}` to find all damage, or prepare the data set again"
    for shard in shards:
        path = folder / shard.name
        if not path.is_file():
            raise ValueError(f"shard {path} is listed in {FILE_NAME} but missing; {advice}")
        found = path.stat().st_size
        if found != shard.bytes:
            state = "truncated" if found < shard.bytes else "not the one listed"
            raise ValueError(f"shard {path} is {state}: {shard.bytes:,} bytes expected, {found:,} found; {advice}")
        if not (folder / shard.index_name).is_file():
            raise ValueError(f"index {folder / shard.index_name} of shard {path} is missing; {advice}")
