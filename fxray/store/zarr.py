"""A store of fxray's format 1: plain zarr v3, written and read by TensorStore."""

from __future__ import annotations

import re
import threading
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from fxray.errors import NotARunError, StoreError
from fxray.store.catalog import SUMMARY, oldest_first, summary
from fxray.store.layout import FORMAT, group, is_safe, safe_key
from fxray.store.manifest import check_format
from fxray.store.reader import ZarrReader
from fxray.store.refusals import check_run_id
from fxray.store.writer import ZarrWriter

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fxray.store.place import Place
    from fxray.store.protocol import StreamReader

__all__ = ["ZarrRun", "ZarrStore"]


class ZarrRun:
    """One run as it stands in a store; see `StoredRun`."""

    def __init__(self, place: Place, run_id: str) -> None:
        """Open the run at `place`.

        Raises:
            NotARunError: there is no run.
            StoreError: a document of it is damaged or of a newer format.
        """
        self._place, self._id = place, run_id
        self._readers: dict[str, StreamReader] = {}
        self._attributes = self._read_attributes()
        self._graph: Mapping[str, Any] | None = None
        self._find_streams()

    @property
    def attributes(self) -> Mapping[str, Any]:
        """`id, name, started, finished, tags, model, versions, captures, notes`."""
        return self._attributes

    @property
    def graph(self) -> Mapping[str, Any]:
        """The architecture as plain data.

        Raises:
            StoreError: it is gone or damaged.
        """
        if self._graph is None:
            where = self._place / "graph"
            graph = (where.attributes() or {}).get("graph")
            if not isinstance(graph, dict):
                msg = f"{where.name}/zarr.json is damaged: it holds no graph"
                raise StoreError(msg)
            self._graph = graph
        return self._graph

    @property
    def streams(self) -> Mapping[str, StreamReader]:
        """Every stream of every rank by name."""
        return MappingProxyType(self._readers)

    def refresh(self) -> bool:
        """Look again, at the streams too; return whether anything changed."""
        before, known = self._attributes, set(self._readers)
        self._attributes = self._read_attributes()
        self._graph = None
        refreshed = [self._readers[name].refresh() for name in known]
        self._find_streams()
        return any(refreshed) or self._attributes != before or set(self._readers) != known

    def _read_attributes(self) -> dict[str, Any]:
        attributes = self._place.attributes()
        if attributes is None:
            msg = f"{self._place.name} holds no run"
            raise NotARunError(msg)
        check_format(attributes, f"{self._place.name}/zarr.json")
        return {name: value for name, value in attributes.items() if name != "fxray"}

    def _find_streams(self) -> None:
        for key in self._place.keys("streams/"):
            if not re.fullmatch(r"streams/r\d+/zarr\.json", key):
                continue
            where = self._place / "streams" / key.split("/")[1]
            for name, stream in _listed(where).items():
                if name not in self._readers:
                    self._readers[name] = ZarrReader(self._place / stream)


def _listed(where: Place) -> dict[str, str]:
    """Return the streams that the document of one rank lists, key by name."""
    streams = (where.attributes() or {}).get("streams")
    if not isinstance(streams, dict) or not all(
        isinstance(key, str) and is_safe(key) for key in streams.values()
    ):
        msg = f"{where.name}/zarr.json is damaged: it lists no streams"
        raise StoreError(msg)
    return streams


