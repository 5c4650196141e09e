"""What is made of steps' seconds is right; nothing here looks at the clock."""

from __future__ import annotations

import gc

import numpy as np

from benchmarks.step_time import interval, ratios, rounds


def test_a_bootstrap_holds_the_median() -> None:
    rows = np.random.default_rng(1).normal(2.0, 0.1, (400, 1))
    found = interval(rows, lambda medians: medians[:, 0])
    assert found.low < 2.0 < found.high
    assert found.high - found.low < 0.05


def test_every_step_is_timed_once_a_round_in_an_order_that_changes() -> None:
    ran: list[int] = []

    def timed(step: int) -> tuple[float, float]:
        ran.append(step)
        return float(step + 1), 10.0 * (step + 1)

    clocks = rounds([lambda s=step: timed(s) for step in range(3)], 20)  # type: ignore[misc]
    turns = [tuple(ran[start : start + 3]) for start in range(0, 60, 3)]
    assert all(sorted(turn) == [0, 1, 2] for turn in turns)
    assert len(set(turns)) > 1
    assert ratios(clocks.wall).tolist() == [[1.0, 2.0, 3.0]] * 20
    assert (clocks.cpu == 10 * clocks.wall).all()


def test_what_was_set_up_is_collected_again_after_the_rounds() -> None:
    frozen: list[int] = []
    rounds([lambda: (float(bool(frozen.append(gc.get_freeze_count()))), 0.0)], 1)  # type: ignore[func-returns-value]
    assert frozen[0] > 0
    assert gc.get_freeze_count() == 0
