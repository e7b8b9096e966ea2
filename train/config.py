"""The configuration: dataclasses, a YAML file over them, dotted overrides over that.

`load_config` is the only way in. It refuses unknown keys and wrong types (OmegaConf structured configs) and impossible
values (`train.validation`) before anything is launched, naming the key, the value and what is allowed.
Sizes are in the unit their name says: steps, samples (a text row or an image), tokens, bytes.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, cast

import yaml
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException


@dataclass
class RunConfig:
    dir: str = MISSING  # where checkpoints, metrics, TensorBoard files and the resolved config go


@dataclass
class LanguageModelConfig:
    vocab_size: int = MISSING  # must equal the tokenizer's
    layers: int = MISSING
    width: int = MISSING
    heads: int = MISSING
    kv_heads: Optional[int] = None  # grouped-query attention; None means as many as `heads`
    mlp_width: int = MISSING
    sequence_length: int = MISSING  # tokens a row; must equal the data set's
    positions: str = "rope"  # rope | sinusoidal | learned
    rope_theta: float = 10_000.0
    norm: str = "rms"  # rms | layer
    norm_position: str = "pre"  # pre | post
    mlp: str = "swiglu"  # swiglu | relu | gelu
    bias: bool = False
    head: str = "tied"  # tied | untied | adaptive
    adaptive_cutoffs: list[int] = field(default_factory=list)  # of the adaptive softmax
    dropout: float = 0.0  # on embeddings and residual branches; never on attention weights
    twicing_layers: Any = "all"  # all | none | "10-12" | [3, 7, 11] | "last:3"; 1-based, ranges inclusive
    attention_backend: str = "auto"
    init_from: Optional[str] = None  # a run directory or a .safetensors file whose weights to start from


@dataclass
class VisionModelConfig:
    image_size: int = MISSING
    patch_size: int = MISSING
    channels: int = 3
    classes: int = MISSING
    layers: int = MISSING
    width: int = MISSING
    heads: int = MISSING
    mlp_ratio: float = 4.0
    drop_path: float = 0.0
    twicing_layers: Any = "all"  # as for language models
    attention_backend: str = "auto"
    init_from: Optional[str] = None


@dataclass
class DataConfig:
    train: str = MISSING  # folder or address that holds manifest.json
    validation: str = MISSING
    lanes: int = 960  # L of the data order: divides by every world size that should be able to continue the run
    shuffle_block: int = 16  # S: samples permuted together inside a lane; 1 keeps the order of the shards
    workers: int = 1  # loader processes a rank
    cache_dir: Optional[str] = None  # where remote shards are kept; needed for addresses that are not local
    allow_pipe: bool = False  # permit `pipe:` addresses, which run a shell command
    on_bad_sample: str = "fail"  # fail | skip (a skipped sample keeps its number and weighs 0)


@dataclass
class VisionDataConfig(DataConfig):
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    augmentation: str = "none"  # none | crop_flip | rand_augment (the DeiT recipe, by timm)
    crop_padding: int = 2  # pixels, for crop_flip
    random_erasing: float = 0.0  # probability, for rand_augment
    repeats: int = 1  # repeated augmentation: n uses sample n // repeats
    mixup: float = 0.0  # alpha; 0 is off
    cutmix: float = 0.0  # alpha; 0 is off


@dataclass
class OptimizerConfig:
    lr: float = MISSING  # peak learning rate
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices only, never on 1-D parameters
    grad_clip: float = 1.0  # largest global gradient norm; 0 is off


@dataclass
class ScheduleConfig:
    kind: str = "cosine"  # cosine | linear | constant
    warmup_steps: int = 0
    final_lr_fraction: float = 0.1  # of the peak, at the last step


@dataclass
class TrainConfig:
    steps: int = MISSING  # length of the schedule
    stop_at_step: Optional[int] = None  # stop there with a checkpoint, as a scheduler's time limit would
    seed: int = 1
    global_batch_size: int = MISSING  # samples a step, over all ranks
    micro_batch_size: Optional[int] = None  # samples a forward pass; None means global_batch_size / world size
    precision: str = "auto"  # auto | bf16 | fp16 | fp32
    label_smoothing: float = 0.0
    activation_checkpointing: int = 0  # recompute every k-th layer in the backward pass; 1 is all, 0 is off
    compile: bool = False  # the blocks, by torch.compile: a C++ compiler on CPUs, Triton on GPUs; not at ZeRO stage 3
    max_skipped_steps: int = 10  # of the last 100: loss or gradient not finite, or a spike; one more stops the run
    on_loss_spike: str = (
        "ignore"  # ignore | skip (the step changes nothing) | roll_back (to the newest checkpoint's weights)
    )
    spike_z_score: float = 6.0  # a spike is so many standard deviations above the mean of the last 100 losses
    hang_seconds: int = (
        120  # a rank that gets no further for so long dumps its stacks and ends (start, save, load: 10 times)
    )
    sequence_parallel_size: int = 1  # ranks that share a row, each with its slice of the positions (language)
    planned_world_size: int = 1  # ranks a recipe is meant for; `--dry-run` plans with it


@dataclass
class EvaluateConfig:
    every_steps: int = 0  # 0: only at the end
    prompts: list[str] = field(default_factory=list)  # continued in TensorBoard at every evaluation (language)


@dataclass
class CheckpointConfig:
    every_steps: int = MISSING
    keep: int = 2  # newest checkpoints kept
    in_background: bool = False  # train on while a copy of the state, in the host's memory, is written


@dataclass
class MonitorConfig:
    every_steps: int = 10  # between TensorBoard points and log lines; metrics.jsonl has every step


@dataclass
class DeepSpeedFileConfig:
    config: str = "configs/deepspeed/zero2.json"  # DeepSpeed's own JSON, without batch sizes and precision


@dataclass
class Config:
    """What language and vision have in common; `task` in the YAML file chooses the class."""

    task: str = MISSING
    run: RunConfig = field(default_factory=RunConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    deepspeed: DeepSpeedFileConfig = field(default_factory=DeepSpeedFileConfig)


@dataclass
class LanguageConfig(Config):
    task: str = "language"
    model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    data: DataConfig = field(default_factory=DataConfig)


@dataclass
class VisionConfig(Config):
    task: str = "vision"
    model: VisionModelConfig = field(default_factory=VisionModelConfig)
    data: VisionDataConfig = field(default_factory=VisionDataConfig)


AnyConfig = LanguageConfig | VisionConfig
SCHEMAS: dict[str, type[AnyConfig]] = {"language": LanguageConfig, "vision": VisionConfig}


def load_config(path: str | Path, overrides: list[str] | None = None) -> AnyConfig:
    """Reads `path` (YAML), applies `overrides` (`["optimizer.lr=3e-4", ...]`) and validates the result.

    Raises:
        ValueError: a missing or unreadable file, an unknown key, a wrong type, a missing or impossible value; the
            message names the key, the value and what is allowed.
    """
    from train.validation import validate  # imported late: it needs the classes above

    config = read_config(path, overrides)
    validate(config)
    return config


def read_config(path: str | Path, overrides: list[str] | None = None) -> AnyConfig:
    """`load_config` without the check that values are possible, which needs torch.

    Raises:
        ValueError: a missing or unreadable file, an unknown key, a wrong type, a missing value.
    """
    # Its values would be written into the run's directory: secrets stay in the environment.
    OmegaConf.clear_resolver("oc.env")
    path, overrides = Path(path), list(overrides or [])
    if not path.is_file():
        raise ValueError(f"config file {path} does not exist")
    from_file = _read(path)
    task = from_file.get("task") if isinstance(from_file, DictConfig) else None
    if task not in SCHEMAS:
        raise ValueError(f"task is {task!r} in {path}; it must be one of {', '.join(SCHEMAS)}")
    from_command_line = [_parse_override(override) for override in overrides]
    try:
        merged = OmegaConf.merge(OmegaConf.structured(SCHEMAS[task]), from_file, *from_command_line)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ValueError(f"{path}: no value for {', '.join(missing)}")
        return cast(AnyConfig, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ValueError(f"{' '.join([str(path), *overrides])}: {_explain(error)}") from None


def _read(path: Path) -> DictConfig | ListConfig:
    try:
        return OmegaConf.load(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} can't be read: {error}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None


def _parse_override(override: str) -> DictConfig:
    key, equals, _ = override.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise ValueError(f"override {override!r} must have the form key=value, such as optimizer.lr=3e-4")
    try:
        return OmegaConf.from_dotlist([override])
    except yaml.YAMLError as error:
        raise ValueError(f"the value of override {override!r} is not valid YAML: {error}") from None


def _explain(error: OmegaConfBaseException) -> str:
    """One line for an OmegaConf error: the key first, and the keys that exist where one is unknown."""
    reason = str(error.msg or error).split("\n")[0]
    key = error.full_key or ""
    if isinstance(error, (ConfigKeyError, ConfigAttributeError)):
        known = [f.name for f in dataclasses.fields(error.object_type)] if error.object_type else []
        return f"unknown key {key}; {key.rpartition('.')[0] or 'the config'} has {', '.join(known)}"
    if "is not a ListConfig" in reason:
        reason = "a list is expected, such as [1, 2]"
    return f"{key}: {reason}" if key else reason


def to_yaml(config: AnyConfig) -> str:
    """The resolved config as YAML that `load_config` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def flatten(config: AnyConfig) -> dict[str, Any]:
    """`{"optimizer.lr": 3e-4, ...}`: every leaf under its dotted key."""

    def walk(value: Any, prefix: str) -> dict[str, Any]:
        if not dataclasses.is_dataclass(value):
            return {prefix: value}
        leaves: dict[str, Any] = {}
        for f in dataclasses.fields(value):
            leaves |= walk(getattr(value, f.name), f"{prefix}.{f.name}" if prefix else f.name)
        return leaves

    return walk(config, "")
