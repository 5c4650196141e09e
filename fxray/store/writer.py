"""The write side of one stream."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

from fxray.errors import StoreError
from fxray.store.column import Column
from fxray.store.layout import (
    COORDINATES,
    MISSING,
    NOMINAL,
    companion,
    coordinate,
    dtype_of,
    encode_shape,
    record_layout,
)
from fxray.store.manifest import manifest_text
from fxray.store.place import check_process
from fxray.store.refusals import check_record, check_same, closed, taken

if TYPE_CHECKING:
    from collections.abc import Mapping

    import tensorstore as ts

    from fxray.store.place import Place
    from fxray.store.protocol import ArrayInfo, Record, Row

__all__ = ["ZarrWriter"]

PENDING_BYTES = 256 << 20
BUFFER_BYTES = 256 << 20


class _RecordColumn:
    """A declared array and its companions."""

    __slots__ = ("column", "info", "raw", "shapes", "size", "sizes")

    def __init__(self, info: ArrayInfo, column: Column) -> None:
        self.info, self.column = info, column
        self.raw = dtype_of(info.dtype).raw
        self.size = info.size
        self.shapes: Column | None = None
        self.sizes: Column | None = None


class _Pending:
    """The writes that are under way, and the first one that failed."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.error: BaseException | None = None
        self._futures: set[ts.Future[Any]] = set()
        self._changed = threading.Condition()

    def add(self, future: ts.Future[Any], nbytes: int) -> None:
        """Hold on to `future` until it is done: a dropped future cancels its write."""
        with self._changed:
            self._futures.add(future)
            self.nbytes += nbytes

        def done(finished: ts.Future[Any]) -> None:
            error = finished.exception()
            with self._changed:
                self._futures.discard(finished)
                self.nbytes -= nbytes
                if error is not None and self.error is None:
                    self.error = error
                self._changed.notify_all()

        future.add_done_callback(done)

    def wait_below(self, nbytes: int) -> None:
        """Block until at most `nbytes` are under way or a write failed."""
        with self._changed:
            self._changed.wait_for(lambda: self.nbytes <= nbytes or self.error is not None)

    def wait_now(self) -> None:
        """Block until every write begun before this call is done or one failed."""
        with self._changed:
            begun = set(self._futures)
            self._changed.wait_for(
                lambda: self.error is not None or begun.isdisjoint(self._futures)
            )


