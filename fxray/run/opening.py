"""Finding a run in a place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxray.errors import NotARunError, nearest
from fxray.run.run import Run
from fxray.run.tables import RunList, RunSummary
from fxray.store import open_store

if TYPE_CHECKING:
    import os

__all__ = ["open_run", "runs"]


def runs(place: str | os.PathLike[str] | None = None) -> RunList:
    """Return the runs in `place`, oldest first; printed, they are a table.

    Args:
        place: a path, `file://…`, `memory://…`; None is memory.

    Raises:
        NotARunError: the place holds no runs of fxray and never did.
        StoreError: it cannot be read, is damaged, or was written by a newer fxray.
    """
    store = open_store(place)
    return RunList(store.name, tuple(map(RunSummary.of, store.runs())))


def open_run(place: str | os.PathLike[str] | None = None, run: str | None = None) -> Run:
    """Return a run of `place` to read.

    Args:
        place: a path, `file://…`, `memory://…`; None is memory.
        run: its id, the beginning of it where that is unique, or its name, where several
            have it the latest; None for the latest run of all.

    Raises:
        NotARunError: there is no such run, or several begin so; names those there are.
        StoreError: it cannot be read, is damaged, or was written by a newer fxray.
    """
    store = open_store(place)
    known = [RunSummary.of(summary) for summary in store.runs()]
    chosen = _choose(known, run, store.name)
    return Run(store.run(chosen.id))


def _choose(known: list[RunSummary], run: str | None, place: str) -> RunSummary:
    if not known:
        msg = f"{place} holds no runs yet"
        raise NotARunError(msg)
    if run is None:
        return known[-1]
    exact = [summary for summary in known if summary.id == run]
    begun = [summary for summary in known if run and summary.id.startswith(run)]
    named = [summary for summary in known if run and summary.name == run]
    if exact or len(begun) == 1:
        return (exact or begun)[0]
    if named:
        return named[-1]
    if begun:
        ids = ", ".join(summary.id for summary in begun)
        msg = f"several runs of {place} begin with {run!r}: {ids}; give more of the id"
        raise NotARunError(msg)
    close = nearest(run, [name for summary in known for name in (summary.id, summary.name) if name])
    hint = f"nearest: {', '.join(map(repr, close))}; " if close else ""
    msg = f"{place} holds no run {run!r}; {hint}fxray.runs({place!r}) lists all {len(known)}"
    raise NotARunError(msg)
