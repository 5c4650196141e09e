"""What fxray says when it cannot go on: what, where, and what next."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "BranchError",
    "DraftError",
    "FxrayError",
    "FxrayWarning",
    "MissingExtraError",
    "NoGraphError",
    "NotARunError",
    "NotSavedError",
    "PictureError",
    "RecordError",
    "SelectionError",
    "SpecialisationError",
    "StoreError",
    "TraceError",
    "UnknownNameError",
    "first_line",
    "nearest",
]


class FxrayError(Exception):
    """Any error that fxray raises on purpose."""

    def __str__(self) -> str:
        # KeyError would show the repr of its message, quotes and escapes included.
        return str(self.args[0]) if self.args else ""


class FxrayWarning(UserWarning):
    """Something was absorbed so that training could go on; said once."""


class TraceError(FxrayError, RuntimeError):
    """The model cannot be traced; the message names the user's file and line."""


class NoGraphError(TraceError):
    """The forward does what no graph can hold; the message names file and line."""


class SpecialisationError(TraceError):
    """A traced graph was called with something it was not traced for."""


class BranchError(SpecialisationError):
    """A branch goes another way, or a number that Python took is another, than when traced.

    Attributes:
        where: `file:line` of the user's branch.
        number: whether it is a number with a fraction, which hardly ever comes again.
    """

    def __init__(self, message: str, where: str = "", *, number: bool = False) -> None:
        super().__init__(message)
        self.where, self.number = where, number


class UnknownNameError(FxrayError, KeyError):
    """No op, parameter or module is called that; the message names the nearest."""


class DraftError(FxrayError, ValueError):
    """A draft entry, a mark or a schedule that makes no sense."""


class SelectionError(FxrayError, TypeError):
    """An object that cannot serve as a selection."""


class RecordError(FxrayError, RuntimeError):
    """A recording that cannot begin or go on."""


class StoreError(FxrayError, OSError):
    """A place that cannot be written or read."""


class NotARunError(StoreError, FileNotFoundError):
    """The place holds no fxray run, or none of that id."""


class NotSavedError(FxrayError, KeyError):
    """What was asked for was not kept; the message says what was."""


class PictureError(FxrayError, ValueError):
    """A picture that cannot be drawn or written as asked."""


class MissingExtraError(FxrayError, ImportError):
    """A library of an optional extra is not installed; the message says how to get it."""


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says: torch's go on with its own tables."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def nearest(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """Return up to `limit` of the `known` names that look most like `name`.

    >>> nearest("layer1.relu", ["layer1.0.relu", "layer1.0.conv1", "head"])[0]
    'layer1.0.relu'
    """
    by_lower = {k.lower(): k for k in known}
    tail = name.lower().rpartition(".")[2]
    close = difflib.get_close_matches(name.lower(), by_lower, n=limit, cutoff=0.5)
    same_tail = [low for low in by_lower if low.rpartition(".")[2] == tail and low not in close]
    return [by_lower[low] for low in (close + same_tail)[:limit]]
