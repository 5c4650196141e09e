"""The read side of one stream."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import tensorstore as ts

from fxray.errors import StoreError
from fxray.store.layout import COORDINATES, MISSING, ROW_LIMIT, decode_shape, dtype_of
from fxray.store.manifest import Manifest, parse_manifest
from fxray.store.refusals import check_row, declared, no_record

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from fxray.store.place import Place
    from fxray.store.protocol import ArrayInfo

__all__ = ["ZarrReader", "ZarrView"]


@attrs.frozen
class ZarrView:
    """One array of a stream, read only where it is indexed; see `ArrayView`."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    _handle: ts.TensorStore
    _where: str

    def __getitem__(self, key: tuple[Any, ...]) -> NDArray[Any]:
        """Return the block that `key` (ints, slices, integer arrays; outer) selects."""
        whole = tuple(map(_bounded, key, self.shape[: len(key)]))
        rest = tuple(slice(0, size) for size in self.shape[len(key) :])
        block = _wait(self._handle.oindex[whole + rest].read(), self._where)
        return block.view(self.dtype)


def _bounded(index: Any, size: int) -> Any:
    """Return `index` as numpy means it: a handle has more rows than were committed."""
    if isinstance(index, slice):
        start, stop, step = index.indices(size)
        if step > 0 and stop > start:
            return np.arange(start, stop, step) if step > 1 else slice(start, stop)
        return np.arange(start, stop, step)
    within = np.asarray(index)
    if within.size and (within.min() < -size or within.max() >= size):
        msg = f"index {index} is out of bounds for {size}"
        raise IndexError(msg)
    wrapped = np.where(within < 0, within + size, within)
    return wrapped if wrapped.ndim else int(wrapped)


def _wait(future: Any, where: str) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.asarray(future.result())
    except ValueError as error:
        msg = f"cannot read {where}: {error}"
        raise StoreError(msg) from error
    return array