class ZarrWriter:
    """Writes one stream of format 1: data first, coordinates next, the manifest last.

    `append` copies records into chunk buffers and begins to write full ones; `commit` writes
    what is left, waits for everything and then replaces the stream's zarr.json in one atomic
    write. A write that fails is raised once, by whichever call comes next, as StoreError;
    from then on rows are dropped and counted, and what was committed stays as it was.

    Attributes:
        rows: rows appended.
        committed: rows that a reader sees.
        dropped: rows that came after a write had failed.
    """

    def __init__(
        self,
        place: Place,
        name: str,
        attributes: Mapping[str, Any],
        *,
        pending_bytes: int = PENDING_BYTES,
        buffer_bytes: int = BUFFER_BYTES,
    ) -> None:
        """Begin the stream `name` at `place`.

        Args:
            place: the stream's folder.
            name: the stream's true name.
            attributes: JSON-ready: `phase`, `moment`, `schedule`, `rank`.
            pending_bytes: how much may be under way before `append` waits.
            buffer_bytes: how much the chunk buffers may hold together; beyond it chunks
                have fewer rows.

        Raises:
            StoreError: there is a stream already, or the place cannot be written.
        """
        self.rows = self.committed = self.dropped = 0
        self._place, self._name, self._attributes = place, name, dict(attributes)
        self._pending_bytes, self._room = pending_bytes, buffer_bytes
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._commit_lock = threading.Lock()
        self._pending = _Pending()
        self._failed = self._closed = False
        self._columns: dict[str, Column] = {}
        self._by_rows: dict[int, list[Column]] = {}
        self._records: dict[str, _RecordColumn] = {}
        self._phases: dict[str, int] = {}
        self._stale = True
        self._begin()

    def _begin(self) -> None:
        coordinates = [coordinate(name) for name in COORDINATES]
        columns = [Column(self._place, layout, 0) for layout in coordinates]
        if not self._place.write_text(self._manifest(0, columns), create=True):
            raise taken(self._place.name)
        for column in columns:
            self._add(column)
        self._step, self._epoch, self._batch, self._call, self._phase, self._time = columns

    def _add(self, column: Column) -> Column:
        self._pending.add(column.begin_document(self.committed), 0)
        self._columns[column.layout.key] = column
        self._by_rows.setdefault(column.rows, []).append(column)
        self._stale = True
        return column

    def declare(self, info: ArrayInfo) -> None:
        """Add the array `info`; the rows appended before it are missing.

        Declaring the same array twice does nothing.

        Raises:
            StoreError: an array of that name was declared otherwise (a new selection needs
                a name of its own), or the dtype cannot be stored.
        """
        with self._lock:
            self._check()
            known = self._records.get(info.name)
            if known is not None:
                check_same(self._name, known.info, info)
                return
            layout = record_layout(info, self._room // 8)
            column = Column(self._place, layout, dtype_of(info.dtype).fill_value)
            self._room = max(0, self._room - column.nbytes)
            record = self._records[info.name] = _RecordColumn(info, self._add(column))
            if self.rows:
                self._backfill(record)

    def _backfill(self, record: _RecordColumn) -> None:
        """Say of every row so far that `record` is missing there."""
        for written in self._companion(record, "shape").backfill(self.rows, MISSING):
            self._pending.add(*written)

    def append(self, row: Row, records: Mapping[str, Record]) -> None:
        """Add one row.

        Args:
            row: where it stands.
            records: the records by array name; a declared array not among them is missing.

        Raises:
            StoreError: a record does not fit its declaration (nothing is appended then), an
                earlier write failed, or this process was forked.
        """
        with self._lock:
            self._check()
            if self._failed:
                self.dropped += 1
                return
            for name, record in records.items():
                known = self._records.get(name)
                declared = None if known is None else (known.info, known.raw)
                check_record(self._name, name, declared, record)
            at = self.rows
            for name, record in records.items():
                self._put(self._records[name], at, record)
            if len(records) < len(self._records):
                self._skip(at, records)
            self._put_row(at, row)
            self.rows = at + 1
            for rows, columns in self._by_rows.items():
                if self.rows % rows == 0:
                    for column in columns:
                        self._flush(column, at)
        if self._pending.nbytes > self._pending_bytes:
            self._pending.wait_below(self._pending_bytes)

    def _put(self, known: _RecordColumn, at: int, record: Record) -> None:
        shape = record.values.shape
        column = known.column
        if shape != column.layout.record and any(
            need > have for need, have in zip(shape, column.layout.record, strict=True)
        ):
            column.grow(shape)
            self._stale = True
        column.put(at, record.values)
        if shape != known.info.shape:
            shapes = known.shapes or self._companion(known, "shape")
            shapes.put(at, encode_shape(shape, shapes.shape[0]))
        elif known.shapes is not None:
            known.shapes.skip(at)
        if record.size != known.size:
            sizes = known.sizes or self._companion(known, "size")
            if len(record.size) > sizes.shape[0]:
                sizes.grow((len(record.size),))
                self._stale = True
            sizes.put(at, encode_shape(record.size, sizes.shape[0]))
        elif known.sizes is not None:
            known.sizes.skip(at)

    def _skip(self, at: int, records: Mapping[str, Record]) -> None:
        for name, known in self._records.items():
            if name in records:
                continue
            known.column.skip(at)
            shapes = known.shapes or self._companion(known, "shape")
            shapes.put(at, [MISSING] * shapes.shape[0])
            if known.sizes is not None:
                known.sizes.skip(at)

    def _companion(self, known: _RecordColumn, role: str) -> Column:
        """Add a companion; its rows so far read as "as declared"."""
        nominal = known.info.shape if role == "shape" else known.size
        layout = companion(known.column.layout, role, max(1, len(nominal)))
        column = self._add(Column(self._place, layout, NOMINAL))
        if role == "shape":
            known.shapes = column
        else:
            known.sizes = column
        return column

    def _put_row(self, at: int, row: Row) -> None:
        code = self._phases.get(row.phase)
        if code is None:
            code = self._phases[row.phase] = len(self._phases)
            self._phase.describe(coordinate("phase", tuple(self._phases)))
        self._step.put(at, row.step)
        self._epoch.put(at, row.epoch)
        self._batch.put(at, row.batch)
        self._call.put(at, row.call)
        self._phase.put(at, code)
        self._time.put(at, row.time)

    def _flush(self, column: Column, row: int) -> None:
        written = column.flush(row)
        if written is not None:
            self._pending.add(*written)

    def commit(self) -> None:
        """Make every row appended so far readable, and wait until it is.

        Any thread may call it while another one appends; that one waits for the copy of the
        chunks in the making, not for the writes.

        Raises:
            StoreError: a write failed; the rows committed before stay readable.
        """
        with self._commit_lock:
            self._commit()

    def _commit(self) -> None:
        with self._lock:
            self._check()
            if self._failed or (self.rows == self.committed and not self._stale):
                return
            rows, self._stale = self.rows, False
            for column in self._columns.values():
                written = column.flush_partial(rows)
                if written is not None:
                    self._pending.add(*written)
            manifest = self._manifest(rows, list(self._columns.values()))
        self._pending.wait_now()
        with self._lock:
            self._check()
        try:
            self._place.write_text(manifest)
        except StoreError:
            self._failed = True
            raise
        self.committed = rows

    def close(self) -> None:
        """Commit for the last time and write the committed shape into every array's zarr.json.

        Without it the stream is whole all the same; only who opens an array past its group
        then sees no rows.

        Raises:
            StoreError: see `commit`.
        """
        with self._commit_lock:
            if self._closed:
                return
            try:
                self._commit()
                if not self._failed:
                    for column in self._columns.values():
                        self._pending.add(column.begin_document(self.committed), 0)
                    self._pending.wait_now()
                    self._check()
            finally:
                self._closed = True

    def _manifest(self, rows: int, columns: list[Column]) -> str:
        arrays = [(column.layout.key, column.document(rows)) for column in columns]
        return manifest_text(self._name, self._attributes, rows, arrays)

    def _check(self) -> None:
        if os.getpid() != self._pid:
            check_process()
        if self._closed:
            raise closed(self._name, self._place.name)
        if self._pending.error is not None and not self._failed:
            self._failed = True
            msg = (
                f"a write to {self._place.name} failed: {self._pending.error}. "
                f"{self.committed} rows are committed and readable; later ones are dropped"
            )
            raise StoreError(msg) from self._pending.error
