import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from train.data.manifest import ImageManifest, Manifest, TextManifest
from train.data.shards import ShardReader
from train.data.storage import is_remote, join


@pytest.fixture
def copy(text_data, tmp_path) -> Path:
    """A copy of the text data set's training part, to damage."""
    shutil.copytree(text_data, tmp_path / "copy")
    return tmp_path / "copy" / "train"


@pytest.fixture
def served(text_data, tmp_path):
    """(address, folder, requests): a copy of the text data set over http."""
    shutil.copytree(text_data, tmp_path / "served")
    requests: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            requests.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path / "served"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/train", tmp_path / "served" / "train", requests
    server.shutdown()
    server.server_close()


def all_samples(reader: ShardReader, manifest: Manifest) -> list[bytes]:
    return [reader.read(i)[0] for i in range(manifest.samples)]


def test_reader_gives_the_rows_of_the_members_in_order(text_data):
    webdataset = pytest.importorskip("webdataset")
    address = str(text_data / "train")
    manifest = Manifest.load(address)
    assert isinstance(manifest, TextManifest) and len(manifest.shards) > 3
    shards = [f"{address}/{shard.name}" for shard in manifest.shards]
    members = [sample["npy"] for sample in webdataset.WebDataset(shards, shardshuffle=False).decode()]
    rows = np.concatenate(members)
    assert rows.shape == (manifest.samples, manifest.row_length + 1) and rows.dtype == np.uint16
    assert all_samples(ShardReader(address, manifest), manifest) == [row.tobytes() for row in rows]


def test_webdataset_reads_our_image_shards(image_data):
    webdataset = pytest.importorskip("webdataset")
    address = str(image_data / "validation")
    manifest = Manifest.load(address)
    assert isinstance(manifest, ImageManifest) and manifest.samples == 23
    shards = [f"{address}/{shard.name}" for shard in manifest.shards]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    reader = ShardReader(address, manifest)
    for i, sample in enumerate(samples):
        assert sample["__key__"] == f"{i:09d}"
        assert reader.read(i) == (sample["png"], int(sample["cls"]))
        assert reader.describe(i) == f"image {i:09d}.png of shard {address}/000000.tar"
    assert len(samples) == 23


def test_reader_keeps_a_bounded_number_of_files_open(image_data, monkeypatch):
    monkeypatch.setattr("train.data.shards._OPEN_SHARDS", 2)
    address = str(image_data / "train")
    reader = ShardReader(address, Manifest.load(address))
    contents = [reader.read(i)[0] for i in (0, 35, 65, 95, 0, 35)]
    assert len(reader._open) == 2
    assert contents[0] == contents[4] and contents[1] == contents[5] != contents[0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, r"does not exist; prepare a data set with `python -m train.prepare text`"),
        (lambda d: [f.unlink() for f in d.iterdir()], r"is empty; .*train.prepare text"),
        (lambda d: (d / "manifest.json").unlink(), r"has no manifest.json; .*train.prepare index"),
        (lambda d: (d / "manifest.json").write_text("{"), r"manifest.json is malformed"),
        (lambda d: (d / "manifest.json").write_text("[]"), r"manifest.json is malformed"),
        (lambda d: (d / "000001.tar").unlink(), r"shard .*000001.tar is listed in manifest.json but missing; .*verify"),
        (lambda d: (d / "000001.idx").unlink(), r"index .*000001.idx of shard .* is missing"),
        (
            lambda d: (d / "000001.tar").write_bytes((d / "000001.tar").read_bytes()[:777]),
            r"shard .*000001.tar is truncated: [\d,]+ bytes expected, 777 found; run `python -m train.prepare verify ",
        ),
    ],
    ids=["no-folder", "empty", "no-manifest", "no-json", "no-object", "no-shard", "no-index", "truncated"],
)
def test_load_says_what_is_wrong_and_what_to_do(copy, damage, message):
    damage(copy)
    with pytest.raises(ValueError, match=message):
        Manifest.load(str(copy))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "version is 99"),
        ({"kind": "sound"}, "no 'sound'"),
        ({"row_length": None, "colour": 1}, "unexpected keyword argument 'colour'"),
        ({"shards": []}, "lists no samples"),
        ({"tokenizer": "../../etc/passwd"}, "not a plain file name"),
        ({"dtype": "object"}, "dtype is 'object'"),
    ],
    ids=["version", "kind", "key", "no-shards", "path", "dtype"],
)
def test_malformed_manifests_are_refused(copy, change, message):
    content = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(ValueError, match=f"manifest.json is malformed .*{re.escape(message)}"):
        Manifest.load(str(copy))


def test_shard_names_can_not_carry_shell_commands(copy):
    content = json.loads((copy / "manifest.json").read_text())
    content["shards"][0]["name"] = "000000.tar; touch owned"
    (copy / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="not a plain file name"):
        Manifest.load(str(copy))


