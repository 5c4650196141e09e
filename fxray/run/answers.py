"""What a series answers when there is no such record, or more than one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fxray.errors import NotSavedError
from fxray.run.sources import Window
from fxray.run.words import missing_step, some

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fxray.run.rows import Rows

__all__ = ["no_record", "several_records"]


def no_record(series: Rows, window: Window, phase: str) -> NotSavedError:
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


def several_records(series: Rows, window: Window, found: NDArray[np.int64]) -> NotSavedError:
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
