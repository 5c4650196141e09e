"""The laws of a store."""

# ruff: noqa: S101 - asserting is what these classes are for

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from fxray.errors import NotARunError, NotSavedError, StoreError, UnknownNameError
from fxray.store import (
    ArrayInfo,
    MemoryStore,
    Record,
    Row,
    Store,
    StoredRun,
    StreamReader,
    StreamWriter,
)
from fxray.store.layout import DTYPES, dtype_of
from fxray.testing.histories import Act, bits, histories, make_record, said, values

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["StoreTests"]

STREAM = "train.forward.always.r0"
_ABOUT: dict[str, Any] = {
    "phase": "train",
    "moment": "forward",
    "schedule": {"every": 1},
    "rank": 0,
}


_laws: Callable[[Any], Any] = settings(
    # Every subclass runs the same laws, which is what they are for.
    suppress_health_check=[HealthCheck.differing_executors],
    max_examples=60,
    deadline=None,
)


class StoreTests:
    """The laws of a store. Subclass it and say how one of yours is made.

    ```python
    class TestShelf(fxray.testing.StoreTests):
        def make_store(self):
            return Shelf(tempfile.mkdtemp())
    ```
    """

    def make_store(self) -> Store:
        """Return a store in a place of its own, with nothing in it."""
        msg = "say how a store of yours is made: def make_store(self)"
        raise NotImplementedError(msg)

    def reopen(self, store: Store) -> Store:
        """Return the place of `store` opened anew, if that is another object."""
        return store

    @pytest.fixture
    def store(self) -> Store:
        """A store with a run `"r1"`."""
        store = self.make_store()
        store.begin_run("r1", {"id": "r1", "name": "test", "started": "2026"}, {"ops": {}})
        return store

    @pytest.fixture
    def writer(self, store: Store) -> StreamWriter:
        """The writer of a stream of that run."""
        return store.writer("r1", STREAM, _ABOUT)

    def _read(self, store: Store) -> StreamReader:
        return self.reopen(store).run("r1").streams[STREAM]

    def test_it_follows_the_protocols(self, store: Store, writer: StreamWriter) -> None:
        """Every method of every protocol is there."""
        assert isinstance(store, Store)
        assert isinstance(writer, StreamWriter)
        assert isinstance(store.run("r1"), StoredRun)
        assert isinstance(self._read(store), StreamReader)
        assert store.name

    @pytest.mark.parametrize("shape", [(), (3,), (0,), (2, 0, 3), (2, 3, 4)])
    @pytest.mark.parametrize("dtype", sorted(DTYPES))
    def test_what_is_written_is_read(
        self, dtype: str, shape: tuple[int, ...], store: Store, writer: StreamWriter
    ) -> None:
        """Bit by bit, as the dtype it was declared with."""
        writer.declare(ArrayInfo("x", dtype, shape))
        written = [values(dtype, shape, seed) for seed in range(5)]
        for step, numbers in enumerate(written):
            writer.append(Row(step), {"x": make_record(numbers)})
        writer.close()
        reader = self._read(store)
        for step, numbers in enumerate(written):
            assert bits(reader.read("x", step)) == bits(numbers.view(dtype_of(dtype).numpy))
        stacked = np.stack(written).view(dtype_of(dtype).numpy)
        assert bits(reader.array("x")[()]) == bits(stacked)

    @pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
    def test_raw_bits_come_back_as_numbers(
        self, name: str, store: Store, writer: StreamWriter
    ) -> None:
        """Bfloat16 and float8 are handed in as bits and read as `ml_dtypes` has them."""
        numbers = np.array([1.0, -0.5, 2.0, np.nan], dtype_of(name).numpy)
        writer.declare(ArrayInfo("x", name, (4,)))
        writer.append(Row(0), {"x": make_record(numbers.view(dtype_of(name).raw))})
        writer.close()
        read = self._read(store).read("x", 0)
        assert read.dtype == numbers.dtype
        assert read.astype("float32")[:3].tolist() == [1.0, -0.5, 2.0]

    @_laws
    @given(history=histories())
    def test_any_history_reads_as_in_memory(self, history: list[Act]) -> None:
        """After all that happens to a stream, everything is said as `MemoryStore` says it."""
        stores: tuple[Store, Store] = (self.make_store(), MemoryStore())
        for store in stores:
            store.begin_run("r1", {}, {})
        writers = [store.writer("r1", STREAM, _ABOUT) for store in stores]
        readers = [self._read(stores[0]), stores[1].run("r1").streams[STREAM]]
        pairs = list(zip(writers, readers, strict=True))
        for act, given_ in history:
            answers = [
                reader.refresh() if act == "refresh" else getattr(writer, act)(*given_)
                for writer, reader in pairs
            ]
            mine, memory = map(said, readers)
            assert (answers[0], mine) == (answers[1], memory)
        self._was_kept(readers[0], [given_[1] for act, given_ in history if act == "append"])

    def _was_kept(self, reader: StreamReader, rows: list[Mapping[str, Record]]) -> None:
        assert reader.rows == len(rows)
        for name in reader.arrays:
            kept = [name in records for records in rows]
            assert reader.present(name).tolist() == kept
            for at in np.flatnonzero(kept).tolist():
                record, read = rows[at][name], reader.read(name, at)
                assert read.shape == record.values.shape
                assert read.tobytes() == record.values.tobytes()
                assert reader.sizes(name)[at] == record.size

    def test_rows_carry_their_coordinates(self, store: Store, writer: StreamWriter) -> None:
        """All of them, as they were given; phases by their name."""
        rows = [Row(7, 1, 2, 3, "train", 10), Row(7, 1, 2, 4, "my valid", 20), Row(8, time=30)]
        for row in rows:
            writer.append(row, {})
        writer.close()
        coords = self._read(store).coords
        names = ("step", "epoch", "batch", "call", "phase", "time")
        assert [Row(*(coords[name][at].item() for name in names)) for at in range(3)] == rows

    def test_many_rows(self, store: Store, writer: StreamWriter) -> None:
        """More than any buffer holds, some without a record, one array late."""
        writer.declare(ArrayInfo("s", "int64", ()))
        n = 8192 + 810
        for step in range(n):
            if step == 8500:
                writer.declare(ArrayInfo("late", "int32", (2,)))
            records = {"s": make_record(np.int64(step))} if step % 3 else {}
            if step >= 8500:
                records["late"] = make_record(np.full(2, step, "int32"))
            writer.append(Row(step, time=step), records)
        writer.close()
        reader, steps = self._read(store), np.arange(n)
        assert (reader.coords["step"] == steps).all()
        assert (reader.present("s") == (steps % 3 > 0)).all()
        assert reader.read("s", n - 1) == n - 1
        assert (reader.present("late") == (steps >= 8500)).all()
        assert reader.read("late", 8500).tolist() == [8500, 8500]
        assert reader.shapes("late")[8499:8501] == [None, (2,)]
        assert reader.sizes("late")[8499:8501] == [None, (2,)]

    def test_what_is_missing_is_no_number(self, store: Store, writer: StreamWriter) -> None:
        """Asking for it is an error; in a block it is NaN."""
        for name in ("float32", "complex64", "bfloat16"):
            writer.declare(ArrayInfo(name, name, (2,)))
        ones = {name: np.ones(2, dtype_of(name).numpy) for name in ("float32", "complex64")}
        bits = np.ones(2, dtype_of("bfloat16").numpy).view("uint16")
        writer.append(Row(0), {})
        writer.append(
            Row(1), {name: make_record(v) for name, v in (ones | {"bfloat16": bits}).items()}
        )
        writer.append(Row(2), {})
        writer.close()
        reader = self._read(store)
        for name in reader.arrays:
            assert reader.present(name).tolist() == [False, True, False]
            assert not reader.whole(name)
            block = reader.array(name)[()].astype("complex64")
            assert np.isnan(block[[0, 2]]).all()
            assert (block[1] == 1).all()
            with pytest.raises(NotSavedError, match="no record at row 2"):
                reader.read(name, 2)

    def test_shapes_may_differ(self, store: Store, writer: StreamWriter) -> None:
        """Records smaller and larger than declared keep their shape, blocks are padded."""
        writer.declare(ArrayInfo("x", "float32", (2, 3)))
        shapes = [(2, 3), (1, 3), (5, 4), (2, 3), (2, 13), (0, 3)]
        for step, shape in enumerate(shapes):
            writer.append(Row(step), {"x": make_record(np.full(shape, step, "float32"))})
            if step == 1:
                writer.commit()
        writer.close()
        reader = self._read(store)
        assert reader.shapes("x") == shapes
        for step, shape in enumerate(shapes):
            assert bits(reader.read("x", step)) == bits(np.full(shape, step, "float32"))
        view = reader.array("x")
        assert view.shape == (6, 5, 13)
        assert np.isnan(view[2, slice(5), slice(4, None)]).all()
        assert (view[4, slice(2)] == 4).all()

    def test_original_sizes_may_differ(self, store: Store, writer: StreamWriter) -> None:
        """The shape of what was selected from is kept beside each record."""
        writer.declare(ArrayInfo("x", "float32", (2,), {"size": [8, 2]}))
        sizes: list[tuple[int, ...]] = [(8, 2), (8, 2), (5, 2), (8, 2), (), (1, 2, 3)]
        for step, size in enumerate(sizes):
            writer.append(Row(step), {"x": make_record(np.zeros(2, "float32"), size)})
        writer.append(Row(9), {})
        writer.close()
        assert self._read(store).sizes("x") == [*sizes, None]
        assert self._read(store).shapes("x") == [(2,)] * 6 + [None]

    def test_a_view_indexes_as_numpy_does(self, store: Store, writer: StreamWriter) -> None:
        """Ints, slices, integer arrays; each dim by itself."""
        writer.declare(ArrayInfo("x", "int32", (3, 4)))
        whole = np.arange(10 * 12, dtype="int32").reshape(10, 3, 4)
        for step in range(10):
            writer.append(Row(step), {"x": make_record(whole[step])})
        writer.close()
        view = self._read(store).array("x")
        assert view.shape == whole.shape
        keys: list[tuple[Any, ...]] = [
            (3,), (-1, 2), (1, 2, 3), (slice(2, 50),), (slice(None), 1, slice(None, None, 2)),
            (slice(8, 2, -3),), (np.array([7, -9]), slice(1)), (slice(4, 2),),
        ]  # fmt: skip
        for key in keys:
            assert np.array_equal(view[key], whole[key]), key
        outer = view[np.array([1, 5]), slice(None), np.array([0, 2])]
        assert np.array_equal(outer, whole[[1, 5]][:, :, [0, 2]])
        with pytest.raises(IndexError):
            view[10,]

    def test_a_record_is_copied(self, store: Store, writer: StreamWriter) -> None:
        """What becomes of the array after `append` is no concern of the store's."""
        for name, shape in (("large", (1 << 19,)), ("small", (4,))):
            writer.declare(ArrayInfo(name, "float32", shape))
        buffers = {"large": np.zeros(1 << 19, "float32"), "small": np.zeros(4, "float32")}
        for step in range(8):
            for buffer in buffers.values():
                buffer[...] = step
            writer.append(
                Row(step), {name: make_record(buffer) for name, buffer in buffers.items()}
            )
        for buffer in buffers.values():
            buffer[...] = -1
        writer.close()
        reader = self._read(store)
        for name in buffers:
            assert (reader.array(name)[:, 3] == np.arange(8)).all()
        reader.read("small", 0)[...] = 9
        assert reader.read("small", 0).tolist() == [0] * 4

    def test_only_what_is_committed_is_seen(self, store: Store, writer: StreamWriter) -> None:
        """And by a reader only once it looks again."""
        writer.declare(ArrayInfo("x", "float32", (4,)))
        reader = self._read(store)
        for step in range(20):
            records = {"x": make_record(np.full(4, step, "float32"))} if step else {}
            writer.append(Row(step), records)
            assert reader.rows == len(reader.coords["step"]) == step
            assert not reader.refresh()
            writer.commit()
            assert reader.rows == step
            assert reader.refresh()
            assert not reader.refresh()
            assert reader.coords["step"].tolist() == list(range(step + 1))
            assert reader.present("x").tolist() == [False] + [True] * step
            assert [reader.read("x", row)[0] for row in range(1, step)] == [*range(1, step)]
            assert reader.array("x").shape == (step + 1, 4)
            for row in (-1, step + 1):
                with pytest.raises(NotSavedError, match=f"{step + 1} rows"):
                    reader.read("x", row)

    def test_a_run_looks_again_at_everything(self, store: Store) -> None:
        """At its attributes, its streams and the rows in them."""
        run = self.reopen(store).run("r1")
        assert run.graph == {"ops": {}}
        assert not run.streams
        writers = {}
        for rank in range(3):
            name = f"train.forward.always.r{rank}"
            writers[name] = self.reopen(store).writer("r1", name, {**_ABOUT, "rank": rank})
            assert run.refresh()
        assert {name: reader.attributes["rank"] for name, reader in run.streams.items()} == {
            name: rank for rank, name in enumerate(writers)
        }
        store.update_run("r1", {"finished": "2027"})
        assert run.attributes.get("finished") is None
        assert run.refresh()
        assert run.attributes["finished"] == "2027"
        assert not run.refresh()
        for rank, writer in enumerate(writers.values()):
            writer.append(Row(rank), {})
            writer.close()
        assert run.refresh()
        assert [reader.rows for reader in run.streams.values()] == [1] * 3

    def test_one_thread_commits_while_another_appends(
        self, store: Store, writer: StreamWriter
    ) -> None:
        """Whoever reads meanwhile sees whole rows."""
        writer.declare(ArrayInfo("x", "float32", (64,)))
        done, failures = threading.Event(), []

        def commit() -> None:
            while not done.is_set():
                try:
                    writer.commit()
                except StoreError as error:
                    failures.append(error)

        thread = threading.Thread(target=commit)
        thread.start()
        reader, n = self._read(store), 3000
        for step in range(n):
            writer.append(Row(step), {"x": make_record(np.full(64, step, "float32"))})
            if step % 300 == 299:
                reader.refresh()
                if "x" in reader.arrays:
                    assert (reader.array("x")[:, 63] == np.arange(reader.rows)).all()
        done.set()
        thread.join()
        writer.close()
        assert not failures
        assert (self._read(store).array("x")[:, 63] == np.arange(n)).all()

    def test_names_and_attributes_come_back(self, store: Store) -> None:
        """Whatever the names; attributes as JSON has them."""
        names = ["../up", "CON", "a/b", "é", "step", "x" * 300, "A", "a", "\ud800", "loss!shape"]
        about = {**_ABOUT, "nested": {"a": [1, None]}}
        given_ = {"selection": {"settings": {"k": 8, "p": (1, float("inf"))}}, "units": "s"}
        back = {"selection": {"settings": {"k": 8, "p": [1, "Infinity"]}}, "units": "s"}
        writer = store.writer("r1", "Stream/../Name.r0", about)
        for name in names:
            writer.declare(ArrayInfo(name, "float64", (), given_))
        writer.append(Row(0), {name: make_record(np.float64(i)) for i, name in enumerate(names)})
        given_.clear()
        writer.close()
        reader = self.reopen(store).run("r1").streams["Stream/../Name.r0"]
        assert reader.attributes == about
        assert list(reader.arrays.values()) == [ArrayInfo(n, "float64", (), back) for n in names]
        assert [reader.read(name, 0) for name in names] == list(range(len(names)))

    def test_runs_are_listed_oldest_first(self) -> None:
        """With what is known now."""
        store = self.make_store()
        for run_id, started in (("b", "2026-02"), ("a", "2026-01"), ("d", "2026-03")):
            attributes = {"id": run_id, "started": started, "versions": {"torch": "2"}}
            store.begin_run(run_id, attributes, {})
        store.update_run("a", {"finished": "2026-04", "notes": ["done"]})
        listed = self.reopen(store).runs()
        assert [entry["id"] for entry in listed] == ["a", "b", "d"]
        assert [entry["finished"] for entry in listed] == ["2026-04", None, None]
        assert {*listed[0]} == {"id", "name", "started", "finished", "tags", "model"}
        attributes = dict(self.reopen(store).run("a").attributes)
        assert attributes["notes"] == ["done"]
        assert attributes["versions"] == {"torch": "2"}

    def test_a_record_that_does_not_fit_appends_nothing(
        self, store: Store, writer: StreamWriter
    ) -> None:
        """The dtype and the number of dims are those declared."""
        writer.declare(ArrayInfo("x", "float32", (2,)))
        good = make_record(np.zeros(2, "float32"))
        for records, why in [
            ({"x": make_record(np.zeros(2, "float64"))}, "takes float32"),
            ({"x": make_record(np.zeros((2, 2), "float32"))}, "another number of dims"),
            ({"x": good, "y": good}, "'y' .* was not declared"),
        ]:
            with pytest.raises(StoreError, match=why):
                writer.append(Row(0), records)
        writer.append(Row(0), {"x": good})
        writer.close()
        assert self._read(store).rows == 1

    def test_declaring_otherwise_is_refused(self, writer: StreamWriter) -> None:
        """Declaring the same again is not."""
        writer.declare(ArrayInfo("x", "float32", (2,)))
        writer.declare(ArrayInfo("x", "float32", (2,)))
        with pytest.raises(StoreError, match="under another name"):
            writer.declare(ArrayInfo("x", "float32", (3,)))
        with pytest.raises(StoreError, match="under another name"):
            writer.declare(ArrayInfo("x", "float32", (2,), {"selection": "Mean"}))
        with pytest.raises(StoreError, match="cannot store dtype"):
            writer.declare(ArrayInfo("y", "quint8", (3,)))

    def test_a_closed_writer_takes_nothing(self, writer: StreamWriter) -> None:
        """Closing it again is fine."""
        writer.close()
        writer.close()
        with pytest.raises(StoreError, match="is closed"):
            writer.append(Row(1), {})
        with pytest.raises(StoreError, match="is closed"):
            writer.declare(ArrayInfo("x", "float32", ()))
        with pytest.raises(StoreError, match="is closed"):
            writer.commit()

    def test_a_stream_has_one_writer(self, store: Store, writer: StreamWriter) -> None:
        """The second is refused, the first goes on."""
        with pytest.raises(StoreError, match="a stream has one writer"):
            self.reopen(store).writer("r1", STREAM, _ABOUT)
        assert list(store.run("r1").streams) == [STREAM]
        writer.append(Row(0), {})
        writer.close()
        assert self._read(store).rows == 1

    def test_a_run_id_is_claimed_once(self, store: Store) -> None:
        """And can be the name of a folder, so that a run can be moved to any store."""
        with pytest.raises(StoreError, match="has a run 'r1' already"):
            self.reopen(store).begin_run("r1", {}, {})
        for bad in ("../x", "A", "catalog", "", "a/b"):
            with pytest.raises(StoreError, match="cannot name a folder"):
                store.begin_run(bad, {}, {})

    def test_what_is_not_there_is_named(self, store: Store, writer: StreamWriter) -> None:
        """A run, an array; a place without any runs."""
        empty = self.make_store()
        for ask in (empty.runs, lambda: empty.run("r1"), lambda: store.run("r2"),
                    lambda: store.run("../runs"), lambda: store.writer("r2", STREAM, _ABOUT),
                    lambda: store.update_run("r2", {})):  # fmt: skip
            with pytest.raises(NotARunError):
                ask()
        writer.declare(ArrayInfo("relu.output", "float32", (2,)))
        writer.close()
        reader = self._read(store)
        for look in (reader.array, reader.present, reader.whole, reader.shapes, reader.sizes,
                     lambda name: reader.read(name, 0)):  # fmt: skip
            with pytest.raises(UnknownNameError, match=r"nearest: 'relu\.output'"):
                look("relu.outputs")
