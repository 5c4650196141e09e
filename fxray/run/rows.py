"""The records of one thing: which there are, where they stand, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from fxray.errors import NotSavedError, UnknownNameError, nearest
from fxray.run.sources import Index, Name, Part, Source, Window
from fxray.run.words import distinct, some
from fxray.store import Row
from fxray.store.layout import COORDINATES, dtype_of

if TYPE_CHECKING:
    from typing import Self

    from numpy.typing import NDArray

__all__ = ["Rows"]

TRAIN = "train"


@attrs.frozen(eq=False, repr=False)
class Rows:
    """What `Series` says of itself to those it hands itself to: tables, exports, pictures.

    Attributes:
        op: path of the op; `""` for logged numbers.
        kind: `"output"`, `"grad"`, `"input"`, `"weight"`, `"weight_grad"` or `"log"`.
        parameter: name of the parameter below the op, `""` where it is none.
        selected_rank: rank of the process whose records these are.
    """

    op: str
    kind: str
    parameter: str
    selected_rank: int
    _by_rank: Mapping[int, Sequence[Source]]
    _windows: tuple[Window, ...] = ()
    _only: str | None = None

    @classmethod
    def build(
        cls, name: Name, by_rank: Mapping[int, Sequence[Source]], windows: tuple[Window, ...] = ()
    ) -> Self:
        """Return the records called `name` over the arrays `by_rank`, within `windows`."""
        return cls(*name, min(by_rank), by_rank, windows)

    # What it is.

    @property
    def title(self) -> str:
        """Op, kind and parameter in one word, e.g. `"conv1.weight.bias"`."""
        if not self.op:
            return self.parameter
        shown = self.parameter if self.parameter != "weight" else ""
        return ".".join(filter(None, (self.op, self.kind, shown, self._only or "")))

    @cached_property
    def sources(self) -> tuple[Source, ...]:
        """The arrays that hold it, of every stream of the rank."""
        found = self._by_rank[self.selected_rank]
        return tuple(s for s in found if self._only is None or s.field == self._only)

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """Names of what a record holds, `("",)` for a single array."""
        return tuple(dict.fromkeys(source.field for source in self.sources))

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks that kept it."""
        return tuple(sorted(self._by_rank))

    @property
    def type(self) -> str:
        """Type of the op, e.g. `"conv2d"`."""
        return str(self.sources[0].info.attributes.get("type", ""))

    @property
    def axes(self) -> str:
        """A letter for each dim of a record, e.g. `"NCHW"`; `""` where unknown."""
        return str(self.sources[-1].info.attributes.get("axes", ""))

    @property
    def selection(self) -> dict[str, Any]:
        """`name` and `settings` of the selection that was last used; empty where unknown."""
        return self.sources[-1].selection

    @property
    def shape(self) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
        """Nominal shape of a record, by field where there are several."""
        shapes = {source.field: source.info.shape for source in self.sources}
        return shapes if self.has_fields else next(iter(shapes.values()))

    @property
    def dtype(self) -> np.dtype[Any] | dict[str, np.dtype[Any]]:
        """dtype of a record, by field where there are several."""
        dtypes = {source.field: dtype_of(source.info.dtype).numpy for source in self.sources}
        return dtypes if self.has_fields else next(iter(dtypes.values()))

    @property
    def has_fields(self) -> bool:
        """Whether a record is a dict of arrays by field."""
        return self._only is None and self.fields != ("",)

    # Which records there are.

    @property
    def steps(self) -> NDArray[np.int64]:
        """Step of each record, shape (record,); non-decreasing, it may repeat."""
        return self.index.coords["step"]

    @property
    def epochs(self) -> NDArray[np.int32]:
        """Epoch of each record, shape (record,)."""
        return self.index.coords["epoch"]

    @property
    def batches(self) -> NDArray[np.int32]:
        """Batch of each record within its pass, shape (record,)."""
        return self.index.coords["batch"]

    @property
    def calls(self) -> NDArray[np.int32]:
        """Which forward of its step each record is from, shape (record,)."""
        return self.index.coords["call"]

    @property
    def phases(self) -> NDArray[np.str_]:
        """Phase of each record, shape (record,)."""
        return self.index.coords["phase"]

    @property
    def times(self) -> NDArray[np.datetime64]:
        """When each record was made, UTC, in nanoseconds, shape (record,)."""
        return self.index.coords["time"].astype("datetime64[ns]")

    def __len__(self) -> int:
        return len(self.steps)

    def __bool__(self) -> bool:
        return len(self) > 0

    @cached_property
    def index(self) -> Index:
        """Every record: in which stream it stands, at which row, and its coordinates."""
        streams: dict[str, list[Source]] = {}
        for source in self.sources:
            streams.setdefault(source.stream, []).append(source)
        parts = tuple(self._part(tuple(sources)) for sources in streams.values())
        part = np.repeat(np.arange(len(parts)), [len(p.rows) for p in parts])
        place = np.concatenate([np.arange(len(p.rows)) for p in parts])
        columns = [p.coords for p in parts]
        if len(parts) == 1 and (np.diff(columns[0]["step"]) >= 0).all():
            return Index(parts, part, place, columns[0])
        coords = {name: np.concatenate([c[name] for c in columns]) for name in COORDINATES}
        order = np.lexsort((coords["call"], coords["time"], coords["step"]))
        ordered = {name: values[order] for name, values in coords.items()}
        return Index(parts, part[order], place[order], ordered)

    def _part(self, sources: tuple[Source, ...]) -> Part:
        reader = sources[0].reader
        present = np.stack([reader.present(source.info.name) for source in sources])
        meant = present.any(axis=0)
        for window in self._windows:
            meant &= window.mask(reader.coords)
        if meant.all():
            return Part(sources, np.arange(reader.rows), present, reader.coords)
        rows = np.flatnonzero(meant)
        coords = {name: values[rows] for name, values in reader.coords.items()}
        return Part(sources, rows, present[:, rows], coords)

    # Records.

    def row(self, at: int) -> Row:
        """Return where the record number `at`, from 0, stands."""
        coords = self.index.coords
        step, epoch, batch, call, time = (
            int(coords[name][at]) for name in ("step", "epoch", "batch", "call", "time")
        )
        return Row(step, epoch, batch, call, str(coords["phase"][at]), time)

    def record(self, at: int) -> Any:
        """Return the record number `at`, from 0: an array, or a dict of arrays by field."""
        index = self.index
        part, place = index.parts[index.part[at]], index.place[at]
        row = int(part.rows[place])
        values = {
            source.field: source.reader.read(source.info.name, row)
            for source, here in zip(part.sources, part.present[:, place], strict=True)
            if here
        }
        return values if self.has_fields else next(iter(values.values()))

    def shapes(self, field: str = "") -> list[tuple[int, ...] | None]:
        """Return the true shape of each record (of its `field`), None where that is missing."""
        sources = [source for source in self.sources if source.field == field]
        if len(sources) == 1 and sources[0].reader.whole(sources[0].info.name):
            return [sources[0].info.shape] * len(self)
        index = self.index
        by_part = [
            [(s, s.reader.shapes(s.info.name)) for s in part.sources if s.field == field]
            for part in index.parts
        ]
        found: list[tuple[int, ...] | None] = []
        for number, place in zip(index.part, index.place, strict=True):
            row = index.parts[number].rows[place]
            shapes = (shapes[row] for _, shapes in by_part[number] if shapes[row] is not None)
            found.append(next(shapes, None))
        return found

    # Narrower.

    def where(self, window: Window) -> Self:
        """Return the series of the records within `window`."""
        return attrs.evolve(self, windows=(*self._windows, window))

    def field(self, name: str) -> Self:
        """Return the series of one field, e.g. `"mean"`, or `"1.0"` for the first state of an LSTM.

        Raises:
            UnknownNameError: no field is called that; names those there are.
        """
        if name not in self.fields:
            close = nearest(name, self.fields)
            hint = f"nearest: {', '.join(map(repr, close))}; " if close else ""
            has = ", ".join(map(repr, self.fields))
            msg = f"{self.title} has no field {name!r}; {hint}it has {has}"
            raise UnknownNameError(msg)
        return attrs.evolve(self, only=name)

    def among(self, sources: Sequence[Source]) -> Self:
        """Return the series of the records that stand in `sources`, some of its own."""
        return attrs.evolve(self, by_rank={self.selected_rank: sources})

    def rank(self, rank: int) -> Self:
        """Return what the process of that rank kept.

        Raises:
            NotSavedError: it kept nothing of this; names the ranks that did.
        """
        if rank not in self._by_rank:
            msg = f"rank {rank} kept no {self.title}; ranks {some(self.ranks)} did"
            raise NotSavedError(msg)
        return attrs.evolve(self, selected_rank=rank)

    def in_phase(self, phase: str | None = None) -> Self:
        """Return the records of `phase`; by default training's, else those of the only phase.

        Raises:
            NotSavedError: nothing was kept in that phase, or it is not clear which is meant.
        """
        return self.where(Window(phase=self._phase(phase)))

    def _phase(self, phase: str | None) -> str:
        """Return the phase that is meant, see `in_phase`."""
        kept = distinct(self.phases)
        if phase is None and TRAIN not in kept and len(kept) > 1:
            msg = f"{self.title} was kept in phases {some(kept)}; say which: phase={kept[0]!r}"
            raise NotSavedError(msg)
        if phase is None:
            phase = TRAIN if TRAIN in kept or not kept else kept[0]
        if phase not in kept:
            there = f"only in {some(kept)}" if kept else "nor in any other"
            msg = f"{self.title} was not kept in phase {phase!r}, {there}"
            raise NotSavedError(msg)
        return phase
