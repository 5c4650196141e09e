"""A matplotlib figure that shows itself in a notebook."""

from __future__ import annotations

import io

from matplotlib.figure import Figure

__all__ = ["Picture"]


class Picture(Figure):
    """A `Figure` without pyplot: no window, no state shared with other figures.

    IPython learns to show figures when pyplot is imported. One that is made without it
    would print as text.
    """

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=110, facecolor="white")
        return buffer.getvalue()