class ZarrReader:
    """Reads the rows that one stream of format 1 has committed; see `StreamReader`.

    One document says all: opening reads it, and so does `refresh`. Arrays are opened when
    they are asked for, their own zarr.json never.
    """

    def __init__(self, place: Place) -> None:
        """Open the stream at `place`.

        Raises:
            StoreError: there is no stream, or its zarr.json is damaged.
        """
        self._place = place
        self._load()

    def _load(self) -> None:
        where = f"{self._place.name}/zarr.json"
        document = self._place.document()
        if document is None:
            msg = f"{where} is gone: the stream is listed, but nothing stands there"
            raise StoreError(msg)
        self._manifest: Manifest = parse_manifest(document, where)
        layouts = self._manifest.layouts.values()
        records = {layout.key: layout.info() for layout in layouts if layout.role == "record"}
        self._keys = {info.name: key for key, info in records.items()}
        self._arrays = MappingProxyType({info.name: info for info in records.values()})
        self._handles: dict[str, ts.TensorStore] = {}
        self._companions: dict[str, NDArray[Any]] = {}
        self._coords: Mapping[str, NDArray[Any]] | None = None

    @property
    def rows(self) -> int:
        """Number of committed rows."""
        return self._manifest.rows

    @property
    def attributes(self) -> Mapping[str, Any]:
        """What the stream was opened with: `phase`, `moment`, `schedule`, `rank`."""
        return self._manifest.attributes

    @property
    def arrays(self) -> Mapping[str, ArrayInfo]:
        """The declared arrays by name, in the order they were declared."""
        return self._arrays

    @property
    def coords(self) -> Mapping[str, NDArray[Any]]:
        """`step, epoch, batch, call, time` (ints) and `phase` (str), each of shape (row,)."""
        if self._coords is None:
            reads = {key: self._handle(key)[: self.rows].read() for key in COORDINATES}
            coords = {key: _wait(read, f"{self._place.name}/{key}") for key, read in reads.items()}
            coords["phase"] = self._phases(coords["phase"])
            self._coords = MappingProxyType(coords)
        return self._coords

    def _phases(self, codes: NDArray[Any]) -> NDArray[Any]:
        names = self._manifest.layouts["phase"].attributes["fxray"].get("phases", [])
        if codes.size and codes.max() >= len(names):
            msg = f"{self._place.name}/phase is damaged: code {codes.max()} of {len(names)} phases"
            raise StoreError(msg)
        return np.array(names, str)[codes] if codes.size else np.array([], str)

    def read(self, name: str, row: int) -> NDArray[Any]:
        """Return the record of array `name` at `row`, of its true shape and dtype.

        Raises:
            UnknownNameError: the stream has no array of that name.
            NotSavedError: the array has no record at that row.
        """
        info = self._info(name)
        check_row(row, self.rows, self._place.name)
        key = self._keys[name]
        shape = self._row_shape(key, info, row)
        if shape is None:
            raise no_record(name, row, self._place.name)
        values = _wait(self._handle(key)[row].read(), f"{self._place.name}/{key}")
        if values.shape != shape:
            values = values[tuple(map(slice, shape))].copy()
        return values.view(dtype_of(info.dtype).numpy)

    def _row_shape(self, key: str, info: ArrayInfo, row: int) -> tuple[int, ...] | None:
        companion = self._companion(key, "shape")
        if companion is None:
            return info.shape
        return decode_shape(companion[row].tolist(), info.shape)

    def array(self, name: str) -> ZarrView:
        """Return the whole array, padded with NaN (ints: 0), to be read in blocks.

        Raises:
            UnknownNameError: the stream has no array of that name.
        """
        info = self._info(name)
        key = self._keys[name]
        shape = (self.rows, *self._widest(key, info))
        where = f"{self._place.name}/{key}"
        return ZarrView(shape, dtype_of(info.dtype).numpy, self._handle(key), where)

    def _widest(self, key: str, info: ArrayInfo) -> tuple[int, ...]:
        # What is stored ends with a whole chunk, which may be wider than any record.
        companion = self._companion(key, "shape")
        if companion is None or not len(companion) or not info.shape:
            return info.shape
        return tuple(np.maximum(companion.max(axis=0), info.shape).tolist())

    def present(self, name: str) -> NDArray[np.bool_]:
        """Return at which rows array `name` has a record, shape (row,)."""
        self._info(name)
        companion = self._companion(self._keys[name], "shape")
        if companion is None:
            return np.ones(self.rows, np.bool_)
        present: NDArray[np.bool_] = companion[:, 0] != MISSING
        return present

    def whole(self, name: str) -> bool:
        """Tell at no cost whether array `name` misses no record and all have its shape."""
        self._info(name)
        return f"{self._keys[name]}!shape" not in self._manifest.layouts

    def shapes(self, name: str) -> list[tuple[int, ...] | None]:
        """Return the true shape of each record of array `name`, None where it is missing."""
        return self._decoded(name, "shape", self._info(name).shape)

    def sizes(self, name: str) -> list[tuple[int, ...] | None]:
        """Return the shape that each record of `name` was selected from, None where missing."""
        sizes = self._decoded(name, "size", self._info(name).size)
        present = self.present(name)
        return [size if here else None for size, here in zip(sizes, present, strict=True)]

    def _decoded(
        self, name: str, role: str, nominal: tuple[int, ...]
    ) -> list[tuple[int, ...] | None]:
        companion = self._companion(self._keys[name], role)
        if companion is None:
            return [nominal] * self.rows
        return [decode_shape(row, nominal) for row in companion.tolist()]

    def refresh(self) -> bool:
        """Look again; return whether more was committed meanwhile."""
        before = self._manifest
        self._load()
        return self._manifest != before

    def _info(self, name: str) -> ArrayInfo:
        return declared(self._arrays, name, self._place.name)

    def _companion(self, key: str, role: str) -> NDArray[Any] | None:
        companion = f"{key}!{role}"
        layout = self._manifest.layouts.get(companion)
        if layout is None:
            return None
        known = self._companions.get(companion)
        if known is None:
            read = self._handle(companion)[: self.rows].read()
            known = _wait(read, f"{self._place.name}/{companion}")
            self._companions[companion] = known
        return known

    def _handle(self, key: str) -> ts.TensorStore:
        handle = self._handles.get(key)
        if handle is None:
            layout = self._manifest.layouts[key]
            metadata = {**layout.metadata(), "shape": [ROW_LIMIT, *layout.record]}
            place = self._place / key
            handle = place.open_array({**metadata, "attributes": {}}, cached=True)
            self._handles[key] = handle
        return handle
