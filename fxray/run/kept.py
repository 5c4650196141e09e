"""What a run kept, counted, as tables to read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

import attrs

from fxray.run.export import extra
from fxray.run.extent import Extent
from fxray.run.tables import human_bytes, table
from fxray.store.layout import dtype_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pandas as pd

    from fxray.run.extent import Extents
    from fxray.run.rows import Rows
    from fxray.run.sources import Source

__all__ = ["CaptureTable", "Kept", "KeptTogether", "kept_of", "summary"]

_HEAD = ("op", "kind", "selection", "phase", "records", "steps", "shape", "dtype", "size")
_SHAPES = 3
"""Different shapes that one row names."""


@attrs.frozen
class Kept:
    """What one array of a run, or the same array in several streams, holds.

    Attributes:
        op: path of the op.
        type: its type, e.g. `"conv2d"`.
        kind: `"output"`, `"grad"`, `"weight"`, `"weight_grad"`, `"input"`.
        parameter: name of the parameter, or `""`.
        field: which of several tensors and numbers, or `""`.
        selection: name of the selection.
        phases: phases in which it was kept.
        records: how many.
        first_step: step of the first record, None where there are no records.
        last_step: step of the last record.
        shape: nominal shape of a record.
        dtype: torch's name.
        nbytes: bytes of all records at the nominal shape.
    """

    op: str
    type: str
    kind: str
    parameter: str
    field: str
    selection: str
    phases: tuple[str, ...]
    records: int
    first_step: int | None
    last_step: int | None
    shape: tuple[int, ...]
    dtype: str
    nbytes: int

    @property
    def steps(self) -> str:
        """First and last step, e.g. `"0–990"`."""
        if self.first_step is None:
            return "–"
        return "–".join(dict.fromkeys(map(str, (self.first_step, self.last_step))))

    @property
    def kind_and_parameter(self) -> str:
        """The kind as `Run.at` and the command name it, e.g. `"weight.bias"`."""
        other = self.parameter if self.parameter != "weight" else ""
        return ".".join(filter(None, (self.kind, other)))


@attrs.frozen
class KeptTogether:
    """The arrays that one selection filled of one kind of an op: its fields, its tensors.

    Attributes:
        rows: one for each array.
        tensors: how many tensors of the op they are of.
    """

    rows: tuple[Kept, ...]
    tensors: int = 1

    @property
    def records(self) -> int:
        """How many; an array that began later has fewer."""
        return max(row.records for row in self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of all records of all arrays at their nominal shapes."""
        return sum(row.nbytes for row in self.rows)

    @property
    def selection(self) -> str:
        """The selection, and of how many arrays, e.g. `"Stats (9 fields)"`."""
        name, fields = self.rows[0].selection, len(self.rows) // self.tensors
        counts = [f"{self.tensors} tensors"] if self.tensors > 1 else []
        counts += [f"{fields} fields"] if fields > 1 else []
        return f"{name} ({' × '.join(counts)})" if counts else name

    def cells(self) -> list[str]:
        """Return the row of a table, see `_HEAD`."""
        most = max(self.rows, key=lambda row: row.records)
        shapes = list(dict.fromkeys(_times(row.shape) for row in self.rows))
        cut = ["…"] if len(shapes) > _SHAPES else []
        return [
            most.op,
            most.kind_and_parameter,
            self.selection,
            ", ".join(dict.fromkeys(phase for row in self.rows for phase in row.phases)),
            str(self.records),
            most.steps,
            ", ".join(shapes[:_SHAPES] + cut),
            ", ".join(dict.fromkeys(row.dtype for row in self.rows)),
            human_bytes(self.nbytes),
        ]


def _times(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def kept_of(series: Rows, extents: Extents) -> list[KeptTogether]:
    """Return what `series` holds by selection: more than one where it was marked anew."""
    by_selection: dict[str, dict[str, list[Source]]] = {}
    for source in series.sources:
        fields = by_selection.setdefault(source.selection_text, {})
        fields.setdefault(source.field, []).append(source)
    return [
        KeptTogether(
            tuple(_row(series, field, sources, extents) for field, sources in fields.items()),
            len({source.item for sources in fields.values() for source in sources}),
        )
        for fields in by_selection.values()
    ]


def _row(series: Rows, field: str, sources: Sequence[Source], extents: Extents) -> Kept:
    held = [extents.of(source) for source in sources]
    all_of_it = Extent.union(held)
    info = sources[-1].info
    return Kept(
        op=series.op,
        type=series.type,
        kind=series.kind,
        parameter=series.parameter,
        field=field,
        selection=sources[-1].selection_name,
        phases=all_of_it.phases,
        records=all_of_it.records,
        first_step=all_of_it.first,
        last_step=all_of_it.last,
        shape=info.shape,
        dtype=info.dtype,
        nbytes=sum(
            one.records * math.prod(source.info.shape) * dtype_of(source.info.dtype).raw.itemsize
            for one, source in zip(held, sources, strict=True)
        ),
    )


def summary(groups: Sequence[KeptTogether], limit: int) -> str:
    """Return the first `limit` of `groups` as a table, and where the rest is to be seen."""
    if not groups:
        return "nothing was kept"
    rows = [group.cells() for group in groups[:limit]]
    text = table(_HEAD, rows)
    if len(groups) <= limit:
        return text
    op = groups[limit].rows[0].op
    return (
        f"{text}\n… and {len(groups) - limit} more. Of one layer: run[{op!r}] in Python, "
        f"fxray show PLACE {op} in a shell; of all: run.captures()"
    )


@attrs.frozen(eq=False, repr=False)
class CaptureTable(Sequence[Kept]):
    """What a run kept, array by array, in the order of the graph; prints as a table."""

    rows: tuple[Kept, ...]

    @classmethod
    def of(cls, groups: Iterable[KeptTogether]) -> CaptureTable:
        """Return the table of the arrays of `groups`."""
        return cls(tuple(row for group in groups for row in group.rows))

    @overload
    def __getitem__(self, index: int) -> Kept: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Kept, ...]: ...
    def __getitem__(self, index: int | slice) -> Kept | tuple[Kept, ...]:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of all records at their nominal shapes."""
        return sum(row.nbytes for row in self.rows)

    @property
    def records(self) -> int:
        """Records of all rows together."""
        return sum(row.records for row in self.rows)

    def to_pandas(self) -> pd.DataFrame:
        """Return the table as a DataFrame.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        names = [field.name for field in attrs.fields(Kept)]
        rows = [[getattr(row, name) for name in names] for row in self.rows]
        return extra("pandas").DataFrame(rows, columns=names)

    def __repr__(self) -> str:
        if not self.rows:
            return "nothing was kept"
        alone = [KeptTogether((row,)).cells() for row in self.rows]
        fields = [row.field for row in self.rows]
        named = [[op, f"{kind}.{field}" if field else kind, *rest]
                 for (op, kind, *rest), field in zip(alone, fields, strict=True)]  # fmt: skip
        return table(_HEAD, named)
