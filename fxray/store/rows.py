"""The rows of one stream in memory, each with its records."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from fxray.errors import StoreError
from fxray.store import refusals
from fxray.store.layout import COORDINATES, Dtype, dtype_of
from fxray.store.plain import to_json
from fxray.store.protocol import ArrayInfo

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fxray.store.protocol import Record, Row

__all__ = ["MemoryReader", "MemoryView", "MemoryWriter"]

# What a zarr store could not keep is refused here too, by the same conversion.
_COORDINATES = {
    name: str if name == "phase" else np.dtype(dtype).type for name, dtype in COORDINATES.items()
}


@attrs.frozen(eq=False)
class _Array:
    """One array as it was declared, and what is known of its records together.

    Attributes:
        info: how it was declared, as it comes back from JSON.
        dtype: how its records are kept.
        raw: dtype of what is appended.
        ndim: of a record.
        size: nominal, of what is selected from.
        widest: sizes that the nominal shape and every record fit into.
        whole: whether no record is missing and all have the nominal shape.
    """

    info: ArrayInfo
    dtype: Dtype
    raw: np.dtype[Any]
    ndim: int
    size: tuple[int, ...]
    widest: tuple[int, ...]
    whole: bool

    def seen(self, shape: tuple[int, ...] | None) -> _Array:
        """Return what is known after a record of that shape, None for a missing one."""
        whole = self.whole and shape == self.info.shape
        widest = self.widest if shape is None else tuple(map(max, shape, self.widest))
        if (widest, whole) == (self.widest, self.whole):
            return self
        return attrs.evolve(self, widest=widest, whole=whole)


_Held = tuple["NDArray[Any]", tuple[int, ...]]
"""The values of a record and the size of what they were selected from, both the store's own."""


@attrs.frozen(eq=False)
class _Entry:
    """One row; appended as a whole, so that an interrupt leaves none half there."""

    coords: Mapping[str, Any]
    records: Mapping[str, _Held]


@attrs.frozen(eq=False)
class _Prefix:
    """What was committed."""

    rows: int
    arrays: Mapping[str, _Array]


class MemoryWriter:
    """Keeps the rows of one stream; see `StreamWriter`.

    Attributes:
        where: name of the stream and its place, for messages.
        attributes: what the stream was opened with, as JSON.
        entries: every row appended; the first ones never change.
        committed: how many of them, and which arrays, a reader sees.
    """

    def __init__(self, where: str, name: str, attributes: Mapping[str, Any]) -> None:
        self.where, self.attributes = where, to_json(attributes)
        self.entries: list[_Entry] = []
        self.committed = _Prefix(0, {})
        self._name, self._pid, self._closed = name, os.getpid(), False
        self._arrays: dict[str, _Array] = {}
        self._lock = threading.Lock()

    def declare(self, info: ArrayInfo) -> None:
        """Add the array `info`; the rows appended before it are missing.

        Declaring the same array twice does nothing.

        Raises:
            StoreError: an array of that name was declared otherwise, or the dtype cannot be
                stored.
        """
        info = attrs.evolve(info, attributes=json.loads(to_json(info.attributes)))
        with self._own_lock():
            self._check_open()
            known = self._arrays.get(info.name)
            if known is not None:
                refusals.check_same(self._name, known.info, info)
                return
            dtype, whole = dtype_of(info.dtype), not self.entries
            self._arrays[info.name] = _Array(
                info, dtype, dtype.raw, len(info.shape), info.size, info.shape, whole
            )

    def append(self, row: Row, records: Mapping[str, Record]) -> None:
        """Add one row.

        Raises:
            StoreError: a record does not fit its declaration (nothing is appended then), the
                stream is closed, or this process was forked.
        """
        with self._own_lock():
            self._check_open()
            arrays = self._arrays
            held: dict[str, _Held] = {}
            changed: dict[str, _Array] = {}
            for name, record in records.items():
                array, values = arrays.get(name), record.values
                if array is None or values.dtype is not array.raw or values.ndim != array.ndim:
                    known = None if array is None else (array.info, array.raw)
                    refusals.check_record(self._name, name, known, record)
                    array = arrays[name]
                held[name] = _copied(record, array.size)
                if values.shape != array.info.shape:
                    changed[name] = array.seen(values.shape)
            if len(held) < len(arrays):
                changed |= {name: arrays[name].seen(None) for name in arrays.keys() - held.keys()}
            coords = {name: kind(getattr(row, name)) for name, kind in _COORDINATES.items()}
            entry = _Entry(coords, held)
            arrays.update(changed)
            self.entries.append(entry)

    def commit(self) -> None:
        """Make every row appended so far readable; any thread may call it."""
        with self._own_lock():
            self._check_open()
            self._commit()

    def close(self) -> None:
        """Commit for the last time."""
        with self._own_lock():
            if not self._closed:
                self._commit()
                self._closed = True

    def _commit(self) -> None:
        before, rows = self.committed, len(self.entries)
        if rows > before.rows or len(self._arrays) > len(before.arrays):
            self.committed = _Prefix(rows, dict(self._arrays))

    def _check_open(self) -> None:
        if self._closed:
            raise refusals.closed(self._name, self.where)

    def _own_lock(self) -> threading.Lock:
        # A fork may have copied the lock while another thread held it.
        if os.getpid() != self._pid:
            msg = (
                f"process {os.getpid()} was forked from {self._pid}, and {self.where} in it is a "
                "copy that nobody else sees; record in the parent only"
            )
            raise StoreError(msg)
        return self._lock


