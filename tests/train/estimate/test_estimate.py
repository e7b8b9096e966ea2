"""`python -m train.estimate`: what it prints for language and vision, its arithmetic, and what it refuses."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from train.config import load_config
from train.estimate.__main__ import main
from train.estimate.communication import all_to_alls, collectives
from train.estimate.gpus import GPUS
from train.estimate.memory import zero_config
from train.models.attention import backend_in_use, planned_backend

SECTIONS = ("MODEL AND CLUSTER", "MEMORY", "FLOPS", "COMMUNICATION", "TIME AND COST", "STORAGE")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["configs/language/llama_1b.yaml", "--gpus=16", "model.layers=2"],
            [r"  norms +10,240", "ZeRO-3 .* this config", "of these, logits and losses", r"a checkpoint +2.6 GB"],
        ),
        (
            ["configs/language/llama_1b.yaml", "--gpus=16", "model.layers=2", "train.sequence_parallel_size=4"],
            [r"ranks that share a row +4", r"ZeRO-3 +all-to-all of slices and heads +\d"],
        ),
        (
            ["configs/language/wikitext103_paper.yaml", "--gpus=4", "--gpu=4090", "model.layers=2"],
            [r"attention backend +fused"],
        ),
        (
            ["configs/vision/deit_tiny.yaml", "--gpus=8", "--gpu=a100-80", "--samples=1281167"],
            [r"an epoch, 1,251 steps", r"images a step +1,024", "ZeRO-1 .* this config"],
        ),
        (["configs/vision/quickstart.yaml", "--gpus=2", "--dollars-per-gpu-hour=2"], [r"the run, 3,750 steps .*, \$"]),
    ],
    ids=["llama_1b", "llama_1b, rows shared", "wikitext103_paper", "deit_tiny", "vision_quickstart"],
)
def test_prints_every_section(arguments, expected, capsys):
    main(arguments)
    printed = capsys.readouterr().out
    assert [title for title in SECTIONS if title not in printed] == []
    for pattern in expected:
        assert re.search(pattern, printed), printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus=7"], r"data.lanes is 15360; it must be a multiple of the number of ranks, 7"),
        (["--gpus=1024"], r"train.global_batch_size is 512; it must be a multiple of the number of ranks, 1024"),
        (["--gpus=64", "train.micro_batch_size=16"], r"train.micro_batch_size is 16; .* one of 1, 2, 4, 8$"),
        (["--gpus=12"], r"--gpus is 12; it must be at most --gpus-per-node, 8, or a multiple of it"),
        (["--gpus=8", "train.precision=fp32"], r"train.precision is fp32"),
    ],
    ids=["lanes", "global batch", "micro-batch", "half a node", "fp32"],
)
def test_impossible_layouts_are_refused_with_the_reason(arguments, message):
    with pytest.raises(ValueError, match=message):
        main(["configs/language/llama_1b.yaml", *arguments])


def test_seconds_of_a_collective_are_those_of_its_slowest_link():
    h100, stage = GPUS["h100"], zero_config({}, 1)
    reduce, gather = collectives(stage, 10**9, "bf16", micro_batches=4)
    assert (reduce.kind, reduce.payload, gather.kind, gather.payload) == ("all-reduce", 2e9, "all-gather", 2e9)
    # In one node every GPU gets 7/8 of it over NVLink, and for an all-reduce twice.
    assert gather.seconds(h100, 8, 8) == pytest.approx(7 / 8 * 2e9 / 450e9)
    assert reduce.seconds(h100, 8, 8) == pytest.approx(2 * 7 / 8 * 2e9 / 450e9)
    # In two, half of it comes to each node through eight network cards of 50 GB/s.
    assert gather.seconds(h100, 16, 8) == pytest.approx(max(15 / 16 * 2e9 / 450e9, 1 / 2 * 2e9 / (8 * 50e9)))
    assert gather.seconds(GPUS["a100-80"], 64, 8) == pytest.approx(7 / 8 * 2e9 / (8 * 25e9))
    assert gather.seconds(h100, 1, 8) == 0


def test_an_all_to_all_leaves_the_node_only_if_the_group_does():
    h100, config = GPUS["h100"], load_config("configs/language/llama_1b.yaml", ["train.sequence_parallel_size=4"])
    config.train.activation_checkpointing = 0
    (sent,) = all_to_alls(config, "bf16", micro_batches=3, samples=2)
    model = config.model
    heads = 2 * model.heads + 2 * model.kv_heads  # of queries and outputs, of keys and values
    tensors = 2 * 2 * model.sequence_length // 4 * heads * (model.width // model.heads)
    assert sent.payload == 3 * model.layers * 2 * tensors  # forward and backward
    assert sent.sent(64) == pytest.approx(3 / 4 * sent.payload)
    assert sent.seconds(h100, 64, gpus_per_node=8) == pytest.approx(3 / 4 * sent.payload / 450e9)
    assert sent.seconds(h100, 64, gpus_per_node=2) == pytest.approx(1 / 2 * sent.payload / 50e9)


def test_accumulated_micro_batches_are_sent_by_stages_2_and_3_only():
    sent = {stage: sum(c.sent(2) for c in collectives(zero_config({}, stage), 10**10, "bf16", 4)) for stage in range(4)}
    once = 2e10
    assert sent == {0: once, 1: 1.5 * once, 2: 4.5 * once, 3: 4 * (1.0 + 0.5) * once}


def test_a_block_that_is_let_go_while_it_is_recomputed_is_gathered_three_times():
    zero = zero_config({"stage3_max_reuse_distance": 10**8}, 3)
    gather, _ = collectives(zero, 10**10, "bf16", 1, recomputed=9 * 10**9, largest_block=10**9)
    assert gather.payload == pytest.approx((2 + 0.9) * 2e10)


def test_auto_is_the_backend_that_twicing_attention_takes():
    language = load_config("configs/language/quickstart.yaml").model
    assert backend_in_use(language, torch.device("cpu"), torch.float64) == "composed"
    language.attention_backend = "reference"
    assert backend_in_use(language, torch.device("cpu"), torch.bfloat16) == "reference"
    assert planned_backend(language, (9, 0), torch.bfloat16) == "reference"


@pytest.mark.parametrize(
    ("recipe", "changes", "capability", "backend"),
    [
        ("language/llama_1b", {}, (9, 0), "fused"),
        ("language/llama_1b", {"heads": 8}, (9, 0), "composed"),  # heads of 256 have no fused gradient
        ("vision/deit_tiny", {}, (10, 0), "fused"),  # short
        ("vision/deit_tiny", {"image_size": 384}, (8, 0), "fused"),
        ("vision/deit_tiny", {"image_size": 384}, (10, 0), "composed"),
    ],
)
def test_auto_on_a_gpu_that_is_not_here(recipe, changes, capability, backend):
    model = dataclasses.replace(load_config(f"configs/{recipe}.yaml").model, **changes)
    assert planned_backend(model, capability, torch.bfloat16) == backend
