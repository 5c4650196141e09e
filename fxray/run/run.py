"""One run, to read."""

from __future__ import annotations

import fnmatch
from typing import TYPE_CHECKING, Any

import numpy as np

from fxray.architecture import Architecture
from fxray.errors import StoreError
from fxray.run import export
from fxray.run.extent import Extents, coords_of
from fxray.run.kept import CaptureTable, KeptTogether, kept_of, summary
from fxray.run.records import Log, OpRecords, find
from fxray.run.series import Series
from fxray.run.sources import LOG, Name, Source, Window, catalogue
from fxray.run.tables import RunSummary, StepRecords, human_bytes, tags_text
from fxray.run.words import distinct, missing_step

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping
    from pathlib import Path

    import graphviz
    import xarray as xr
    from numpy.typing import NDArray

    from fxray.store import StoredRun

__all__ = ["Run"]

_KINDS = ("input", "output", "grad", "weight", "weight_grad")
_ROWS_SHOWN = 40


class Run:
    """What one training left behind, or leaves behind while it runs.

    A look at what was committed when it was opened; `refresh` looks again.
    """

    def __init__(
        self,
        stored: StoredRun,
        *,
        windows: tuple[Window, ...] = (),
        ops: frozenset[str] | None = None,
    ) -> None:
        """Read `stored`.

        Args:
            stored: the run, from a store.
            windows: rows that are meant; all of them.
            ops: paths of the ops that are meant; None for all, logged numbers included.
        """
        self._stored, self._windows, self._ops = stored, windows, ops
        self._architecture: Architecture | None = None
        self._sources = catalogue(stored)
        self._known: dict[Name, Series] = {}

    # What it is.

    @property
    def id(self) -> str:
        """The run's unique id."""
        return str(self.attributes.get("id", ""))

    @property
    def name(self) -> str:
        """What the user called it, or `""`."""
        return str(self.attributes.get("name") or "")

    @property
    def tags(self) -> Mapping[str, Any]:
        """The user's tags."""
        return dict(self.attributes.get("tags") or {})

    @property
    def attributes(self) -> Mapping[str, Any]:
        """All that was written of the run: model, versions, captures asked for, notes, …."""
        return self._stored.attributes

    @property
    def notes(self) -> tuple[str, ...]:
        """What the recorder had to say, e.g. why a capture kept nothing."""
        return tuple(self.attributes.get("notes") or ())

    @property
    def summary(self) -> RunSummary:
        """The run as it is listed."""
        return RunSummary.of({**self.attributes, "id": self.id})

    @property
    def architecture(self) -> Architecture:
        """The model that was traced.

        Raises:
            StoreError: what stands in the store is no architecture.
        """
        if self._architecture is None:
            try:
                self._architecture = Architecture.from_dict(self._stored.graph)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                msg = f"the graph of run {self.id} is damaged ({type(error).__name__}: {error})"
                raise StoreError(msg) from error
        return self._architecture

    @property
    def steps(self) -> NDArray[np.int64]:
        """Every step at which anything was kept, ascending, each once."""
        steps = [coords["step"] for coords in self._rows()]
        return np.unique(np.concatenate(steps)) if steps else np.array([], np.int64)

    # What it holds.

    def __getitem__(self, name: str) -> OpRecords:
        """Return what was kept of an op or a module.

        Args:
            name: path, type key or fx name of an op, or path of a module.

        Raises:
            UnknownNameError: neither op nor module is called that; names the nearest.
        """
        return find(self.architecture, name, self._names(), self._series, self.notes)

    @property
    def log(self) -> Log:
        """The numbers that the user logged, e.g. `run.log["loss"].steps`."""
        return Log(self._series, tuple(name for name in self._sources if name[1] == LOG))

    def at(self, step: int, *, phase: str | None = None, call: int | None = None) -> StepRecords:
        """Return everything that was kept at `step`, by op, then by kind.

        Kinds are `"output"`, `"grad"`, `"input"`, `"weight"`, `"weight_grad"`; a parameter
        not called `weight` stands under `"weight.bias"`, `"weight_grad.bias"`.

        Args:
            step: the step.
            phase: the phase; training's, else that of the only one there is.
            call: which forward of the step, where there were several.

        Raises:
            NotSavedError: nothing was kept there, or of several calls; says what there is.
        """
        everything = StepRecords(step)
        for series in self._all():
            here = series.where(Window(step=step, phase=phase, call=call))
            if not here:
                continue
            other = series.parameter not in ("", "weight")
            kind = f"{series.kind}.{series.parameter}" if other else series.kind
            everything.setdefault(series.op, {})[kind] = here.sel(step=step, phase=phase, call=call)
        if not everything:
            nothing = f"nothing of run {self.id}"
            raise missing_step(nothing, step, self.steps)
        return everything

    def where(
        self,
        *,
        step: int | slice | None = None,
        epoch: int | slice | None = None,
        phase: str | None = None,
        op: str | None = None,
    ) -> Run:
        """Return a narrower run.

        Args:
            step: a step, or a slice of steps, stop exclusive.
            epoch: an epoch, or a slice.
            phase: name of a phase.
            op: shell-style pattern over paths (`"layer1.*"`), or the name of an op or module.

        Raises:
            UnknownNameError: `op` matches nothing; names the nearest.
        """
        window = Window(step=step, epoch=epoch, phase=phase)
        ops = self._ops if op is None else self._matching(op) & (self._ops or self._matching("*"))
        narrower = Run(self._stored, windows=(*self._windows, window), ops=ops)
        narrower._architecture = self._architecture
        return narrower

    def captures(self) -> CaptureTable:
        """Return what was kept, a row for each array, in the order of the graph."""
        return CaptureTable.of(self._kept())

    def refresh(self) -> Run:
        """Look again at what is committed by now, and return the run itself."""
        self._stored.refresh()
        self._sources, self._known = catalogue(self._stored), {}
        self._architecture = None
        return self

    # Elsewhere.

    def to_xarray(self) -> xr.DataTree:
        """Return the run lazy and labelled, one node for each stream.

        The nodes are named as the streams; step, epoch, batch, call, phase, time are
        coordinates over `row`. bfloat16 and float8 are widened to float32, which is exact.

        Raises:
            MissingExtraError: xarray is not installed.
        """
        return export.tree(self._stored, self._windows, self._meant, dict(self.attributes))

    def render(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        title: str | None = None,
        **options: Any,
    ) -> graphviz.Digraph | Path:
        """Draw the graph, its badges saying how often each kind was kept.

        Args:
            path: file to write, `.svg`, `.png`, `.pdf` or `.dot`; None gives the picture.
            title: heading; the run's name or id.
            options: further arguments of `fxray.look.render.to_dot`, e.g. `depth=2`.

        Returns:
            The path that was written, or the `graphviz.Digraph`.
        """
        # Pictures are asked for last, if at all: reading numbers should not wait for them.
        from fxray.look import render

        known = self.architecture
        badges = {op: kinds for op, kinds in self.badges().items() if op in known}
        dot = render.to_dot(known, badges, title=title or self.name or self.id, **options)
        return dot if path is None else render.save(dot, path)

    def badges(self) -> dict[str, dict[str, str]]:
        """Return by op and kind how often it was kept, e.g. `{"relu": {"output": "×12"}}`."""
        counts: dict[str, dict[str, int]] = {}
        extents = Extents(self._windows)
        for series in self._all():
            # What was marked anew was kept by one selection after the other.
            count = sum(one.records for one in kept_of(series, extents))
            if count:
                kinds = counts.setdefault(series.op, {})
                kinds[series.kind] = max(kinds.get(series.kind, 0), count)
        return {op: {kind: f"×{n}" for kind, n in kinds.items()} for op, kinds in counts.items()}

    def __str__(self) -> str:
        kept = self._kept()
        lines = [*self._heading(kept), "", summary(kept, _ROWS_SHOWN), *self._footing()]
        return "\n".join(lines)

    def __repr__(self) -> str:
        named = f" {self.name!r}" if self.name else ""
        return f"<Run {self.id}{named}: {len(self._names())} series; print(run) says more>"

    def _heading(self, kept: list[KeptTogether]) -> list[str]:
        summary, model = self.summary, self.summary.model
        parameters = model.get("parameters")
        count = f", {parameters:,} parameters" if isinstance(parameters, int) else ""
        finished = summary.finished or "not finished"
        lines = [
            f"{summary}; {finished if summary.finished is None else f'finished {finished}'}",
            f"model {model.get('class', 'unknown')}{count}",
        ]
        if summary.tags:
            lines.append(f"tags {tags_text(summary.tags)}")
        return [*lines, self._extent(kept)]

    def _extent(self, kept: list[KeptTogether]) -> str:
        """Say which steps, epochs, batches and phases there are, and how large it all is."""
        rows = self._rows()
        if not rows:
            return "nothing was kept yet"

        def span(name: str) -> str:
            low = min(int(coords[name].min()) for coords in rows)
            high = max(int(coords[name].max()) for coords in rows)
            return str(low) if low == high else f"{low}–{high}"

        phases = dict.fromkeys(phase for coords in rows for phase in distinct(coords["phase"]))
        return (
            f"steps {span('step')} ({len(self.steps)} kept), epochs {span('epoch')}, "
            f"batches {span('batch')}, phases {', '.join(phases)}; "
            f"{sum(one.records for one in kept):,} records, "
            f"{human_bytes(sum(one.nbytes for one in kept))}"
        )

    def _footing(self) -> list[str]:
        log = [f"logged: {', '.join(self.log)}"] if len(self.log) else []
        return [*([""] if log or self.notes else []), *log, *(f"note: {n}" for n in self.notes)]

    # Which series are meant.

    def _meant(self, name: Name) -> bool:
        op, kind, _ = name
        return self._ops is None or op in self._ops if kind != LOG else self._ops is None

    def _names(self) -> tuple[Name, ...]:
        """Return what names the series of ops, in the order of the graph, then of kinds."""
        order = {op: at for at, op in enumerate(self._stored.graph.get("ops", ()))}

        def place(name: Name) -> tuple[int, int]:
            kind = _KINDS.index(name[1]) if name[1] in _KINDS else len(_KINDS)
            return order.get(name[0], len(order)), kind

        meant = (name for name in self._sources if name[1] != LOG and self._meant(name))
        return tuple(sorted(meant, key=place))

    def _all(self) -> list[Series]:
        return [series for name in self._names() if (series := self._series(name)) is not None]

    def _kept(self) -> list[KeptTogether]:
        """Return what was kept, one for each selection of each kind of each op."""
        extents = Extents(self._windows)
        return [one for series in self._all() for one in kept_of(series, extents)]

    def _series(self, name: Name) -> Series | None:
        by_rank = self._sources.get(name)
        if by_rank is None or not self._meant(name):
            return None
        if name not in self._known:
            self._known[name] = Series.build(name, by_rank, self._windows)
        return self._known[name]

    def _rows(self) -> list[Mapping[str, NDArray[Any]]]:
        """Return the coordinates of what was kept, stream by stream, where there is any."""
        streams: dict[str, list[Source]] = {}
        for series in self._all():
            for source in series.sources:
                streams.setdefault(source.stream, []).append(source)
        found = [coords_of(sources, self._windows) for sources in streams.values()]
        return [coords for coords in found if len(coords["step"])]

    def _matching(self, pattern: str) -> frozenset[str]:
        kept = {name[0] for name in self._sources if name[1] != LOG}
        paths = {*self.architecture, *kept}
        found = frozenset(path for path in paths if fnmatch.fnmatchcase(path, pattern))
        if found:
            return found
        if pattern in self.architecture:
            return frozenset([self.architecture.resolve(pattern)])
        beneath = frozenset(self.architecture.beneath(pattern))
        if not beneath:
            raise self.architecture.unknown(pattern)
        return beneath
