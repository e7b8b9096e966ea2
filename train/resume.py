"""Is a checkpoint a continuation of what the config asks for?"""

from __future__ import annotations

from train.checkpoint import State
from train.config import AnyConfig, flatten

# A change to any of these would silently make another model, or another order of the data.
FIXED = ("task", "train.seed", "train.global_batch_size", "data.lanes", "data.shuffle_block", "data.repeats")
# Of the model, all but these.
FREE_IN_MODEL = ("model.attention_backend", "model.init_from")


def check_same_run(state: State, config: AnyConfig, data_digest: str) -> list[str]:
    """Compares a checkpoint with the config that is to continue it; returns one line for each harmless change.

    Raises:
        ValueError: the checkpoint belongs to another model, data set or order of the data; names key and both values.
    """
    run_dir = config.run.dir
    if state.data_digest != data_digest:
        raise ValueError(
            f"the data set has changed since {run_dir} was started (its manifest differs): "
            "give back the old one, or start a new run with another run.dir"
        )
    changes = []
    for key, value in flatten(config).items():
        was = state.config.get(key)
        if value == was or key == "train.stop_at_step":
            continue
        if key in FIXED or (key.startswith("model.") and key not in FREE_IN_MODEL):
            raise ValueError(
                f"{key}={value!r}, but {run_dir} was started with {was!r}: "
                "give that value to continue it, or another run.dir to start a new run"
            )
        changes.append(f"{key} was {was!r} and is now {value!r}")
    return changes
