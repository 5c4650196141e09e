"""What a trace obtained, what it fixed, and how far it was verified."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import numpy as np
import torch

from fxray.tracing.ops import info_of

__all__ = ["Report", "baked_values", "count_ops", "guards_in"]


@attrs.frozen
class Report:
    """What a trace obtained.

    Attributes:
        frontend: `"execution"` or `"symbolic"`.
        ops: number of ops by mode.
        free: what may differ from call to call, in words, e.g. `"batch size"`.
        fixed: what may not, each with the reason.
        guards: `file:line` of every branch on a size that follows the batch.
        constants: number of values baked into the graphs.
        verified: how the graphs compared with the model on the traced input.
        notes: whatever else a user must know.
    """

    frontend: str
    ops: Mapping[str, int]
    free: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    guards: tuple[str, ...] = ()
    constants: int = 0
    verified: str = "not verified: there was no input to run"
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        counts = ", ".join(f"{mode} {count} ops" for mode, count in self.ops.items())
        parts = [f"traced by {self.frontend} ({counts})"]
        parts += [f"{what} free" for what in self.free]
        parts += self.fixed
        if self.guards:
            parts.append(f"{_count(len(self.guards), 'branch')} guarded: {', '.join(self.guards)}")
        if self.constants:
            parts.append(f"{_count(self.constants, 'constant')} baked")
        parts += self.notes
        parts.append(self.verified)
        return "; ".join(parts)


def _count(number: int, what: str) -> str:
    plural = f"{what}es" if what.endswith("ch") else f"{what}s"
    return f"{number} {what if number == 1 else plural}"


def guards_in(graphs: Mapping[str, Any]) -> list[str]:
    """Return `file:line` of every guarded branch, of all modes."""
    return [
        str(node.args[2]).replace("\\", "/").rpartition("/")[2]
        for graph in graphs.values()
        for node in graph.nodes
        if "fxray_guard" in node.meta
    ]


def baked_values(constants: Mapping[str, Any]) -> int:
    """Return how many of the constants are values; a function or a class is none."""
    return sum(isinstance(value, (torch.Tensor, np.ndarray)) for value in constants.values())


def count_ops(graph: Any) -> int:
    """Return the number of ops in an fx graph."""
    return sum(info_of(node) is not None for node in graph.nodes)
