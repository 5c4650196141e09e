"""The paper that plots are drawn on: figures, colours, captions."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import attrs
import numpy as np

from fxray.errors import MissingExtraError
from fxray.look.plotdata import Array, PlotData, evenly, numbers

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

__all__ = [
    "BLUE",
    "GREY",
    "INK",
    "MUTED",
    "ORANGE",
    "Scale",
    "caption",
    "clean",
    "colorbar",
    "new_figure",
    "show",
    "step_name",
    "step_ticks",
    "times",
    "whole_numbers",
    "write",
]

INK, MUTED, GREY = "#1f2328", "#59636e", "#d0d7de"
BLUE, ORANGE = "#0072B2", "#D55E00"

_DIVERGING, _SEQUENTIAL = "RdBu_r", "viridis"
_BAD = {_DIVERGING: ("#FFC400", "yellow"), _SEQUENTIAL: ("#FF2BD6", "pink")}
_OUTLIER = 5.0


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of that size in inches, laid out so that nothing overlaps.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from fxray.look.picture import Picture  # an extra, so not above
    except ImportError as error:
        msg = "plots need matplotlib, which is not installed: `pip install 'fxray[plot]'`."
        raise MissingExtraError(msg) from error
    figure = Picture(figsize=(width, height), layout="constrained", dpi=100)
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.set(w_pad=0.09, h_pad=0.09)  # type: ignore[call-arg]
    return figure


@attrs.frozen
class Scale:
    """How numbers become colours.

    Attributes:
        low: number at the lower end of the colours.
        high: number at the upper end.
        colors: name of matplotlib's colour map.
        beyond: which ends have numbers beyond them: `"neither"`, `"min"`, `"max"`, `"both"`.
        nan: how many numbers are NaN.
        infinite: how many are infinite.
    """

    low: float
    high: float
    colors: str
    beyond: str = "neither"
    nan: int = 0
    infinite: int = 0

    @classmethod
    def of(cls, arrays: Iterable[Array], *, signed: bool) -> Scale:
        """Return the scale that `arrays` share; a few outliers do not wash it out.

        NaN and infinities have no say in the limits: they are drawn in a colour that
        the map does not have.
        """
        flat = np.concatenate([np.zeros(0), *(numbers(a).ravel() for a in arrays)])
        finite = flat[np.isfinite(flat)]
        nan = int(np.isnan(flat).sum())
        count = {"nan": nan, "infinite": flat.size - finite.size - nan}
        if not finite.size:
            return cls(-1.0 if signed else 0.0, 1.0, _map(signed=signed), **count)
        low, high = _limits(finite, signed=signed)
        beyond = {(False, False): "neither", (True, False): "min", (False, True): "max"}.get(
            (bool(finite.min() < low), bool(finite.max() > high)), "both"
        )
        return cls(low, high, _map(signed=signed), beyond, **count)

    @property
    def note(self) -> str:
        """What cannot be read off the colours: how many numbers are not finite."""
        counts = [f"{self.nan:,} NaN"] if self.nan else []
        counts += [f"{self.infinite:,} infinite"] if self.infinite else []
        return f"{', '.join(counts)} (in {_BAD[self.colors][1]})" if counts else ""


def _map(*, signed: bool) -> str:
    return _DIVERGING if signed else _SEQUENTIAL


def _limits(finite: Array, *, signed: bool) -> tuple[float, float]:
    if signed:
        size = np.abs(finite)
        high = _without_outliers(size) or 1.0
        return -high, high
    low, high = float(finite.min()), _without_outliers(finite)
    return (low, high) if high > low else (low, low + (abs(low) or 1.0))


def _without_outliers(values: Array) -> float:
    """Return the largest of `values`, or nearly, where that is far beyond all others."""
    high, usual = float(values.max()), float(np.quantile(values, 0.995))
    return usual if 0 < usual * _OUTLIER < high else high


def show(
    axes: Axes,
    values: Array,
    scale: Scale,
    *,
    extent: tuple[float, float, float, float] | None = None,
    aspect: str = "auto",
) -> AxesImage:
    """Draw the matrix `values` with its first row at the top; masked cells stay empty."""
    import matplotlib as mpl  # an extra, so not above

    colors = mpl.colormaps[scale.colors].with_extremes(bad=_BAD[scale.colors][0])
    if not values.size:
        values = np.ma.array([[np.nan]], mask=True)
    absent = np.ma.getmaskarray(values)
    plain = np.where(absent, np.nan, numbers(np.ma.getdata(values)))
    image = axes.imshow(
        np.ma.masked_invalid(plain),
        cmap=colors,
        vmin=scale.low,
        vmax=scale.high,
        extent=extent,
        aspect=aspect,  # type: ignore[arg-type]
        interpolation="nearest",
        origin="upper",
    )
    if absent.any():
        # NaN is drawn in a loud colour; what is not there must not look like it.
        image.set_alpha(np.where(absent, 0.0, 1.0))
    return image


def colorbar(figure: Figure, image: AxesImage, axes: Sequence[Axes], scale: Scale) -> None:
    """Draw one thin bar of colours for all `axes`."""
    bar = figure.colorbar(
        image, ax=list(axes), extend=scale.beyond, shrink=0.85, aspect=28, pad=0.015
    )
    bar.ax.tick_params(labelsize=8, colors=MUTED, length=2)
    bar.outline.set_visible(False)


def clean(axes: Axes, *, grid: bool = False) -> None:
    """Take away what carries no data."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GREY)
    axes.tick_params(labelsize=8, colors=MUTED, length=2)
    axes.xaxis.label.set(size=9, color=MUTED)
    axes.yaxis.label.set(size=9, color=MUTED)
    if grid:
        axes.grid(visible=True, color=GREY, linewidth=0.5, alpha=0.6)
        axes.set_axisbelow(True)


