"""A place for arrays: what training leaves behind, as plain zarr that anyone can open.

A run is a group, a stream is a group below it, and a record is a row of an array:

>>> import numpy as np
>>> from fxray.store import ArrayInfo, Record, Row, open_store
>>> store = open_store("memory://essay")
>>> store.begin_run("a1", {"name": "baseline"}, graph={})
>>> writer = store.writer("a1", "train.forward.always.r0", {"phase": "train", "rank": 0})
>>> writer.declare(ArrayInfo("relu.output", "float32", (3,), {"op": "relu", "kind": "output"}))
>>> writer.append(Row(step=0), {"relu.output": Record(np.ones(3, "float32"), (2, 3))})
>>> writer.close()
>>> stream = store.run("a1").streams["train.forward.always.r0"]
>>> stream.coords["step"], stream.read("relu.output", 0), stream.sizes("relu.output")
(array([0]), array([1., 1., 1.], dtype=float32), [(2, 3)])

Rows are appended to memory and written in whole chunks; a commit writes what is left, waits
for all of it, and then replaces the stream's zarr.json, which says how many rows there are.
That one write is atomic, so a reader sees whole rows or none of them, whenever it looks and
whatever became of the writer. `protocol` says what a store must do, `layout` how this one
lays it out, `zarr` is the store itself; `memory` is the one for a first look, which lasts as
long as the process.
"""

from fxray.store.memory import MemoryStore
from fxray.store.opening import open_store
from fxray.store.protocol import (
    ArrayInfo,
    ArrayView,
    Record,
    Row,
    Store,
    StoredRun,
    StreamReader,
    StreamWriter,
)
from fxray.store.zarr import ZarrStore

__all__ = [
    "ArrayInfo",
    "ArrayView",
    "MemoryStore",
    "Record",
    "Row",
    "Store",
    "StoredRun",
    "StreamReader",
    "StreamWriter",
    "ZarrStore",
    "open_store",
]
