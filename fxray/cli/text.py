"""Tables and numbers as a terminal shows them."""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["number", "print_array", "print_table", "statistics", "times"]


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print `rows` under `head`; on a terminal with rich's lines, where rich is installed.

    Columns that are empty in every row are left out.
    """
    kept = [n for n in range(len(head)) if any(row[n] for row in rows) or not rows]
    head = [head[n] for n in kept]
    rows = [[row[n] for n in kept] for row in rows]
    if sys.stdout.isatty() and importlib.util.find_spec("rich"):
        _print_rich(head, rows)
        return
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        print("  ".join(map(str.ljust, row, widths)).rstrip())


def _print_rich(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box  # an extra, so not above
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for name in head:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # as Text: brackets in names are no markup
    Console().print(table)


def times(shape: Sequence[int]) -> str:
    """Return a shape for a reader.

    >>> times((16, 8, 8)), times(())
    ('16×8×8', 'scalar')
    """
    return "×".join(map(str, shape)) or "scalar"


def print_array(array: NDArray[Any]) -> None:
    """Print `array` as numpy does, of a large one the corners."""
    large = array.size > 0 and array.dtype.kind == "f" and np.nanmax(np.abs(array)) >= 0.01
    with np.printoptions(precision=4, edgeitems=2, threshold=400, suppress=bool(large)):
        print(array)


def number(value: Any) -> str:
    """Return one number with as many digits as are read.

    >>> number(np.float32(0.1)), number(np.int64(16384)), number(float("nan"))
    ('0.1', '16384', 'nan')
    """
    plain = value.item() if hasattr(value, "item") else value
    return f"{plain:.5g}" if isinstance(plain, (float, complex)) else str(plain)


def statistics(array: NDArray[Any]) -> str:
    """Return shape, dtype, least, mean and greatest of what is not NaN, and how many are.

    A single number is told as such.

    >>> statistics(np.array([[1.0, 2.0], [float("nan"), 6.0]]))
    '2×2 float64; min 1, mean 3, max 6; 1 NaN'
    """
    if not array.ndim:
        return number(array)
    about = f"{times(array.shape)} {array.dtype}"
    # ml_dtypes' own have no reductions.
    wide = array.astype(np.float32) if array.dtype.kind == "V" else array
    wide = np.abs(wide) if wide.dtype.kind == "c" else wide
    missing = np.isnan(wide) if wide.dtype.kind == "f" else np.zeros(wide.shape, np.bool_)
    rest = wide[~missing]
    ends = ""
    if rest.size:
        mean = rest.mean(dtype=np.float64)
        ends = f"min {number(rest.min())}, mean {number(mean)}, max {number(rest.max())}"
    size = "magnitudes: " if array.dtype.kind == "c" else ""
    return "; ".join(filter(None, (about, f"{size}{ends}" if ends else "", f"{missing.sum()} NaN")))
