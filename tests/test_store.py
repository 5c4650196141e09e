"""The store: what is written is read again, by fxray and without it, whatever happens."""

from __future__ import annotations

import ast
import copy
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from fxray.errors import NotARunError, NotSavedError, StoreError
from fxray.store import (
    ArrayInfo,
    Record,
    Row,
    StreamReader,
    ZarrStore,
    open_store,
)
from fxray.store import place as place_module
from fxray.store.layout import COORDINATES, DTYPES, dtype_of
from fxray.store.manifest import parse_manifest
from fxray.store.writer import ZarrWriter
from fxray.testing import StoreTests
from fxray.testing.histories import values as drawn

if TYPE_CHECKING:
    from collections.abc import Callable


STREAM = "train.forward.always.r0"
ABOUT = {"phase": "train", "moment": "forward", "schedule": {"every": 1}, "rank": 0}


def begin(place: str | Path, run_id: str = "r1") -> ZarrStore:
    store = open_store(place)
    store.begin_run(run_id, {"id": run_id, "name": "test", "started": "2026"}, {"ops": {}})
    return store


def record(values: Any, size: tuple[int, ...] | None = None) -> Record:
    values = np.asarray(values)
    return Record(values, values.shape if size is None else size)


def stream(store: ZarrStore, run_id: str = "r1") -> StreamReader:
    return store.run(run_id).streams[STREAM]


@pytest.fixture
def store(tmp_path: Path) -> ZarrStore:
    return begin(tmp_path / "runs")


@pytest.fixture
def writer(store: ZarrStore) -> ZarrWriter:
    return store.writer("r1", STREAM, ABOUT)


def by_zarr(where: Path) -> Any:
    """Return what zarr-python finds, without fxray; its types are those of numpy."""
    return zarr.open_group(where, mode="r")


def by_xarray(where: Path) -> Any:
    """Return what xarray finds, without fxray."""
    return xr.open_zarr(where)


def same(one: Any, other: Any) -> bool:
    """Tell whether two arrays are equal bit by bit."""
    alike: bool = (
        one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    )
    return alike


class TestZarrStore(StoreTests):
    """What any store promises; the rest of this file is about zarr, files and processes."""

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path) -> None:
        self._folder, self._names = tmp_path, itertools.count()

    def make_store(self) -> ZarrStore:
        return open_store(self._folder / f"runs-{next(self._names)}")

    def reopen(self, store: ZarrStore) -> ZarrStore:
        return open_store(store.name)


# Round trips.


