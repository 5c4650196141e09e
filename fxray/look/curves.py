"""Numbers drawn as curves over steps: scalars, statistics, histograms, ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fxray.look.canvas import (
    BLUE,
    GREY,
    INK,
    MUTED,
    ORANGE,
    caption,
    clean,
    new_figure,
    step_name,
    write,
)
from fxray.look.plotdata import Array, PlotData, numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Loss", "histograms", "ranks", "statistics"]

Loss = tuple[Sequence[int], Sequence[float]]
"""Steps, and the loss at each."""

_LINES = 10
_AROUND, _FAULTS = ("mean", "std", "min", "max"), ("nan", "inf")
_PINK, _GREEN = "#E6007E", "#009E73"
# Okabe and Ito's colours, then lighter ones of the same hues.
_COLORS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00",
    "#56B4E9", "#8C564B", "#6F6F6F", "#B2A100", "#332288",
)  # fmt: skip


def statistics(data: PlotData, loss: Loss | None = None, loss_name: str = "loss") -> Figure:
    """Draw one number per step and field; the mean with a band of one deviation."""
    values = {
        field: np.array([numbers(a).ravel()[0] for a in rows])
        for field, rows in data.records.items()
    }
    panels = _panels(values)
    count = len(panels) + (loss is not None)
    figure = new_figure(7.2, min(12.0, 1.1 + (2.9 if count == 1 else 1.75 * count)))
    grid = figure.subplots(count, 1, squeeze=False, sharex=True)[:, 0]
    for axes, fields in zip(grid, panels, strict=False):
        if "mean" in fields:
            _band(axes, data.steps, {field: values[field] for field in fields})
        else:
            _lines(axes, data.steps, {field: values[field] for field in fields})
            if fields == [""]:  # the selection says what the only number is: Norm, Mean
                write(axes, data.selection)
        clean(axes, grid=True)
    if loss is not None:
        grid[-1].plot(*loss, color=INK, linewidth=1.0)
        clean(grid[-1], grid=True)
        write(grid[-1], loss_name)
    grid[-1].set_xlabel("step")
    _whole_steps(grid[-1], data.steps)
    caption(figure, data, _counted(values))
    return figure


def _panels(values: dict[str, Array]) -> list[list[str]]:
    """Return the fields that share a panel; what is always 0 or the same is not drawn."""
    around = [name for name in values if name in _AROUND] if "mean" in values else []
    faults = [name for name in values if name in _FAULTS and len(values) > 2]
    counts = [name for name in values if name == "count" and len(values) > 1]
    rest = [name for name in values if name not in {*around, *faults, *counts}]
    if "fraction_zero" in rest and len(rest) > 1 and not values["fraction_zero"].any():
        rest.remove("fraction_zero")
    loud = [name for name in faults if values[name].any()]
    return [group for group in (around, *([name] for name in rest), loud) if group]


def _counted(values: dict[str, Array]) -> str:
    count = values.get("count")
    same = count is not None and len(values) > 1 and (count == count[0]).all()
    return f"{int(count[0]):,} elements each" if same and count is not None else ""


def _band(axes: Axes, steps: Sequence[int], values: dict[str, Array]) -> None:
    mean, std = values["mean"], values.get("std")
    single = len(set(steps)) == 1
    if std is not None and single:  # a band has no width at one step
        axes.errorbar(steps, mean, std, color=BLUE, alpha=0.4, linewidth=6, label="± std")
    elif std is not None:
        axes.fill_between(
            steps, mean - std, mean + std, color=BLUE, alpha=0.22, linewidth=0, label="± std"
        )
    axes.plot(steps, mean, color=BLUE, linewidth=1.6, label="mean", **_marks(steps))
    # Plain lines: dashes of what changes at every step are a haze.
    for name, color in (("max", ORANGE), ("min", _GREEN)):
        if name in values:
            edge = _finite(values[name])
            marks = _marks(steps) if single else {}
            axes.plot(steps, edge, color=color, linewidth=0.8, label=name, zorder=1.5, **marks)
    _mark_faults(axes, steps, mean)
    # Beside the axes: inside it would cover numbers whichever corner it takes.
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    write(axes, "mean" if std is None else "mean, one standard deviation to either side")


def _lines(axes: Axes, steps: Sequence[int], values: dict[str, Array]) -> None:
    for color, (name, series) in zip((BLUE, ORANGE), values.items(), strict=False):
        axes.plot(steps, _finite(series), color=color, linewidth=1.4, label=name, **_marks(steps))
        _mark_faults(axes, steps, series)
    if len(values) > 1:
        axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    write(axes, " and ".join(name.replace("_", " ") for name in values if name))


def _marks(steps: Sequence[int]) -> dict[str, Any]:
    return {"marker": "o", "markersize": 3} if len(steps) <= 40 else {}


def _finite(values: Array) -> Array:
    return np.where(np.isfinite(values), values, np.nan)


def _mark_faults(axes: Axes, steps: Sequence[int], values: Array) -> None:
    """Put a pink cross at the foot of every step whose number is not finite."""
    bad = np.asarray(steps)[~np.isfinite(values)]
    if bad.size:
        axes.plot(
            bad, np.full(bad.size, 0.03), "x", color=_PINK, markersize=6, markeredgewidth=1.6,
            transform=axes.get_xaxis_transform(), clip_on=False, label="not finite",
        )  # fmt: skip


def _whole_steps(axes: Axes, steps: Sequence[int]) -> None:
    """Name steps by whole numbers only."""
    if len(set(steps)) <= 6:
        axes.set_xticks(sorted(set(steps)))
    else:
        axes.locator_params(axis="x", integer=True)
    if len(set(steps)) == 1:
        axes.set_xlim(steps[0] - 1, steps[0] + 1)


def histograms(data: PlotData) -> Figure:
    """Draw counts between edges: bars for one step, a ridge over several."""
    counts = [numbers(a).ravel() for a in data.records["counts"]]
    edges = [numbers(a).ravel() for a in data.records["edges"]]
    single = len(counts) == 1
    figure = new_figure(7.2, 3.4 if single else 1.6 + 0.32 * max(6, len(counts)))
    axes = figure.add_subplot()
    if single:
        axes.stairs(counts[0], edges[0], fill=True, color=BLUE)
        axes.set_ylabel("elements")
        clean(axes, grid=True)
        write(axes, step_name(data, 0))
    else:
        _ridge(axes, list(zip(counts, edges, strict=True)))
        axes.set_yticks(range(len(counts)), [str(step) for step in data.steps])
        axes.set_ylabel("step")
        clean(axes)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    axes.set_xlabel("value")
    caption(figure, data, "" if single else "each step to its own height")
    return figure


def _ridge(axes: Axes, rows: Sequence[tuple[Array, Array]]) -> None:
    import matplotlib as mpl  # an extra, so not above

    colors = mpl.colormaps["viridis"](np.linspace(0.1, 0.85, len(rows)))
    densities = []
    for counts, edges in rows:
        # Where all elements are equal the bins have no width, and so no density.
        width = np.diff(edges)
        safe = np.where(width > 0, width, 1.0)
        densities.append(np.where(np.isfinite(width), counts / safe, 0.0))
    whole = max(edges[-1] for _, edges in rows) - min(edges[0] for _, edges in rows)
    # Each to its own height: a step whose values are all alike would flatten the others.
    for n, (density, (_, edges)) in enumerate(zip(densities, rows, strict=True)):
        top = n + 1.6 * density / (density.max() or 1.0)
        axes.fill_between(
            edges, n, np.append(top, top[-1]), step="post", color=colors[n], linewidth=0,
            zorder=2 * (len(rows) - n),
        )  # fmt: skip
        # White between ridges; but over one as narrow as a line it would be all there is.
        narrow = edges[-1] - edges[0] < 0.05 * whole
        color = colors[n] if narrow else "white"
        axes.stairs(
            top, edges, baseline=None, color=color, linewidth=0.8, zorder=2 * (len(rows) - n) + 1
        )
    axes.set_ylim(-0.2, len(rows) + 0.9)


def ranks(data: PlotData) -> Figure:
    """Draw which places in the tensor were the largest: their ranks over steps.

    At one step the values themselves are drawn, largest first.
    """
    places = [a.ravel().astype(np.int64) for a in data.records["indices"]]
    values = [numbers(a).ravel() for a in data.records["values"]]
    if len(places) == 1:
        return _ranked_bars(data, places[0], values[0])
    most = max(1, *(a.size for a in places))
    figure = new_figure(7.6, min(9.0, 2.0 + 0.28 * max(6, most)) + 1.5)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    others = _rank_lines(upper, data.steps, places)
    upper.set_ylim(most + 0.5, 0.5)
    upper.set_yticks(sorted({round(n) for n in np.linspace(1, most, min(most, 8))}))
    upper.set_ylabel("rank")
    first = np.array([row[0] if row.size else np.nan for row in values])
    last = np.array([row[-1] if row.size else np.nan for row in values])
    _lines(lower, data.steps, {"rank 1": first, f"rank {most}": last} if most > 1 else
           {"rank 1": first})  # fmt: skip
    write(lower, "value")
    lower.set_xlabel("step")
    _whole_steps(lower, data.steps)
    clean(upper, grid=True)
    clean(lower, grid=True)
    caption(figure, data, f"{others} more indices in grey" if others else "")
    return figure


def _rank_lines(axes: Axes, steps: Sequence[int], places: Sequence[Array]) -> int:
    """Draw a line per place, in colour for the ten most frequent; return how many are grey."""
    seen = Counter(int(place) for row in places for place in row)
    named = [place for place, _ in seen.most_common(_LINES)]
    grey = [place for place in seen if place not in named]
    for place in grey:
        ranked = [_rank(row, place) for row in places]
        axes.plot(steps, ranked, "o-", color=GREY, linewidth=0.8, markersize=1.6)
    for place, color in zip(named, _COLORS, strict=False):
        ranked = [_rank(row, place) for row in places]
        axes.plot(steps, ranked, "o-", color=color, linewidth=1.8, markersize=3.6, label=str(place))
    if named:
        axes.legend(
            title="index", fontsize=8, title_fontsize=8, frameon=False,
            loc="center left", bbox_to_anchor=(1.0, 0.5),
        )  # fmt: skip
    return len(grey)


def _rank(row: Array, place: int) -> float:
    found = np.flatnonzero(row == place)
    return float(found[0] + 1) if found.size else np.nan


def _ranked_bars(data: PlotData, places: Array, values: Array) -> Figure:
    shown = min(places.size, 40)
    figure = new_figure(7.2, 3.2)
    axes = figure.add_subplot()
    axes.bar(range(shown), _finite(values[:shown]), color=BLUE, width=0.8)
    axes.set_xticks(range(shown), [str(place) for place in places[:shown]])
    if shown > 12:
        axes.tick_params(axis="x", rotation=90)
    axes.axhline(0, color=MUTED, linewidth=0.6)
    axes.set_xlabel("index")
    axes.set_ylabel("value")
    clean(axes, grid=True)
    write(axes, step_name(data, 0))
    caption(figure, data, f"first {shown} of {places.size}" if shown < places.size else "")
    return figure
