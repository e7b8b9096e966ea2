"""From a torch module to a DeepSpeed engine.

DeepSpeed's JSON file chooses how state is partitioned and offloaded. Batch sizes, precision, optimizer and clipping are
written once, in the YAML file, and put into DeepSpeed's configuration here.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from train import nvme, zero
from train.config import AnyConfig
from train.data.order import data_parallel_size, micro_batch_size
from train.tasks import Task


def gradient_accumulation_steps(config: AnyConfig, world_size: int) -> int:
    """Forward passes a rank makes for one optimizer step; an integer, which the data's start-up check has made sure of."""
    at_once = micro_batch_size(config, world_size) * data_parallel_size(config, world_size)
    assert config.train.global_batch_size % at_once == 0
    return config.train.global_batch_size // at_once


def zero_settings(config: AnyConfig) -> dict[str, Any]:
    """What the file `deepspeed.config` says of ZeRO, as written there: DeepSpeed's defaults are not filled in."""
    settings: dict[str, Any] = _deepspeed_file(config).get("zero_optimization", {})
    return settings


def zero_stage(config: AnyConfig) -> int:
    return int(zero_settings(config).get("stage", 0))


def deepspeed_config(config: AnyConfig, world_size: int, precision: str) -> dict[str, Any]:
    """The file `deepspeed.config` names, completed with what the YAML file decides.

    Raises:
        ValueError: fp16 without ZeRO.
    """
    settings = _deepspeed_file(config)
    for part, folder in nvme.folders(config, zero_settings(config)).items():
        settings["zero_optimization"][part]["nvme_path"] = str(folder)
    optimizer = config.optimizer
    if precision == "fp16" and zero_stage(config) == 0:
        raise ValueError(
            f"deepspeed.config={config.deepspeed.config} is without ZeRO, where DeepSpeed does not scale the loss of fp16: "
            "take a file of stage 1, 2 or 3, or train.precision bf16 or fp32"
        )
    # torch's AdamW, fused, needs no compiler, offloaded or not; DeepSpeed's own would be built at the first start.
    parameters = dict(lr=optimizer.lr, betas=list(optimizer.betas), eps=optimizer.eps, torch_adam=True, fused=True)
    return settings | {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": micro_batch_size(config, world_size),
        "gradient_accumulation_steps": gradient_accumulation_steps(config, world_size),
        # Of the ranks that share rows DeepSpeed is told for the sake of these products only (`train.sequence_parallel`).
        "sequence_parallel_size": config.train.sequence_parallel_size,
        "gradient_clipping": optimizer.grad_clip,
        "optimizer": {"type": "AdamW", "params": parameters},
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
        "steps_per_print": 2**31,  # progress is the monitor's business
    }


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases, norms and other 1-D parameters do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if _dimensions(p) > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if _dimensions(p) <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_model(task: Task, config: AnyConfig, world_size: int, precision: str) -> nn.Module:
    """The task's model with fresh weights, the same on every rank; with `model.init_from` they are still to be loaded.

    At ZeRO stage 3 it is partitioned while it is built, so that no rank ever holds more of it than its share and one
    parameter.
    """
    model: Any
    if zero_stage(config) < 3:
        model = task.build_model()
        return model
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=deepspeed_config(config, world_size, precision)):
        model = task.build_model(initialise=False)
    if not config.model.init_from:
        model.initialise(writable)
    return model


def writable(parameter: Any) -> AbstractContextManager[Any]:
    """Makes a parameter of a partitioned model whole while it is written. Every rank must enter; rank 0's values count."""
    import deepspeed

    gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
        [parameter], modifier_rank=0, enabled=is_partitioned(parameter)
    )
    return gathered


def is_partitioned(parameter: Any) -> bool:
    return hasattr(parameter, "ds_id")


def build_engine(model: Any, config: AnyConfig, world_size: int, precision: str) -> Any:
    """`deepspeed.initialize`, with the process group already joined.

    Raises:
        ValueError: DeepSpeed can't do what is asked for.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if precision == "fp16" and not get_accelerator().is_fp16_supported():
        raise ValueError(
            "train.precision is fp16, in which DeepSpeed does not train on this processor (a CPU needs AVX512-FP16): "
            "take bf16 or fp32"
        )
    if config.train.compile:
        if zero_stage(config) == 3:
            raise ValueError(
                f"train.compile is true, but deepspeed.config={config.deepspeed.config} is stage 3, which gathers weights in "
                "hooks that torch.compile can't trace: take stage 0, 1 or 2, or train.compile=false"
            )
        for block in model.blocks:  # one block's code serves all, which the whole model's would not
            block.compile()
    settings = deepspeed_config(config, world_size, precision)
    _fit_bucket(settings.get("zero_optimization", {}), parameter_count(model))
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=parameter_groups(model, config.optimizer.weight_decay),
        config=settings,
        dist_init_required=False,
    )
    zero.undo_first_step(engine)
    return engine


def _fit_bucket(zero: dict[str, Any], parameters: int) -> None:
    """No larger than the model: DeepSpeed allocates all of it, at stages 1 and 2 in every backward pass, which a small model
    on a CPU feels in page faults, and on a GPU takes memory that nothing uses."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero["reduce_bucket_size"] = min(DeepSpeedZeroConfig(**zero).reduce_bucket_size, parameters)


def set_learning_rate(engine: Any, lr: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def take_step(engine: Any, update: bool) -> bool:
    """The optimizer's step; returns whether it changed the weights.

    It does not where `update` is False or where the gradient is not finite: then the gradients are consumed, and neither
    weights nor the optimizer's state change. Every rank must call it, with the same `update`.
    """
    optimizer = engine.basic_optimizer  # torch's, inside DeepSpeed's
    if engine.optimizer is optimizer:  # fp32 without ZeRO: DeepSpeed does not look at the gradient
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        update = update and bool(torch.nn.utils.get_total_norm(gradients).isfinite())
    if not update:
        optimizer.step = lambda *arguments: None
    engine.step()
    if not update:
        del optimizer.step
    return update and not getattr(engine.optimizer, "overflow", False)


def gradient_norm(engine: Any) -> float | None:
    """The global norm before clipping, in float; None where DeepSpeed computes none (fp32 without ZeRO)."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def loss_scale(engine: Any) -> float | None:
    """What the loss is multiplied by in fp16, at present; None in other precisions."""
    return float(zero.loss_scaler(engine).cur_scale) if engine.fp16_enabled() else None


def full_state_dict(engine: Any, is_main: bool) -> dict[str, torch.Tensor]:
    """The model's weights on the CPU, whole, on rank 0 ({} elsewhere). Every rank must call it.

    Under ZeRO-3 the parameters are gathered one at a time, so that no GPU ever holds the whole model.
    """
    import deepspeed

    weights: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=is_partitioned(parameter)):
            if is_main:
                weights[name] = parameter.detach().to("cpu", copy=True).contiguous()
    if is_main:
        persistent = engine.module.state_dict().keys()
        buffers = {name: b for name, b in engine.module.named_buffers() if name in persistent}
        weights |= {name: buffer.detach().to("cpu", copy=True).contiguous() for name, buffer in buffers.items()}
    return weights


def _deepspeed_file(config: AnyConfig) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads(Path(config.deepspeed.config).read_text())
    return settings


def parameter_count(model: nn.Module) -> int:
    """Of the whole model, partitioned or not."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())


def _dimensions(parameter: nn.Parameter) -> int:
    """Of the whole parameter: ZeRO-3 leaves an empty 1-D stub in place of each."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
