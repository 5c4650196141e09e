"""A series as one array, labelled array or table."""

from __future__ import annotations

import importlib
import math
from typing import TYPE_CHECKING, Any, Protocol

import attrs
import numpy as np

from fxray.errors import MissingExtraError, NotSavedError
from fxray.run.sources import Index, Source
from fxray.store import ArrayView
from fxray.store.layout import dtype_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pandas as pd
    import xarray as xr
    from numpy.typing import NDArray

    from fxray.run.rows import Rows
    from fxray.run.sources import Name, Window
    from fxray.store import StoredRun, StreamReader

__all__ = ["extra", "stack", "to_pandas", "to_xarray", "tree"]

_ABOUT = ("op", "type", "kind", "parameter", "item", "field", "axes")

# None: every record has the shape of the array.
Shapes = list[tuple[int, ...] | None] | None


def extra(module: str) -> Any:
    """Import a library of the `xarray` extra.

    Raises:
        MissingExtraError: it is not installed; says how to get it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        msg = f"{library} is not installed: pip install 'fxray[xarray]'"
        raise MissingExtraError(msg) from error


def stack(series: Rows) -> NDArray[Any]:
    """Return all records of a single-field series as one array, see `Series.to_numpy`."""
    if series.has_fields:
        msg = (
            f"{series.title} has fields {', '.join(series.fields)}; say which: "
            f".field({series.fields[0]!r}).to_numpy()"
        )
        raise NotSavedError(msg)
    shapes = set(series.shapes(series.fields[0]))
    if len(shapes) > 1:
        shown = ", ".join(map(str, list(shapes)[:3]))
        msg = (
            f"the records of {series.title} differ in shape ({shown}); iterate over the series, "
            "or let .to_xarray() pad them"
        )
        raise NotSavedError(msg)
    shape = shapes.pop() if shapes else series.sources[-1].info.shape
    dtypes = {dtype_of(source.info.dtype).numpy for source in series.sources}
    records = Padded.of(series, series.fields[0], dtypes.pop() if len(dtypes) == 1 else None)
    return records.read((slice(None), *map(slice, shape or ())))


class Block(Protocol):
    """Numbers that are read where they are indexed."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """dtype of what is read."""
        ...

    def read(self, key: Sequence[Any]) -> NDArray[Any]:
        """Return the block that `key` selects, along each dim on its own (outer indexing)."""
        ...


@attrs.frozen(eq=False)
class Padded:
    """The records of one field of a series as one array, padded to the widest.

    Attributes:
        shape: `(record, *widest record)`.
        dtype: dtype of what is read.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    _index: Index
    _field: str
    _shapes: Shapes

    @classmethod
    def of(cls, series: Rows, field: str, dtype: np.dtype[Any] | None = None) -> Padded:
        """Return the records of `field`, as `dtype` or else widened, see `_widened`."""
        sources = [source for source in series.sources if source.field == field]
        if len({len(source.info.shape) for source in sources}) > 1:
            msg = (
                f"the selection of {series.title} was changed while it ran, and its records have "
                "different dims; narrow it first: series[a:b]"
            )
            raise NotSavedError(msg)
        recorded = zip(*(s.reader.array(s.info.name).shape[1:] for s in sources), strict=True)
        widest = tuple(max(sizes) for sizes in recorded)
        whole = len(sources) == 1 and sources[0].reader.whole(sources[0].info.name)
        shapes = None if whole else series.shapes(field)
        read = dtype or _widened(sources, whole=_all_of(shapes, widest))
        return cls((len(series), *widest), read, series.index, field, shapes)

    def read(self, key: Sequence[Any]) -> NDArray[Any]:
        """Return the block that `key` selects."""
        meant = [np.atleast_1d(np.arange(n)[k]) for n, k in zip(self.shape, key, strict=True)]
        records, index = meant[0], self._index
        block = np.full([len(where) for where in meant], _fill(self.dtype), self.dtype)
        for number, part in enumerate(index.parts):
            mine = np.flatnonzero(index.part[records] == number)
            places = index.place[records[mine]]
            for source, present in zip(part.sources, part.present, strict=True):
                here = present[places]
                if source.field == self._field and here.any():
                    view = source.reader.array(source.info.name)
                    _copy(view, part.rows[places[here]], meant[1:], block, mine[here])
        if self.dtype.kind == "f" and self._shapes is not None:
            _blank(block, [self._shapes[record] for record in records], meant[1:])
        return _dropped(block, self.shape, key)


