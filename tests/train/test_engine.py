"""What the YAML file and DeepSpeed's JSON become together."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from train.config import load_config
from train.engine import deepspeed_config, parameter_groups
from train.precision import resolve_precision

QUICKSTART = "configs/language/quickstart.yaml"


def test_batch_sizes_multiply_out():
    config = load_config(QUICKSTART, ["train.global_batch_size=48", "train.micro_batch_size=4"])
    settings = deepspeed_config(config, world_size=3, precision="bf16")
    assert settings["train_batch_size"] == 48
    assert settings["train_micro_batch_size_per_gpu"] == 4
    assert settings["gradient_accumulation_steps"] == 4


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_precision_is_set_once(precision):
    settings = deepspeed_config(load_config(QUICKSTART), 2, precision)
    assert (settings["bf16"]["enabled"], settings["fp16"]["enabled"]) == (precision == "bf16", precision == "fp16")


def test_the_file_chooses_the_stage(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}))
    settings = deepspeed_config(load_config(QUICKSTART, [f"deepspeed.config={path}"]), 2, "bf16")
    assert settings["zero_optimization"]["stage"] == 1
    assert settings["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}


def test_fp16_without_zero_is_refused():
    config = load_config(QUICKSTART, ["deepspeed.config=configs/deepspeed/zero0.json"])
    with pytest.raises(ValueError, match=r"deepspeed.config=configs/deepspeed/zero0.json is without ZeRO.*fp16"):
        deepspeed_config(config, 2, "fp16")


def test_only_matrices_decay():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Embedding(5, 4))
    decayed, plain = parameter_groups(model, weight_decay=0.1)
    assert [p.ndim for p in decayed["params"]] == [2, 2] and decayed["weight_decay"] == 0.1
    assert [p.ndim for p in plain["params"]] == [1, 1, 1] and plain["weight_decay"] == 0.0


def test_precision_that_was_asked_for_is_kept():
    assert resolve_precision("fp32", torch.device("cpu")) == "fp32"
    assert resolve_precision("auto", torch.device("cpu")) in ("bf16", "fp32")
