"""`python -m train.prepare text | images | verify | index`: makes data sets and checks them."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 for a damaged data set, 2 for a wrong call or missing data."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m train.prepare", description="Makes data sets for training and checks them.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    text = commands.add_parser("text", help="text files to packed rows of tokens", description=_text.__doc__)
    text.set_defaults(command=_text)
    source = text.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", type=Path, nargs="+", metavar="FILE", help='plain text, or .jsonl with "text"')
    source.add_argument("--source", choices=["wikipedia-summaries"], help="public text, downloaded")
    text.add_argument(
        "--documents",
        choices=["line", "blank-line"],
        default="line",
        help="what separates documents in plain text: every line is one (default), or blank lines stand between them",
    )
    text.add_argument("--tokenizer", type=Path, metavar="FILE", help="an existing SentencePiece model, with BOS")
    text.add_argument(
        "--tokenizer-type", choices=["bpe", "unigram", "word"], default="bpe", help="of the one to train (default: bpe)"
    )
    text.add_argument("--vocab-size", type=_positive, default=4096, help="of the one to train (default: 4096)")
    text.add_argument("--row-length", type=_positive, default=256, help="tokens predicted in a row (default: 256)")
    text.add_argument(
        "--validation-fraction", type=_fraction, default=0.05, help="of the documents, chosen by hash (default: 0.05)"
    )
    text.add_argument("--rows-per-shard", type=_positive, help="default: at most 64 MiB, and 16 shards")
    _add_common(text)

    images = commands.add_parser("images", help="images to shards", description=_images.__doc__)
    images.set_defaults(command=_images)
    source = images.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--folder", type=Path, metavar="DIR", help="holds train/CLASS/*.JPEG and val/CLASS/*.JPEG, as ImageNet does"
    )
    source.add_argument(
        "--source", choices=["fashion-mnist", "mnist"], help="public images, downloaded; mnist has 5,000 of them"
    )
    images.add_argument("--samples-per-shard", type=_positive, help="default: at most 64 MiB, and 16 shards")
    _add_common(images)

    check = commands.add_parser("verify", help="compare a data set with its manifest", description=_verify.__doc__)
    check.set_defaults(command=_verify)
    check.add_argument("folder", type=Path, metavar="DIR")

    index = commands.add_parser("index", help="adopt existing WebDataset shards", description=_index.__doc__)
    index.set_defaults(command=_index)
    index.add_argument("folder", type=Path, metavar="DIR")
    index.add_argument("--classes", type=_positive, help="default: the largest label, and one")
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets the folders train and validation")
    parser.add_argument(
        "--downloads", type=Path, metavar="DIR", help="where downloads stay (default: downloads, beside --out)"
    )
    parser.add_argument("--processes", type=_positive, default=os.cpu_count(), help="default: one a core")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


# The modules below are imported when needed: not every command needs SentencePiece, Pillow or the network.


def _text(options: argparse.Namespace) -> int:
    """Trains a SentencePiece tokeniser (or takes one), splits documents into train and validation, packs rows of
    tokens, and writes WebDataset shards. Run again after an interruption, it continues."""
    from train.prepare.sources import wikipedia_summaries
    from train.prepare.text import TextSettings, prepare_text

    settings = TextSettings(
        inputs=options.input or [wikipedia_summaries(_downloads(options))],
        separator=options.documents,
        tokenizer=options.tokenizer,
        tokenizer_type=options.tokenizer_type,
        vocab_size=options.vocab_size,
        row_length=options.row_length,
        validation_fraction=options.validation_fraction,
        rows_per_shard=options.rows_per_shard,
    )
    prepare_text(settings, options.out, options.processes)
    return 0


def _images(options: argparse.Namespace) -> int:
    """Writes images, mixed by class, to WebDataset shards. Run again after an interruption, it continues."""
    from train.prepare.images import prepare_images

    prepare_images(
        options.source, options.folder, _downloads(options), options.out, options.samples_per_shard, options.processes
    )
    return 0


def _downloads(options: argparse.Namespace) -> Path:
    return options.downloads or options.out.parent / "downloads"


def _verify(options: argparse.Namespace) -> int:
    """Compares checksums, indexes and sample counts of a data set, or of those in the folders of DIR, with their
    manifests. Prints a line for each problem; the exit status is 1 if there are any."""
    from train.prepare.verify import verify

    problems = verify(options.folder)
    for problem in problems:
        print(problem)
    if not problems:
        print(f"{options.folder} is as its manifests say")
    return 1 if problems else 0


def _index(options: argparse.Namespace) -> int:
    """Makes the manifest and the indexes that training needs for existing WebDataset shards of images (png, jpg, ...
    and cls)."""
    from train.prepare.images import index_images

    index_images(options.folder, options.classes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
