"""How fxray's format 1 lays runs, streams and records out as zarr v3.

```text
root/zarr.json                        group, attributes {"fxray": {"format": 1}}
root/catalog/<run>/zarr.json          group, attributes = summary of the run
root/<run>/zarr.json                  group, attributes = all that is known of the run
root/<run>/graph/zarr.json            group, attributes {"graph": {…}}
root/<run>/streams/r<rank>/zarr.json  group, attributes {"streams": {name: key}}
root/<run>/<stream>/zarr.json         group, consolidated metadata: the commit point
root/<run>/<stream>/<coordinate>/     step, epoch, batch, call, phase, time: (row,)
root/<run>/<stream>/<array>/          (row, *record)
root/<run>/<stream>/<array>!shape/    true shape of each record, where one differs
root/<run>/<stream>/<array>!size/     original size of each, where one differs
```

Companion rows hold a shape; -1 in front means nominal, -2 missing, -3 a 0-dim tensor, and
-1 behind is padding. So rows that were never written say "as declared".
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import attrs
import ml_dtypes
import numpy as np

from fxray.errors import StoreError
from fxray.store.protocol import ArrayInfo

__all__ = [
    "COORDINATES",
    "DTYPES",
    "FORMAT",
    "MISSING",
    "NOMINAL",
    "ROW_LIMIT",
    "ArrayLayout",
    "Dtype",
    "companion",
    "coordinate",
    "decode_shape",
    "dtype_of",
    "encode_shape",
    "group",
    "is_safe",
    "record_layout",
    "records_per_chunk",
    "safe_key",
]

FORMAT = 1
"""The newest format that this fxray reads and the one it writes."""

ROW_LIMIT = 1 << 40
"""Rows that a handle is opened for: so large that appending never resizes."""

COORDINATES = {
    "step": "int64",
    "epoch": "int32",
    "batch": "int32",
    "call": "int32",
    "phase": "uint16",
    "time": "int64",
}
"""Coordinate arrays of every stream and their dtypes; `phase` is a code, see `flag_meanings`."""

NOMINAL, MISSING, SCALAR = -1, -2, -3
"""First entry of a companion row that says something else than a size."""

ROWS_PER_CHUNK_LIMIT = 8192
SMALL_RECORD, SMALL_CHUNK, LARGE_CHUNK = 16 << 10, 256 << 10, 1 << 20
EDGE_OF_NOTHING = 16
"""Chunk edge along a dim that is nominally empty: a chunk edge of 0 is not allowed."""

_ACCEPTED = re.compile(r"[a-z0-9_][a-z0-9_.-]{0,99}\Z")
_REFUSED = re.compile(
    r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?\Z"  # devices on Windows, with any extension
    r"|__|c(\.|\Z)|zarr\.json\Z|.*\.\Z"  # zarr's own names; a trailing dot vanishes on Windows
    r"|(row|step|epoch|batch|call|phase|time|graph|streams|catalog)\Z"  # ours
)
_SAFE = re.compile(r"[a-z0-9_-][a-z0-9_.~!-]{0,119}\Z")
# xarray reads these attributes of an array as instructions on how to decode it.
_DECODED_BY_XARRAY = {
    "_FillValue", "_Unsigned", "add_offset", "bounds", "calendar", "coordinates", "dtype",
    "fxray", "grid_mapping", "missing_value", "scale_factor", "units",
}  # fmt: skip


def _ints(sizes: Iterable[int]) -> tuple[int, ...]:
    return tuple(sizes)


def safe_key(name: str) -> str:
    """Return a key for `name` that every file system takes and that no other name has.

    A plain lower-case name is its own key; any other is a slug and a hash, joined by `~`,
    which no plain name holds: two names never share a key, on a case-insensitive file
    system either, and none climbs out of its folder.

    >>> safe_key("layer1.0.relu.output")
    'layer1.0.relu.output'
    >>> safe_key("Encoder/../Block.output")
    'encoder_block_output~fa6ba10fe627f06b'
    """
    if _ACCEPTED.match(name) and not _REFUSED.match(name):
        return name
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    slug = re.sub(r"[^a-z0-9-]+", "_", name.lower())[:48].strip("_-") or "x"
    return f"{slug}~{digest}"


def is_safe(key: str) -> bool:
    """Tell whether `key` could have come from `safe_key`, a companion's suffix included."""
    return _SAFE.match(key) is not None and ".." not in key and not key.endswith(".")


