"""SentencePiece: training a tokeniser, and loading one."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

TYPES = ("bpe", "unigram", "word")
_LONGEST_LINE = 1 << 20  # bytes; SentencePiece drops longer lines without a word
_TRAINING_LINES = 2_000_000  # drawn at random from larger texts


def train_tokenizer(documents: Iterable[str], path: Path, kind: str, vocab_size: int) -> None:
    """Trains a model of `vocab_size` pieces on `documents` and writes it to `path`.

    Text is kept as it is (no normalisation), and what has no piece of its own is spelt in bytes (except by `word`), so
    that decoding gives the text back. BOS is the only control piece; it starts and thereby separates documents.

    Raises:
        ValueError: SentencePiece can't make such a model of this text.
    """
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(1)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(documents),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            byte_fallback=kind != "word",
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=kind == "word",
            max_sentence_length=_LONGEST_LINE,
            input_sentence_size=_TRAINING_LINES,
            shuffle_input_sentence=True,
            unk_id=0,
            bos_id=1,
            eos_id=-1,
            pad_id=-1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[-1].rpartition("] ")[2]  # after the place in its source
        raise ValueError(f"--vocab-size {vocab_size} with --tokenizer-type {kind} can't be trained: {reason}") from None
    partial = path.with_suffix(".partial")
    partial.write_bytes(model.getvalue())
    os.replace(partial, path)


def _lines(documents: Iterable[str]) -> Iterator[str]:
    longest = _LONGEST_LINE // 4  # characters: one takes at most four bytes
    for document in documents:
        for line in document.splitlines():
            for start in range(0, len(line), longest):
                yield line[start : start + longest]


@functools.cache
def load_tokenizer(path: Path) -> sentencepiece.SentencePieceProcessor:
    """The model at `path`.

    Raises:
        ValueError: it can't be read, or has no BOS piece.
    """
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"--tokenizer {path} can't be read: {error}") from None
    if tokenizer.bos_id() < 0:
        raise ValueError(f"--tokenizer {path} has no BOS piece, which must start every document")
    return tokenizer
