"""Anything that may happen to a stream, drawn, and all that can be read of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from hypothesis import strategies as st

from fxray.store import ArrayInfo, Record, Row, StreamReader
from fxray.store.layout import dtype_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Act", "bits", "histories", "make_record", "said", "values"]

Act = tuple[str, tuple[Any, ...]]
"""Something that happens: a method of the writer, or `"refresh"`, which is the reader's."""


def make_record(numbers: Any, size: tuple[int, ...] | None = None) -> Record:
    """Return a record of the numbers given; it was selected from the whole by default."""
    array = np.asarray(numbers)
    return Record(array, array.shape if size is None else size)


def values(dtype: str, shape: tuple[int, ...], seed: int) -> NDArray[Any]:
    """Return any bits, NaN and infinities among them, as they are handed to a store."""
    raw = dtype_of(dtype).raw
    rng = np.random.default_rng(seed)
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    if raw.kind in "fc":
        special = np.array([np.nan, np.inf, -np.inf, -0.0, 5e-324, 1.5, -2], raw)
        chosen: NDArray[Any] = rng.choice(special, shape)
        return chosen
    return rng.integers(0, 256, (*shape, raw.itemsize), np.uint8).view(raw).reshape(shape)


def bits(array: NDArray[Any]) -> tuple[str, tuple[int, ...], bytes]:
    """Return dtype, shape and bits of an array: all that == would not compare."""
    return str(array.dtype), array.shape, array.tobytes()


def said(reader: StreamReader) -> dict[str, Any]:
    """Return everything that a reader says, so that two can be compared by ==."""
    found: dict[str, Any] = {
        "rows": reader.rows,
        "attributes": reader.attributes,
        "coords": {name: coord.tolist() for name, coord in reader.coords.items()},
        "arrays": dict(reader.arrays),
        "each": {},
    }
    for name in reader.arrays:
        view, present = reader.array(name), reader.present(name).tolist()
        # What pads is NaN or 0, by whatever bits; some NaN warn when they are converted.
        with np.errstate(invalid="ignore"):
            padded = view[()].astype(np.complex128).reshape(-1).tolist()
        found["each"][name] = {
            "present": present,
            "whole": reader.whole(name),
            "shapes": reader.shapes(name),
            "sizes": reader.sizes(name),
            "records": [bits(reader.read(name, row)) for row, here in enumerate(present) if here],
            "view": (view.shape, view.dtype, [None if n != n else n for n in padded]),  # noqa: PLR0124
        }
    return found


@st.composite
def _declarations(draw: st.DrawFn) -> list[ArrayInfo]:
    names = draw(st.lists(st.text(max_size=8), min_size=1, max_size=3, unique=True))
    dtypes = ["float32", "bfloat16", "float8_e5m2", "int64", "bool", "complex64"]
    told = [{}, {"size": [8, 2]}, {"op": "relu", "selection": {"settings": {}}}]
    return [
        ArrayInfo(
            name,
            draw(st.sampled_from(dtypes)),
            draw(st.lists(st.integers(0, 3), max_size=2)),
            draw(st.sampled_from(told)),
        )
        for name in names
    ]


@st.composite
def _records(draw: st.DrawFn, info: ArrayInfo) -> Record:
    odd = draw(st.booleans())
    shape = tuple(draw(st.integers(0, 5)) if odd else size for size in info.shape)
    size = draw(st.none() | st.lists(st.integers(0, 9), max_size=3).map(tuple))
    seed = draw(st.integers(0, 99))
    return Record(values(info.dtype, shape, seed), info.size if size is None else size)


@st.composite
def histories(draw: st.DrawFn) -> list[Act]:
    """Draw what happens to a stream up to its end."""
    undeclared, declared, history = draw(_declarations()), list[ArrayInfo](), list[Act]()
    for step in range(draw(st.integers(0, 14))):
        act = draw(st.sampled_from(["append", "append", "commit", "declare", "refresh"]))
        if act == "append":
            row = Row(step, call=step % 2, phase=draw(st.sampled_from(["train", "va l"])))
            known = [info for info in declared if draw(st.booleans())]
            history.append((act, (row, {info.name: draw(_records(info)) for info in known})))
        elif act != "declare":
            history.append((act, ()))
        elif undeclared:
            declared.append(undeclared.pop())
            history.append((act, (declared[-1],)))
    return [*history, ("close", ()), ("refresh", ())]
