"""`--dry-run` accepts every recipe, with the world size it was written for, on a machine without its data."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
RECIPES = sorted(
    str(p.relative_to(REPOSITORY))
    for folder in ("language", "vision")
    for p in (REPOSITORY / "configs" / folder).glob("*.yaml")
)
# One batch of the largest takes minutes on two cores: its depth goes, its shape stays where it can.
SMALLER = {recipe: ["model.layers=2"] for recipe in ("llama_1b", "gpt2_124m", "wikitext103_paper")}
SMALLER["llama_1b"].append("train.sequence_parallel_size=4")  # the batch is then a rank's slice of a row
SMALLER["llama_70b"] = ["model.layers=2", "model.width=256", "model.heads=8", "model.mlp_width=1024"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: Path(path).stem)
def test_every_recipe_is_accepted(recipe):
    command = [sys.executable, "-m", "train", recipe, "--dry-run", *SMALLER.get(Path(recipe).stem, [])]
    ran = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    for line in ("parameters", "gradient accumulation", "ZeRO-3", "<- this config", "the config works"):
        assert line in ran.stdout
