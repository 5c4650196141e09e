"""Where a store stands, and how its documents are read and written there."""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import attrs
import tensorstore as ts

from fxray.errors import StoreError
from fxray.store.plain import to_json

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Place", "check_process", "open_place"]

DOCUMENT = "zarr.json"
READ_CACHE_BYTES = 64 << 20
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)


@functools.cache
def _contexts() -> tuple[int, ts.Context, ts.Context]:
    """Return the process that made them, the context to write with and the one to read with.

    One pair per process: its limits and its cache are for all stores together.
    """
    write = ts.Context(
        {
            # A rename is atomic without a sync; only a power cut asks for more, at 30 times
            # the cost of the write.
            "file_io_sync": False,
            "file_io_concurrency": {"limit": 4},
            "data_copy_concurrency": {"limit": 2},
            "cache_pool": {"total_bytes_limit": 0},
        }
    )
    read = ts.Context({"cache_pool": {"total_bytes_limit": READ_CACHE_BYTES}}, parent=write)
    return os.getpid(), write, read


def check_process() -> None:
    """Refuse to go on in a fork of the process that began to use the store.

    Raises:
        StoreError: this process was forked from one that had opened a store.
    """
    # TensorStore aborts such a process without a word of Python; this is the word.
    owner, _, _ = _contexts()
    if owner != os.getpid():
        msg = (
            f"process {os.getpid()} was forked from {owner} after that one had opened a store, "
            "and TensorStore's threads do not survive a fork; start it with "
            'multiprocessing.get_context("spawn"), or record in the parent only'
        )
        raise StoreError(msg)


@attrs.frozen
class Place:
    """A folder of documents and arrays.

    Attributes:
        name: how the user called it, for messages.
        path: its path, ending in `/`.
    """

    name: str
    path: str

    def __truediv__(self, key: str) -> Place:
        return Place(f"{self.name.rstrip('/')}/{key}", f"{self.path}{key}/")

    def spec(self) -> dict[str, Any]:
        """Return TensorStore's kvstore spec."""
        return {"driver": "file", "path": self.path}

    def keys(self, prefix: str) -> list[str]:
        """Return every key below `prefix`, the prefix included."""
        # TensorStore lists recursively only: never ask for a prefix that holds chunks.
        stop = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        try:
            found = self._kvstore().list(ts.KvStore.KeyRange(prefix, stop)).result()
        except ValueError as error:
            msg = f"cannot list {self.name}/{prefix}: {error}"
            raise StoreError(msg) from error
        return sorted(key.decode("utf-8", "replace") for key in found)

    def read(self, key: str = DOCUMENT) -> bytes | None:
        """Return the bytes at `key`, None if there are none.

        Raises:
            StoreError: it is there and cannot be read.
        """
        try:
            result = self._kvstore().read(key).result()
        except ValueError as error:
            msg = f"cannot read {self.name}/{key}: {error}"
            raise StoreError(msg) from error
        return bytes(result.value) if result.state == "value" else None

    def write(self, document: Mapping[str, Any], *, create: bool = False) -> bool:
        """Write the place's zarr.json at once; return False if `create` finds one there.

        Raises:
            StoreError: it cannot be written, by the file system's word.
        """
        return self.write_text(to_json(document), create=create)

    def write_text(self, text: str, *, create: bool = False) -> bool:
        """Write `text` as the place's zarr.json, see `write`."""
        try:
            kvstore = self._kvstore()
            condition = kvstore.read(DOCUMENT).result() if create else None
            if condition is not None and condition.state == "value":
                return False
            # The generation of a key that is not there makes the write create-only; an empty
            # one would make it unconditional.
            expected = condition.stamp.generation if condition is not None else None
            stamp = kvstore.write(DOCUMENT, text.encode(), if_equal=expected).result()
        except ValueError as error:
            msg = f"cannot write {self.name}/{DOCUMENT}: {error}"
            raise StoreError(msg) from error
        return bool(stamp.generation)

    def begin_write(self, text: str) -> ts.Future[Any]:
        """Begin to write the place's zarr.json and return the future; keep it until done."""
        future: ts.Future[Any] = self._kvstore().write(DOCUMENT, text.encode())
        return future

    def document(self) -> dict[str, Any] | None:
        """Return the place's zarr.json, None if there is none.

        Raises:
            StoreError: it is not a JSON object; names the file.
        """
        raw = self.read()
        if raw is None:
            return None
        try:
            document = json.loads(raw)
        except (ValueError, RecursionError) as error:
            msg = f"{self.name}/{DOCUMENT} is damaged: not JSON ({error})"
            raise StoreError(msg) from error
        if not isinstance(document, dict):
            msg = f"{self.name}/{DOCUMENT} is damaged: a JSON {type(document).__name__}, no object"
            raise StoreError(msg)
        return document

    def attributes(self) -> dict[str, Any] | None:
        """Return the attributes of the group that stands here, None if there is no zarr.json.

        Raises:
            StoreError: it is no group of zarr v3; names the file.
        """
        document = self.document()
        if document is None:
            return None
        attributes = document.get("attributes", {})
        if document.get("node_type") != "group" or not isinstance(attributes, dict):
            msg = f"{self.name}/{DOCUMENT} is damaged: not a group of zarr v3"
            raise StoreError(msg)
        return attributes

    def open_array(self, metadata: Mapping[str, Any], *, cached: bool = False) -> ts.TensorStore:
        """Open the array that stands here without a look at its own zarr.json.

        Raises:
            StoreError: TensorStore cannot make sense of `metadata`.
        """
        check_process()
        _, write, read = _contexts()
        spec = {"driver": "zarr3", "kvstore": self.spec(), "metadata": dict(metadata)}
        context = read if cached else write
        try:
            return ts.open(spec, open=True, assume_metadata=True, context=context).result()
        except ValueError as error:
            msg = f"cannot open array {self.name}: {error}"
            raise StoreError(msg) from error

    def _kvstore(self) -> ts.KvStore:
        check_process()
        return ts.KvStore.open(self.spec(), context=_contexts()[1]).result()


def open_place(place: str | os.PathLike[str]) -> Place:
    """Return the folder that the user means: a path or `file://…`.

    Nothing is touched yet.

    Raises:
        StoreError: a scheme that is not supported.
    """
    text = os.fspath(place)
    scheme = _SCHEME.match(text)
    if scheme is None:
        path = Path(text).expanduser().absolute().as_posix()
        return Place(text, f"{os.path.normpath(path)}/")
    if scheme[1].lower() == "file":
        url = urlsplit(text)
        if url.netloc not in ("", "localhost"):
            msg = f"{text!r} names a host; a local file URL has three slashes: file:///…"
            raise StoreError(msg)
        return Place(text, f"{os.path.normpath(unquote(url.path))}/")
    msg = f"cannot store at {text!r}; this fxray takes a path, file://… and memory://…"
    raise StoreError(msg)
