"""What one trace in one mode gave: a graph, and all that was noted beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
from torch import fx

from fxray.tracing.grounds import State

__all__ = ["WrittenGraph"]


@attrs.frozen
class WrittenGraph:
    """What one trace in one mode gave.

    Attributes:
        graph: the fx graph.
        constants: what the graph reads as an attribute and the model does not hold.
        returns: the nodes whose tensors each module call returned; the root as `""`.
        inlined: paths of the modules whose forward was traced through.
        reads: the tensor properties that the forward read (`"dtype"`, `"device"`, …).
        state: what of Python's and torch's state it was traced under.
        writes: paths of the tensors of the model that the forward wrote.
        inputs: places of the placeholders that it wrote.
        notes: what a user must know of it, as sentences without a capital.
    """

    graph: fx.Graph
    constants: dict[str, Any]
    returns: Mapping[str, tuple[fx.Node, ...]]
    inlined: tuple[str, ...]
    reads: frozenset[str] = frozenset()
    state: State = attrs.field(factory=State)
    writes: tuple[str, ...] = ()
    inputs: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    def named_for(self, name: str) -> dict[str, Any]:
        """Return the constants under names of `name`'s own, which the graph reads from now on.

        Several graphs share one module.
        """
        renamed = {}
        for node in self.graph.nodes:
            if node.op == "get_attr" and node.target in self.constants:
                constant = f"_{name.replace('.', '_')}{node.target}"
                renamed[constant] = self.constants[node.target]
                node.target = constant
        return renamed
