"""A progress bar over a loader, where there is a terminal and rich to draw it."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

__all__ = ["shown"]

T = TypeVar("T")


def shown(batches: Iterable[T], description: str) -> Generator[T, None, None]:
    """Yield the batches; draw how far they are if someone is looking."""
    if not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:
        yield from batches
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        total = None
        with contextlib.suppress(TypeError):  # an iterable without a length
            total = len(batches)  # type: ignore[arg-type]
        yield from progress.track(batches, total=total, description=description)
