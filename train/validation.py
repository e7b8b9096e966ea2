"""Refuses configurations that cannot work, before anything is launched.

Only what the file itself decides is checked here. What needs the world size or the data set's manifest is checked when
the data is built.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

from train.config import AnyConfig, LanguageConfig, LanguageModelConfig, VisionConfig, VisionModelConfig, flatten
from train.models.layers import parse_twicing_layers
from twicing_core.attention import BACKENDS

CHOICES: dict[str, tuple[str, ...]] = {
    "model.positions": ("rope", "sinusoidal", "learned"),
    "model.norm": ("rms", "layer"),
    "model.norm_position": ("pre", "post"),
    "model.mlp": ("swiglu", "relu", "gelu"),
    "model.head": ("tied", "untied", "adaptive"),
    "model.attention_backend": ("auto", *BACKENDS),
    "data.on_bad_sample": ("fail", "skip"),
    "data.augmentation": ("none", "crop_flip", "rand_augment"),
    "train.on_loss_spike": ("ignore", "skip", "roll_back"),
    "schedule.kind": ("cosine", "linear", "constant"),
    "train.precision": ("auto", "bf16", "fp16", "fp32"),
}
AT_LEAST_1 = (
    "model.vocab_size",
    "model.layers",
    "model.width",
    "model.heads",
    "model.kv_heads",
    "model.mlp_width",
    "model.sequence_length",
    "model.image_size",
    "model.patch_size",
    "model.channels",
    "model.classes",
    "data.lanes",
    "data.shuffle_block",
    "data.repeats",
    "train.steps",
    "train.stop_at_step",
    "train.global_batch_size",
    "train.micro_batch_size",
    "train.sequence_parallel_size",
    "train.planned_world_size",
    "train.hang_seconds",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "monitor.every_steps",
)
AT_LEAST_0 = (
    "data.workers",
    "data.crop_padding",
    "data.mixup",
    "data.cutmix",
    "optimizer.weight_decay",
    "optimizer.grad_clip",
    "schedule.warmup_steps",
    "train.seed",
    "train.max_skipped_steps",
    "train.activation_checkpointing",
    "evaluate.every_steps",
)
ABOVE_0 = (
    "model.rope_theta",
    "model.mlp_ratio",
    "optimizer.lr",
    "optimizer.eps",
    "train.spike_z_score",
)
BELOW_1 = (
    "model.dropout",
    "model.drop_path",
    "train.label_smoothing",
)  # and at least 0
NOT_EMPTY = (
    "run.dir",
    "data.train",
    "data.validation",
)
FRACTIONS = (
    "data.random_erasing",
    "schedule.final_lr_fraction",
)  # 0 and 1 included
# Settings of DeepSpeed's own that the YAML file decides, each with the key that does.
DECIDED_HERE = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "gradient_clipping": "optimizer.grad_clip",
    "optimizer": "optimizer.*",
    "scheduler": "schedule.*",
    "bf16": "train.precision",
    "fp16": "train.precision",
}


class Problems:
    """What is wrong with a configuration, one line each."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def require(self, holds: bool, key: str, value: Any, allowed: str) -> bool:
        """Notes a problem unless `holds`; returns `holds`."""
        if not holds:
            self.lines.append(f"{key} is {value!r}; it must be {allowed}")
        return holds


def validate(config: AnyConfig) -> None:
    """Checks every value by itself and, if those are sound, against each other.

    Warns about settings that have no effect beside the others.

    Raises:
        ValueError: one line for each impossible value: its dotted key, the value and what is allowed.
    """
    problems = Problems()
    _check_each_value(config, problems)
    if not problems.lines:  # the rest divides by these values
        _check_training(config, problems)
        _check_deepspeed_file(config, problems)
        if isinstance(config, LanguageConfig):
            _check_language_model(config.model, problems)
        else:
            _check_vision(config, problems)
        _check_sequence_parallel(config, problems)
    if problems.lines:
        raise ValueError("\n".join(problems.lines))
    for message in _ignored_settings(config):
        warnings.warn(message, stacklevel=2)


