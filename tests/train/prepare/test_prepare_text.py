import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from train.data.manifest import Manifest, TextManifest
from train.data.shards import ShardReader
from train.prepare.__main__ import main
from train.prepare.text import _split_of

WORDS = ["twicing", "attention", "filters", "smooth", "the", "residual", "so", "that", "tokens", "ältere", "Wörter"]


def write_lines(path: Path, count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    lines = [" ".join(draw.choices(WORDS, k=draw.randint(1, 40))) for _ in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return lines


def prepare(folder: Path, *options: str, source: str = "input.txt", out: str = "out") -> int:
    common = ["--vocab-size", "300", "--row-length", "32", "--processes", "2", "--out", str(folder / out)]
    return main(["text", "--input", str(folder / source), *common, *options])


def rows_of(folder: Path) -> tuple[np.ndarray, TextManifest]:
    manifest = Manifest.load(str(folder))
    assert isinstance(manifest, TextManifest)
    reader = ShardReader(str(folder), manifest)
    content = b"".join(reader.read(i)[0] for i in range(manifest.samples))
    return np.frombuffer(content, dtype=manifest.dtype).reshape(manifest.samples, manifest.row_length + 1), manifest


def checksums(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "prepare.json"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_every_token_of_every_document_is_predicted_once(tmp_path, monkeypatch):
    monkeypatch.setattr("train.prepare.text._CHUNK_CHARACTERS", 5000)  # many chunks, so that rows cross their bounds
    lines = write_lines(tmp_path / "input.txt", 500)
    assert prepare(tmp_path, "--validation-fraction", "0.2", "--rows-per-shard", "70") == 0
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "out/tokenizer.model"))
    for split in ("train", "validation"):
        documents = [line for line in lines if _split_of(line, 0.2) == split]
        expected = [token for document in documents for token in [tokenizer.bos_id(), *tokenizer.encode(document)]]
        rows, manifest = rows_of(tmp_path / "out" / split)
        assert np.array_equal(rows[1:, 0], rows[:-1, -1]), "consecutive rows overlap by one token"
        predicted = rows[:, 1:].ravel().tolist()
        assert [int(rows[0, 0]), *predicted] == expected[: len(predicted) + 1]
        assert len(expected) - 1 - len(predicted) == manifest.dropped_tokens < manifest.row_length
        assert manifest.documents == len(documents) > 50


def test_splits_are_disjoint_even_for_repeated_documents(tmp_path):
    lines = write_lines(tmp_path / "input.txt", 300)
    (tmp_path / "input.txt").write_text("\n".join(lines * 2))
    assert prepare(tmp_path, "--validation-fraction", "0.3") == 0
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "out/tokenizer.model"))
    texts = []
    for split in ("train", "validation"):
        rows, _ = rows_of(tmp_path / "out" / split)
        stream = [int(rows[0, 0]), *rows[:, 1:].ravel().tolist()]
        starts = np.flatnonzero(np.array(stream) == tokenizer.bos_id()).tolist()
        texts.append({tokenizer.decode(stream[a + 1 : b]) for a, b in pairwise(starts)})
    long = [{text for text in part if len(text) > 40} for part in texts]
    assert long[0] and long[1] and not long[0] & long[1]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_same_input_gives_the_same_bytes(tmp_path, kind):
    write_lines(tmp_path / "input.txt", 300)
    options = ["--tokenizer-type", kind, "--vocab-size", "290"]
    assert prepare(tmp_path, *options) == 0
    assert prepare(tmp_path, *options, "--processes", "1", out="again") == 0
    first = checksums(tmp_path / "out")
    assert len(first) > 10 and first == checksums(tmp_path / "again")


def test_a_word_tokenizer(tmp_path):
    lines = write_lines(tmp_path / "input.txt", 200)
    assert prepare(tmp_path, "--tokenizer-type", "word", "--vocab-size", "13") == 0
    rows, manifest = rows_of(tmp_path / "out/train")
    assert manifest.vocab_size == 13 and rows.max() < 13
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "out/tokenizer.model"))
    assert len(tokenizer.encode(lines[0])) == len(lines[0].split())


def test_an_existing_tokenizer_is_used_as_it_is(tmp_path):
    write_lines(tmp_path / "input.txt", 300)
    assert prepare(tmp_path) == 0
    model = tmp_path / "out/tokenizer.model"
    write_lines(tmp_path / "other.txt", 300, seed=1)
    assert prepare(tmp_path, "--tokenizer", str(model), source="other.txt", out="other") == 0
    assert (tmp_path / "other/tokenizer.model").read_bytes() == model.read_bytes()
    assert rows_of(tmp_path / "other/train")[1].tokenizer_sha256 == hashlib.sha256(model.read_bytes()).hexdigest()


def test_tokens_beyond_16_bits_are_stored_in_32(tmp_path, monkeypatch):
    write_lines(tmp_path / "input.txt", 300)
    assert prepare(tmp_path) == 0
    monkeypatch.setattr("train.prepare.text._dtype", lambda vocab_size: "uint32")
    assert prepare(tmp_path, out="wide") == 0
    narrow, wide = rows_of(tmp_path / "out/train")[0], rows_of(tmp_path / "wide/train")[0]
    assert narrow.dtype == np.uint16 and wide.dtype == np.uint32 and np.array_equal(narrow, wide)


