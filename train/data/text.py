"""Rows of tokens to language batches."""

from __future__ import annotations

import numpy as np
import torch

from train.data.batches import BadSampleError, Batch, Float32Array, load_or_skip
from train.data.manifest import TextManifest
from train.data.order import Int64Array
from train.data.shards import ShardReader


class TextBatches:
    """Makes language batches from sample ids; b rows of N = `manifest.row_length` targets.

    The batch holds `input_ids` (b, N) int64; `targets` (b, N) int64, the tokens one further; `cu_seqlens` int32, 1-D,
    offsets into the b * N flattened inputs where rows and documents start, and b * N; `weights` (b,) float32, 0 for
    rows to ignore; `sample_ids` (b,) int64.

    Raises (when called):
        BadSampleError: a row can't be read or has tokens outside the vocabulary, unless `skip_bad`.
    """

    def __init__(self, reader: ShardReader, manifest: TextManifest, skip_bad: bool):
        self._reader = reader
        self._manifest = manifest
        self._skip_bad = skip_bad

    def __call__(self, numbers: Int64Array, ids: Int64Array, weights: Float32Array) -> Batch:
        nothing = np.full(self._manifest.row_length + 1, self._manifest.bos_id, dtype=np.int64)
        rows = np.empty((len(ids), len(nothing)), dtype=np.int64)
        for i, sample_id in enumerate(ids.tolist()):
            rows[i], good = load_or_skip(self._row, sample_id, nothing, self._skip_bad)
            weights[i] *= good
        inputs = rows[:, :-1]
        starts = inputs == self._manifest.bos_id
        starts[:, 0] = True
        return {
            "input_ids": torch.from_numpy(inputs.copy()),
            "targets": torch.from_numpy(rows[:, 1:].copy()),
            "cu_seqlens": torch.from_numpy(np.append(np.flatnonzero(starts), inputs.size).astype(np.int32)),
            "weights": torch.from_numpy(weights),
            "sample_ids": torch.from_numpy(ids),
        }

    def _row(self, sample_id: int) -> Int64Array:
        content, _ = self._reader.read(sample_id)
        row = np.frombuffer(content, dtype=self._manifest.dtype).astype(np.int64)
        if len(row) != self._manifest.row_length + 1 or row.max() >= self._manifest.vocab_size:
            raise BadSampleError(
                f"{self._reader.describe(sample_id)} is damaged: it must hold {self._manifest.row_length + 1} tokens "
                f"below {self._manifest.vocab_size}; run `python -m train.prepare verify` on the data set"
            )
        return row
