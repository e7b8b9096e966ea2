"""Which changes of the config a checkpoint can be continued with."""

from __future__ import annotations

import pytest

from train.checkpoint import State
from train.config import flatten, load_config
from train.resume import check_same_run

QUICKSTART = "configs/language/quickstart.yaml"


def _check(*overrides: str, digest: str = "data") -> list[str]:
    state = State(10, 160, 2, 2, flatten(load_config(QUICKSTART)), "data")
    return check_same_run(state, load_config(QUICKSTART, list(overrides)), digest)


def test_the_same_config_continues():
    assert _check() == []
    assert _check("train.stop_at_step=20") == []


@pytest.mark.parametrize("change", ["optimizer.lr=0.1", "train.steps=2000", "model.attention_backend=composed"])
def test_harmless_changes_are_told(change):
    key = change.partition("=")[0]
    assert [line.split(" was ")[0] for line in _check(change)] == [key]


@pytest.mark.parametrize(
    "change",
    ["train.seed=2", "train.global_batch_size=32", "data.lanes=480", "data.shuffle_block=1", "model.layers=3"]
    + ["model.twicing_layers=none"],
)
def test_another_run_is_refused(change):
    key, _, value = change.partition("=")
    with pytest.raises(ValueError, match=rf"{key}='?{value}'?, but runs/quickstart was started with"):
        _check(change)


def test_another_data_set_is_refused():
    with pytest.raises(ValueError, match="data set has changed"):
        _check(digest="other")
