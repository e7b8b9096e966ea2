"""Language modelling: predict each token of a row from those before it in its document."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.config import LanguageConfig
from train.evaluate.generation import generate
from train.models.attention import SharedRows
from train.models.language import LanguageModel
from train.tasks import Batch, flops_per_sample


class LanguageTask:
    unit = "tokens"

    def __init__(
        self,
        config: LanguageConfig,
        tokenizer_path: Path | None,
        device: torch.device,
        shared_rows: SharedRows | None = None,
    ) -> None:
        self._config = config
        self._tokenizer_path = tokenizer_path
        self._device = device
        self._shared_rows = shared_rows
        self.units_per_sample = config.model.sequence_length

    def build_model(self, initialise: bool = True) -> LanguageModel:
        return LanguageModel(self._config.model, self._config.train.activation_checkpointing, initialise)

    def flops_per_unit(self) -> tuple[float, float]:
        model, hardware = flops_per_sample(self._config, self._device)
        return model / self.units_per_sample, hardware / self.units_per_sample

    def loss_sum(self, model: Any, batch: Batch, first_sample: int) -> Tensor:
        return self._losses(model, batch).sum()

    def validation_sums(self, model: Any, batch: Batch) -> Tensor:
        losses = self._losses(model, batch)
        targets = batch["weights"].sum().double() * losses.shape[1]
        return torch.stack([losses.sum().double(), targets]).cpu()

    def _losses(self, model: Any, batch: Batch) -> Tensor:
        """float32, of each target of the rows, or of this rank's slice of them; 0 in rows to ignore."""
        losses = model(
            batch["input_ids"],
            targets=batch["targets"],
            cu_seqlens=batch["cu_seqlens"],
            shared_rows=self._shared_rows,
        )
        return losses * batch["weights"][:, None]

    def validation_metrics(self, sums: Tensor) -> dict[str, float]:
        loss = (sums[0] / sums[1]).item()
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}

    def example(self, model: Any, batch: Batch) -> tuple[str, str | Tensor] | None:
        if not self._config.evaluate.prompts or self._tokenizer_path is None:
            return None
        tokenizer = load_tokenizer(self._tokenizer_path)
        texts = [
            generate(
                model, tokenizer, prompt, max_new_tokens=60, temperature=0.8, top_k=40, seed=self._config.train.seed
            )
            for prompt in self._config.evaluate.prompts
        ]
        return "continued prompts", "\n\n".join(f"> {text}" for text in texts)

    def placeholder_batch(self, samples: int) -> Batch:
        length = self.units_per_sample
        ids = torch.randint(self._config.model.vocab_size, (samples, length + 1))
        return {
            "input_ids": ids[:, :-1].contiguous(),
            "targets": ids[:, 1:].contiguous(),
            "cu_seqlens": torch.arange(0, samples * length + 1, length, dtype=torch.int32),
            "weights": torch.ones(samples),
            "sample_ids": torch.arange(samples),
        }


def load_tokenizer(path: Path) -> Any:
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(path))
