"""One array while it is written: its chunk in the making, its handle."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from fxray.store.layout import ROW_LIMIT, ArrayLayout
from fxray.store.manifest import array_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    import tensorstore as ts
    from numpy.typing import NDArray

    from fxray.store.place import Place

__all__ = ["Column"]


class Column:
    """The rows of one array that do not fill a chunk yet, and where full chunks go.

    Only whole chunks are ever written, through a handle that was opened for 2^40 rows and
    trusts our metadata: nothing is read before a write and nothing is resized.

    Attributes:
        layout: the array's layout, its record dims as wide as needed so far.
        rows: rows per chunk.
        shape: sizes of a row of the buffer: the record dims in whole chunks.
        text: the array's zarr.json before and after the number of rows.
        dirty: whether the buffer holds rows that no commit has written.
        partial: the last write of a chunk that was not full.
    """

    __slots__ = (
        "_buffer", "_fill", "_handle", "_place", "dirty", "dtype", "layout", "partial", "rows",
        "shape", "text",
    )  # fmt: skip

    def __init__(self, place: Place, layout: ArrayLayout, fill: Any) -> None:
        self._place = place / layout.key
        self._fill = fill
        self.dtype = np.dtype(layout.stored)
        self.rows = layout.chunk[0]
        self.partial: ts.Future[Any] | None = None
        self.dirty = False
        self._buffer: NDArray[Any] | None = None
        self._open(layout)

    def _open(self, layout: ArrayLayout) -> None:
        self.layout = layout
        self.text = array_text(layout)
        self.shape = layout.record
        # Attributes may hold text that only Python's JSON takes, and the handle needs none.
        metadata = {**layout.metadata(), "shape": [ROW_LIMIT, *layout.record], "attributes": {}}
        self._handle = self._place.open_array(metadata)

    @property
    def nbytes(self) -> int:
        """Bytes of one chunk buffer."""
        return self.rows * math.prod(self.shape) * self.dtype.itemsize

    def document(self, rows: int) -> str:
        """Return the array's zarr.json for `rows` rows."""
        return f"{self.text[0]}{rows}{self.text[1]}"

    def describe(self, layout: ArrayLayout) -> None:
        """Replace the attributes; shapes stay as they are."""
        self.layout = layout
        self.text = array_text(layout)

    def begin_document(self, rows: int) -> ts.Future[Any]:
        """Begin to write the array's own zarr.json."""
        return self._place.begin_write(self.document(rows))

    def put(self, row: int, values: Any) -> None:
        """Set the record at `row`; it may be smaller than the record dims."""
        at = row % self.rows
        buffer = self._buffer
        if buffer is None:
            buffer = self._buffer = np.empty((self.rows, *self.shape), self.dtype)
            buffer[:at] = self._fill
        shape = getattr(values, "shape", self.shape)
        if shape == self.shape:
            buffer[at] = values
        else:
            buffer[at] = self._fill
            buffer[at][tuple(map(slice, shape))] = values
        self.dirty = True

    def skip(self, row: int) -> None:
        """Say that there is no record at `row`."""
        if self._buffer is not None:
            self._buffer[row % self.rows] = self._fill
            self.dirty = True

    def backfill(self, rows: int, value: Any) -> Iterator[tuple[ts.Future[Any], int]]:
        """Set `value` at every row below `rows`, nothing having been written before."""
        for chunk in range(rows // self.rows):
            yield self._write(chunk, np.full((self.rows, *self.shape), value, self.dtype))
        if rows % self.rows:
            self._buffer = np.empty((self.rows, *self.shape), self.dtype)
            self._buffer[: rows % self.rows] = value
            self.dirty = True

    def flush(self, row: int) -> tuple[ts.Future[Any], int] | None:
        """Begin to write the chunk whose last row is `row`; return future and bytes.

        None when all its rows were skipped: what is not stored reads as the fill value.
        """
        buffer, self._buffer, self.dirty = self._buffer, None, False
        return None if buffer is None else self._write(row // self.rows, buffer)

    def flush_partial(self, rows: int) -> tuple[ts.Future[Any], int] | None:
        """Begin to write what there is of the last chunk, padded from a copy."""
        if not self.dirty or self._buffer is None:
            return None
        filled = rows % self.rows
        padded = np.empty_like(self._buffer)
        padded[:filled] = self._buffer[:filled]
        padded[filled:] = self._fill
        written = self._write(rows // self.rows, padded)
        self.partial, self.dirty = written[0], False
        return written

    def grow(self, shape: tuple[int, ...]) -> None:
        """Widen the record dims until a record of `shape` fits, in whole chunks."""
        edges = self.layout.chunk[1:]
        record = tuple(
            have if need <= have else -(-need // edge) * edge
            for have, need, edge in zip(self.layout.record, shape, edges, strict=True)
        )
        self._wait()
        old, before = self._buffer, self.shape
        self._open(ArrayLayout(
            self.layout.key, self.layout.stored, self.layout.fill, record, self.layout.chunk,
            self.layout.attributes,
        ))  # fmt: skip
        if old is not None:
            self._buffer = np.full((self.rows, *self.shape), self._fill, self.dtype)
            self._buffer[(slice(None), *map(slice, before))] = old

    def _write(self, chunk: int, buffer: NDArray[Any]) -> tuple[ts.Future[Any], int]:
        self._wait()
        start = chunk * self.rows
        # write() returns before it has read its source: the buffer is never touched again.
        target = self._handle[start : start + self.rows]
        future = target.write(buffer, can_reference_source_data_indefinitely=True).commit
        return future, buffer.nbytes

    def _wait(self) -> None:
        """Wait for the write of the same chunk, half full, that a commit has begun.

        Two writes of one chunk may be done in any order; the fuller one must be the last.
        """
        partial, self.partial = self.partial, None
        if partial is not None:
            partial.exception()