def write(axes: Axes, words: str) -> None:
    """Put a small title above the left edge of `axes`."""
    axes.set_title(words, loc="left", fontsize=9, color=MUTED, parse_math=False)


def whole_numbers(axes: Axes, *, columns: bool = True) -> None:
    """Name rows and, unless they have names, columns of a heat map by whole numbers only."""
    axes.locator_params(axis="y", integer=True)
    if columns:
        axes.locator_params(axis="x", integer=True)


def step_name(data: PlotData, row: int) -> str:
    """Return e.g. `"step 120 · epoch 2"`."""
    epoch = f" · epoch {data.epochs[row]}" if data.epochs else ""
    return f"step {data.steps[row]}{epoch}"


def step_ticks(axes: Axes, data: PlotData, *, label: bool = True) -> None:
    """Name the columns of a heat map over rows by their steps."""
    shown = evenly(len(data.steps), 8)
    axes.set_xticks(shown, [str(data.steps[n]) for n in shown])
    axes.set_xlabel("step" if label else "")


def times(shape: Sequence[int]) -> str:
    """Return e.g. `"8×28×28"`."""
    return "×".join(map(str, shape)) or "scalar"


def caption(figure: Figure, data: PlotData, *notes: str) -> None:
    """Write what is shown above a figure, and of what and how much of it below."""
    figure.suptitle(
        data.title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK, parse_math=False
    )
    first, last = data.steps[0], data.steps[-1]
    span = step_name(data, 0) if len(data.steps) == 1 else f"steps {first} to {last}"
    if len(data.steps) > 1 and data.epochs and data.epochs[0] != data.epochs[-1]:
        span += f" · epochs {data.epochs[0]} to {data.epochs[-1]}"
    drawn = len(data.steps)
    thinned = f"{drawn} of {data.kept:,} records" if data.kept > drawn else ""
    words = [data.phase, span, thinned, _shape(data), data.selection, *notes]
    figure.supxlabel(
        _wrapped([word for word in words if word], int(figure.get_figwidth() * 15)),
        x=0.01,
        ha="left",
        fontsize=8,
        color=MUTED,
        parse_math=False,
    )


def _shape(data: PlotData) -> str:
    shapes = {a.shape for rows in data.records.values() for a in rows}
    alone = len(shapes) == 1 and len(data.records) == 1 and shapes != {()}
    kept = times(shapes.pop()) if alone else ""
    usual = Counter(data.sizes).most_common(1)
    whole = times(usual[0][0]) if usual else ""
    mostly = "mostly " if len(set(data.sizes)) > 1 else ""
    sizes = [size for size in (kept, mostly + whole if whole != kept else "") if size]
    return f"shape {' of '.join(sizes)}" if sizes else ""


def _wrapped(words: Sequence[str], width: int) -> str:
    lines = [""]
    for word in words:
        joined = f"{lines[-1]} · {word}" if lines[-1] else word
        if lines[-1] and len(joined) > width:
            lines.append(word)
        else:
            lines[-1] = joined
    return "\n".join(lines)