class ZarrStore:
    """A place for the arrays of many runs: one zarr hierarchy; see `Store`.

    Attributes:
        place: where it stands.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """How the user called the place, for messages."""
        return self.place.name

    def __repr__(self) -> str:
        return f"<ZarrStore at {self.place.name}>"

    def begin_run(
        self, run_id: str, attributes: Mapping[str, Any], graph: Mapping[str, Any]
    ) -> None:
        """Claim `run_id`, then write what is known of the run, its entry in the catalog last.

        Args:
            run_id: lower-case letters, digits, `_`, `-`, `.`.
            attributes: JSON-ready, see `StoredRun.attributes`.
            graph: the architecture as plain data.

        Raises:
            StoreError: the place cannot be written or holds something else, or the id is
                taken or cannot be a folder's name.
        """
        check_run_id(run_id)
        self._begin_root()
        run = self.place / run_id
        own = {"format": FORMAT, "run": run_id}
        if not run.write(group({**attributes, "fxray": own}), create=True):
            msg = f"{self.place.name} has a run {run_id!r} already"
            raise StoreError(msg)
        (run / "graph").write(group({"graph": graph}))
        (run / "streams").write(group({}))
        self._enter(run_id, attributes)

    def _begin_root(self) -> None:
        root = group({"fxray": {"format": FORMAT}})
        if not self.place.write(root, create=True):
            attributes = self.place.attributes() or {}
            if "fxray" not in attributes:
                msg = f"{self.place.name} holds another zarr hierarchy; give a folder of its own"
                raise StoreError(msg)
            self._check_root(attributes)
        (self.place / "catalog").write(group({}), create=True)

    def _enter(self, run_id: str, attributes: Mapping[str, Any]) -> None:
        (self.place / "catalog" / run_id).write(group(summary(run_id, attributes)))

    def update_run(
        self,
        run_id: str,
        attributes: Mapping[str, Any],
        graph: Mapping[str, Any] | None = None,
    ) -> None:
        """Replace the named attributes of a run, in its entry in the catalog too.

        A model may run ops that it never ran before; then its graph is replaced as well.

        Raises:
            NotARunError: there is no run of that id.
            StoreError: the place cannot be written.
        """
        with self._lock:
            run = self._place_of(run_id)
            before = run.attributes()
            if before is None:
                raise self._no_run(run_id)
            merged = {**before, **attributes, "fxray": before.get("fxray")}
            if graph is not None:
                (run / "graph").write(group({"graph": graph}))
            run.write(group(merged))
            self._enter(run_id, merged)

    def runs(self) -> list[dict[str, Any]]:
        """Return `id, name, started, finished, tags, model` of every run, oldest first.

        Raises:
            NotARunError: the place is no store of fxray.
            StoreError: a document is damaged or of a newer format.
        """
        self._check_place()
        summaries = []
        for key in self.place.keys("catalog/"):
            parts = key.split("/")
            if len(parts) == 3 and parts[2] == "zarr.json":
                where = self.place / "catalog" / parts[1]
                entry = where.attributes() or {}
                summaries.append({**dict.fromkeys(SUMMARY), **entry, "id": parts[1]})
        return oldest_first(summaries)

    def run(self, run_id: str) -> ZarrRun:
        """Return a run to read.

        Raises:
            NotARunError: there is no run of that id.
            StoreError: a document of it is damaged or of a newer format.
        """
        self._check_place()
        run = self._place_of(run_id)
        if run.read() is None:
            raise self._no_run(run_id)
        return ZarrRun(run, run_id)

    def writer(self, run_id: str, stream: str, attributes: Mapping[str, Any]) -> ZarrWriter:
        """Begin the stream `stream` of a run and list it under its rank.

        Raises:
            NotARunError: there is no run of that id.
            StoreError: the stream was begun already, or the place cannot be written.
        """
        run, key = self._place_of(run_id), safe_key(stream)
        if run.read() is None:
            raise self._no_run(run_id)
        writer = ZarrWriter(run / key, stream, attributes)
        rank = run / "streams" / f"r{int(attributes.get('rank', 0))}"
        with self._lock:
            # Each rank has a document of its own, so no two processes write the same one.
            known = _listed(rank) if rank.read() is not None else {}
            rank.write(group({"streams": {**known, stream: key}}))
        return writer

    def _place_of(self, run_id: str) -> Place:
        if safe_key(run_id) != run_id:
            raise self._no_run(run_id)
        return self.place / run_id

    def _no_run(self, run_id: str) -> NotARunError:
        return NotARunError(f"{self.place.name} holds no run {run_id!r}")

    def _check_place(self) -> None:
        attributes = self.place.attributes()
        if attributes is None or "fxray" not in attributes:
            msg = f"{self.place.name} holds no fxray runs; fxray.record(net, place) puts one there"
            raise NotARunError(msg)
        self._check_root(attributes)

    def _check_root(self, attributes: Mapping[str, Any]) -> None:
        check_format(attributes, f"{self.place.name}/zarr.json")