@attrs.frozen(eq=False)
class Stored:
    """One array of a stream, all its rows, as xarray takes it."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    _view: ArrayView
    _shapes: Shapes

    @classmethod
    def of(cls, source: Source) -> Stored:
        """Return the array of `source`, widened, see `_widened`."""
        view = source.reader.array(source.info.name)
        name = source.info.name
        shapes = None if source.reader.whole(name) else source.reader.shapes(name)
        dtype = _widened([source], whole=_all_of(shapes, view.shape[1:]))
        return cls(view.shape, dtype, view, shapes)

    def read(self, key: Sequence[Any]) -> NDArray[Any]:
        """Return the block that `key` selects."""
        meant = [np.atleast_1d(np.arange(n)[k]) for n, k in zip(self.shape, key, strict=True)]
        block = self._view[tuple(map(_as_slice, meant))].astype(self.dtype)
        if self.dtype.kind == "f" and self._shapes is not None:
            _blank(block, [self._shapes[row] for row in meant[0]], meant[1:])
        return _dropped(block, self.shape, key)


def _copy(
    view: ArrayView,
    rows: NDArray[np.int64],
    meant: list[NDArray[np.int64]],
    block: NDArray[Any],
    into: NDArray[np.int64],
) -> None:
    """Copy what the array `view` has of a block; it may be narrower than the widest."""
    within = [where < size for where, size in zip(meant, view.shape[1:], strict=True)]
    wanted = [_as_slice(where[inside]) for where, inside in zip(meant, within, strict=True)]
    values = view[(_as_slice(rows), *wanted)]
    block[np.ix_(into, *map(np.flatnonzero, within))] = values.astype(block.dtype)


def _all_of(shapes: Shapes, shape: tuple[int, ...]) -> bool:
    return shapes is None or all(one == shape for one in shapes)


def _blank(
    block: NDArray[Any],
    shapes: list[tuple[int, ...] | None],
    meant: list[NDArray[np.int64]],
) -> None:
    """Set NaN where a record ends before the widest does, or is missing.

    Floats have it there already; integers that became floats would show zeros.
    """
    for at, shape in enumerate(shapes):
        if shape is None:
            block[at] = math.nan
            continue
        for dim, (where, size) in enumerate(zip(meant, shape, strict=True)):
            if (where >= size).any():
                np.moveaxis(block[at], dim, 0)[where >= size] = math.nan


def _as_slice(where: NDArray[np.int64]) -> Any:
    """Return numbers that follow one another as a slice: many times faster to read."""
    if len(where) and bool((np.diff(where) == 1).all()):
        return slice(int(where[0]), int(where[-1]) + 1)
    return where


def _dropped(block: NDArray[Any], shape: tuple[int, ...], key: Sequence[Any]) -> NDArray[Any]:
    """Return `block` without the dims that `key` gave a single number for."""
    single = [np.ndim(np.arange(n)[k]) == 0 for n, k in zip(shape, key, strict=True)]
    return np.asarray(block[tuple(0 if one else slice(None) for one in single)])


def _widened(sources: Sequence[Source], *, whole: bool) -> np.dtype[Any]:
    """Return the dtype in which xarray and pandas read the arrays `sources`.

    bfloat16 and float8 become float32, which is exact. Integers stay what they are while
    every record is `whole`; else they become float64, so that what is missing is NaN.
    """
    dtypes = []
    for source in sources:
        known = dtype_of(source.info.dtype)
        dtypes.append(np.dtype(np.float32) if known.numpy != known.raw else known.raw)
    common = np.result_type(*dtypes)
    return common if whole or common.kind in "fc" else np.dtype(np.float64)


def _fill(dtype: np.dtype[Any]) -> Any:
    if dtype.kind == "c":
        return complex(math.nan, math.nan)
    # ml_dtypes' own have kind "V" and take NaN as floats do.
    return math.nan if dtype.kind in "fV" else 0


def _lazily(block: Block) -> Any:
    """Return `block` as xarray holds what it has not read yet."""
    backends, indexing = extra("xarray.backends"), extra("xarray.core.indexing")

    class Lazy(backends.BackendArray):  # type: ignore[misc,name-defined]  # xarray is optional
        """What xarray asks for numbers."""

        shape, dtype = block.shape, block.dtype

        def __getitem__(self, key: Any) -> Any:
            support = indexing.IndexingSupport.OUTER
            return indexing.explicit_indexing_adapter(key, self.shape, support, block.read)

    return indexing.LazilyIndexedArray(Lazy())


def to_xarray(series: Rows) -> xr.DataArray | xr.Dataset:
    """Return the series labelled and lazy, see `Series.to_xarray`."""
    library = extra("xarray")
    variables = {}
    for field in series.fields:
        records = Padded.of(series, field)
        ndim = len(records.shape) - 1
        named = len(set(series.axes)) == ndim and not series.has_fields
        prefix = f"{field}." if series.has_fields else ""
        dims = list(series.axes) if named else [f"{prefix}dim_{i}" for i in range(ndim)]
        variables[field] = (("row", *dims), _lazily(records))
    about = {
        "op": series.op,
        "kind": series.kind,
        "parameter": series.parameter,
        "selection": str(series.selection.get("name", "")),
        "rank": series.selected_rank,
    }
    coords = {name: ("row", values) for name, values in _columns(series).items()}
    if series.has_fields:
        dataset: xr.Dataset = library.Dataset(variables, coords, about)
        return dataset
    variable = library.Variable(*variables[series.fields[0]])
    array: xr.DataArray = library.DataArray(variable, coords, name=series.title, attrs=about)
    return array


def _columns(series: Rows) -> dict[str, NDArray[Any]]:
    return {
        "step": series.steps,
        "epoch": series.epochs,
        "batch": series.batches,
        "call": series.calls,
        "phase": series.phases,
        "time": series.times,
    }


def to_pandas(series: Rows) -> pd.DataFrame:
    """Return single numbers over steps as a table, see `Series.to_pandas`."""
    pandas = extra("pandas")
    if any(source.info.shape for source in series.sources):
        msg = f"the records of {series.title} are arrays, no table; .to_xarray() takes them"
        raise NotSavedError(msg)
    columns = _columns(series)
    index = pandas.Index(columns.pop("step"), name="step")
    for field in series.fields:
        name = field or (series.kind if series.op else series.parameter)
        columns[name] = Padded.of(series, field).read((slice(None),))
    return pandas.DataFrame(columns, index=index)


def tree(
    stored: StoredRun,
    windows: tuple[Window, ...],
    meant: Callable[[Name], bool],
    attributes: dict[str, Any],
) -> xr.DataTree:
    """Return the streams of a run as nodes of a tree, lazy, each over its own rows.

    Args:
        stored: the run.
        windows: rows that are meant.
        meant: tells whether a series is.
        attributes: what the root says.
    """
    library = extra("xarray")
    nodes = {"/": library.Dataset(attrs=attributes)}
    for name, reader in stored.streams.items():
        sources = [Source(name, reader, info) for info in reader.arrays.values()]
        chosen = [source for source in sources if meant(source.name)]
        # A slash would make a level of its own.
        nodes[name.replace("/", "_")] = _node(chosen, reader, windows)
    result: xr.DataTree = library.DataTree.from_dict(nodes)
    return result


def _node(sources: list[Source], reader: StreamReader, windows: tuple[Window, ...]) -> xr.Dataset:
    library = extra("xarray")
    mask = np.ones(reader.rows, np.bool_)
    for window in windows:
        mask &= window.mask(reader.coords)
    rows = np.flatnonzero(mask)
    coords = {name: ("row", values[rows]) for name, values in reader.coords.items()}
    coords["time"] = ("row", reader.coords["time"][rows].astype("datetime64[ns]"))
    variables = {}
    for source in sources:
        block, name = Stored.of(source), source.info.name
        dims = ["row", *(f"{name}.dim_{i}" for i in range(len(block.shape) - 1))]
        about = {key: str(source.info.attributes.get(key, "")) for key in _ABOUT}
        variables[name] = library.Variable(dims, _lazily(block), about).isel(row=rows)
    dataset: xr.Dataset = library.Dataset(variables, coords, dict(reader.attributes))
    return dataset