@attrs.frozen
class Dtype:
    """How the store keeps one dtype of torch.

    Attributes:
        name: torch's name without its prefix.
        stored: zarr's name of what is kept: raw bits where zarr has no such dtype.
        fill: what stands for "nothing here", as JSON: NaN wherever there is one.
        numpy: dtype of what is read, e.g. `ml_dtypes.bfloat16`.
    """

    name: str
    stored: str
    fill: Any
    numpy: np.dtype[Any] = attrs.field(converter=np.dtype)

    @property
    def raw(self) -> np.dtype[Any]:
        """dtype of the array as it is kept."""
        return np.dtype(self.stored)

    @property
    def fill_value(self) -> Any:
        """`fill` as a scalar of `raw`."""
        fill = complex(math.nan, math.nan) if isinstance(self.fill, list) else self.fill
        return self.raw.type(float("nan") if fill == "NaN" else fill)


def _dtypes() -> dict[str, Dtype]:
    plain = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
    table = [Dtype(name, name, 0, name) for name in plain]
    table.append(Dtype("bool", "bool", fill=False, numpy="bool"))
    table += [Dtype(name, name, "NaN", name) for name in ("float16", "float32", "float64")]
    table += [Dtype(name, name, ["NaN", "NaN"], name) for name in ("complex64", "complex128")]
    # zarr-python refuses a whole group that holds one native bfloat16 array, so these are
    # kept as raw bits; the fill value is the bits of their NaN.
    raw = [
        ("bfloat16", "uint16", 0x7FC0),
        ("float8_e4m3fn", "uint8", 0x7F),
        ("float8_e4m3fnuz", "uint8", 0x80),
        ("float8_e5m2", "uint8", 0x7E),
        ("float8_e5m2fnuz", "uint8", 0x80),
        ("float8_e8m0fnu", "uint8", 0xFF),
    ]
    table += [Dtype(name, bits, nan, getattr(ml_dtypes, name)) for name, bits, nan in raw]
    return {dtype.name: dtype for dtype in table}


DTYPES: Mapping[str, Dtype] = _dtypes()
"""Every dtype the store takes, by torch's name."""


def dtype_of(name: str) -> Dtype:
    """Return the `Dtype` that torch calls `name`.

    Raises:
        StoreError: the store has no place for such a dtype; lists those it has.
    """
    dtype = DTYPES.get(name)
    if dtype is None:
        msg = f"cannot store dtype {name!r}; a selection may convert to one of {', '.join(DTYPES)}"
        raise StoreError(msg)
    return dtype


@attrs.frozen
class ArrayLayout:
    """One zarr array of a stream: all that its metadata document says but the rows.

    Attributes:
        key: its folder below the stream.
        stored: zarr data type.
        fill: fill value as JSON.
        record: sizes of the dims behind `row`.
        chunk: sizes of a chunk, rows first.
        attributes: the array's attributes; `fxray` holds what fxray itself needs.
    """

    key: str
    stored: str
    fill: Any
    record: tuple[int, ...] = attrs.field(converter=_ints)
    chunk: tuple[int, ...] = attrs.field(converter=_ints)
    attributes: Mapping[str, Any] = attrs.field(factory=dict, hash=False)

    @property
    def role(self) -> str:
        """`"record"`, `"coordinate"`, `"shape"` or `"size"`."""
        return str(self.attributes["fxray"]["role"])

    def metadata(self) -> dict[str, Any]:
        """Return the array's zarr.json without its shape."""
        return {
            "zarr_format": 3,
            "node_type": "array",
            "data_type": self.stored,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": list(self.chunk)},
            },
            # A separator of "/" would make a directory for every row.
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": self.fill,
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            # xarray puts the dims of a group in one namespace, so they carry the key.
            "dimension_names": ["row", *(f"{self.key}!{i}" for i in range(len(self.record)))],
            "attributes": dict(self.attributes),
        }

    def info(self) -> ArrayInfo:
        """Return the record array as it was declared."""
        own = self.attributes["fxray"]
        given = {name: value for name, value in self.attributes.items() if name != "fxray"}
        return ArrayInfo(own["name"], own["dtype"], own["shape"], {**given, **own["attributes"]})


