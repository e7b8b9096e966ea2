"""The learning rate at every corner of the schedule."""

import pytest

from train.config import LanguageConfig
from train.schedule import learning_rate


def config(steps: int, warmup: int, kind: str = "cosine", final: float = 0.1) -> LanguageConfig:
    result = LanguageConfig()
    result.optimizer.lr = 1.0
    result.train.steps = steps
    result.schedule.kind, result.schedule.warmup_steps, result.schedule.final_lr_fraction = kind, warmup, final
    return result


@pytest.mark.parametrize(
    ("kind", "step", "expected"),
    [
        ("cosine", 1, 0.1),
        ("cosine", 10, 1.0),
        ("cosine", 60, 0.55),
        ("cosine", 85, 0.1 + 0.9 * 0.1464466),
        ("cosine", 110, 0.1),
        ("linear", 5, 0.5),
        ("linear", 60, 0.55),
        ("linear", 85, 0.325),
        ("linear", 110, 0.1),
        ("constant", 5, 0.5),
        ("constant", 60, 1.0),
        ("constant", 110, 1.0),
    ],
)
def test_values_with_10_warmup_steps_of_110(kind: str, step: int, expected: float) -> None:
    assert learning_rate(step, config(110, 10, kind)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 2, 3, 50])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_every_short_run_has_learning_rates_above_zero_and_at_most_the_peak(steps: int, warmup: int, kind: str) -> None:
    rates = [learning_rate(step, config(steps, warmup, kind)) for step in range(1, steps + 1)]
    assert all(0 < rate <= 1.0 for rate in rates)


def test_warmup_longer_than_the_run_only_rises() -> None:
    assert [learning_rate(step, config(3, 6)) for step in (1, 2, 3)] == pytest.approx([1 / 6, 2 / 6, 3 / 6])


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_a_single_step_without_warmup_is_the_last_step(kind: str) -> None:
    assert learning_rate(1, config(1, 0, kind, final=0.25)) == pytest.approx(0.25)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_never_rises_after_warmup(kind: str) -> None:
    rates = [learning_rate(step, config(50, 7, kind)) for step in range(7, 51)]
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == len(rates)


def test_depends_on_nothing_but_its_arguments() -> None:
    settings = config(100, 10)
    forwards = [learning_rate(step, settings) for step in range(1, 101)]
    assert [learning_rate(step, settings) for step in range(100, 0, -1)] == forwards[::-1]
