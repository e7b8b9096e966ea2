import gzip
import io
import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train.data.manifest import ImageManifest, Manifest
from train.data.shards import ShardReader
from train.prepare.__main__ import main
from train.prepare.images import PixelImages, _write_split
from train.prepare.sources import _idx


@pytest.fixture
def class_folders(tmp_path) -> Path:
    """train and val with the classes ant, bee and cow; 12 + 3 files a class, each image of its own shade."""
    shade = 0
    for split, count in (("train", 12), ("val", 3)):
        for name in ("bee", "ant", "cow"):
            folder = tmp_path / "source" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (9, 7), (shade, 0, 0)).save(folder / f"{name}_{i}.JPEG")
                shade += 5
    (tmp_path / "source/train/ant/notes.txt").write_text("no image")
    return tmp_path / "source"


def prepare(folder: Path, out: Path, *options: str) -> int:
    return main(["images", "--folder", str(folder), "--out", str(out), "--processes", "2", *options])


def samples_of(folder: Path) -> list[tuple[bytes, int]]:
    manifest = Manifest.load(str(folder))
    assert isinstance(manifest, ImageManifest)
    reader = ShardReader(str(folder), manifest)
    return [reader.read(i) for i in range(manifest.samples)]


def test_class_folders_keep_files_and_labels(class_folders, tmp_path):
    assert prepare(class_folders, tmp_path / "out", "--samples-per-shard", "10") == 0
    assert (tmp_path / "out/classes.txt").read_text().split() == ["ant", "bee", "cow"]
    for split, source in (("train", "train"), ("validation", "val")):
        expected = {
            (path.read_bytes(), label)
            for label, name in enumerate(["ant", "bee", "cow"])
            for path in (class_folders / source / name).glob("*.JPEG")
        }
        samples = samples_of(tmp_path / "out" / split)
        assert len(samples) == len(expected) and set(samples) == expected
    labels = [label for _, label in samples_of(tmp_path / "out/train")]
    assert len(set(labels[:10])) == 3, "classes mix within a shard"
    assert [shard.samples for shard in Manifest.load(str(tmp_path / "out/train")).shards] == [10, 10, 10, 6]


def test_preparing_is_deterministic_and_done_once(class_folders, tmp_path, capsys):
    for out in ("a", "b"):
        assert prepare(class_folders, tmp_path / out) == 0
    digests = [Manifest.load(str(tmp_path / out / "train")).digest for out in ("a", "b")]
    assert digests[0] == digests[1]
    capsys.readouterr()
    assert prepare(class_folders, tmp_path / "a") == 0
    assert "is complete: nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: shutil.rmtree(s / "val"), "must hold the folders train and val"),
        (lambda s: (s / "val/dog").mkdir(), "val has a class that the training images lack: dog"),
        (lambda s: [f.unlink() for f in s.glob("val/*/*")], "val has no images"),
    ],
    ids=["no-validation", "other-class", "no-images"],
)
def test_wrong_folders_are_one_line_errors(class_folders, tmp_path, capsys, damage, message):
    damage(class_folders)
    assert prepare(class_folders, tmp_path / "out") == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and "\n" not in error


