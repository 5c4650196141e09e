"""`fxray runs`: list the runs of a place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxray.cli.command import Command, add_place, default_place
from fxray.cli.text import print_table
from fxray.run import RunSummary, runs

if TYPE_CHECKING:
    import argparse

__all__ = ["COMMAND"]


def _run(given: argparse.Namespace) -> None:
    listed = runs(default_place(given.place))
    if not listed:
        print(listed)
        return
    head = ["run", "name", "model", "started (UTC)", "finished", "tags"]
    print_table(head, [_row(summary) for summary in listed])


def _row(run: RunSummary) -> list[str]:
    tags = " ".join(f"{name}={value}" for name, value in run.tags.items())
    model = str(run.model.get("class", "")).rpartition(".")[2]
    finished = _time(run.finished) if run.finished else "not finished"
    return [run.id, run.name, model, _time(run.started), finished, tags]


def _time(text: str) -> str:
    """Return a time as people write it.

    >>> _time("2026-11-22T14:47:21.316+00:00")
    '2026-11-22 14:47:21'
    """
    return text[:19].replace("T", " ")


COMMAND = Command(
    "runs",
    "List the runs in a folder, oldest first.",
    (
        ("fxray runs", "those in ./runs, else in ./fxray-demo/runs"),
        ("fxray runs experiments/lr", "those in another folder"),
    ),
    add_place,
    _run,
)