def _check_each_value(config: AnyConfig, problems: Problems) -> None:
    values = {key: value for key, value in flatten(config).items() if value is not None}
    task = "language" if isinstance(config, LanguageConfig) else "vision"
    problems.require(config.task == task, "task", config.task, f"{task}, as in the file whose model this is")
    for key, value in values.items():
        if isinstance(value, float) and not problems.require(math.isfinite(value), key, value, "a finite number"):
            return

    def require_all(keys: Collection[str], holds: Any, allowed: str) -> None:
        for key in keys:
            if key in values:
                problems.require(holds(values[key]), key, values[key], allowed)

    for key, choices in CHOICES.items():
        require_all([key], lambda value, choices=choices: value in choices, "one of " + ", ".join(choices))
    require_all(AT_LEAST_1, lambda value: value >= 1, "at least 1")
    require_all(AT_LEAST_0, lambda value: value >= 0, "at least 0")
    require_all(ABOVE_0, lambda value: value > 0, "above 0")
    require_all(BELOW_1, lambda value: 0 <= value < 1, "at least 0 and below 1")
    require_all(NOT_EMPTY, lambda value: value != "", "a folder or an address")
    require_all(FRACTIONS, lambda value: 0 <= value <= 1, "from 0 to 1")
    betas = config.optimizer.betas
    problems.require(
        len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
        "optimizer.betas",
        betas,
        "two numbers, each at least 0 and below 1",
    )


def _check_training(config: AnyConfig, problems: Problems) -> None:
    train = config.train
    if train.micro_batch_size is not None:
        problems.require(
            train.global_batch_size % train.micro_batch_size == 0,
            "train.micro_batch_size",
            train.micro_batch_size,
            f"a divisor of train.global_batch_size, {train.global_batch_size}",
        )
    problems.require(
        train.activation_checkpointing <= config.model.layers,
        "train.activation_checkpointing",
        train.activation_checkpointing,
        f"at most model.layers, {config.model.layers}: it recomputes every k-th layer",
    )


def _check_deepspeed_file(config: AnyConfig, problems: Problems) -> None:
    path = Path(config.deepspeed.config)
    key = "deepspeed.config"
    if not problems.require(path.is_file(), key, str(path), "a JSON file that exists, seen from the working directory"):
        return
    try:
        settings = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        problems.require(False, key, str(path), f"valid JSON: {error}")
        return
    if not problems.require(isinstance(settings, dict), key, str(path), "a JSON object"):
        return
    for name in sorted(DECIDED_HERE.keys() & settings.keys()):
        problems.require(False, key, str(path), f"without {name!r}, which {DECIDED_HERE[name]} decides")
    zero = settings.get("zero_optimization", {})
    for name in ("offload_optimizer", "offload_param"):
        part = zero.get(name, {})
        device = part.get("device", "none")
        allowed = f"a file whose {name} is to none, cpu or nvme, not {device}"
        problems.require(device in ("none", "cpu", "nvme"), key, str(path), allowed)
        if device == "nvme":
            allowed = f"a file of stage 3, if its {name} is to nvme"
            problems.require(zero.get("stage", 0) == 3, key, str(path), allowed)
            allowed = f"a file whose {name} has an nvme_path, the folder on each host's disk"
            problems.require(bool(part.get("nvme_path")), key, str(path), allowed)
            allowed = f"a file whose {name} has neither pipeline_read nor pipeline_write, with which it can't be saved"
            problems.require(not (part.get("pipeline_read") or part.get("pipeline_write")), key, str(path), allowed)


def _check_width_and_layers(model: LanguageModelConfig | VisionModelConfig, problems: Problems) -> None:
    allowed = f"a divisor of model.width, {model.width}"
    problems.require(model.width % model.heads == 0, "model.heads", model.heads, allowed)
    try:
        parse_twicing_layers(model.twicing_layers, model.layers)
    except ValueError as error:
        problems.lines.append(str(error))


