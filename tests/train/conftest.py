import random
from pathlib import Path

import pytest

from train.prepare.text import TextSettings, prepare_text


@pytest.fixture(scope="session")
def text_data(tmp_path_factory) -> Path:
    """A prepared text data set: about 400 rows of 16 tokens, of a vocabulary of 300, in `train`."""
    folder = tmp_path_factory.mktemp("text")
    draw = random.Random(0)
    words = ["twicing", "attention", "filters", "smooth", "residual", "tokens", "decay", "depth", "kernel", "row"]
    lines = [" ".join(draw.choices(words, k=draw.randint(1, 30))) for _ in range(400)]
    (folder / "input.txt").write_text("\n".join(lines) + "\n")
    settings = TextSettings(
        inputs=[folder / "input.txt"],
        separator="line",
        tokenizer=None,
        tokenizer_type="bpe",
        vocab_size=300,
        row_length=16,
        validation_fraction=0.2,
        rows_per_shard=50,
    )
    prepare_text(settings, folder / "data", processes=1)
    return folder / "data"
