"""A series as the picture that suits it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fxray.look.plot import plot
from fxray.look.plotdata import PlotData

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

    from fxray.run.series import Series

__all__ = ["draw"]

RECORDS_DRAWN = 256
"""Arrays that one picture over steps reads; evenly chosen where there are more."""


def draw(  # noqa: PLR0913  # the choices of one picture
    series: Series,
    *,
    step: int | None = None,
    steps: Sequence[int] | None = None,
    field: str | None = None,
    phase: str | None = None,
    loss: Any = None,
) -> Figure:
    """Return the picture of `series`, see `Series.plot`."""
    meant = series.in_phase(phase)
    if isinstance(loss, type(series)):
        logged = loss.in_phase(phase)
        loss = logged.steps.tolist(), logged.to_numpy().tolist()
    data = plot_data(meant, field, [step] if step is not None else steps)
    drawn = None if field is None or data.fields == {""} else field
    return plot(data, step=step, steps=steps, field=drawn, loss=loss)


def plot_data(
    series: Series, field: str | None = None, steps: Sequence[int] | None = None
) -> PlotData:
    """Return the records of `series` as a plot takes them.

    Where an op returns several tensors, those of the first, or of the one that `field` names.
    """
    item, names = _fields(series, field)
    chosen = _chosen(series, steps)
    rows = [(at, series.record(at)) for at in chosen]
    records: dict[str, list[Any]] = {name: [] for name in names}
    kept = []
    for at, record in rows:
        # A series narrowed to one field has bare records.
        values = record if isinstance(record, dict) else dict.fromkeys(names.values(), record)
        if all(whole in values for whole in names.values()):
            kept.append(at)
            for name, whole in names.items():
                records[name].append(_widened(values[whole]))
    return PlotData(
        op=series.op or "log",
        kind=series.kind,
        records=records,
        steps=series.steps[kept],
        epochs=series.epochs[kept],
        phase=str(series.phases[0]),
        axes=series.axes,
        parameter=series.parameter,
        item=item,
        selection=str(series.selection.get("name", "")).rpartition(".")[2],
    )


def _fields(series: Series, field: str | None) -> tuple[str, dict[str, str]]:
    """Return the item drawn, and its fields: as the selection calls them, as the series does."""
    if field is not None:
        series.field(field)
    by_item: dict[str, dict[str, str]] = {}
    for source in series.sources:
        given = source.info.attributes
        fields = by_item.setdefault(str(given.get("item", "")), {})
        fields[str(given.get("field", ""))] = source.field
    for item, fields in by_item.items():
        if field is None or field in fields.values():
            return item, fields
    return next(iter(by_item.items()))


def _chosen(series: Series, steps: Sequence[int] | None) -> list[int]:
    """Return the numbers of the records to draw."""
    every = np.arange(len(series))
    if steps is not None and np.isin(series.steps, steps).any():
        every = every[np.isin(series.steps, steps)]
    single = all(not source.info.shape for source in series.sources)
    if len(every) > RECORDS_DRAWN and not single:
        every = every[np.linspace(0, len(every) - 1, RECORDS_DRAWN).round().astype(int)]
    chosen: list[int] = every.tolist()
    return chosen


def _widened(values: Any) -> Any:
    return values.astype(np.float32) if values.dtype.kind == "V" else values
