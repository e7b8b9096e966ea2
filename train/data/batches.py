"""What text and image batches share: the types, and what happens to a sample that can't be used."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from train.data.order import Int64Array

Batch = dict[str, torch.Tensor]
Float32Array = npt.NDArray[np.float32]
# (numbers n, sample ids, weights), each (b,), to a batch; weights may be set to 0 in place.
MakeBatch = Callable[[Int64Array, Int64Array, Float32Array], Batch]

_log = logging.getLogger(__name__)
_Sample = TypeVar("_Sample")


class BadSampleError(ValueError):
    """A sample that can't be read or decoded; the message names its shard and key."""


def load_or_skip(
    load: Callable[[int], _Sample], sample_id: int, substitute: _Sample, skip_bad: bool
) -> tuple[_Sample, bool]:
    """`(load(sample_id), True)`; for a bad sample `(substitute, False)` and a warning if `skip_bad`.

    Raises:
        BadSampleError: the sample is bad, and not to be skipped.
    """
    try:
        return load(sample_id), True
    except (OSError, ValueError) as error:
        if not skip_bad:
            raise BadSampleError(f"{error} (data.on_bad_sample=skip would go on without it)") from error
        _log.warning("skipped: %s", error)
        return substitute, False
