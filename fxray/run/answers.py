"""What a series answers when there is no such record, or more than one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fxray.errors import NotSavedError
from fxray.run.sources import Window

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fxray.run.series import Series

__all__ = ["distinct", "missing_step", "no_record", "several_records", "some", "span"]

SHOWN = 6
"""Values that a message lists."""


def no_record(series: Series, window: Window, phase: str) -> NotSavedError:
    """Return the error that says that nothing stands at `window`, and what does."""
    kept = series.where(Window(phase=phase))
    at_step = kept.where(Window(step=window.step)) if window.step is not None else kept
    if isinstance(window.step, int) and not at_step:
        what = f"no {series.title} of phase {phase!r}"
        return missing_step(what, window.step, np.unique(kept.steps))
    names = [name for name in window.given if name not in ("step", "phase")]
    there = "; ".join(
        f"{name} {some(np.unique(at_step.index.coords[name]).tolist())}" for name in names
    )
    return NotSavedError(f"{series.title} has no record with {window}; there are: {there}")


def several_records(series: Series, window: Window, found: NDArray[np.int64]) -> NotSavedError:
    """Return the error that says how to tell the records `found` at `window` apart."""
    coords = series.index.coords
    asked = str(window) or "no more said"
    for name in ("call", "batch", "step", "epoch"):
        values = coords[name][found].tolist()
        if name not in window.given and len(set(values)) == len(values):
            repaired = ", ".join(filter(None, (str(window), f"{name}={values[0]}")))
            return NotSavedError(
                f"{series.title} has {len(found)} records with {asked}, of "
                f"{name} {some(values)}; say which: .sel({repaired})"
            )
    return NotSavedError(
        f"{series.title} has {len(found)} records with {asked}; say more to "
        ".sel(step=, epoch=, batch=, call=, phase=), or iterate over the series"
    )


def some(values: Any) -> str:
    """Return a few of `values` as text.

    >>> some(range(9)), some(["train", "valid"])
    ('0, 1, 2, 3, 4, 5, …', "'train', 'valid'")
    """
    values = list(values)
    shown = ", ".join(repr(value) for value in values[:SHOWN])
    return f"{shown}, …" if len(values) > SHOWN else shown


def distinct(names: NDArray[np.str_]) -> list[str]:
    """Return each of `names` once, in their order.

    >>> distinct(np.array(["train", "train", "valid"]))
    ['train', 'valid']
    """
    if len(names) and (names == names[0]).all():
        return [str(names[0])]
    return list(dict.fromkeys(names.tolist()))


def missing_step(what: str, step: int, steps: NDArray[Any]) -> NotSavedError:
    """Return the error that says that `what` was kept at `step`; names the nearest of `steps`.

    >>> missing_step("no relu.output", 7, np.array([0, 10, 20]))
    NotSavedError('no relu.output was kept at step 7; nearest: 10, 0. ...')
    """
    if not len(steps):
        return NotSavedError(f"{what} was kept at step {step}, nor at any other")
    close = steps[np.argsort(np.abs(steps - step), kind="stable")[:2]]
    return NotSavedError(
        f"{what} was kept at step {step}; nearest: {some(close.tolist())}. "
        f"There are {span(steps)}: .steps has them all"
    )


def span(steps: NDArray[Any]) -> str:
    """Return the first and last of `steps` as text.

    >>> span(np.array([0, 10, 20]))
    'steps 0 to 20, 3 of them'
    """
    if len(steps) == 1:
        return f"step {steps[0]}"
    return f"steps {steps[0]} to {steps[-1]}, {len(steps)} of them"
