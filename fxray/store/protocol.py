"""What a place for arrays takes and gives, whatever stands behind it."""

# Protocols, not base classes: a store shares no code with another one, and whoever brings
# their own (a database, a message queue) need not import anything from here.

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import attrs
from numpy.typing import NDArray

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "ArrayInfo",
    "ArrayView",
    "Record",
    "Row",
    "Store",
    "StoredRun",
    "StreamReader",
    "StreamWriter",
]


def _ints(values: Any) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


@attrs.frozen
class Row:
    """Where one record stands in a training: the leading dimension of every array.

    Attributes:
        step: training steps begun before the row, from 0; it may repeat.
        epoch: epoch, from 0.
        batch: batch within the pass, from 0.
        call: which of several forwards in the same step and phase, from 0.
        phase: name of the pass, e.g. `"train"` or `"valid"`.
        time: nanoseconds since 1970-01-01 UTC.
    """

    step: int
    epoch: int = 0
    batch: int = 0
    call: int = 0
    phase: str = "train"
    time: int = 0


@attrs.frozen
class ArrayInfo:
    """One array of a stream as it is declared.

    Attributes:
        name: unique in its stream, e.g. `"conv1.weight.bias"`; any text will do.
        dtype: torch's name, e.g. `"float32"` or `"bfloat16"`.
        shape: nominal shape of one record; a record may differ in sizes, not in dims.
        attributes: JSON-ready: `op`, `type`, `kind`, `parameter`, `item`, `field`,
            `selection`, `size` (nominal shape of what the selection was given), `axes`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...] = attrs.field(converter=_ints)
    attributes: Mapping[str, Any] = attrs.field(factory=dict, hash=False)

    @property
    def size(self) -> tuple[int, ...]:
        """Nominal shape of the tensor the selection was given; `shape` where not told."""
        return _ints(self.attributes.get("size", self.shape))


@attrs.frozen(eq=False)
class Record:
    """The numbers of one array at one row.

    Attributes:
        values: the record; bfloat16 and float8 as raw bits (uint16, uint8). It is copied
            before `append` returns.
        size: shape of the tensor that the selection was given.
    """

    values: NDArray[Any]
    size: tuple[int, ...]


class ArrayView(Protocol):
    """One array of a stream, read only where it is indexed."""

    @property
    def shape(self) -> tuple[int, ...]:
        """`(row, *record)`: what the nominal shape and every record fit into."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """dtype of what indexing gives; `ml_dtypes`' own for bfloat16 and float8."""
        ...

    def __getitem__(self, key: tuple[Any, ...]) -> NDArray[Any]:
        """Return the block that `key` (ints, slices, integer arrays; outer) selects."""
        ...


@runtime_checkable
class StreamWriter(Protocol):
    """The write side of one stream; one writer per stream, one thread appending."""

    def declare(self, info: ArrayInfo) -> None:
        """Add an array, now or in mid-run; the rows before it are missing."""
        ...

    def append(self, row: Row, records: Mapping[str, Record]) -> None:
        """Add one row; a declared array that is not among `records` is missing there."""
        ...

    def commit(self) -> None:
        """Make every row appended so far readable; blocks; any thread may call it."""
        ...

    def close(self) -> None:
        """Commit for the last time."""
        ...


@runtime_checkable
class StreamReader(Protocol):
    """The read side of one stream: a consistent prefix of it, as last committed."""

    @property
    def rows(self) -> int:
        """Number of committed rows."""
        ...

    @property
    def attributes(self) -> Mapping[str, Any]:
        """What the stream was opened with: `phase`, `moment`, `schedule`, `rank`."""
        ...

    @property
    def coords(self) -> Mapping[str, NDArray[Any]]:
        """`step, epoch, batch, call, time` (ints) and `phase` (str), each of shape (row,)."""
        ...

    @property
    def arrays(self) -> Mapping[str, ArrayInfo]:
        """The declared arrays by name, in the order they were declared."""
        ...

    def read(self, name: str, row: int) -> NDArray[Any]:
        """Return one record with its true shape and dtype; NotSavedError where missing."""
        ...

    def array(self, name: str) -> ArrayView:
        """Return the whole array, padded, to be read in blocks."""
        ...

    def present(self, name: str) -> NDArray[np.bool_]:
        """Return at which rows the array has a record, shape (row,)."""
        ...

    def whole(self, name: str) -> bool:
        """Tell whether no record is missing and all have the nominal shape."""
        ...

    def shapes(self, name: str) -> list[tuple[int, ...] | None]:
        """Return the true shape of each record, None where it is missing."""
        ...

    def sizes(self, name: str) -> list[tuple[int, ...] | None]:
        """Return what each record was selected from: a shape, None where it is missing."""
        ...

    def refresh(self) -> bool:
        """Look again; return whether more was committed meanwhile."""
        ...


@runtime_checkable
class StoredRun(Protocol):
    """One run as it stands in a store."""

    @property
    def attributes(self) -> Mapping[str, Any]:
        """`id, name, started, finished, tags, model, versions, captures, notes`."""
        ...

    @property
    def graph(self) -> Mapping[str, Any]:
        """The architecture as plain data."""
        ...

    @property
    def streams(self) -> Mapping[str, StreamReader]:
        """Every stream of every rank by name."""
        ...

    def refresh(self) -> bool:
        """Look again, at the streams too; return whether anything changed."""
        ...


@runtime_checkable
class Store(Protocol):
    """A place for the arrays of many runs."""

    @property
    def name(self) -> str:
        """How the user called the place, for messages."""
        ...

    def begin_run(
        self, run_id: str, attributes: Mapping[str, Any], graph: Mapping[str, Any]
    ) -> None:
        """Claim `run_id`; StoreError if it is taken or the place cannot be written."""
        ...

    def update_run(
        self,
        run_id: str,
        attributes: Mapping[str, Any],
        graph: Mapping[str, Any] | None = None,
    ) -> None:
        """Replace the named attributes of a run, e.g. `finished`; its graph, if one is given."""
        ...

    def runs(self) -> list[dict[str, Any]]:
        """Return a summary of every run, oldest first."""
        ...

    def writer(self, run_id: str, stream: str, attributes: Mapping[str, Any]) -> StreamWriter:
        """Begin a stream of a run."""
        ...

    def run(self, run_id: str) -> StoredRun:
        """Return a run to read; NotARunError if there is none of that id."""
        ...
