"""Weights from elsewhere: safetensors only, since other formats can run code when they are read."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from train.run_directory import newest_checkpoint


def load_weights(model: nn.Module, source: str | Path) -> None:
    """Fills `model`, strictly, from a run directory's newest checkpoint or a `.safetensors` file.

    Raises:
        ValueError: nothing to read there, or weights of another shape; names the first parameters that don't fit.
    """
    path = Path(source)
    if path.suffix != ".safetensors":
        path = newest_checkpoint(path) / "model.safetensors"
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} can't be read as safetensors: {error}") from None
    own = model.state_dict()
    wrong = [name for name in own.keys() | weights.keys() if not _fits(own, weights, name)]
    if wrong:
        raise ValueError(
            f"{path} holds another model: {', '.join(sorted(wrong)[:3])} and {len(wrong)} in all do not fit"
        )
    model.load_state_dict(weights)


def _fits(own: dict, weights: dict, name: str) -> bool:  # type: ignore[type-arg]
    return name in own and name in weights and own[name].shape == weights[name].shape
