"""Text from a language model, to look at while it trains."""

from __future__ import annotations

from typing import Protocol

import torch

from train.models.language import LanguageModel


class Tokenizer(Protocol):
    """What is needed of a `sentencepiece.SentencePieceProcessor`."""

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...
    def bos_id(self) -> int: ...


@torch.no_grad()
def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> str:
    """`prompt` and its continuation, up to where the model would start another document.

    Every token recomputes the whole prefix, or its last `sequence_length` tokens. Sampling has a random generator of
    its own: the same arguments and weights give the same text, on every rank, and training's random state stays as it
    is. Under ZeRO-3 all ranks must call it together.

    Args:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample among this many likeliest tokens; None is all.
    """
    device = next(model.parameters()).device
    random = torch.Generator().manual_seed(seed)
    tokens = [tokenizer.bos_id(), *tokenizer.encode(prompt)]
    was_training = model.training
    model.eval()
    for _ in range(max_new_tokens):
        window = torch.tensor([tokens[-model.config.sequence_length :]], device=device)
        token = _sample(model(window)[0, -1].float().cpu(), temperature, top_k, random)
        if token == tokenizer.bos_id():
            break
        tokens.append(token)
    model.train(was_training)
    return tokenizer.decode(tokens[1:])


def _sample(logits_V: torch.Tensor, temperature: float, top_k: int | None, random: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    if top_k is not None and top_k < len(logits_V):
        logits_V = logits_V.masked_fill(logits_V < logits_V.topk(top_k).values[-1], float("-inf"))
    return int(torch.multinomial(torch.softmax(logits_V / temperature, dim=-1), 1, generator=random))
