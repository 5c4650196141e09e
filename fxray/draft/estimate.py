"""What a draft will cost before anything runs, roughly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import attrs

from fxray.architecture import TensorSpec
from fxray.errors import DraftError, FxrayError
from fxray.selections import Selection, spec_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fxray.architecture import Architecture, Op
    from fxray.draft.schedule import Schedule

__all__ = ["BYTES_PER_SECOND", "SECONDS_PER_RECORD", "Cost", "Estimate", "estimate"]

SECONDS_PER_RECORD = 30e-6
"""What one record costs the training thread, assumed: selecting and copying a small
tensor takes about 20 µs, handing it to the writer about 10 µs."""

BYTES_PER_SECOND = 1e9
"""What the training thread copies in a second, assumed; the writing goes on beside it."""

_SMALL_RECORD, _SMALL_CHUNK, _LARGE_CHUNK, _MOST_RECORDS = 16 << 10, 256 << 10, 1 << 20, 8192


class Row(Protocol):
    """What a capture says, as far as its cost depends on it."""

    @property
    def op(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def selection(self) -> Selection: ...
    @property
    def schedule(self) -> Schedule: ...


@attrs.frozen
class Cost:
    """What one capture costs.

    Attributes:
        op: path of the op.
        kind: kind of the capture.
        due: how many steps it is due at.
        specs: shape and dtype of each array kept at such a step; None where unknown.
        why: why it is unknown, else empty.
    """

    op: str
    kind: str
    due: int
    specs: tuple[TensorSpec, ...] | None
    why: str = ""

    @property
    def records(self) -> int:
        """How many records it writes; what is unknown counts as one array."""
        return self.due * (1 if self.specs is None else len(self.specs))

    @property
    def nbytes(self) -> int | None:
        """Bytes of those, uncompressed; None where unknown."""
        return None if self.specs is None else self.due * sum(spec.nbytes for spec in self.specs)

    @property
    def chunks(self) -> int | None:
        """How many chunks those fill; None where unknown."""
        if self.specs is None:
            return None
        return sum(-(-self.due // _records_per_chunk(spec.nbytes)) for spec in self.specs)


def _records_per_chunk(nbytes: int) -> int:
    # As the store does it by default; it stands above and cannot be asked from here.
    chunk = _SMALL_CHUNK if nbytes <= _SMALL_RECORD else _LARGE_CHUNK
    fitting = max(1, chunk // max(1, nbytes))
    return min(_MOST_RECORDS, 1 << (fitting.bit_length() - 1))


@attrs.frozen
class Estimate:
    """What a draft costs over `steps` training steps: roughly.

    It takes one forward and one optimizer step per training step, every op reached, shapes
    as traced and no evaluation. `str()` is a table.

    Attributes:
        steps: how many training steps.
        rows: cost by capture, in the order of the draft.
    """

    steps: int
    rows: tuple[Cost, ...]

    @property
    def unknown(self) -> tuple[Cost, ...]:
        """The captures whose size is unknown; the totals leave their bytes out."""
        return tuple(row for row in self.rows if row.specs is None)

    @property
    def bytes(self) -> int:
        """Bytes of all records, uncompressed, as far as known."""
        return sum(row.nbytes or 0 for row in self.rows)

    @property
    def records(self) -> int:
        """How many records."""
        return sum(row.records for row in self.rows)

    @property
    def chunks(self) -> int:
        """How many chunks they fill, as far as known."""
        return sum(row.chunks or 0 for row in self.rows)

    @property
    def seconds(self) -> float:
        """Seconds of the training thread: `SECONDS_PER_RECORD` and `BYTES_PER_SECOND`."""
        return self.records * SECONDS_PER_RECORD + self.bytes / BYTES_PER_SECOND

    def __str__(self) -> str:
        table = [("op", "kind", "due", "bytes each", "bytes", "chunks")]
        for row in self.rows:
            each = "?" if row.specs is None else _size(sum(s.nbytes for s in row.specs))
            sizes = (each, _size(row.nbytes), "?" if row.chunks is None else f"{row.chunks:,}")
            table.append((row.op, row.kind, f"{row.due:,}", *sizes))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [_line(cells, widths) for cells in table] if self.rows else []
        return "\n".join([*lines, *self._totals()])

    def _totals(self) -> Iterable[str]:
        yield (
            f"{self.steps:,} steps: {_size(self.bytes)}, "
            f"{self.records:,} records in {self.chunks:,} chunks, "
            f"about {self.seconds:.2g} s of the training thread"
        )
        for why in dict.fromkeys(row.why for row in self.unknown):
            rows = [row for row in self.unknown if row.why == why]
            names = ", ".join(f"{row.op} {row.kind}" for row in rows[:3])
            more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
            yield f"not counted, size unknown: {names}{more} ({why})"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    left = [cell.ljust(width) for cell, width in zip(cells[:2], widths[:2], strict=True)]
    right = [cell.rjust(width) for cell, width in zip(cells[2:], widths[2:], strict=True)]
    return "  ".join([*left, *right])


def _size(nbytes: float | None) -> str:
    if nbytes is None:
        return "?"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    return f"{nbytes:,.4g} TiB"


def estimate(architecture: Architecture, captures: Iterable[Row], steps: int) -> Estimate:
    """Return what `captures` of `architecture` cost over `steps` training steps.

    Raises:
        DraftError: `steps` is not a whole number of at least 0.
    """
    given: Any = steps
    if isinstance(given, bool) or not isinstance(given, int) or given < 0:
        msg = f"estimate(steps={steps!r}): give a whole number of training steps"
        raise DraftError(msg)
    return Estimate(steps, tuple(_cost(architecture[row.op], row, steps) for row in captures))


def _cost(op: Op, row: Row, steps: int) -> Cost:
    due = row.schedule.count(steps)
    tensors = _tensors(op, row.kind)
    if not tensors:
        return Cost(op.path, row.kind, due, None, "traced without an input, so without shapes")
    try:
        specs = [spec for tensor in tensors for spec in _kept(row.selection, tensor)]
    except FxrayError as error:
        return Cost(op.path, row.kind, due, None, str(error))
    return Cost(op.path, row.kind, due, tuple(specs))


def _tensors(op: Op, kind: str) -> tuple[TensorSpec, ...]:
    if kind in {"weight", "weight_grad"}:
        return tuple(op.parameters.values())
    return op.inputs if kind == "input" else op.outputs


def _kept(selection: Selection, tensor: TensorSpec) -> list[TensorSpec]:
    kept = spec_of(selection, tensor)
    return list(kept.values()) if isinstance(kept, dict) else [kept]
