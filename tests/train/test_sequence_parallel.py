"""Ranks that share rows compute what one rank alone does: attention, models, and whole runs of the trainer."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.nn import functional as F

from train.config import load_config
from train.distributed import Ranks
from train.models.language import LanguageModel
from train.run import run
from train.sequence_parallel import SequenceParallel
from twicing_core import twicing_attention

CONFIG = "configs/language/quickstart.yaml"
PACKED = [0, 20, 50, 64, 100, 128]  # two rows of 64; documents end inside slices and at their ends
# Attention itself changes no bit. Linear layers of fewer rows, and sums over ranks, take their terms in another order.
FLOAT32 = 1e-6
HALF = 1e-3  # gradients keep 8 or 11 bits, and AdamW's steps for small ones may turn round
HALVES = {"bf16": ("zero0", "zero3"), "fp16": ("zero1",)}  # and the stages tried in each
if not get_accelerator().is_fp16_supported():
    del HALVES["fp16"]


def _attention(ranks: Ranks) -> None:
    shared = SequenceParallel(2)
    softmax = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    twicing = partial(twicing_attention, is_causal=True, enable_gqa=True)
    packed = torch.tensor(PACKED, dtype=torch.int32)
    for attend, dtype, key_heads, arguments in [
        (twicing, torch.float32, 4, {}),
        (twicing, torch.float32, 4, {"cu_seqlens": packed}),
        (twicing, torch.float32, 2, {"cu_seqlens": packed}),
        (twicing, torch.bfloat16, 2, {}),
        (twicing, torch.float32, 2, {"backend": "composed", "cu_seqlens": packed}),
        (twicing, torch.float64, 2, {"backend": "reference", "cu_seqlens": packed}),
        (softmax, torch.float32, 2, {}),
    ]:
        draw = torch.Generator().manual_seed(0)
        shapes = [(2, heads, 64, 16) for heads in (4, key_heads, key_heads, 4)]
        *whole, grad_output = (torch.randn(shape, generator=draw).to(dtype) for shape in shapes)
        own = shared.positions(64)
        parts = [tensor[:, :, own].detach().requires_grad_() for tensor in whole]
        whole = [tensor.requires_grad_() for tensor in whole]

        expected = attend(*whole, **arguments)
        output = shared.attend(attend, *parts, **arguments)
        assert torch.equal(output, expected[:, :, own])
        expected.backward(grad_output)
        output.backward(grad_output[:, :, own])
        for part, tensor in zip(parts, whole, strict=True):
            assert part.grad is not None and tensor.grad is not None
            assert torch.equal(part.grad, tensor.grad[:, :, own])


def _models(ranks: Ranks) -> None:
    shared = SequenceParallel(2)
    packed = torch.tensor(PACKED, dtype=torch.int32)
    ids = torch.randint(65, (2, 65), generator=torch.Generator().manual_seed(1))
    batch: dict[str, Any] = {"input_ids": ids[:, :-1], "targets": ids[:, 1:], "cu_seqlens": packed}
    small = ["model.vocab_size=65", "model.layers=2", "model.width=32", "model.heads=4", "model.mlp_width=48"]
    small += ["model.sequence_length=64"]
    for recompute, *settings in [
        (1, "model.kv_heads=2"),
        (0, "model.positions=learned", "model.twicing_layers=last:1"),
        (2, "model.positions=sinusoidal", "model.head=adaptive", "model.adaptive_cutoffs=[20]"),
    ]:
        torch.manual_seed(0)
        model = LanguageModel(load_config(CONFIG, [*small, *settings]).model, recompute)
        expected = model(**batch)
        expected.sum().backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        model.zero_grad()

        losses = model(**batch, shared_rows=shared)
        torch.testing.assert_close(losses, expected[:, shared.positions(64)], rtol=FLOAT32, atol=1e-6)
        losses.sum().backward()
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            dist.all_reduce(parameter.grad)
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-5)


def _attention_and_models(ranks: Ranks) -> None:
    _attention(ranks)
    _models(ranks)


def test_attention_and_models_are_those_of_one_rank(run_distributed):
    run_distributed(_attention_and_models, 2)


def _run(ranks: Ranks, data: Path, run_dir: Path, stage: str, size: int, *overrides: str) -> None:
    settings = [f"data.train={data}/train", f"data.validation={data}/validation", "data.workers=0", "data.lanes=12"]
    settings += ["model.vocab_size=300", "model.sequence_length=16", "model.layers=2", "model.width=32"]
    settings += ["model.mlp_width=48", "model.kv_heads=2", "schedule.warmup_steps=1"]
    settings += ["train.steps=6", "train.global_batch_size=12", "train.micro_batch_size=3", "evaluate.every_steps=0"]
    settings += [f"run.dir={run_dir}", f"deepspeed.config=configs/deepspeed/{stage}.json", "train.precision=fp32"]
    settings += ["evaluate.prompts=[]"]
    settings += [f"train.sequence_parallel_size={size}"]
    assert run(load_config(CONFIG, [*settings, *overrides]), time.time()) == 0


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def _assert_same_run(run_dir: Path, expected_dir: Path, tolerance: float = FLOAT32) -> None:
    """The same samples in each step, and losses, in training and validation, that agree to `tolerance`."""
    for name, count in {"metrics.jsonl": 6, "validation.jsonl": 1}.items():
        lines, expected = _lines(run_dir / name), _lines(expected_dir / name)
        assert len(lines) == len(expected) == count
        for line, other in zip(lines, expected, strict=True):
            assert (line.get("samples"), line.get("batch_hash")) == (other.get("samples"), other.get("batch_hash"))
            assert line["loss"] == pytest.approx(other["loss"], rel=tolerance), (run_dir.name, name, line["step"])


def _alone(ranks: Ranks, data: Path, runs: Path) -> None:
    _run(ranks, data, runs / "alone", "zero2", 1)


def _two_to_a_row(ranks: Ranks, data: Path, runs: Path) -> None:
    for stage, prompts in {"zero2": "[]", "zero3": "[twicing]"}.items():
        _run(ranks, data, runs / stage, stage, 2, "train.activation_checkpointing=1", f"evaluate.prompts={prompts}")
    if ranks.is_main:
        for stage in ("zero2", "zero3"):
            _assert_same_run(runs / stage, runs / "alone")


@pytest.mark.slow
def test_two_ranks_that_share_rows_train_as_one_does(run_distributed, text_data, tmp_path):
    run_distributed(_alone, 1, text_data, tmp_path)
    run_distributed(_two_to_a_row, 2, text_data, tmp_path)


def _alone_in_all_precisions(ranks: Ranks, data: Path, runs: Path) -> None:
    _run(ranks, data, runs / "alone", "zero2", 1)
    for precision in HALVES:
        _run(ranks, data, runs / f"alone_{precision}", "zero2", 1, f"train.precision={precision}")


def _begin(ranks: Ranks, data: Path, runs: Path) -> None:
    _run(ranks, data, runs / "resumed", "zero2", 2, "train.stop_at_step=2")


def _four(ranks: Ranks, data: Path, runs: Path) -> None:
    stages = ("zero0", "zero1", "zero2", "zero3_offload")
    for stage in stages:
        _run(ranks, data, runs / stage, stage, 2)
    if ranks.is_main:
        for stage in stages:
            _assert_same_run(runs / stage, runs / "alone")
    for precision, half_stages in HALVES.items():
        for stage in half_stages:
            settings = [f"train.precision={precision}", "train.activation_checkpointing=2"]
            _run(ranks, data, runs / f"{stage}_{precision}", stage, 2, *settings)
            if ranks.is_main:
                _assert_same_run(runs / f"{stage}_{precision}", runs / f"alone_{precision}", HALF)
    _run(ranks, data, runs / "resumed", "zero3", 2, "train.stop_at_step=3")
    _run(ranks, data, runs / "resumed", "zero1", 1, "train.stop_at_step=4")


def _finish(ranks: Ranks, data: Path, runs: Path) -> None:
    _run(ranks, data, runs / "resumed", "zero2", 1, "train.stop_at_step=5")
    _run(ranks, data, runs / "resumed", "zero2", 1)
    _assert_same_run(runs / "resumed", runs / "alone")


@pytest.mark.long
def test_groups_of_two_among_four_ranks_and_resuming_with_other_groups(run_distributed, text_data, tmp_path):
    run_distributed(_alone_in_all_precisions, 1, text_data, tmp_path)
    run_distributed(_begin, 2, text_data, tmp_path)
    run_distributed(_four, 4, text_data, tmp_path)
    run_distributed(_finish, 1, text_data, tmp_path)
