"""The one document whose atomic write commits a stream."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from fxray.errors import StoreError
from fxray.store.layout import COORDINATES, FORMAT, ArrayLayout, is_safe
from fxray.store.plain import to_json

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Manifest", "array_text", "check_format", "manifest_text", "parse_manifest"]

RECORD_BYTES_LIMIT = 1 << 40


@attrs.frozen
class Manifest:
    """What a stream's zarr.json says.

    Attributes:
        attributes: what the stream was opened with.
        rows: committed rows.
        layouts: every array by key.
    """

    attributes: Mapping[str, Any]
    rows: int
    layouts: Mapping[str, ArrayLayout]


def array_text(layout: ArrayLayout) -> tuple[str, str]:
    """Return the array's zarr.json as text before and after the number of rows.

    A commit joins such texts: dumping 500 documents anew would cost it 30 ms.
    """
    record = "".join(f",{size}" for size in layout.record)
    return f'{to_json(layout.metadata())[:-1]},"shape":[', f"{record}]}}"


def manifest_text(
    name: str, attributes: Mapping[str, Any], rows: int, arrays: Iterable[tuple[str, str]]
) -> str:
    """Return the zarr.json of the stream `name` with `rows` rows.

    Args:
        name: the stream's true name.
        attributes: what the stream was opened with.
        rows: rows to commit.
        arrays: key and zarr.json of every array.
    """
    own = {"format": FORMAT, "stream": name, "rows": rows, "own": sorted(attributes)}
    # xarray makes coordinates of the arrays named here, so `step` may repeat.
    document = {**attributes, "coordinates": " ".join(COORDINATES), "fxray": own}
    metadata = ",".join(f"{to_json(key)}:{text}" for key, text in arrays)
    return (
        f'{{"zarr_format":3,"node_type":"group","attributes":{to_json(document)},'
        '"consolidated_metadata":{"kind":"inline","must_understand":false,'
        f'"metadata":{{{metadata}}}}}}}'
    )


def check_format(attributes: Mapping[str, Any], where: str) -> None:
    """Refuse a store that a newer fxray wrote.

    Raises:
        StoreError: the format is newer than this fxray's, or none at all.
    """
    own = attributes.get("fxray")
    version = own.get("format") if isinstance(own, dict) else None
    if not isinstance(version, int) or version < 1:
        msg = f"{where} is damaged: its attributes name no format of fxray"
        raise StoreError(msg)
    if version > FORMAT:
        msg = (
            f"{where} is of format {version}, written by a newer fxray; this one reads up to "
            f"{FORMAT}: pip install --upgrade fxray"
        )
        raise StoreError(msg)


def parse_manifest(document: Mapping[str, Any], where: str) -> Manifest:
    """Return what a stream's zarr.json says, checked.

    Raises:
        StoreError: it is not a manifest of fxray, or of a newer format; names the file.
    """
    try:
        attributes = document["attributes"]
        check_format(attributes, where)
        own = attributes["fxray"]
        rows = own["rows"]
        given = {name: attributes[name] for name in own["own"]}
        metadata = document["consolidated_metadata"]["metadata"]
        if not isinstance(rows, int) or rows < 0:
            msg = f"{rows!r} rows"
            raise ValueError(msg)  # noqa: TRY301
        layouts = {key: _parse_array(key, array, rows) for key, array in metadata.items()}
        _check_roles(layouts)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        msg = f"{where} is damaged: not the manifest of a stream ({type(error).__name__}: {error})"
        raise StoreError(msg) from error
    return Manifest(given, rows, layouts)


def _parse_array(key: str, document: Mapping[str, Any], rows: int) -> ArrayLayout:
    if not is_safe(key):
        msg = f"{key!r} is no key of an array"
        raise ValueError(msg)
    shape, chunk = document["shape"], document["chunk_grid"]["configuration"]["chunk_shape"]
    if not all(type(n) is int and 0 <= n < 1 << 48 for n in [*shape, *chunk]):
        msg = f"array {key!r} has shape {shape!r} in chunks of {chunk!r}"
        raise ValueError(msg)
    stored = np.dtype(document["data_type"])
    too_large = math.prod(max(1, n) for n in chunk) * stored.itemsize > RECORD_BYTES_LIMIT
    if shape[0] != rows or len(chunk) != len(shape) or 0 in chunk or too_large:
        msg = f"array {key!r} of {rows} rows has shape {shape!r} in chunks of {chunk!r}"
        raise ValueError(msg)
    layout = ArrayLayout(
        key, stored.name, document["fill_value"], shape[1:], chunk, document["attributes"]
    )
    if layout.role == "record" and len(layout.info().shape) != len(layout.record):
        msg = f"array {key!r} has records of {layout.record}, declared {layout.info().shape}"
        raise ValueError(msg)
    return layout


def _check_roles(layouts: Mapping[str, ArrayLayout]) -> None:
    absent = [name for name in COORDINATES if name not in layouts]
    unknown = {layout.role for layout in layouts.values()} - {
        "record", "coordinate", "shape", "size"
    }  # fmt: skip
    if absent or unknown:
        msg = f"absent coordinates {absent}, unknown roles {sorted(unknown)}"
        raise ValueError(msg)