def _check_language_model(model: LanguageModelConfig, problems: Problems) -> None:
    _check_width_and_layers(model, problems)
    if model.kv_heads is not None:
        allowed = f"a divisor of model.heads, {model.heads}"
        problems.require(model.heads % model.kv_heads == 0, "model.kv_heads", model.kv_heads, allowed)
    if model.positions == "rope":
        allowed = f"such that model.width / model.heads is even, which rope needs; model.heads is {model.heads}"
        problems.require(model.width // model.heads % 2 == 0, "model.width", model.width, allowed)
    if model.positions == "sinusoidal":
        problems.require(model.width % 2 == 0, "model.width", model.width, "even with model.positions sinusoidal")
    if model.head == "adaptive":
        cutoffs = model.adaptive_cutoffs
        ascending = cutoffs == sorted(set(cutoffs))
        in_range = bool(cutoffs) and min(cutoffs) >= 1 and max(cutoffs) < model.vocab_size
        allowed = f"ascending, at least 1 and below model.vocab_size, {model.vocab_size}, for the adaptive head"
        problems.require(ascending and in_range, "model.adaptive_cutoffs", cutoffs, allowed)


def _check_sequence_parallel(config: AnyConfig, problems: Problems) -> None:
    key, size = "train.sequence_parallel_size", config.train.sequence_parallel_size
    if size == 1:
        return
    if not isinstance(config, LanguageConfig):
        problems.require(False, key, size, "1 for vision: the positions of an image are not shared between ranks")
        return
    model = config.model
    shared = {"model.sequence_length": model.sequence_length, "model.heads": model.heads}
    if model.kv_heads is not None:
        shared["model.kv_heads"] = model.kv_heads
    for other, number in shared.items():
        problems.require(number % size == 0, key, size, f"a divisor of {other}, {number}")
    allowed = f"false with {key}={size}: traced by torch.compile, the exchange between ranks gets no gradient"
    problems.require(not config.train.compile, "train.compile", config.train.compile, allowed)


def _check_vision(config: VisionConfig, problems: Problems) -> None:
    model, data = config.model, config.data
    _check_width_and_layers(model, problems)
    problems.require(model.channels in (1, 3), "model.channels", model.channels, "1, grey images, or 3, colour")
    problems.require(
        model.image_size % model.patch_size == 0,
        "model.patch_size",
        model.patch_size,
        f"a divisor of model.image_size, {model.image_size}",
    )
    for key, numbers in (("data.mean", data.mean), ("data.std", data.std)):
        allowed = f"{model.channels} numbers, as many as model.channels"
        problems.require(len(numbers) == model.channels, key, numbers, allowed)
    problems.require(all(s > 0 for s in data.std), "data.std", data.std, "above 0")
    if data.mixup > 0 or data.cutmix > 0:
        micro = config.train.micro_batch_size
        key, size = (
            ("train.global_batch_size", config.train.global_batch_size)
            if micro is None
            else ("train.micro_batch_size", micro)
        )
        problems.require(size % 2 == 0, key, size, "even with data.mixup or data.cutmix, which mix images in pairs")


def _ignored_settings(config: AnyConfig) -> list[str]:
    """Settings that a user has given a value other than the default, and that have no effect."""
    messages = []
    if isinstance(config, LanguageConfig):
        if config.model.adaptive_cutoffs and config.model.head != "adaptive":
            messages.append(f"model.adaptive_cutoffs is ignored: model.head is {config.model.head}")
        if config.train.label_smoothing > 0:
            messages.append("train.label_smoothing is ignored: it is for vision")
    else:
        if config.data.random_erasing > 0 and config.data.augmentation != "rand_augment":
            messages.append(
                f"data.random_erasing is ignored: data.augmentation is {config.data.augmentation}, not rand_augment"
            )
        if config.evaluate.prompts:
            messages.append("evaluate.prompts is ignored: it is for language")
    if config.schedule.warmup_steps >= config.train.steps:
        messages.append(
            f"schedule.warmup_steps, {config.schedule.warmup_steps}, is not below train.steps, {config.train.steps}: "
            "the learning rate only rises"
        )
    stop = config.train.stop_at_step
    if stop is not None and stop >= config.train.steps:
        messages.append(f"train.stop_at_step, {stop}, is ignored: train.steps is {config.train.steps}")
    return messages
