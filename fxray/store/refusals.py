"""What every store refuses, in the same words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fxray.errors import NotSavedError, StoreError, UnknownNameError, nearest
from fxray.store.layout import safe_key

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from fxray.store.protocol import ArrayInfo, Record

__all__ = [
    "check_record",
    "check_row",
    "check_run_id",
    "check_same",
    "closed",
    "declared",
    "no_record",
    "taken",
]


def check_run_id(run_id: str) -> None:
    """Refuse an id that cannot be a folder's name, also where there are no folders.

    Raises:
        StoreError: it has something else than lower-case letters, digits, `_`, `-`, `.`.
    """
    if safe_key(run_id) != run_id:
        msg = f"run id {run_id!r} cannot name a folder everywhere; use a-z, 0-9, _, - and ."
        raise StoreError(msg)


def taken(where: str) -> StoreError:
    """Return the error for a second writer of the stream at `where`."""
    return StoreError(f"{where} holds a stream already; a stream has one writer")


def closed(stream: str, where: str) -> StoreError:
    """Return the error for what comes after the end of a stream."""
    return StoreError(f"stream {stream!r} at {where} is closed")


def check_same(stream: str, known: ArrayInfo, info: ArrayInfo) -> None:
    """Refuse to declare the array `known` another time, and otherwise.

    Raises:
        StoreError: `info` is not what it was; a new selection needs a name of its own.
    """
    if known != info:
        msg = (
            f"array {info.name!r} of stream {stream!r} was declared as {known}, now as {info}; "
            "declare it under another name"
        )
        raise StoreError(msg)


def check_record(
    stream: str, name: str, known: tuple[ArrayInfo, np.dtype[Any]] | None, record: Record
) -> None:
    """Refuse a record that does not fit its declaration.

    Args:
        stream: the stream's name.
        name: the array's name.
        known: its declaration and the dtype of what is appended, None if there is none.
        record: what is to be appended.

    Raises:
        StoreError: the array was not declared, or the dtype or the number of dims differ.
    """
    if known is None:
        msg = f"array {name!r} of stream {stream!r} was not declared"
        raise StoreError(msg)
    (info, raw), values = known, record.values
    if values.dtype != raw:
        msg = f"array {name!r} takes {raw} for {info.dtype}, not {values.dtype}"
        raise StoreError(msg)
    if values.ndim != len(info.shape):
        msg = (
            f"array {name!r} was declared with records of shape {info.shape}; one of shape "
            f"{values.shape} has another number of dims. Declare it under another name"
        )
        raise StoreError(msg)


def declared(arrays: Mapping[str, ArrayInfo], name: str, where: str) -> ArrayInfo:
    """Return the array `name` of the stream at `where`.

    Raises:
        UnknownNameError: there is none; names the nearest.
    """
    info = arrays.get(name)
    if info is None:
        close = nearest(name, arrays)
        hint = f"nearest: {', '.join(map(repr, close))}" if close else "it has none like it"
        msg = f"stream {where} has no array {name!r}; {hint}"
        raise UnknownNameError(msg)
    return info


def check_row(row: int, rows: int, where: str) -> None:
    """Refuse a row that is not among the `rows` committed at `where`.

    Raises:
        NotSavedError: it is not; there are no negative rows.
    """
    if not 0 <= row < rows:
        msg = f"{where} has {rows} rows, none of number {row}"
        raise NotSavedError(msg)


def no_record(name: str, row: int, where: str) -> NotSavedError:
    """Return the error for a record that is missing."""
    return NotSavedError(f"array {name!r} has no record at row {row} of {where}")
