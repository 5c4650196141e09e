"""Keys, dtypes, chunks, companions and documents of format 1."""

from __future__ import annotations

import json
import math
import unicodedata
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxray.errors import StoreError
from fxray.store.layout import (
    COORDINATES,
    DTYPES,
    decode_shape,
    dtype_of,
    encode_shape,
    is_safe,
    record_layout,
    records_per_chunk,
    safe_key,
)
from fxray.store.manifest import array_text, manifest_text
from fxray.store.place import open_place
from fxray.store.plain import to_json
from fxray.store.protocol import ArrayInfo

AWKWARD = [
    "", ".", "..", "../x", "a/b", "a\\b", "con", "CON", "nul.txt", "com1", "c", "c.0", "C.0",
    "__x", "zarr.json", "x.", "A", "é", "e\u0301", "\ud800", "a\0b", "row", "step", "phase", "x!shape", "a~b",
    "x" * 101, " ", "a b", "-x", "*", "a:b?", "streams", "graph", "catalog",
]  # fmt: skip


@given(st.text() | st.sampled_from(AWKWARD))
def test_a_key_is_a_name_that_every_file_system_takes(name: str) -> None:
    key = safe_key(name)
    assert is_safe(key)
    assert 0 < len(key) <= 100
    assert set(key) <= set("abcdefghijklmnopqrstuvwxyz0123456789_.-~")
    assert not key.startswith(".")
    assert not key.endswith(".")
    assert "/" not in key
    assert key.partition(".")[0] not in {"con", "prn", "aux", "nul", "com1", "lpt1", "c"}
    assert key not in {*COORDINATES, "row", "zarr.json", "graph", "streams", "catalog"}
    assert safe_key(name) == key


@given(*[st.text(alphabet="aAbB.~!é/\u0301", max_size=6) | st.sampled_from(AWKWARD)] * 2)
def test_two_names_never_share_a_key_on_a_case_insensitive_file_system_either(
    one: str, other: str
) -> None:
    folded = {unicodedata.normalize("NFC", safe_key(name)).casefold() for name in (one, other)}
    assert len(folded) == len({one, other})


@pytest.mark.parametrize("name", ["layer1.0.relu.output", "conv1.weight", "_x", "0", "relu-0"])
def test_a_plain_name_is_its_own_key(name: str) -> None:
    assert safe_key(name) == name


@pytest.mark.parametrize("key", ["..", "../x", "a/../b", "", ".x", "a/b", "A", "x.", "a\0"])
def test_a_key_that_could_climb_or_clash_is_not_safe(key: str) -> None:
    assert not is_safe(key)


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_the_fill_value_of_every_float_is_a_nan_by_an_independent_reading(name: str) -> None:
    dtype = dtype_of(name)
    fill = np.array([dtype.fill_value], dtype.raw).view(dtype.numpy)
    if name.startswith(("float", "bfloat", "complex")):
        assert np.isnan(fill.astype(np.complex128 if "complex" in name else np.float64)).all()
    else:
        assert not fill.any()
    own = getattr(ml_dtypes, name, None)
    assert dtype.numpy == np.dtype(own or name)
    assert dtype.numpy.itemsize == dtype.raw.itemsize


def test_a_dtype_without_a_place_is_refused_with_those_that_have_one() -> None:
    with pytest.raises(StoreError, match=r"cannot store dtype 'complex32'.*bfloat16"):
        dtype_of("complex32")


@given(st.integers(0, 1 << 34), st.integers(0, 1 << 34))
def test_a_chunk_is_a_power_of_two_of_records_within_its_bounds(nbytes: int, room: int) -> None:
    rows = records_per_chunk(nbytes, room)
    assert rows & (rows - 1) == 0
    assert 1 <= rows <= 8192
    assert rows == 1 or rows * nbytes <= min(1 << 20, room)
    assert rows == 1 or nbytes > 16 << 10 or rows * nbytes <= 256 << 10


@pytest.mark.parametrize(("shape", "chunk"), [
    ((), (8192,)), ((256,), (256, 256)), ((8, 32, 32), (32, 8, 32, 32)),
    ((0, 4), (1024, 16, 4)), ((2048, 2048), (1, 2048, 2048)),
])  # fmt: skip
def test_a_chunk_holds_whole_records(shape: Any, chunk: tuple[int, ...]) -> None:
    assert record_layout(ArrayInfo("x", "float32", shape)).chunk == chunk


@given(st.lists(st.integers(0, 1 << 40), max_size=4), st.integers(0, 3))
def test_a_companion_row_says_the_shape_it_was_given(shape: Any, wider: int) -> None:
    row = encode_shape(tuple(shape), max(1, len(shape)) + wider)
    assert len(row) == max(1, len(shape)) + wider
    assert decode_shape(row, (7, 7)) == tuple(shape)


def test_attributes_that_xarray_would_act_on_are_kept_out_of_its_sight() -> None:
    info = ArrayInfo("x", "float32", (2,), {"units": "days since 2000-01-01", "op": "relu"})
    layout = record_layout(info)
    assert "units" not in layout.attributes
    assert layout.attributes["op"] == "relu"
    assert layout.info() == info


@given(st.text(max_size=20), st.dictionaries(st.text(max_size=5), st.floats() | st.text()))
def test_documents_are_strict_json_whatever_the_names(name: str, given_: dict[str, Any]) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    layout = record_layout(ArrayInfo(name, "float32", (2,), given_))
    head, tail = array_text(layout)
    text = manifest_text(name, given_, 3, [(layout.key, f"{head}3{tail}")])
    document = json.loads(text, parse_constant=refuse)
    array = document["consolidated_metadata"]["metadata"][layout.key]
    assert array["shape"] == [3, 2]
    assert array["attributes"]["fxray"]["name"] == name


def test_what_json_lacks_is_spelled_as_zarr_does() -> None:
    document = {"a": math.inf, "b": [-math.inf, math.nan], "c": np.float32(1.5), 3: (1,),
                "d": open_place("x").spec, "e": np.array([7])}  # fmt: skip
    text = to_json(document)
    assert text.startswith('{"a":"Infinity","b":["-Infinity","NaN"],"c":1.5,"3":[1],"d":"<')
    assert text.endswith(',"e":7}')


@pytest.mark.parametrize(("place", "path"), [
    ("/tmp/x", "/tmp/x/"), ("/tmp/a b%20/", "/tmp/a b%20/"), ("file:///tmp/a%20b", "/tmp/a b/"),
])  # fmt: skip
def test_a_place_is_a_path_or_a_url(place: str, path: str) -> None:
    assert open_place(place).path == path


@pytest.mark.parametrize("place", ["s3://bucket/x", "gs://x", "http://x/y", "file://host/x"])
def test_other_places_are_refused_by_name(place: str) -> None:
    with pytest.raises(StoreError, match=place.partition(":")[0]):
        open_place(place)
