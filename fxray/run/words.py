"""The values of a run in a few words, for what it prints and says."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from fxray.errors import NotSavedError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

__all__ = ["distinct", "missing_step", "some", "span", "why_nothing"]

SHOWN = 6
"""Values that a message lists."""


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


def span(steps: NDArray[Any]) -> str:
    """Return the first and last of `steps` as text.

    >>> span(np.array([0, 10, 20]))
    'steps 0 to 20, 3 of them'
    """
    if len(steps) == 1:
        return f"step {steps[0]}"
    return f"steps {steps[0]} to {steps[-1]}, {len(steps)} of them"


def missing_step(what: str, step: int, steps: NDArray[Any]) -> NotSavedError:
    """Return the error that says that `what` was kept at `step`; names the nearest of `steps`.

    >>> missing_step("no relu.output", 7, np.array([0, 10, 20]))
    NotSavedError('no relu.output was kept at step 7; nearest: 10, 0. ...')
    """
    if not len(steps):
        return NotSavedError(f"{what} was kept at step {step}, nor at any other")
    close = steps[np.argsort(np.abs(steps - step), kind="stable")[:2]]
    return NotSavedError(
        f"{what} was kept at step {step}; nearest: {some(close.tolist())}. There are {span(steps)}"
    )


def why_nothing(notes: Iterable[str], op: str, kind: str) -> str:
    """Return the reason that a run's `notes` give for a capture without a record, or `""`.

    >>> why_nothing(["nothing was kept of the grad of x, stem.0: no gradient came"], "x", "grad")
    'no gradient came'
    """
    for note in notes:
        found = re.match(r"nothing was kept of the (\w+) of ([^:]+): (.+)", note, re.DOTALL)
        if found and found[1] == kind and op in found[2].split(", "):
            return found[3]
    return ""