def test_index_adopts_shards_that_another_program_wrote(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    images = [np.full((6, 5, 3), 10 * i, dtype=np.uint8) for i in range(20)]
    with webdataset.ShardWriter(str(tmp_path / "x-%04d.tar"), maxcount=7, verbose=0) as writer:
        for i, image in enumerate(images):
            writer.write({"__key__": f"n0{i % 4}/image_{i}", "jpg": image, "cls": i % 4, "json": {"a": 1}})
    assert main(["index", str(tmp_path)]) == 0
    assert main(["verify", str(tmp_path)]) == 0
    samples = samples_of(tmp_path)
    assert [label for _, label in samples] == [i % 4 for i in range(20)]
    for image, (content, _) in zip(images, samples, strict=True):
        assert abs(np.asarray(Image.open(io.BytesIO(content))).astype(int) - image).max() < 5
    assert Manifest.load(str(tmp_path)).classes == 4  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([{"__key__": "a", "png": b"x"}], "sample /a has no label"),
        ([{"__key__": "a", "cls": b"1"}], "sample /a has no image"),
        ([{"__key__": "a", "txt": b"1"}], "holds no images"),
        ([{"__key__": "a", "png": b"x", "cls": b"one"}], "is not a readable tar of images and labels"),
    ],
    ids=["no-label", "no-image", "neither", "label-not-a-number"],
)
def test_index_refuses_other_shards(tmp_path, capsys, samples, message):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "x.tar"), encoder=False) as writer:
        for sample in samples:
            writer.write(sample)
    assert main(["index", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def data(tmp_path) -> Path:
    for split in ("train", "validation"):
        images = PixelImages(np.random.default_rng(0).integers(0, 255, (20, 8, 8), dtype=np.uint8), np.arange(20) % 2)
        (tmp_path / "data" / split).mkdir(parents=True)
        _write_split(tmp_path / "data" / split, images, classes=2, per_shard=10, processes=1)
    return tmp_path / "data"


def change_byte(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_verify_accepts_what_was_prepared(data, capsys):
    assert main(["verify", str(data)]) == 0
    assert main(["verify", str(data / "train")]) == 0


def test_verify_lists_every_problem_on_its_line(data, capsys):
    change_byte(data / "train/000000.tar", 600)
    change_byte(data / "train/000001.idx", 200)
    (data / "validation/000000.tar").unlink()
    with open(data / "validation/000001.tar", "r+b") as tar:
        tar.truncate(700)
    assert main(["verify", str(data)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("data/")[-1].split(" is ")[0] for line in lines] == [
        "train/000000.tar",
        "train/000001.idx",
        "validation/000000.tar",
        "validation/000001.tar",
    ]
    assert "missing" in lines[2] and "700 found" in lines[3]


def test_verify_counts_the_samples(data, capsys):
    content = json.loads((data / "train/manifest.json").read_text())
    content["shards"][1]["samples"] = 9
    (data / "train/manifest.json").write_text(json.dumps(content))
    assert main(["verify", str(data)]) == 1
    assert "does not belong to shard 000001.tar with 9 samples" in capsys.readouterr().out


def test_verify_needs_a_data_set(tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 2
    assert "holds no manifest.json" in capsys.readouterr().err


def test_idx_files(tmp_path):
    array = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    with gzip.open(tmp_path / "x.gz", "wb") as file:
        file.write(struct.pack(">BBBBiii", 0, 0, 8, 3, 2, 3, 4) + array.tobytes())
    assert np.array_equal(_idx(tmp_path / "x.gz"), array)


def test_fashion_mnist_falls_back_to_mnist_and_says_so(tmp_path, monkeypatch, capsys):
    def unavailable(downloads):
        raise OSError("apt-get is not installed")

    pixels = np.arange(600, dtype=np.uint16).repeat(784).reshape(600, 28, 28).astype(np.uint8)
    monkeypatch.setattr("train.prepare.images.fashion_mnist", unavailable)
    monkeypatch.setattr("train.prepare.images.mnist_5000", lambda downloads: (pixels, np.arange(600) % 10))
    assert main(["images", "--source", "fashion-mnist", "--out", str(tmp_path / "out"), "--processes", "1"]) == 0
    said = capsys.readouterr().out
    assert "fashion-mnist can't be had: apt-get is not installed" in said and "using mnist instead" in said
    assert [len(samples_of(tmp_path / "out" / split)) for split in ("train", "validation")] == [100, 500]


@pytest.mark.slow
def test_the_image_sources(tmp_path, capsys):
    assert main(["images", "--source", "fashion-mnist", "--out", str(tmp_path / "fashion")]) == 0
    assert "using mnist instead" not in capsys.readouterr().out
    assert [Manifest.load(str(tmp_path / "fashion" / s)).samples for s in ("train", "validation")] == [60_000, 10_000]
    assert main(["images", "--source", "mnist", "--out", str(tmp_path / "mnist")]) == 0
    assert [Manifest.load(str(tmp_path / "mnist" / s)).samples for s in ("train", "validation")] == [4500, 500]


@pytest.mark.parametrize("arguments", [["--help"], ["text", "--help"], ["verify", "nowhere"]])
def test_the_command_starts_without_torch(arguments):
    program = "import sys; sys.modules['torch'] = None; from train.prepare.__main__ import main; sys.exit(main())"
    result = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert result.returncode == (2 if "nowhere" in arguments else 0), result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["text"],
        ["text", "--input", "x", "--out", "y", "--row-length", "0"],
        ["images", "--source", "cifar", "--out", "x"],
    ],
    ids=["no-command", "no-input", "zero", "unknown-source"],
)
def test_wrong_calls_are_one_line_errors(arguments, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
