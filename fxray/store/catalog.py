"""What a list of runs says of each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["SUMMARY", "oldest_first", "summary"]

SUMMARY = ("id", "name", "started", "finished", "tags", "model")
"""Attributes of a run that its summary repeats."""


def summary(run_id: str, attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the summary of a run; what is not known of it is None."""
    return {name: attributes.get(name) for name in SUMMARY} | {"id": run_id}


def oldest_first(summaries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return `summaries` in the order in which the runs were started, then by id."""
    return sorted(summaries, key=lambda entry: (str(entry["started"] or ""), entry["id"]))