@pytest.mark.parametrize("shape", [(), (3,), (0,), (2, 0, 3), (2, 3, 4)])
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_dtype_and_shape_is_read_as_it_was_written_with_and_without_fxray(
    dtype: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    store = begin(tmp_path)
    writer = store.writer("r1", STREAM, ABOUT)
    writer.declare(ArrayInfo("x", dtype, shape, {"op": "x", "kind": "output"}))
    written = [drawn(dtype, shape, seed) for seed in range(5)]
    for step, values in enumerate(written):
        writer.append(Row(step), {"x": record(values)})
    writer.close()
    reader = stream(store)
    for step, values in enumerate(written):
        assert same(reader.read("x", step), values.view(dtype_of(dtype).numpy))
    where = tmp_path / "r1" / STREAM
    plain = by_zarr(where)["x"]
    assert same(plain[...], np.stack(written))
    assert plain.attrs["fxray"]["dtype"] == dtype
    opened = by_xarray(where)
    assert same(opened["x"].values, np.stack(written))
    assert opened["x"].dims[0] == "row"


def test_rows_carry_their_coordinates(writer: ZarrWriter, store: ZarrStore, tmp_path: Path) -> None:
    rows = [Row(7, 1, 2, 3, "train", 10), Row(7, 1, 2, 4, "my valid", 20), Row(8, time=30)]
    for row in rows:
        writer.append(row, {})
    writer.close()
    coords = stream(store).coords
    found = [Row(*(coords[name][i].item() for name in COORDINATES)) for i in range(3)]
    assert found == rows
    opened = by_xarray(tmp_path / "runs" / "r1" / STREAM)
    assert set(opened.coords) == set(COORDINATES)
    assert opened.time.values[1] == np.datetime64(20, "ns")
    meanings = opened.phase.attrs["flag_meanings"].split()
    assert [meanings[code] for code in opened.phase.values] == ["train", "my_valid", "train"]


def test_more_rows_than_a_chunk(writer: ZarrWriter, store: ZarrStore, tmp_path: Path) -> None:
    writer.declare(ArrayInfo("x", "float32", (1024,)))
    n = 64 * 3 + 5
    for step in range(n):
        writer.append(Row(step), {"x": record(np.full(1024, step, "float32"))})
        if step == 100:
            writer.commit()
    writer.close()
    read = stream(store).array("x")[:, 5:7]
    assert read.tolist() == [[step, step] for step in range(n)]
    where = tmp_path / "runs" / "r1" / STREAM
    assert sorted(path.name for path in (where / "x").iterdir()) == [
        "c.0.0", "c.1.0", "c.2.0", "c.3.0", "zarr.json",
    ]  # fmt: skip
    assert (by_zarr(where)["x"][:, 0] == np.arange(n)).all()


# Missing and ragged.


def test_what_is_missing_reads_as_nan_without_fxray_and_never_as_zero(
    writer: ZarrWriter, store: ZarrStore, tmp_path: Path
) -> None:
    for name in ("float32", "complex64", "bfloat16"):
        writer.declare(ArrayInfo(name, name, (2,)))
    writer.append(Row(0), {})
    for step in (1, 2):
        values = {name: record(np.ones(2, dtype_of(name).raw)) for name in ("float32", "complex64")}
        values["bfloat16"] = record(np.ones(2, ml_dtypes.bfloat16).view("uint16"))
        writer.append(Row(step), values if step == 1 else {})
    writer.close()
    plain = by_zarr(tmp_path / "runs" / "r1" / STREAM)
    for name in ("float32", "complex64", "bfloat16"):
        read = plain[name][...]
        read = read.view(ml_dtypes.bfloat16).astype("float32") if name == "bfloat16" else read
        assert np.isnan(read[[0, 2]]).all()
        assert (read[1] == 1).all()
        assert plain[f"{name}!shape"][:, 0].tolist() == [-2, -1, -2]
        with pytest.raises(NotSavedError, match="no record at row 2"):
            stream(store).read(name, 2)
        assert stream(store).present(name).tolist() == [False, True, False]


def test_an_array_declared_in_mid_run_is_missing_before(
    writer: ZarrWriter, store: ZarrStore, tmp_path: Path
) -> None:
    writer.declare(ArrayInfo("early", "float32", (2,)))
    for step in range(9000):
        if step == 8500:
            writer.declare(ArrayInfo("late", "int32", (2,)))
        now = {"early": record(np.full(2, step, "float32"))}
        late = {"late": record(np.full(2, step, "int32"))} if step >= 8500 else {}
        writer.append(Row(step), now | late)
    writer.close()
    reader = stream(store)
    assert (reader.present("late") == (np.arange(9000) >= 8500)).all()
    assert reader.read("late", 8500).tolist() == [8500, 8500]
    assert reader.shapes("late")[8499] is None
    assert reader.sizes("late")[8499:8501] == [None, (2,)]
    plain = by_zarr(tmp_path / "runs" / "r1" / STREAM)
    assert "early!shape" not in plain
    assert plain["late!shape"][8498:8502, 0].tolist() == [-2, -2, -1, -1]


def test_records_larger_and_smaller_than_declared(
    writer: ZarrWriter, store: ZarrStore, tmp_path: Path
) -> None:
    writer.declare(ArrayInfo("x", "float32", (2, 3)))
    shapes = [(2, 3), (1, 3), (5, 4), (2, 3), (2, 13), (0, 3)]
    for step, shape in enumerate(shapes):
        writer.append(Row(step), {"x": record(np.full(shape, step, "float32"))})
        if step == 1:
            writer.commit()
    writer.close()
    reader = stream(store)
    assert reader.shapes("x") == shapes
    for step, shape in enumerate(shapes):
        assert same(reader.read("x", step), np.full(shape, step, "float32"))
    plain = by_zarr(tmp_path / "runs" / "r1" / STREAM)["x"]
    assert plain.shape == (6, 6, 15)
    assert np.isnan(plain[2, 5:, 4:]).all()
    assert np.isnan(plain[1, 1]).all()
    assert (plain[4, :2, :13] == 4).all()


# Commits.


def test_only_what_is_committed_is_seen_by_anyone(
    writer: ZarrWriter, store: ZarrStore, tmp_path: Path
) -> None:
    writer.declare(ArrayInfo("x", "float32", (1024,)))
    where = tmp_path / "runs" / "r1" / STREAM
    reader = stream(store)
    for step in range(200):
        writer.append(Row(step), {"x": record(np.full(1024, step, "float32"))})
        if step == 99:
            writer.commit()
    assert reader.rows == 0
    assert reader.refresh()
    assert not reader.refresh()
    assert reader.rows == 100
    assert len(reader.coords["step"]) == 100
    assert reader.array("x").shape == (100, 1024)
    with pytest.raises(NotSavedError, match="100 rows"):
        reader.read("x", 100)
    assert by_xarray(where)["x"].shape == (100, 1024)
    assert by_zarr(where)["x"].shape == (100, 1024)
    with warnings.catch_warnings():
        # The root has no consolidated metadata: it would hide runs begun later.
        warnings.simplefilter("ignore", RuntimeWarning)
        tree: Any = xr.open_datatree(tmp_path / "runs", engine="zarr")
    assert tree[f"r1/{STREAM}/x"].shape == (100, 1024)
    assert (tree[f"r1/{STREAM}/x"].values[:, 7] == np.arange(100)).all()
    writer.close()
    assert reader.refresh()
    assert (reader.array("x")[:, 0] == np.arange(200)).all()


def test_close_gives_every_array_its_committed_shape(
    writer: ZarrWriter, store: ZarrStore, tmp_path: Path
) -> None:
    writer.declare(ArrayInfo("x", "float32", (2,)))
    writer.append(Row(0), {"x": record(np.zeros(3, "float32"))})
    writer.close()
    writer.close()
    for path in (tmp_path / "runs" / "r1" / STREAM).iterdir():
        if path.is_dir():
            assert zarr.open_array(path, mode="r").shape[0] == 1
    with pytest.raises(StoreError, match="is closed"):
        writer.append(Row(1), {})


def test_what_is_under_way_is_bounded(store: ZarrStore) -> None:
    writer = ZarrWriter(store.place / "r1" / "bounded", "bounded", {}, pending_bytes=4 << 20)
    writer.declare(ArrayInfo("x", "float32", (1 << 19,)))
    most = 0
    for step in range(30):
        writer.append(Row(step), {"x": record(np.full(1 << 19, step, "float32"))})
        most = max(most, writer._pending.nbytes)
    writer.close()
    assert most <= 4 << 20
    assert writer._pending.nbytes == 0


def test_many_arrays_share_the_bytes_of_the_buffers(store: ZarrStore) -> None:
    writer = ZarrWriter(store.place / "r1" / "shared", "shared", {}, buffer_bytes=8 << 20)
    for i in range(40):
        writer.declare(ArrayInfo(f"x{i}", "float32", (1 << 16,)))
    assert sum(known.column.nbytes for known in writer._records.values()) <= 17 << 20
    writer.close()


def test_a_full_chunk_waits_for_the_write_of_its_half(writer: ZarrWriter) -> None:
    writer.declare(ArrayInfo("x", "float32", (1 << 17,)))
    column = writer._records["x"].column
    waited = []

    class Half:
        """A write that a commit has begun, and that is slow."""

        def exception(self) -> None:
            waited.append(column.partial)

    for step in range(column.rows - 1):
        writer.append(Row(step), {"x": record(np.zeros(1 << 17, "float32"))})
    column.partial = Half()  # type: ignore[assignment]  # no future, but as slow as one
    assert not waited
    writer.append(Row(9), {"x": record(np.zeros(1 << 17, "float32"))})
    assert waited == [None]
    writer.close()


# Killed.

KILLED = """
import sys, itertools, numpy as np
from fxray.store import ArrayInfo, Record, Row, open_store
store = open_store(sys.argv[1])
store.begin_run("r1", {"id": "r1"}, {})
writer = store.writer("r1", "train.forward.always.r0", {"rank": 0})
for name, shape in (("small", (16,)), ("large", (1 << 16,)), ("ragged", (4,)), ("rare", ())):
    writer.declare(ArrayInfo(name, "float32", shape))
for step in itertools.count():
    value = lambda *shape: Record(np.full(shape, step, "float32"), shape)
    records = {"small": value(16), "large": value(1 << 16), "ragged": value(1 + step % 7)}
    if step % 3 == 0:
        records["rare"] = value()
    if step == 40:
        writer.declare(ArrayInfo("late", "float32", (2,)))
    if step >= 40:
        records["late"] = value(2)
    writer.append(Row(step, time=step), records)
    if step % 5 == 4:
        writer.commit()
        print(step + 1, flush=True)
"""


@pytest.mark.parametrize("commits", [1, 5, 9, 14, 23])
def test_what_was_committed_survives_a_kill(commits: int, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        said = [int(child.stdout.readline()) for _ in range(commits)]
        child.send_signal(signal.SIGKILL)
        said += [int(line) for line in child.stdout.read().split()]
    reader = stream(open_store(tmp_path))
    assert reader.rows >= said[-1]
    steps = np.arange(reader.rows)
    assert (reader.coords["step"] == steps).all()
    assert (reader.coords["time"] == steps).all()
    assert (reader.array("small")[()] == steps[:, None]).all()
    assert (reader.array("large")[:, ::997] == steps[:, None]).all()
    assert reader.shapes("ragged") == [(1 + step % 7,) for step in range(reader.rows)]
    assert all((reader.read("ragged", step) == step).all() for step in range(reader.rows))
    assert (reader.present("rare") == (steps % 3 == 0)).all()
    if "late" in reader.arrays:
        assert (reader.present("late") == (steps >= 40)).all()
    opened = by_xarray(tmp_path / "r1" / STREAM)
    assert (opened["small"].values == steps[:, None]).all()
    assert (opened["rare"].values[::3] == steps[::3]).all()
    assert np.isnan(opened["rare"].values[1::3]).all()


# Errors.


def test_a_failed_write_is_raised_once_and_what_was_committed_stays(
    writer: ZarrWriter, store: ZarrStore, tmp_path: Path
) -> None:
    writer.declare(ArrayInfo("x", "float32", (1 << 18,)))
    writer.append(Row(0), {"x": record(np.ones(1 << 18, "float32"))})
    writer.commit()
    folder = tmp_path / "runs" / "r1" / STREAM / "x"
    folder.rename(tmp_path / "kept")
    folder.write_text("a file where a folder should be")
    raised = []
    for step in range(1, 30):
        try:
            writer.append(Row(step), {"x": record(np.ones(1 << 18, "float32"))})
            if step % 10 == 0:
                writer.commit()
        except StoreError as error:
            raised.append(error)
    writer.close()
    assert len(raised) == 1
    assert "a write to" in str(raised[0])
    assert "1 rows are committed" in str(raised[0])
    assert writer.dropped > 0
    folder.unlink()
    (tmp_path / "kept").rename(folder)
    reader = stream(store)
    assert reader.rows == 1
    assert reader.read("x", 0).sum() == 1 << 18


def test_a_commit_that_cannot_be_written_is_raised_once(writer: ZarrWriter, tmp_path: Path) -> None:
    writer.append(Row(0), {})
    writer.commit()
    shutil.rmtree(tmp_path / "runs" / "r1" / STREAM)
    (tmp_path / "runs" / "r1" / STREAM).write_text("")
    writer.append(Row(1), {})
    with pytest.raises(StoreError):
        writer.commit()
    writer.commit()
    writer.close()
    assert writer.committed == 1


@pytest.mark.parametrize("folder", ["file/runs", "/proc/fxray-runs", "/dev/null/runs"])
def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(
    folder: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write"):
        begin(tmp_path / folder)


def test_somebody_elses_zarr_is_not_written_into(tmp_path: Path) -> None:
    zarr.create_group(tmp_path, attributes={"theirs": 1})
    with pytest.raises(StoreError, match="another zarr hierarchy"):
        begin(tmp_path)
    assert by_zarr(tmp_path).attrs["theirs"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["zarr.json"]


def test_a_folder_that_is_no_store_or_has_no_such_run_says_so(
    tmp_path: Path, store: ZarrStore
) -> None:
    for ask in (lambda: open_store(tmp_path).runs(), lambda: open_store(tmp_path).run("r1"),
                lambda: store.run("r2"), lambda: store.run("../runs"),
                lambda: store.writer("r2", STREAM, ABOUT),
                lambda: store.update_run("r2", {})):  # fmt: skip
        with pytest.raises(NotARunError):
            ask()


def edit(path: Path, change: Callable[[Any], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_a_newer_format_is_refused_with_what_to_do(
    writer: ZarrWriter, store: ZarrStore, tmp_path: Path
) -> None:
    root = tmp_path / "runs"

    def newer(document: Any) -> None:
        document["attributes"]["fxray"]["format"] = 2

    edit(root / "r1" / STREAM / "zarr.json", newer)
    with pytest.raises(StoreError, match=rf"{STREAM}/zarr.json is of format 2"):
        store.run("r1")
    edit(root / "zarr.json", newer)
    for ask in (store.runs, lambda: store.run("r1"), lambda: begin(root, "r2")):
        with pytest.raises(StoreError, match="pip install --upgrade fxray"):
            ask()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"node_type": "array"}', "\xff",
                                  "[" * 100_000, '{"node_type":"group","attributes":7}',
                                  '{"node_type":"group","attributes":{"fxray":{}}}'])  # fmt: skip
@pytest.mark.parametrize("where", ["zarr.json", "r1/zarr.json", "r1/streams/r0/zarr.json",
                                   f"r1/{STREAM}/zarr.json", "r1/graph/zarr.json"])  # fmt: skip
def test_a_damaged_document_is_a_clear_error_that_names_the_file(
    where: str, text: str, writer: ZarrWriter, store: ZarrStore, tmp_path: Path
) -> None:
    (tmp_path / "runs" / where).write_bytes(text.encode("latin-1"))
    with pytest.raises(StoreError) as caught:
        _ = store.run("r1").graph
    damaged = not isinstance(caught.value, NotARunError)
    assert not damaged or where in str(caught.value)
    assert damaged or where == "zarr.json"


def test_a_stream_that_is_listed_and_gone_is_named(
    writer: ZarrWriter, store: ZarrStore, tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path / "runs" / "r1" / STREAM)
    with pytest.raises(StoreError, match=f"{STREAM}/zarr.json is gone"):
        store.run("r1")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    where = tmp_path_factory.mktemp("manifest")
    store = begin(where)
    writer = store.writer("r1", STREAM, ABOUT)
    writer.declare(ArrayInfo("x", "float32", (2,)))
    writer.append(Row(0), {"x": record(np.zeros(3, "float32"))})
    writer.close()
    found: dict[str, Any] = json.loads((where / "r1" / STREAM / "zarr.json").read_text())
    return found


JUNK: st.SearchStrategy[Any] = st.sampled_from([None, -1, 0, 1 << 70, 1.5, float("nan"), "", "x", "../..", [], {}, [1],
                        [[]], {"a": 1}, True, "float128", "object"])  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_hostile_manifest_is_parsed_or_refused_and_nothing_else(
    manifest: dict[str, Any], data: st.DataObject
) -> None:
    hostile = copy.deepcopy(manifest)
    for _ in range(data.draw(st.integers(1, 2))):
        node: Any = hostile
        parent: Any = None
        key: Any = None
        while (
            isinstance(node, (dict, list)) and node and (parent is None or data.draw(st.booleans()))
        ):
            keys = sorted(node) if isinstance(node, dict) else range(len(node))
            parent, key = node, data.draw(st.sampled_from(list(keys)))
            node = parent[key]
        if data.draw(st.booleans()):
            parent[key] = copy.deepcopy(data.draw(JUNK))
        elif isinstance(parent, dict):
            parent[str(data.draw(JUNK))] = parent.pop(key)
    try:
        parsed = parse_manifest(hostile, "somewhere/zarr.json")
    except StoreError as error:
        assert "somewhere/zarr.json" in str(error)  # noqa: PT017
    else:
        assert parsed.rows >= 0
        assert all(layout.chunk[0] > 0 for layout in parsed.layouts.values())


def test_metadata_that_tensorstore_refuses_is_a_store_error(
    writer: ZarrWriter, store: ZarrStore, tmp_path: Path
) -> None:
    writer.declare(ArrayInfo("x", "float32", (2,)))
    writer.append(Row(0), {"x": record(np.zeros(2, "float32"))})
    writer.close()

    def break_it(document: Any) -> None:
        document["consolidated_metadata"]["metadata"]["x"]["fill_value"] = {"no": "number"}

    edit(tmp_path / "runs" / "r1" / STREAM / "zarr.json", break_it)
    with pytest.raises(StoreError, match=r"cannot open array .*/x"):
        stream(store).read("x", 0)


def test_a_torn_chunk_is_a_store_error_that_names_the_array(
    writer: ZarrWriter, store: ZarrStore, tmp_path: Path
) -> None:
    writer.declare(ArrayInfo("x", "float32", (2,)))
    writer.append(Row(0), {"x": record(np.ones(2, "float32"))})
    writer.close()
    (tmp_path / "runs" / "r1" / STREAM / "x" / "c.0.0").write_bytes(b"torn")
    with pytest.raises(StoreError, match=r"cannot read .*/x"):
        stream(store).read("x", 0)


FORKED = """
import os, sys, numpy as np
from fxray.errors import StoreError
from fxray.store import ArrayInfo, Record, Row, open_store
store = open_store(sys.argv[1])
store.begin_run("r1", {}, {})
writer = store.writer("r1", "s.r0", {"rank": 0})
writer.declare(ArrayInfo("x", "float32", (2,)))
one = {"x": Record(np.ones(2, "float32"), (2,))}
child = os.fork()
if child == 0:
    said = []
    for ask in (lambda: writer.append(Row(0), one), writer.commit, store.runs,
                lambda: open_store(sys.argv[1]).run("r1")):
        try:
            ask()
        except StoreError as error:
            said.append("forked" in str(error))
    os._exit(0 if said == [True] * 4 else 1)
writer.append(Row(0), one)
writer.close()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), store.run("r1").streams["s.r0"].rows)
"""


def test_a_forked_process_is_told_so_instead_of_being_aborted(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED, str(tmp_path)],
                         env=environment, capture_output=True, text=True, check=True)  # fmt: skip
    assert out.stdout.split() == ["0", "1"], out.stderr


# Runs and places.


def test_no_chunk_is_listed_to_find_runs_or_streams(
    writer: ZarrWriter, store: ZarrStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer.close()
    asked: list[str] = []
    keys = place_module.Place.keys

    def spy(self: place_module.Place, prefix: str) -> list[str]:
        asked.append(prefix)
        return keys(self, prefix)

    monkeypatch.setattr(place_module.Place, "keys", spy)
    store.runs()
    assert list(store.run("r1").streams) == [STREAM]
    assert asked == ["catalog/", "streams/"]


def test_ranks_write_documents_of_their_own(store: ZarrStore) -> None:
    others = {}
    for rank in range(3):
        name = f"train.forward.always.r{rank}"
        # Every process has a store of its own.
        others[name] = open_store(store.name).writer("r1", name, {**ABOUT, "rank": rank})
        others[name].append(Row(rank), {})
        others[name].close()
    found = store.run("r1").streams
    assert {name: reader.attributes["rank"] for name, reader in found.items()} == {
        name: rank for rank, name in enumerate(others)
    }


def test_names_that_no_file_system_takes_are_kept(store: ZarrStore, tmp_path: Path) -> None:
    names = ["../up", "CON", "a/b", "é", "step", "x" * 300, "A", "a", "\ud800", "loss!shape"]
    writer = store.writer("r1", "Stream/../Name.r0", {"rank": 0})
    for name in names:
        writer.declare(ArrayInfo(name, "float64", ()))
    writer.append(Row(0), {name: record(np.float64(i)) for i, name in enumerate(names)})
    writer.close()
    reader = store.run("r1").streams["Stream/../Name.r0"]
    assert list(reader.arrays) == names
    assert [reader.read(name, 0) for name in names] == list(range(len(names)))
    outside = [path.name for path in tmp_path.iterdir()]
    assert outside == ["runs"]
    keys = json.loads((tmp_path / "runs/r1/streams/r0/zarr.json").read_text())["attributes"]
    opened = by_xarray(tmp_path / "runs" / "r1" / keys["streams"]["Stream/../Name.r0"])
    assert len(opened.data_vars) == len(names)


def test_a_file_url_is_a_path(tmp_path: Path) -> None:
    begin(tmp_path / "with space")
    url = (tmp_path / "with space").as_uri()
    assert [entry["id"] for entry in open_store(url).runs()] == ["r1"]


def test_nothing_here_can_execute_what_it_reads() -> None:
    for folder in ("store", "run"):
        for path in (Path(__file__).parent.parent / "fxray" / folder).glob("*.py"):
            names = {node.id for node in ast.walk(ast.parse(path.read_text("utf-8")))
                     if isinstance(node, ast.Name)}  # fmt: skip
            assert not names & {"pickle", "eval", "exec", "torch"}, path


def test_nothing_but_zarr_stands_inside_a_store(writer: ZarrWriter, tmp_path: Path) -> None:
    writer.declare(ArrayInfo("x", "float32", (2,)))
    writer.append(Row(0), {"x": record(np.ones(3, "float32"))})
    writer.close()
    names = {path.name for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    assert {name for name in names if name != "zarr.json" and not name.startswith("c.")} == set()
    for path in (tmp_path / "runs").rglob("*"):
        assert not path.is_dir() or (path / "zarr.json").exists(), path
