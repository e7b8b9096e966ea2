"""Weights from elsewhere: safetensors only, since other formats can run code when they are read."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from train.run_directory import newest_checkpoint


def load_weights(model: nn.Module, source: str | Path) -> None:
    """Fills `model`, strictly, from a run directory's newest checkpoint or a `.safetensors` file.

    Raises:
        ValueError: as `find_weights`.
    """
    copy_weights(model, find_weights(model, source))


def find_weights(model: nn.Module, source: str | Path) -> Path:
    """The file that `copy_weights` can fill `model` from.

    Raises:
        ValueError: nothing to read there, or weights of another shape; names the first that don't fit.
    """
    path = Path(source)
    if path.suffix != ".safetensors":
        path = newest_checkpoint(path) / "model.safetensors"
    try:
        with safe_open(path, "pt") as file:
            there = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} can't be read as safetensors: {error}") from None
    # A parameter of a partitioned model knows the shape of the whole.
    own = {name: list(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in _tensors(model).items()}
    wrong = [name for name in own.keys() | there.keys() if own.get(name) != there.get(name)]
    if wrong:
        raise ValueError(
            f"{path} holds another model: {', '.join(sorted(wrong)[:3])} and {len(wrong)} in all do not fit"
        )
    return path


@torch.no_grad()
def copy_weights(
    model: nn.Module,
    path: Path,
    writable: Callable[[Any], AbstractContextManager[Any]] = nullcontext,
    read: bool = True,
) -> None:
    """Fills `model` from the file that `find_weights` has found, one parameter at a time.

    Args:
        writable: `writable(parameter)` makes a parameter of a partitioned model whole while it is written; every rank must
            call `copy_weights` then.
        read: False on ranks whose copy does not count.
    """
    with safe_open(path, "pt") as file:
        for name, tensor in _tensors(model).items():
            with writable(tensor):
                if read:
                    tensor.copy_(file.get_tensor(name))


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, those that a file of the model's weights holds."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensors[name] for name in model.state_dict()}