def records_per_chunk(nbytes: int, room: int = 1 << 62) -> int:
    """Return how many records of `nbytes` make a chunk: a power of two, at most 8192.

    Small records fill chunks of 256 KiB, larger ones of 1 MiB, and from 1 MiB on each has
    its own; `room` (bytes) bounds the chunk further.

    >>> [records_per_chunk(n) for n in (4, 1024, 256 << 10, 16 << 20)]
    [8192, 256, 4, 1]
    """
    target = SMALL_CHUNK if nbytes <= SMALL_RECORD else LARGE_CHUNK
    fitting = max(1, min(target, room) // max(1, nbytes))
    return min(ROWS_PER_CHUNK_LIMIT, 1 << (fitting.bit_length() - 1))


def record_layout(info: ArrayInfo, room: int = 1 << 62) -> ArrayLayout:
    """Return how the array `info` is laid out, its chunks within `room` bytes if possible."""
    dtype = dtype_of(info.dtype)
    edges = tuple(size or EDGE_OF_NOTHING for size in info.shape)
    rows = records_per_chunk(math.prod(edges) * dtype.raw.itemsize, room)
    plain = {k: v for k, v in info.attributes.items() if k not in _DECODED_BY_XARRAY}
    own = {
        "role": "record",
        "name": info.name,
        "dtype": info.dtype,
        "shape": list(info.shape),
        "attributes": {k: v for k, v in info.attributes.items() if k in _DECODED_BY_XARRAY},
    }
    attributes = {**plain, "fxray": own}
    key = safe_key(info.name)
    return ArrayLayout(key, dtype.stored, dtype.fill, info.shape, (rows, *edges), attributes)


def companion(layout: ArrayLayout, role: str, width: int) -> ArrayLayout:
    """Return the layout of the `"shape"` or `"size"` companion of a record array."""
    rows = records_per_chunk(8 * width)
    attributes = {"fxray": {"role": role, "of": layout.key}}
    key = f"{layout.key}!{role}"
    return ArrayLayout(key, "int64", NOMINAL, (width,), (rows, width), attributes)


def coordinate(name: str, phases: tuple[str, ...] = ()) -> ArrayLayout:
    """Return the layout of a coordinate; `phases` are the names that the codes stand for."""
    attributes: dict[str, Any] = {"fxray": {"role": "coordinate"}}
    if name == "time":
        attributes["units"] = "nanoseconds since 1970-01-01"
        attributes["calendar"] = "proleptic_gregorian"
    if name == "phase":
        # CF separates meanings by blanks, so the exact names stand beside them.
        attributes["flag_values"] = list(range(len(phases)))
        attributes["flag_meanings"] = " ".join(re.sub(r"\s", "_", phase) for phase in phases)
        attributes["fxray"]["phases"] = list(phases)
    chunk = (ROWS_PER_CHUNK_LIMIT,)
    return ArrayLayout(name, COORDINATES[name], 0, (), chunk, attributes)


def group(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the zarr.json of a group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}


def encode_shape(shape: tuple[int, ...], width: int) -> list[int]:
    """Return `shape` as a companion row of `width` entries.

    >>> encode_shape((2, 5), 3), encode_shape((), 1)
    ([2, 5, -1], [-3])
    """
    row = list(shape) or [SCALAR]
    return row + [NOMINAL] * (width - len(row))


def decode_shape(row: list[int], nominal: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the shape that a companion row says, None where the record is missing.

    >>> decode_shape([2, 5, -1], (9, 9)), decode_shape([-1, -1], (9, 9)), decode_shape([-2], (3,))
    ((2, 5), (9, 9), None)
    """
    if row[0] == MISSING:
        return None
    if row[0] == NOMINAL:
        return nominal
    return tuple(size for size in row if size >= 0)
