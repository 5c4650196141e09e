"""Arrays drawn as images: grids of filters and feature maps, and heat maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import attrs
import numpy as np

from fxray.look.canvas import (
    BLUE,
    MUTED,
    Scale,
    caption,
    clean,
    colorbar,
    new_figure,
    show,
    step_name,
    step_ticks,
    whole_numbers,
    write,
)
from fxray.look.plotdata import Array, PlotData, numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "attention",
    "feature_maps",
    "filters",
    "flattened",
    "matrices",
    "sequences",
    "vectors",
]

_ACROSS, _DOWN = 16, 12
_PANELS = 4
_ELEMENTS = 4096
_NAMES = {"C": "channel", "T": "token", "L": "place", "O": "output", "I": "input"}


@attrs.frozen(eq=False)
class _Grid:
    """Tiles in rows and columns, with names for both; `None` leaves a place empty.

    Attributes:
        tiles: images, row by row.
        rows: name of each row.
        columns: name of each column, or none.
        down: what the rows are.
        across: what the columns are.
        note: what of the whole is not among the tiles.
    """

    tiles: Sequence[Sequence[Array | None]]
    rows: Sequence[str]
    columns: Sequence[str]
    down: str
    across: str
    note: str = ""


def filters(data: PlotData) -> Figure:
    """Draw a convolution's weights (out, in, height, width), one tile per pair of channels.

    One input channel fills rows with filters; several steps give one row each.
    """
    if "L" in data.letters:  # one dimension in space: a filter is an image of (in, length)
        arrays = tuple(a[:, None] for a in data.arranged("OIL"))
    else:
        arrays = _slices(data, "OI")
    outs, ins = arrays[-1].shape[:2]
    if len(arrays) > 1:
        pairs = [(o, i) for o in range(outs) for i in range(ins)]
        names = [f"{o}" if ins == 1 else f"{o}, {i}" for o, i in pairs]
        across = "filter" if ins == 1 else "filter (output, input)"
        return _draw_grid(data, _over_rows(data, arrays, pairs, names, across))
    if ins == 1:
        grid = _filled([arrays[0][o, 0] for o in range(outs)], "filter")
    else:
        named = _kept(data, "O", "output channel"), _kept(data, "I", "input channel")
        if outs <= ins:
            grid = _table(arrays[0], *named)
        else:
            grid = _table(arrays[0].swapaxes(0, 1), *named[::-1])
    return _draw_grid(data, grid)


def feature_maps(data: PlotData) -> Figure:
    """Draw maps (sample, channel, height, width): rows of samples, columns of channels.

    A single sample fills rows with channels, a single channel with samples; several steps
    give one row each.
    """
    return _draw_grid(data, _maps(data, _slices(data, "NC"), _kept(data, "C", "channel")))


def attention(data: PlotData) -> Figure:
    """Draw weights of attention (sample, head, query, key): samples by heads.

    Without a dim of heads samples fill rows; several steps give one row each.
    """
    arrays = tuple(a if a.ndim == 4 else a[:, None] for a in data.only)
    return _draw_grid(data, _maps(data, arrays, "head"), "in each map queries down, keys across")


def _maps(data: PlotData, arrays: Sequence[Array], across: str) -> _Grid:
    samples, channels = arrays[-1].shape[:2]
    if len(arrays) > 1 and channels == 1:
        pairs = [(n, 0) for n in range(samples)]
        return _over_rows(data, arrays, pairs, [f"{n}" for n in range(samples)], "sample")
    if len(arrays) > 1:
        pairs = [(0, c) for c in range(channels)]
        grid = _over_rows(data, arrays, pairs, [f"{c}" for c in range(channels)], across)
        note = ", ".join(filter(None, ("first sample", grid.note)))
        return attrs.evolve(grid, note=note if samples > 1 else grid.note)
    if samples == 1:
        return _filled([arrays[0][0, c] for c in range(channels)], across)
    if channels == 1:
        return _filled([arrays[0][n, 0] for n in range(samples)], "sample")
    return _table(arrays[0], "sample", across)


def _kept(data: PlotData, letter: str, name: str) -> str:
    """Return what a dim's numbers count: where some were left out, not the tensor's own."""
    dim = data.letters.find(letter)
    whole = data.sizes[-1] if data.sizes else ()
    strided = len(whole) == data.ndim and whole[dim] != data.only[-1].shape[dim]
    return f"kept {name}" if strided else name


def _slices(data: PlotData, channels: str) -> tuple[Array, ...]:
    """Return images (…, …, height, width): of a volume the slice in the middle."""
    if "D" not in data.letters:
        return data.arranged(f"{channels}HW")
    return tuple(a[:, :, a.shape[2] // 2] for a in data.arranged(f"{channels}DHW"))


def _over_rows(
    data: PlotData,
    arrays: Sequence[Array],
    pairs: Sequence[tuple[int, int]],
    names: Sequence[str],
    across: str,
) -> _Grid:
    """Return one row of tiles, those at `pairs`, per record; a smaller one may lack some."""
    tiles = [
        [a[m, n] if m < a.shape[0] and n < a.shape[1] else None for m, n in pairs[:_ACROSS]]
        for a in arrays
    ]
    steps = [str(step) for step in data.steps]
    note = _of(len(pairs[:_ACROSS]), len(pairs), across.partition(" (")[0])
    return _Grid(tiles, steps, names[:_ACROSS], "step", across, note)


def _table(array: Array, down: str, across: str) -> _Grid:
    rows, columns = min(array.shape[0], _DOWN), min(array.shape[1], _ACROSS)
    tiles = [[array[m, n] for n in range(columns)] for m in range(rows)]
    names = [str(n) for n in range(max(rows, columns))]
    left_out = _of(rows, array.shape[0], down), _of(columns, array.shape[1], across)
    note = ", ".join(filter(None, left_out))
    return _Grid(tiles, names[:rows], names[:columns], down, across, note)


def _filled(tiles: Sequence[Array], name: str) -> _Grid:
    """Return `tiles` one after the other in rows, about twice as wide as high."""
    kept: list[Array | None] = list(tiles[: _ACROSS * _DOWN])
    width = min(_ACROSS, max(1, math.ceil(math.sqrt(2 * len(kept)))))
    rows = [kept[n : n + width] for n in range(0, len(kept), width)]
    ends = [(n * width, n * width + len(row) - 1) for n, row in enumerate(rows)]
    names = ["–".join(dict.fromkeys(map(str, pair))) for pair in ends]
    return _Grid(rows, names, [], name, "", _of(len(kept), len(tiles), name))


def _of(shown: int, whole: int, name: str) -> str:
    """Return e.g. `"12 of 16 samples"`, nothing where all are shown."""
    return f"{shown} of {whole} {name}s" if shown < whole else ""


def _draw_grid(data: PlotData, grid: _Grid, note: str = "") -> Figure:
    """Draw all tiles in one pair of axes: a hundred axes would take seconds."""
    present = [tile for row in grid.tiles for tile in row if tile is not None and tile.size]
    if not present:
        return flattened(data)
    scale = Scale.of(present, signed=data.signed)
    height, width = (max(sizes) for sizes in zip(*(tile.shape for tile in present), strict=True))
    gap = max(0.3, 0.08 * max(height, width))
    across = max(len(row) for row in grid.tiles)
    wide, high = across * (width + gap), len(grid.tiles) * (height + gap)
    inches = _inches(across * width / max(width, height), high / wide, named=bool(grid.columns))
    figure = new_figure(*inches)
    axes = figure.add_subplot()
    images = [
        show(axes, tile, scale, extent=(x, x + tile.shape[1], y + tile.shape[0], y), aspect="equal")
        for y, row in ((m * (height + gap), row) for m, row in enumerate(grid.tiles))
        for x, tile in ((n * (width + gap), tile) for n, tile in enumerate(row))
        if tile is not None and tile.size
    ]
    axes.set(xlim=(-gap / 2, wide - gap / 2), ylim=(high - gap / 2, -gap / 2))
    _name_tiles(axes, grid, (width + gap, height + gap), (width / 2, height / 2))
    colorbar(figure, images[0], [axes], scale)
    caption(figure, data, note, "middle slice" if "D" in data.letters else "", grid.note,
            scale.note)  # fmt: skip
    return figure


def _inches(tiles: float, ratio: float, *, named: bool) -> tuple[float, float]:
    """Return the size of a figure for so many tiles abreast, `ratio` as high as wide."""
    width = min(8.8, max(3.3, 0.75 * tiles))
    if width * ratio > 9:
        width = max(3.3, 9 / ratio)
    return width + 1.2, min(9.0, max(0.5, width * ratio)) + (1.3 if named else 0.9)


def _name_tiles(
    axes: Axes, grid: _Grid, pitch: tuple[float, float], middle: tuple[float, float]
) -> None:
    axes.set_xticks([n * pitch[0] + middle[0] for n in range(len(grid.columns))], grid.columns)
    axes.set_yticks([n * pitch[1] + middle[1] for n in range(len(grid.rows))], grid.rows)
    axes.set_xlabel(grid.across)
    axes.set_ylabel(grid.down)
    axes.xaxis.set_label_position("top")
    clean(axes)
    axes.tick_params(length=0, labelsize=8, labeltop=True, labelbottom=False)
    if any(len(name) > 3 for name in grid.columns):
        axes.tick_params(axis="x", rotation=45)
    for spine in axes.spines.values():
        spine.set_visible(False)


def sequences(data: PlotData) -> Figure:
    """Draw the first sample of (sample, token, channel) at up to four steps."""
    across = next(letter for letter in "TL" if letter in data.letters)
    first = [a[0].T if a.shape[0] else a.reshape(0, 0) for a in data.arranged(f"N{across}C")]
    return _panels(data, first, _NAMES[across], "channel", "first sample")


def matrices(data: PlotData) -> Figure:
    """Draw matrices (out, in) at up to four steps."""
    names = {"O": "entry", "I": "channel"} if data.type.startswith("embedding") else _NAMES
    down, across = (_kept(data, letter, names.get(letter, "")) for letter in data.letters)
    return _panels(data, data.only, across, down)


def _panels(
    data: PlotData, images: Sequence[Array], across: str, down: str, note: str = ""
) -> Figure:
    """Draw one heat map per row side by side, all on one scale."""
    scale = Scale.of(images, signed=data.signed)
    ratio = images[-1].shape[0] / max(1, images[-1].shape[1])
    width = 6.4 if len(images) == 1 else min(11.0, 3.2 * len(images))
    height = min(6.5, max(1.6, (width - 1.2) / len(images) * ratio)) + 1.2
    figure = new_figure(width, height)
    grid = figure.subplots(1, len(images), squeeze=False, sharey=True)[0]
    for n, axes in enumerate(grid):
        last = show(axes, images[n], scale)
        whole_numbers(axes)
        clean(axes)
        axes.set_xlabel(across)
        write(axes, step_name(data, n))
    grid[0].set_ylabel(down)
    colorbar(figure, last, list(grid), scale)
    caption(figure, data, note, scale.note)
    return figure


def vectors(data: PlotData) -> Figure:
    """Draw vectors (channel) or (sample, channel): a heat map over steps per sample.

    At a single step a batch of vectors is one matrix, and a vector a row of bars.
    """
    letters = data.letters
    batched = data.ndim == 2
    arrays = data.arranged("NC") if batched and set(letters) == {"N", "C"} else data.only
    name = "channel" if "C" in letters else _NAMES.get(letters[-1:], "element")
    if len(arrays) == 1:
        return _panels(data, arrays, name, "sample") if batched else _bars(data, arrays[0], name)
    samples = max(a.shape[0] for a in arrays) if batched else 1
    shown = min(samples, _PANELS)
    columns = [
        [a[n] if n < a.shape[0] else a[:0].ravel() for a in arrays] if batched else list(arrays)
        for n in range(shown)
    ]
    names = [f"sample {n}" for n in range(shown)] if samples > 1 else [""]
    note = f"first {shown} of {samples} samples" if shown < samples else ""
    return _over_steps(data, columns, names, name, note)


def flattened(data: PlotData) -> Figure:
    """Draw anything: the elements of each record in a column, steps from left to right."""
    named = [(field, [a.ravel() for a in rows]) for field, rows in data.records.items()]
    most = max(a.size for _, rows in named for a in rows)
    note = f"first {_ELEMENTS:,} of {most:,} elements" if most > _ELEMENTS else ""
    columns = [[a[:_ELEMENTS] for a in rows] for _, rows in named]
    return _over_steps(data, columns, [field for field, _ in named], "element", note)


def _bars(data: PlotData, values: Array, name: str) -> Figure:
    plain = numbers(values)
    scale = Scale.of([plain], signed=data.signed)
    figure = new_figure(6.4, 3.0)
    axes = figure.add_subplot()
    axes.bar(range(plain.size), np.where(np.isfinite(plain), plain, 0.0), width=0.9, color=BLUE)
    for place in np.flatnonzero(~np.isfinite(plain)):
        axes.axvspan(place - 0.5, place + 0.5, color="#FF2BD6", alpha=0.6, linewidth=0)
    axes.axhline(0, color=MUTED, linewidth=0.6)
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel(name)
    clean(axes, grid=True)
    write(axes, step_name(data, 0))
    caption(figure, data, scale.note.replace("yellow", "pink"))
    return figure


def _over_steps(
    data: PlotData, columns: Sequence[Sequence[Array]], names: Sequence[str], down: str, note: str
) -> Figure:
    """Draw one heat map over rows per name, the columns of each padded to one length."""
    figure = new_figure(7.2, min(9.0, 1.2 + max(2.2, 3.2 / len(columns) + 0.9) * len(columns)))
    grid = figure.subplots(len(columns), 1, squeeze=False, sharex=True)[:, 0]
    shared = Scale.of([a for rows in columns for a in rows], signed=data.signed)
    alone = len(data.records) > 1
    for axes, rows, name in zip(grid, columns, names, strict=True):
        scale = Scale.of(rows, signed=data.signed) if alone else shared
        image = show(axes, _side_by_side(rows), scale)
        whole_numbers(axes, columns=False)
        axes.set_ylabel(down)
        clean(axes)
        step_ticks(axes, data, label=axes is grid[-1])
        if name:
            write(axes, name)
        if alone:
            colorbar(figure, image, [axes], scale)
    if not alone:
        colorbar(figure, image, list(grid), shared)
    caption(figure, data, note, shared.note)
    return figure


def _side_by_side(rows: Sequence[Array]) -> Array:
    """Return `rows` as the columns of a masked matrix, masked where a row is shorter."""
    length = max([1, *(a.size for a in rows)])
    matrix = np.full((length, len(rows)), np.nan)
    absent = np.ones(matrix.shape, dtype=bool)
    for n, a in enumerate(rows):
        matrix[: a.size, n] = numbers(a).ravel()
        absent[: a.size, n] = False
    return np.ma.array(matrix, mask=absent)
