"""Which array of which stream holds what, and which of its rows are meant."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
from numpy.typing import NDArray

from fxray.store import ArrayInfo, StreamReader

if TYPE_CHECKING:
    from fxray.store import StoredRun

__all__ = ["LOG", "Index", "Name", "Part", "Source", "Window", "catalogue"]

LOG = "log"
"""Moment and kind of the numbers that the user logged."""

Name = tuple[str, str, str]
"""What names a series: op path, kind, parameter; for a logged number `("", "log", its name)`."""


@attrs.frozen(eq=False)
class Source:
    """One array of one stream.

    Attributes:
        stream: name of the stream.
        reader: the stream.
        info: the array as it was declared.
    """

    stream: str
    reader: StreamReader
    info: ArrayInfo

    @cached_property
    def is_log(self) -> bool:
        """Whether it holds numbers that the user logged."""
        # By its name alone a module or a phase called "log" would have nothing but logs.
        moment = self.reader.attributes.get("moment")
        return moment == LOG if moment is not None else self.stream.startswith("log.")

    @cached_property
    def name(self) -> Name:
        """Op path, kind and parameter."""
        if self.is_log:
            return "", LOG, self.info.name
        given = self.info.attributes
        op, kind, parameter = (str(given.get(name, "")) for name in ("op", "kind", "parameter"))
        return op, kind, parameter

    @cached_property
    def field(self) -> str:
        """Which of several tensors, which field of it: `""`, `"mean"`, `"1.0"`, `"1.0.mean"`."""
        return ".".join(filter(None, (self.item, self.own_field)))

    @property
    def item(self) -> str:
        """Which of several tensors that the op returns, `""` for the only one."""
        return "" if self.is_log else str(self.info.attributes.get("item", ""))

    @property
    def own_field(self) -> str:
        """The field as the selection calls it, `""` where it gives a single tensor."""
        return "" if self.is_log else str(self.info.attributes.get("field", ""))

    @property
    def selection(self) -> dict[str, Any]:
        """`name` and `settings` of the selection that filled it; empty where unknown."""
        selection = self.info.attributes.get("selection", {})
        return dict(selection) if isinstance(selection, dict) else {"name": str(selection)}

    @property
    def selection_name(self) -> str:
        """Name of the class of the selection, e.g. `"Stats"`."""
        return str(self.selection.get("name", "")).rpartition(".")[2]

    @cached_property
    def selection_text(self) -> str:
        """The selection, settings and all: the same text for what one selection filled."""
        return repr(sorted(self.selection.items()))

    @property
    def rank(self) -> int:
        """Rank of the process that wrote it."""
        rank = self.reader.attributes.get("rank", 0)
        return rank if isinstance(rank, int) else 0


def catalogue(stored: StoredRun) -> dict[Name, dict[int, list[Source]]]:
    """Return every array of a run by what it holds, then by rank."""
    found: dict[Name, dict[int, list[Source]]] = {}
    for stream, reader in stored.streams.items():
        for info in reader.arrays.values():
            source = Source(stream, reader, info)
            found.setdefault(source.name, {}).setdefault(source.rank, []).append(source)
    return found


@attrs.frozen
class Window:
    """Which rows are meant; None means all.

    Attributes:
        step: a step, or a slice of steps, stop exclusive.
        epoch: an epoch, or a slice.
        batch: a batch, or a slice.
        call: which of several forwards of a step.
        phase: name of a phase.
    """

    step: int | slice | None = None
    epoch: int | slice | None = None
    batch: int | slice | None = None
    call: int | slice | None = None
    phase: str | None = None

    @property
    def given(self) -> dict[str, Any]:
        """What was asked for, by coordinate."""
        return {name: value for name, value in attrs.asdict(self).items() if value is not None}

    def mask(self, coords: Mapping[str, NDArray[Any]]) -> NDArray[np.bool_]:
        """Return which rows of `coords` are meant, shape (row,)."""
        mask = np.ones(len(coords["step"]), np.bool_)
        for name, wanted in self.given.items():
            mask &= _matches(coords[name], wanted)
        return mask

    def __str__(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.given.items())


def _matches(values: NDArray[Any], wanted: Any) -> NDArray[np.bool_]:
    if not isinstance(wanted, slice):
        equal: NDArray[np.bool_] = values == wanted
        return equal
    start = 0 if wanted.start is None else operator.index(wanted.start)
    mask: NDArray[np.bool_] = values >= start
    if wanted.stop is not None:
        mask &= values < operator.index(wanted.stop)
    if wanted.step is not None:
        mask &= (values - start) % operator.index(wanted.step) == 0
    return mask


@attrs.frozen(eq=False)
class Part:
    """The rows of one stream that belong to a series.

    Attributes:
        sources: the arrays, several where there are fields or a selection was changed.
        rows: row numbers in the stream, shape (record,).
        present: which source has a record there, shape (source, record).
        coords: the coordinates of the rows, each of shape (record,).
    """

    sources: tuple[Source, ...]
    rows: NDArray[np.int64]
    present: NDArray[np.bool_]
    coords: Mapping[str, NDArray[Any]]


@attrs.frozen(eq=False)
class Index:
    """Every record of a series in the order of steps: its part, its place there, its row."""

    parts: tuple[Part, ...]
    part: NDArray[np.int64]
    place: NDArray[np.int64]
    coords: Mapping[str, NDArray[Any]]
