"""Steps timed in alternated rounds, and the bounds that their ratios lie in.

A round times one step of each, in an order drawn anew, and divides by the first step of that
round: what the machine does meanwhile meets all alike. All are of one process, for between two
processes the same convolution may differ by a fifth, pair after pair, in where its memory lies.
"""

from __future__ import annotations

import gc
import time
from typing import TYPE_CHECKING

import attrs
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Clocks", "Interval", "here", "interval", "measure", "ratios", "rounds", "table"]


@attrs.frozen
class Interval:
    """A median and the bounds in which it lies with 95 % confidence."""

    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interval(
    rows: NDArray[np.float64],
    figure: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    draws: int = 2000,
) -> Interval:
    """Return `figure` of the medians over `rows`, with its bootstrap bounds.

    Rows are drawn again whole, so that what was measured side by side stays together.

    Args:
        rows: (round, column).
        figure: from medians (draw, column) to one number per draw (draw,).
        draws: how many times the rows are drawn again.

    >>> ones = np.ones((50, 2))
    >>> str(interval(ones, lambda medians: medians[:, 0] + medians[:, 1]))
    '2.000 [2.000, 2.000]'
    """
    generator = np.random.default_rng(0)
    picks = generator.integers(0, len(rows), (draws, len(rows)))
    drawn = figure(np.stack([np.median(rows[pick], axis=0) for pick in picks]))
    low, high = np.percentile(drawn, [2.5, 97.5])
    middle = figure(np.median(rows, axis=0)[None])[0]
    return Interval(float(middle), float(low), float(high))


@attrs.frozen(eq=False)
class Clocks:
    """The seconds of each step of each round.

    Attributes:
        wall: (round, step), as they pass.
        cpu: (round, step), of the processor, by all threads of the step's process: other
            programs do not count.
    """

    wall: NDArray[np.float64]
    cpu: NDArray[np.float64]


def here(step: Callable[[], object]) -> Callable[[], tuple[float, float]]:
    """Return what runs `step` in this process and returns its seconds, wall and processor."""

    def timed() -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        return time.perf_counter() - wall, time.process_time() - cpu

    return timed


def rounds(timed: Sequence[Callable[[], tuple[float, float]]], pairs: int) -> Clocks:
    """Return the seconds of each of `timed`, run once in each of as many rounds as `pairs`."""
    seconds = np.empty((pairs, len(timed), 2))
    gc.collect()
    # What was set up is not gone through again by collections that fall into a step.
    gc.freeze()
    try:
        # Drawn anew every round: in a fixed order each way would always find the caches as the
        # same other way leaves them.
        generator = np.random.default_rng(0)
        for turn in range(pairs):
            for column in generator.permutation(len(timed)):
                seconds[turn, column] = timed[column]()
    finally:
        gc.unfreeze()
    return Clocks(seconds[..., 0], seconds[..., 1])


def measure(
    steps: Sequence[Callable[[], object]], pairs: int, warm_up: int = 10
) -> NDArray[np.float64]:
    """Return the seconds of each step as they pass: (round, step)."""
    for _ in range(warm_up):
        for step in steps:
            step()
    return rounds([here(step) for step in steps], pairs).wall


def ratios(seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the seconds of each step over those of the first of its round."""
    return seconds / seconds[:, :1]


def table(lines: Sequence[Sequence[str]]) -> str:
    """Return the lines with their cells one below the other."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
