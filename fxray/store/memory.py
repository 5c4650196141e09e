"""A store in the memory of this process: rows in a list, nothing underneath."""

# Not TensorStore's memory driver: one of its threads may hold the driver's mutex and wait for
# the GIL (to call back, or to release a buffer of Python's that is overwritten) while a thread
# of Python holds the GIL and waits for that mutex in a read. Both wait for ever.

from __future__ import annotations

import json
import threading
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from fxray.errors import NotARunError, StoreError
from fxray.store import refusals
from fxray.store.catalog import oldest_first, summary
from fxray.store.plain import to_json
from fxray.store.rows import MemoryReader, MemoryWriter

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fxray.store.protocol import StreamReader

__all__ = ["MemoryRun", "MemoryStore", "open_memory"]


class _Held:
    """A run as the store holds it: JSON, so that nobody can change it from outside."""

    def __init__(self, attributes: str, graph: str) -> None:
        self.attributes, self.graph = attributes, graph
        self.streams: dict[str, MemoryWriter] = {}


class MemoryRun:
    """One run as it stands in a store; see `StoredRun`."""

    def __init__(self, held: _Held) -> None:
        self._held = held
        self._readers: dict[str, StreamReader] = {}
        self.streams: Mapping[str, StreamReader] = MappingProxyType(self._readers)
        self.attributes: Mapping[str, Any] = {}
        self.graph: Mapping[str, Any] = {}
        self.refresh()

    def refresh(self) -> bool:
        """Look again, at the streams too; return whether anything changed."""
        before, known = self.attributes, len(self._readers)
        self.attributes = json.loads(self._held.attributes)
        self.graph = json.loads(self._held.graph)
        refreshed = [reader.refresh() for reader in self._readers.values()]
        for name, stream in self._held.streams.copy().items():
            if name not in self._readers:
                self._readers[name] = MemoryReader(stream)
        return any(refreshed) or self.attributes != before or len(self._readers) > known


class MemoryStore:
    """The arrays of many runs in the memory of this process; see `Store`.

    Everything stays until the process ends, or until nobody holds the store if it was made
    here and not by `open_store`.

    Attributes:
        name: how the place is called, for messages.
    """

    def __init__(self, name: str = "memory://") -> None:
        self.name = name
        self._runs: dict[str, _Held] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<MemoryStore {self.name}>"

    def begin_run(
        self, run_id: str, attributes: Mapping[str, Any], graph: Mapping[str, Any]
    ) -> None:
        """Claim `run_id`, then keep what is known of the run.

        Raises:
            StoreError: the id is taken or cannot be a folder's name.
        """
        refusals.check_run_id(run_id)
        held = _Held(to_json(attributes), to_json(graph))
        if self._runs.setdefault(run_id, held) is not held:
            msg = f"{self.name} has a run {run_id!r} already"
            raise StoreError(msg)

    def update_run(
        self,
        run_id: str,
        attributes: Mapping[str, Any],
        graph: Mapping[str, Any] | None = None,
    ) -> None:
        """Replace the named attributes of a run; its graph, if one is given.

        Raises:
            NotARunError: there is no run of that id.
        """
        held = self._held(run_id)
        with self._lock:
            held.attributes = to_json({**json.loads(held.attributes), **attributes})
            held.graph = held.graph if graph is None else to_json(graph)

    def runs(self) -> list[dict[str, Any]]:
        """Return `id, name, started, finished, tags, model` of every run, oldest first.

        Raises:
            NotARunError: there are none.
        """
        if not self._runs:
            msg = f"{self.name} holds no fxray runs; fxray.record(net, place) puts one there"
            raise NotARunError(msg)
        runs = self._runs.copy().items()
        return oldest_first(summary(run_id, json.loads(held.attributes)) for run_id, held in runs)

    def run(self, run_id: str) -> MemoryRun:
        """Return a run to read.

        Raises:
            NotARunError: there is no run of that id.
        """
        return MemoryRun(self._held(run_id))

    def writer(self, run_id: str, stream: str, attributes: Mapping[str, Any]) -> MemoryWriter:
        """Begin the stream `stream` of a run.

        Raises:
            NotARunError: there is no run of that id.
            StoreError: the stream was begun already.
        """
        streams = self._held(run_id).streams
        writer = MemoryWriter(f"{self.name.rstrip('/')}/{run_id}/{stream}", stream, attributes)
        if streams.setdefault(stream, writer) is not writer:
            raise refusals.taken(writer.where)
        return writer

    def _held(self, run_id: str) -> _Held:
        held = self._runs.get(run_id)
        if held is None:
            msg = f"{self.name} holds no run {run_id!r}"
            raise NotARunError(msg)
        return held


_STORES: dict[str, MemoryStore] = {}


def open_memory(name: str = "") -> MemoryStore:
    """Return the store of that name, the same for everyone in this process."""
    key = name.strip("/")
    return _STORES.setdefault(key, MemoryStore(f"memory://{key}"))