def test_text_survives_tokenising(tmp_path):
    """Newlines, spaces at will and characters that the tokeniser never saw."""
    write_lines(tmp_path / "input.txt", 300)
    assert prepare(tmp_path) == 0
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "out/tokenizer.model"))
    text = "def f():\n    return  '∑ 🙂'"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_long_lines_take_part_in_training_the_tokenizer(tmp_path):
    lines = [" ".join(["gewöhnlich"] * 3000), *["a b"] * 50]  # far beyond SentencePiece's own limit
    (tmp_path / "input.txt").write_text("\n".join(lines))
    main(["text", "--input", str(tmp_path / "input.txt"), "--vocab-size", "280", "--out", str(tmp_path / "out")])
    model = next(tmp_path.rglob("tokenizer.model"))
    assert len(sentencepiece.SentencePieceProcessor(model_file=str(model)).encode("gewöhnlich")) <= 2


def test_documents_of_jsonl_and_of_paragraphs(tmp_path):
    lines = write_lines(tmp_path / "input.txt", 300)
    (tmp_path / "input.jsonl").write_text("".join(json.dumps({"text": line, "id": 1}) + "\n" for line in lines))
    (tmp_path / "paragraphs.txt").write_text("\n\n \n".join(lines) + "\n\n")
    assert prepare(tmp_path) == 0
    assert prepare(tmp_path, source="input.jsonl", out="jsonl") == 0
    assert prepare(tmp_path, "--documents", "blank-line", source="paragraphs.txt", out="paragraphs") == 0
    assert checksums(tmp_path / "out") == checksums(tmp_path / "jsonl") == checksums(tmp_path / "paragraphs")


def test_a_complete_output_is_left_alone(tmp_path, capsys):
    write_lines(tmp_path / "input.txt", 300)
    assert prepare(tmp_path) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    capsys.readouterr()
    assert prepare(tmp_path) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'} is complete: nothing to do\n"
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert prepare(tmp_path, "--row-length", "16") == 2
    assert "holds something else or other settings" in capsys.readouterr().err


@pytest.mark.parametrize("moment", ["tokens/train-00000003.npy", "train/000002.tar"], ids=["tokenising", "writing"])
def test_preparing_continues_after_a_kill(tmp_path, moment):
    # enough chunks and shards that the kill lands in the middle; the finished parts must not be made again
    write_lines(tmp_path / "input.txt", 3000)
    program = "import train.prepare.text as t; t._CHUNK_CHARACTERS = 20000\nimport train.prepare.__main__ as m, sys\n"
    command = [sys.executable, "-c", program + "sys.exit(m.main(sys.argv[1:]))", "text"]
    command += ["--input", str(tmp_path / "input.txt"), "--vocab-size", "300", "--row-length", "32"]
    command += ["--rows-per-shard", "20", "--processes", "2", "--out"]
    assert subprocess.run([*command, str(tmp_path / "whole")]).returncode == 0

    process = subprocess.Popen([*command, str(tmp_path / "out")])
    while not (tmp_path / "out.partial" / moment).exists():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.001)
    process.send_signal(signal.SIGSTOP)
    second = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True)
    assert second.returncode == 2 and "out is being prepared by another process" in second.stderr
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.partial").rglob("0*.tar")}
    made[tmp_path / "out.partial/tokenizer.model"] = (tmp_path / "out.partial/tokenizer.model").stat().st_mtime_ns
    time.sleep(1)  # the killed process's own workers notice and end
    assert subprocess.run([*command, str(tmp_path / "out")]).returncode == 0
    assert checksums(tmp_path / "out") == checksums(tmp_path / "whole")
    for path, time_made in made.items():
        assert (tmp_path / "out" / path.relative_to(tmp_path / "out.partial")).stat().st_mtime_ns == time_made


@pytest.mark.parametrize("settings", ["other", "lost"])
def test_unfinished_work_with_other_settings_is_discarded(tmp_path, capsys, settings):
    write_lines(tmp_path / "input.txt", 300)
    assert prepare(tmp_path, "--row-length", "100000") == 2
    assert (tmp_path / "out.partial").exists()
    if settings == "lost":  # by a kill while the work was discarded
        (tmp_path / "out.partial" / "prepare.json").unlink()
    (tmp_path / "out.partial" / "leftover").mkdir()
    assert prepare(tmp_path) == 0
    assert not (tmp_path / "out" / "leftover").exists() and not (tmp_path / "out" / ".lock").exists()
    assert "was begun with other settings: starting again" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", [], "input.txt is empty"),
        (None, [], "input.txt is not a file"),
        (b"\xff\xfe\xff", [], "input.txt is not UTF-8 text"),
        (b"a b c\n" * 50, ["--vocab-size", "50000"], "--vocab-size 50000 with --tokenizer-type bpe can't be trained"),
        (b"some words\nother words\n" * 50, ["--tokenizer", "input"], "--tokenizer input can't be read"),
        (b"\n \n\n", [], "can't be trained"),
    ],
    ids=["empty", "missing", "binary", "vocabulary", "tokenizer", "blank"],
)
def test_errors_are_one_line(tmp_path, capfd, content, options, message):
    if content is not None:
        (tmp_path / "input.txt").write_bytes(content)
    assert prepare(tmp_path, *options) == 2
    error = capfd.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and "\n" not in error


@pytest.mark.slow
def test_the_wikipedia_source(tmp_path):
    assert main(["text", "--source", "wikipedia-summaries", "--out", str(tmp_path / "wikipedia")]) == 0
    rows, manifest = rows_of(tmp_path / "wikipedia/train")
    assert manifest.vocab_size == 4096 and manifest.documents > 9000 and rows.size > 1_000_000
    download = next((tmp_path / "downloads").glob("*.whl"))
    made = download.stat().st_mtime_ns
    assert main(["text", "--source", "wikipedia-summaries", "--out", str(tmp_path / "again")]) == 0
    assert download.stat().st_mtime_ns == made
    assert checksums(tmp_path / "again") == checksums(tmp_path / "wikipedia")
