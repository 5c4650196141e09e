"""Finding the store that a place means."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from fxray.store.memory import open_memory
from fxray.store.place import open_place
from fxray.store.zarr import ZarrStore

if TYPE_CHECKING:
    from fxray.store.protocol import Store

__all__ = ["open_store"]

MEMORY = "memory://"


def open_store(place: str | os.PathLike[str] | None = None) -> Store:
    """Return the store at `place`; nothing is touched yet.

    Args:
        place: a path, `file://…`, `memory://name`; None is `memory://`, which lasts as long
            as the process and is the same for everyone in it.

    Raises:
        StoreError: a scheme that is not supported.

    >>> store = open_store("memory://doctest")
    >>> store.begin_run("8f3a", {"name": "baseline"}, {})
    >>> [run["name"] for run in store.runs()]
    ['baseline']
    """
    text = MEMORY if place is None else os.fspath(place)
    if text.lower().startswith(MEMORY):
        return open_memory(text[len(MEMORY) :])
    return ZarrStore(open_place(text))
