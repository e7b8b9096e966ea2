"""Image classification, with label smoothing, mixup and cutmix as in DeiT (arXiv:2012.12877)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor
from torchvision.utils import make_grid

from train.config import VisionConfig
from train.models.vision import VisionModel
from train.tasks import Batch, flops_per_sample


class VisionTask:
    unit = "images"
    units_per_sample = 1

    def __init__(self, config: VisionConfig, device: torch.device) -> None:
        self._config = config
        self._device = device
        data = config.data
        self._mixup = None
        if data.mixup > 0 or data.cutmix > 0:
            self._mixup = Mixup(
                mixup_alpha=data.mixup,
                cutmix_alpha=data.cutmix,
                label_smoothing=config.train.label_smoothing,
                num_classes=config.model.classes,
            )

    def build_model(self, initialise: bool = True) -> VisionModel:
        return VisionModel(self._config.model, self._config.train.activation_checkpointing, initialise)

    def flops_per_unit(self) -> tuple[float, float]:
        return flops_per_sample(self._config, self._device)

    def loss_sum(self, model: Any, batch: Batch, first_sample: int) -> Tensor:
        images, labels = batch["images"], batch["labels"]
        smoothing = self._config.train.label_smoothing
        if self._mixup is not None:
            # timm draws from numpy's global generator: seeded by the data's position, it resumes exactly.
            np.random.seed((self._config.train.seed * 1_000_003 + first_sample) % 2**32)
            images, labels = self._mixup(images, labels)
            smoothing = 0.0  # already in the mixed labels
        losses = F.cross_entropy(self._logits(model, images), labels, label_smoothing=smoothing, reduction="none")
        return (losses * batch["weights"]).sum()

    def validation_sums(self, model: Any, batch: Batch) -> Tensor:
        labels, weights = batch["labels"], batch["weights"]
        logits = self._logits(model, batch["images"])
        losses = F.cross_entropy(logits, labels, reduction="none")
        ranked = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        top1, top5 = ranked[:, 0].float() * weights, ranked.any(1).float() * weights
        return torch.stack([(losses * weights).sum(), top1.sum(), top5.sum(), weights.sum()]).double().cpu()

    def validation_metrics(self, sums: Tensor) -> dict[str, float]:
        loss, top1, top5 = (sums[:3] / sums[3]).tolist()
        return {"loss": loss, "accuracy": top1, "top5_accuracy": top5}

    def example(self, model: Any, batch: Batch) -> tuple[str, str | Tensor] | None:
        images, labels = batch["images"][:32], batch["labels"][:32]
        right = (self._logits(model, images).argmax(1) == labels).cpu()
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self._config.data.mean, self._config.data.std))
        pixels = (images.cpu() * std + mean).clamp(0, 1).expand(-1, 3, -1, -1)
        enlarged = F.interpolate(pixels, scale_factor=max(1, 96 // pixels.shape[-1]), mode="nearest")
        frames = torch.where(right[:, None], torch.tensor([0.1, 0.7, 0.2]), torch.tensor([0.9, 0.1, 0.1]))
        framed = frames[:, :, None, None].expand(-1, -1, enlarged.shape[2] + 8, enlarged.shape[3] + 8).clone()
        framed[:, :, 4:-4, 4:-4] = enlarged
        return "validation images, framed green where classified rightly", make_grid(framed, nrow=8, pad_value=1.0)

    def placeholder_batch(self, samples: int) -> Batch:
        model = self._config.model
        return {
            "images": torch.randn(samples, model.channels, model.image_size, model.image_size),
            "labels": torch.randint(model.classes, (samples,)),
            "weights": torch.ones(samples),
            "sample_ids": torch.arange(samples),
        }

    @staticmethod
    def _logits(model: Any, images: Tensor) -> Tensor:
        """float32 (b, classes); the model computes in the dtype that the engine gave its weights."""
        dtype = next(getattr(model, "module", model).parameters()).dtype
        return model(images.to(dtype)).float()