def test_digest_depends_on_content_alone(copy, text_data):
    manifest = Manifest.load(str(copy))
    assert manifest.digest == Manifest.load(str(text_data / "train")).digest
    content = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(dict(reversed(content.items()))))
    assert Manifest.load(str(copy)).digest == manifest.digest
    content["shards"][0]["sha256"] = "0" * 64
    (copy / "manifest.json").write_text(json.dumps(content))
    assert Manifest.load(str(copy)).digest != manifest.digest


def test_an_index_of_another_shard_is_refused(copy):
    manifest = Manifest.load(str(copy))
    last = manifest.shards[-1]
    shutil.copy(copy / "000000.idx", copy / last.index_name)
    with pytest.raises(ValueError, match=f"index .*{last.index_name} does not belong to shard {last.name}"):
        ShardReader(str(copy), manifest).read(manifest.samples - 1)


def test_a_shard_cut_while_training_is_an_error_that_names_it(copy):
    manifest = Manifest.load(str(copy))
    reader = ShardReader(str(copy), manifest)
    reader.read(0)
    with open(copy / "000000.tar", "r+b") as tar:
        tar.truncate(1000)
    with pytest.raises(OSError, match=r"shard 000000.tar of .* ends early"):
        reader.read(49)


@pytest.mark.parametrize(
    ("address", "remote"),
    [
        ("data/wikipedia/train", False),
        ("/data:1/x", False),
        ("file:/data", False),
        ("http://host/x", True),
        ("s3://bucket/x", True),
        ("pipe:cat x", True),
    ],
)
def test_is_remote(address, remote):
    assert is_remote(address) == remote


def test_join_follows_a_leading_parent():
    assert join("http://host/data/train/", "000000.tar") == "http://host/data/train/000000.tar"
    assert join("http://host/data/train", "../tokenizer.model") == "http://host/data/tokenizer.model"
    assert join("pipe:cat /data/train", "../tokenizer.model") == "pipe:cat /data/tokenizer.model"


def test_remote_shards_are_fetched_once(served, text_data, tmp_path):
    address, _, requests = served
    manifest = Manifest.load(address)
    expected = all_samples(ShardReader(str(text_data / "train"), manifest), manifest)
    for _ in range(2):
        reader = ShardReader(address, manifest, cache_dir=str(tmp_path / "cache"))
        assert all_samples(reader, manifest) == expected
    tars = [request for request in requests if request.endswith(".tar")]
    assert sorted(tars) == [f"/train/{shard.name}" for shard in manifest.shards]
    # indexes of equal content are one file in the cache
    indexes = [request for request in requests if request.endswith(".idx")]
    assert len(indexes) == len({shard.index_sha256 for shard in manifest.shards})
    assert not list((tmp_path / "cache").glob("*.partial"))


FETCH = """
import sys
from train.data.manifest import Manifest
from train.data.shards import ShardReader
address, cache = sys.argv[1:]
ShardReader(address, Manifest.load(address), cache).read(0)
"""


def test_ranks_that_start_together_fetch_once(served, tmp_path):
    address, _, requests = served
    ranks = [subprocess.Popen([sys.executable, "-c", FETCH, address, str(tmp_path / "cache")]) for _ in range(3)]
    assert [rank.wait() for rank in ranks] == [0, 0, 0]
    assert requests.count("/train/000000.tar") == 1


def test_a_remote_shard_with_another_checksum_is_refused(served, tmp_path):
    address, folder, requests = served
    manifest = Manifest.load(address)
    damaged = bytearray((folder / "000000.tar").read_bytes())
    damaged[700] ^= 1
    (folder / "000000.tar").write_bytes(damaged)
    reader = ShardReader(address, manifest, cache_dir=str(tmp_path / "cache"))
    for _ in range(2):
        with pytest.raises(OSError, match=rf"{address}/000000.tar is damaged: the manifest says sha256"):
            reader.read(0)
    assert requests.count("/train/000000.tar") == 1, "a bad shard was fetched again for another sample"
    assert not list((tmp_path / "cache").glob("*.tar"))


def test_a_remote_shard_that_is_missing_is_named(served, tmp_path):
    address, folder, _ = served
    manifest = Manifest.load(address)
    (folder / "000000.tar").unlink()
    with pytest.raises(OSError, match=rf"{address}/000000.tar can't be read"):
        ShardReader(address, manifest, cache_dir=str(tmp_path / "cache")).read(0)


def test_remote_needs_a_cache(served):
    with pytest.raises(ValueError, match=r"is not local; set data.cache_dir"):
        ShardReader(served[0], Manifest.load(served[0]))


def test_pipes_are_refused_unless_allowed(text_data, tmp_path):
    address = f"pipe:cat {text_data}/train"
    manifest = Manifest.load(str(text_data / "train"))
    with pytest.raises(ValueError, match=r"runs a shell command .* data.allow_pipe=true"):
        ShardReader(address, manifest, cache_dir=str(tmp_path))
    reader = ShardReader(address, Manifest.load(address), cache_dir=str(tmp_path), allow_pipe=True)
    assert all_samples(reader, manifest) == all_samples(ShardReader(str(text_data / "train"), manifest), manifest)