def _copied(record: Record, nominal: tuple[int, ...]) -> _Held:
    size = nominal if record.size == nominal else tuple(map(int, record.size))
    return np.array(record.values, order="C"), size


@attrs.frozen(eq=False)
class MemoryView:
    """One array of a stream, put together where it is indexed; see `ArrayView`."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    _records: list[_Held | None]
    _kept: Dtype

    def __getitem__(self, key: tuple[Any, ...]) -> NDArray[Any]:
        """Return the block that `key` (ints, slices, integer arrays; outer) selects."""
        first, *rest = key or (slice(None),)
        rows = np.asarray(np.arange(self.shape[0])[first])
        block = np.full((rows.size, *self.shape[1:]), self._kept.fill_value, self._kept.raw)
        for at, row in enumerate(rows.flat):
            record = self._records[row]
            if record is not None:
                values, _ = record
                within: tuple[Any, ...] = (at, *map(slice, values.shape))
                block[within] = values
        block = block.reshape(rows.shape + self.shape[1:])
        # The last dim first: whatever an index does to its dim, those before keep their place.
        for dim in reversed(range(len(rest))):
            block = block[(slice(None),) * (rows.ndim + dim) + (rest[dim],)]
        return np.asarray(block).view(self.dtype)


class MemoryReader:
    """Reads the rows that one stream has committed; see `StreamReader`."""

    def __init__(self, stream: MemoryWriter) -> None:
        self._stream = stream
        self.attributes: Mapping[str, Any] = json.loads(stream.attributes)
        self._look()

    def _look(self) -> None:
        self._prefix = self._stream.committed
        arrays = self._prefix.arrays
        self.rows = self._prefix.rows
        self.arrays = MappingProxyType({name: array.info for name, array in arrays.items()})
        self._coords: Mapping[str, NDArray[Any]] | None = None
        self._columns: dict[str, list[_Held | None]] = {}

    @property
    def coords(self) -> Mapping[str, NDArray[Any]]:
        """`step, epoch, batch, call, time` (ints) and `phase` (str), each of shape (row,)."""
        if self._coords is None:
            entries = self._stream.entries[: self.rows]
            coords = {
                name: np.array([entry.coords[name] for entry in entries], kind)
                for name, kind in _COORDINATES.items()
            }
            self._coords = MappingProxyType(coords)
        return self._coords

    def read(self, name: str, row: int) -> NDArray[Any]:
        """Return the record of array `name` at `row`, of its true shape and dtype.

        Raises:
            UnknownNameError: the stream has no array of that name.
            NotSavedError: the array has no record at that row.
        """
        info = refusals.declared(self.arrays, name, self._stream.where)
        refusals.check_row(row, self.rows, self._stream.where)
        record = self._stream.entries[row].records.get(name)
        if record is None:
            raise refusals.no_record(name, row, self._stream.where)
        values, _ = record
        return values.copy().view(dtype_of(info.dtype).numpy)

    def array(self, name: str) -> MemoryView:
        """Return the whole array, padded with NaN (ints: 0), to be read in blocks."""
        records, array = self._column(name), self._prefix.arrays[name]
        return MemoryView((self.rows, *array.widest), array.dtype.numpy, records, array.dtype)

    def present(self, name: str) -> NDArray[np.bool_]:
        """Return at which rows array `name` has a record, shape (row,)."""
        return np.array([record is not None for record in self._column(name)], np.bool_)

    def whole(self, name: str) -> bool:
        """Tell whether array `name` misses no record and all have its shape."""
        refusals.declared(self.arrays, name, self._stream.where)
        return self._prefix.arrays[name].whole

    def shapes(self, name: str) -> list[tuple[int, ...] | None]:
        """Return the true shape of each record of array `name`, None where it is missing."""
        return [record[0].shape if record else None for record in self._column(name)]

    def sizes(self, name: str) -> list[tuple[int, ...] | None]:
        """Return the shape that each record of `name` was selected from, None where missing."""
        return [record[1] if record else None for record in self._column(name)]

    def refresh(self) -> bool:
        """Look again; return whether more was committed meanwhile."""
        before = self._prefix
        self._look()
        return self._prefix is not before

    def _column(self, name: str) -> list[_Held | None]:
        refusals.declared(self.arrays, name, self._stream.where)
        if name not in self._columns:
            entries = self._stream.entries[: self.rows]
            self._columns[name] = [entry.records.get(name) for entry in entries]
        return self._columns[name]
