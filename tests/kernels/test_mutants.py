"""Some of the planted bugs; verify.py has all of them."""

from __future__ import annotations

import mutants
import pytest

FEW = [mutant for mutant in mutants.every_mutant() if "sync_block" in mutant.name][:2]
FEW += [*mutants.MISTAKES[3:16:6], *mutants.INSTRUCTIONS[7:8]]
FEW += [
    mutant for mutant in mutants.WAVEFRONT if "a count instead of flags" in mutant.name or "by index" in mutant.name
]


def test_every_mutant_still_applies() -> None:
    every = mutants.every_mutant()
    assert len(every) >= 30 and len({mutant.name for mutant in every}) == len(every)
    for mutant in every:
        text = (mutants.KERNELS / mutant.file).read_text().partition(mutant.after)[2] if mutant.after else None
        assert mutant.original in (text or (mutants.KERNELS / mutant.file).read_text())


@pytest.mark.parametrize("mutant", FEW, ids=lambda mutant: mutant.name)
def test_is_caught(mutant: mutants.Mutant) -> None:
    assert mutants.verdict(mutant)
