"""From the last hidden state to losses, without ever holding float32 logits of a whole batch.

Shapes: T = B·N tokens, D width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHUNK_TOKENS = 512  # tokens whose float32 logits exist together
RECOMPUTE_ABOVE = 2**25  # logits of a batch; more are not kept for the backward pass but computed again


def token_losses(x_TD: torch.Tensor, weight_VD: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    """Cross entropy in nats of each token, (T,) float32, for logits `x @ weight.T`.

    The softmax is taken in float32. Chunks stay in the cache, which makes this faster than one call as well as smaller.
    """

    def losses_of(x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(x, weight_VD).float(), targets, reduction="none")

    recompute = torch.is_grad_enabled() and x_TD.shape[0] * weight_VD.shape[0] > RECOMPUTE_ABOVE
    chunks = zip(x_TD.split(CHUNK_TOKENS), targets_T.split(CHUNK_TOKENS), strict=True)
    if recompute:
        # There is no dropout in a head, so there is no random state to keep.
        return torch.cat(
            [checkpoint(losses_of, x, t, use_reentrant=False, preserve_rng_state=False) for x, t in chunks]
        )
    return torch.cat([losses_of(x, t) for x, t in chunks])


class AdaptiveHead(nn.AdaptiveLogSoftmaxWithLoss):
    """torch's adaptive softmax (arXiv:1609.04309), safe to train on many ranks and in half precision.

    torch's own forward pass skips a cluster of rare tokens that the batch has none of. Its parameters then have no
    gradient on that rank, and the ranks' reductions no longer match. Here every cluster takes part, with no rows if
    need be. Log-softmaxes are taken in float32.

    All clusters have the full width, as in Transformer-XL and the twicing paper's code, where torch's default makes
    each four times narrower than the one before.
    """

    def __init__(self, width: int, vocab_size: int, cutoffs: list[int]) -> None:
        super().__init__(width, vocab_size, cutoffs, div_value=1.0)

    def token_losses(self, x_TD: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
        """Cross entropy in nats of each token, (T,) float32."""
        head_logs = F.log_softmax(self.head(x_TD).float(), dim=-1)
        first_targets = targets_T.clamp(max=self.shortlist_size)
        losses = torch.zeros_like(head_logs[:, 0])
        for index, (tail, low, high) in enumerate(zip(self.tail, self.cutoffs, self.cutoffs[1:], strict=False)):
            rows = ((targets_T >= low) & (targets_T < high)).nonzero().squeeze(1)
            tail_losses = F.cross_entropy(tail(x_TD[rows]).float(), targets_T[rows] - low, reduction="none")
            losses = losses.index_add(0, rows, tail_losses)
            first_targets = first_targets.index_fill(0, rows, self.shortlist_size + index)
        return losses - head_logs.gather(1, first_targets.unsqueeze(1)).squeeze(1)

    def log_probabilities(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Of every token of the vocabulary: (T, V) float32."""
        head_logs = F.log_softmax(self.head(x_TD).float(), dim=-1)
        parts = [head_logs[:, : self.shortlist_size]]
        for index, tail in enumerate(self.tail):
            cluster = head_logs[:, self.shortlist_size + index, None]
            parts.append(cluster + F.log_softmax(tail(x_TD).float(), dim=-1))
        return torch.cat(parts, dim=-1)
