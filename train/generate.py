"""`python -m train.generate RUN --prompt "..."`: continue a text with a trained language model."""

from __future__ import annotations

import argparse
import sys

import torch

from train.config import LanguageConfig
from train.evaluate.generation import generate
from train.models.language import LanguageModel
from train.tasks.language import load_tokenizer
from train.trained import open_run, print_errors


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m train.generate", description="Continue a text with a trained language model."
    )
    parser.add_argument("run", help="run directory, such as runs/quickstart")
    parser.add_argument("--prompt", action="append", help="text to continue; may be given several times")
    parser.add_argument("--max-new-tokens", type=int, default=80)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token")
    parser.add_argument("--top-k", type=int, default=40, help="draw from the k likeliest tokens")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()

    trained = open_run(options.run)
    if not isinstance(trained.config, LanguageConfig):
        raise ValueError(f"{options.run} is a {trained.config.task} run; only language models generate text")
    assert isinstance(trained.model, LanguageModel) and trained.data.tokenizer_path
    tokenizer = load_tokenizer(trained.data.tokenizer_path)
    for prompt in options.prompt or trained.config.evaluate.prompts or ["The"]:
        with torch.no_grad():
            text = generate(
                trained.model,
                tokenizer,
                prompt,
                max_new_tokens=options.max_new_tokens,
                temperature=options.temperature,
                top_k=options.top_k,
                seed=options.seed,
            )
        print(text + "\n")


if __name__ == "__main__":
    sys.exit(print_errors(main))
