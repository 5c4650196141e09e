"""What a place and a run hold, as text to read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import attrs
import numpy as np

from fxray.run.answers import distinct
from fxray.run.export import extra

if TYPE_CHECKING:
    import pandas as pd

    from fxray.run.series import Series

__all__ = ["CaptureTable", "Kept", "RunList", "RunSummary", "human_bytes", "kept_rows", "table"]

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@attrs.frozen
class RunSummary:
    """One run of a place, as it is listed.

    Attributes:
        id: unique; any prefix of it that is unique opens the run.
        name: what the user called it, or `""`.
        started: when, ISO 8601, UTC.
        finished: when, or None: it is running, or was killed.
        tags: the user's.
        model: `class`, `parameters`, `fingerprint`.
    """

    id: str
    name: str = ""
    started: str = ""
    finished: str | None = None
    tags: Mapping[str, Any] = attrs.field(factory=dict, hash=False)
    model: Mapping[str, Any] = attrs.field(factory=dict, hash=False)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> RunSummary:
        """Return the summary that a store gave as `plain`."""
        finished = plain.get("finished")
        tags, model = (_mapping(plain.get(name)) for name in ("tags", "model"))
        return cls(
            str(plain["id"]),
            str(plain.get("name") or ""),
            str(plain.get("started") or ""),
            None if finished is None else str(finished),
            tags,
            model,
        )

    def __str__(self) -> str:
        named = f" {self.name!r}" if self.name else ""
        started = f", started {self.started}" if self.started else ""
        return f"run {self.id}{named}{started}"


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, dict) else {}


@attrs.frozen(eq=False, repr=False)
class RunList(Sequence[RunSummary]):
    """The runs of a place, oldest first; prints as a table.

    Attributes:
        place: where they are.
        summaries: the runs.
    """

    place: str
    summaries: tuple[RunSummary, ...]

    @overload
    def __getitem__(self, index: int) -> RunSummary: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[RunSummary, ...]: ...
    def __getitem__(self, index: int | slice) -> RunSummary | tuple[RunSummary, ...]:
        return self.summaries[index]

    def __len__(self) -> int:
        return len(self.summaries)

    def __repr__(self) -> str:
        if not self.summaries:
            return f"no runs in {self.place}"
        rows = [
            [run.id, run.name, str(run.model.get("class", "")), run.started, run.finished or "–",
             tags_text(run.tags)]
            for run in self.summaries
        ]  # fmt: skip
        return table(["run", "name", "model", "started", "finished", "tags"], rows)


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


def kept_rows(series: Series) -> list[Kept]:
    """Return a row for each field of `series`."""
    rows = []
    for field in series.fields:
        one = series if series.fields == (field,) else series.field(field)
        info = one.sources[-1].info
        itemsize = np.dtype(one.dtype).itemsize if not isinstance(one.dtype, dict) else 0
        rows.append(
            Kept(
                op=series.op,
                type=series.type,
                kind=series.kind,
                parameter=series.parameter,
                field=field,
                selection=str(one.selection.get("name", "")).rpartition(".")[2],
                phases=tuple(distinct(one.phases)),
                records=len(one),
                first_step=int(one.steps[0]) if one else None,
                last_step=int(one.steps[-1]) if one else None,
                shape=info.shape,
                dtype=info.dtype,
                nbytes=len(one) * math.prod(info.shape) * itemsize,
            )
        )
    return rows


@attrs.frozen(eq=False, repr=False)
class CaptureTable(Sequence[Kept]):
    """What a run kept, row by row, in the order of the graph; prints as a table."""

    rows: tuple[Kept, ...]

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

    def text(self, limit: int | None = None) -> str:
        """Return the first `limit` rows as a table, all by default."""
        head = ["op", "kind", "selection", "phase", "records", "steps", "shape", "dtype", "size"]
        rows = [
            [
                row.op,
                ".".join(filter(None, (row.kind, row.parameter, row.field))),
                row.selection,
                ", ".join(row.phases),
                str(row.records),
                row.steps,
                "×".join(map(str, row.shape)) or "scalar",
                row.dtype,
                human_bytes(row.nbytes),
            ]
            for row in self.rows[:limit]
        ]
        more = len(self.rows) - len(rows)
        rest = f"\n… and {more} more: run.captures() has them all" if more else ""
        return table(head, rows) + rest

    def __repr__(self) -> str:
        return self.text() if self.rows else "nothing was kept"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return `rows` under `head`, each column as wide as its widest entry.

    >>> print(table(["op", "records"], [["relu", "12"]]))
    op    records
    relu  12
    """
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in [head, *rows]]
    return "\n".join(lines)


def tags_text(tags: Mapping[str, Any]) -> str:
    """Return tags as `name=value` pairs."""
    return " ".join(f"{name}={value}" for name, value in tags.items())


def human_bytes(nbytes: float) -> str:
    """Return a number of bytes for a reader.

    >>> human_bytes(0), human_bytes(1536), human_bytes(3 << 30)
    ('0 B', '1.5 KiB', '3.0 GiB')
    """
    power = min(len(_UNITS) - 1, int(math.log2(nbytes)) // 10) if nbytes >= 1 else 0
    digits = 0 if power == 0 else 1
    return f"{nbytes / (1 << 10 * power):.{digits}f} {_UNITS[power]}"
