"""A series as the picture that suits it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from fxray.look.plot import plot, rule_for
from fxray.look.plotdata import PlotData, evenly
from fxray.run.export import Padded
from fxray.run.rows import Rows
from fxray.run.words import missing_step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from fxray.run.sources import Source

__all__ = ["draw", "plot_data"]


def draw(  # noqa: PLR0913  # the choices of one picture
    series: Rows,
    *,
    step: int | None = None,
    steps: Sequence[int] | None = None,
    field: str | None = None,
    phase: str | None = None,
    loss: Any = None,
) -> Figure:
    """Return the picture of `series`, see `Series.plot`."""
    meant = series.in_phase(phase)
    name = "loss"
    if isinstance(loss, Rows):
        name = loss.title
        # Numbers are logged where they are computed: a valid picture has the loss of training.
        logged = loss.in_phase(phase if phase in loss.phases else None)
        loss = logged.steps.tolist(), _numbers(logged, np.arange(len(logged)), logged.fields[0])
    wanted = [step] if step is not None else steps
    data = plot_data(meant, field, wanted)
    drawn = None if steps is None else list(dict.fromkeys(data.steps))
    return plot(data, step=step, steps=drawn, loss=loss, loss_name=name)


def plot_data(
    series: Rows, field: str | None = None, steps: Sequence[int] | None = None
) -> PlotData:
    """Return the records of `series` as a plot takes them, no more of them than it draws.

    Where an op returns several tensors, those of the first, or of the one that `field`
    names; where it was marked anew, those of the last selection.

    Args:
        series: within one phase.
        field: of the selection, or one of the tensors.
        steps: those to draw; by default what suits the drawing.

    Raises:
        NotSavedError: nothing was kept at one of the steps; names the nearest.
    """
    for step in () if steps is None else steps:
        if step not in series.steps:
            nothing = f"no {series.title}"
            raise missing_step(nothing, step, np.unique(series.steps))
    among = _chosen(series, field, steps)
    one = among if field is None else [s for s in among if field in (s.field, s.item)]
    names = {source.own_field: source.field for source in one}
    narrowed = len(names) == 1 and (field is not None or not series.has_fields)
    alone = next(iter(names)) if narrowed else ""
    drawn = series.among(one)
    held = np.ones(len(drawn), np.bool_)
    for name in names.values():
        held &= _held(drawn, name)
    rows = np.flatnonzero(held)
    if steps is not None:
        rows = rows[np.isin(drawn.steps[rows], steps)]
    last = _read(drawn, names, rows[-1:])
    last = last.with_field(alone) if alone else last
    rule = rule_for(last)
    if steps is None and not rule.evolves:
        return last
    shown = rows[evenly(len(rows), rule.rows or len(rows))]
    data = attrs.evolve(_read(drawn, names, shown), kept=len(rows))
    return data.with_field(alone) if alone else data


def _chosen(series: Rows, field: str | None, steps: Sequence[int] | None) -> list[Source]:
    """Return the arrays that one selection filled of one tensor, of those the last to do so."""
    if field is not None and field not in {source.item for source in series.sources}:
        series.field(field)  # raises, with the nearest
    groups: dict[tuple[str, str], list[Source]] = {}
    for source in series.sources:
        groups.setdefault((source.item, source.selection_text), []).append(source)
    fitting = [
        group
        for group in groups.values()
        if field is None or any(field in (source.field, source.item) for source in group)
    ]
    candidates = [group for group in fitting if group[0].item == fitting[0][0].item]
    for group in reversed(candidates):
        kept = series.among(group).steps
        if len(kept) if steps is None else np.isin(kept, steps).any():
            return group
    return candidates[-1]


def _held(series: Rows, field: str) -> NDArray[np.bool_]:
    """Return at which records of `series` the field has one, shape (record,)."""
    index = series.index
    held = np.zeros(len(series), np.bool_)
    for number, part in enumerate(index.parts):
        mine = [n for n, source in enumerate(part.sources) if source.field == field]
        here = index.part == number
        present: NDArray[np.bool_] = np.any(part.present[mine], axis=0)
        held[here] = present[index.place[here]]
    return held


def _read(series: Rows, names: dict[str, str], rows: NDArray[np.int64]) -> PlotData:
    """Return the records number `rows` of the fields `names`: what the plot calls them, and we."""
    records: dict[str, Any] = {name: [] for name in names}
    if all(not source.info.shape for source in series.sources):
        # One read for all: one for each of ten thousand numbers takes seconds.
        records = {name: _numbers(series, rows, field) for name, field in names.items()}
    else:
        for at in rows.tolist():
            values = series.record(at)
            for name, field in names.items():
                one = values[field] if isinstance(values, dict) else values
                records[name].append(one.astype(np.float32) if one.dtype.kind == "V" else one)
    return PlotData(
        op=series.op or "log",
        kind=series.kind,
        records=records,
        steps=series.steps[rows],
        epochs=series.epochs[rows],
        phase=str(series.phases[rows[0]]) if len(rows) else "",
        axes=_axes(series),
        parameter=series.parameter,
        item=series.sources[0].item,
        selection=series.sources[0].selection_name,
        sizes=_sizes(series, rows),
        type=series.type,
    )


def _axes(series: Rows) -> str:
    """Return the axes of the records; those of a recurrent state are no sequence."""
    state = series.sources[0].item.startswith("1")
    if state and series.type.startswith(("lstm", "gru", "rnn")):
        return "SNC"  # layers stacked, samples, channels
    return series.axes


def _numbers(series: Rows, rows: NDArray[np.int64], field: str) -> NDArray[Any]:
    return Padded.of(series, field).read((rows,))


def _sizes(series: Rows, rows: NDArray[np.int64]) -> list[tuple[int, ...]]:
    """Return what each record was selected from; nothing for logged numbers, or if unknown."""
    if series.sources[0].is_log:
        return []
    index = series.index
    sizes: dict[tuple[int, int], list[tuple[int, ...] | None]] = {}
    found = []
    for at in rows.tolist():
        number, place = int(index.part[at]), index.place[at]
        part = index.parts[number]
        having = int(part.present[:, place].argmax())
        if (number, having) not in sizes:
            source = part.sources[having]
            sizes[number, having] = source.reader.sizes(source.info.name)
        found.append(sizes[number, having][int(part.rows[place])])
    known = [size for size in found if size is not None]
    return known if len(known) == len(found) else []
